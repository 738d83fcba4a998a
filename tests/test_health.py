"""HealthMonitor: decisions against closed forms, runs built to fail in each way, and none on healthy ones."""

import csv
import math
import re

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import dirac, fit, ignoring, points, sgd, small, tensors, trainer, weights, zeros

from lightning_gan_stability import (
    MLP,
    AutoEncoder,
    BoundaryEquilibrium,
    Extragradient,
    GANModule,
    GeneratorEMA,
    HealthMonitor,
    Minimax,
    Packed,
    QualityMonitor,
    R1Penalty,
    Ring,
    Simultaneous,
    UpdateRatio,
    Wasserstein,
)
from lightning_gan_stability.advice import HEALTH
from lightning_gan_stability.monitors.health import (
    exploding_gradient,
    loss_tells_nothing,
    noisy_gradient,
    not_finite,
    overfitting_discriminator,
    rank_correlation,
    rotation,
    vanishing_gradient,
    weak_discriminator,
)


def said(monitor):
    return [entry["verdict"] for entry in monitor.verdicts if entry["verdict"] != "loss_tells_nothing"]


def watched(module, batches, *callbacks, every=20, **kwargs):
    monitor = HealthMonitor(every=every)
    with ignoring():
        fit(module, batches, callbacks=[*callbacks, monitor], **kwargs)
    return monitor


# ---------- decisions


def turning(factor, angle, n=65, d=6):
    """Points that turn by an angle at each step, and shrink."""
    plane = torch.linalg.qr(torch.randn(d, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    t = torch.arange(n, dtype=torch.float64)
    return factor ** t[:, None] * torch.stack([(angle * t).cos(), (angle * t).sin()], 1) @ plane.T


def test_a_rotation_has_its_period():
    found = rotation(turning(1.0, 2 * math.pi / 20))
    assert found["period"] == pytest.approx(20)
    assert (found["trough"], found["peak"]) == pytest.approx((-1, 1), abs=1e-9)
    assert found["amplitude"] == pytest.approx(1)


@pytest.mark.parametrize(
    "positions",
    [
        turning(0.97, 2 * math.pi / 20),  # damps
        torch.arange(65.0)[:, None] * torch.ones(1, 3),  # goes straight on
        torch.randn(65, 50, generator=torch.Generator().manual_seed(0)).cumsum(0),  # wanders
        torch.randn(65, 50, generator=torch.Generator().manual_seed(1)),  # jitters around a point
        torch.zeros(65, 3),
        turning(1.0, 0.3)[:30],
    ],
)
def test_what_is_no_rotation(positions):
    assert rotation(positions) is None


GOOD = {
    "accuracy": 0.7, "gap": 1.0, "d_loss": 1.0, "g_loss": 1.0, "d_norm": 1.0, "g_norm": 1.0, "g_spread": 0.5,
    "overflows": 0.0,
    "apart": 0.05, "apart_by_chance": 0.1, "r_v": 0.1, "r_v_by_chance": 0.1, "train_logit": 1.0, "held_out_logit": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("decide", "change"),
    [
        (vanishing_gradient, {"g_norm": 5e-4, "accuracy": 0.99}),
        (exploding_gradient, {"g_norm": 200.0}),
        (noisy_gradient, {"g_spread": 4.0}),
        (weak_discriminator, {"accuracy": 0.51, "apart": 0.5}),
        (overfitting_discriminator, {"r_v": 0.9}),
        (not_finite, {"overflows": 0.6}),
    ],
)
def test_decisions(decide, change):
    assert decide([GOOD] * 6) is None
    assert decide([*[GOOD] * 6, GOOD | change]) is not None
    for key in change:  # each sign alone is none
        if len(change) > 1:
            assert decide([*[GOOD] * 6, GOOD | {key: change[key]}]) is None
    assert decide([dict.fromkeys(GOOD, math.nan)] * 6) is None


def test_a_good_discriminator_that_guesses_is_not_weak():
    assert weak_discriminator([GOOD | {"accuracy": 0.5, "apart": 0.02}]) is None


@pytest.mark.parametrize("sign", ["apart", "fid"])
def test_a_discriminator_that_guesses_while_samples_come_closer_is_not_weak(sign):
    weak = GOOD | {"accuracy": 0.5, "apart": 0.5, "fid": 10.0}
    assert weak_discriminator([weak, weak, weak]) is not None
    assert weak_discriminator([weak | {sign: 1.2 * weak[sign]}, weak, weak]) is None


def test_a_gradient_that_comes_back_does_not_explode():
    gone = GOOD | {"g_norm": 0.0}
    assert exploding_gradient([*[GOOD] * 5, *[gone] * 20, GOOD]) is None
    assert exploding_gradient([*[GOOD] * 5, *[gone] * 20, GOOD | {"g_norm": 101.0}]) is not None


@pytest.mark.parametrize(
    ("norms", "explodes"),
    [
        ([1.0, 2.0, 4.0, 300.0], True),
        ([2.0, 10.0, 100.0, *[4000.0] * 4], True),  # so early that it is the median
        ([1.0] * 3 + [300.0] * 40, False),  # has long been so: it was said at that time
        ([float(n**3) for n in range(1, 200)], False),  # grows as weights do that grow without bounds
        ([math.nan, 1.0, 2.0, 3.0, 400.0], True),
        ([1.0, 2.0, 300.0], False),  # too soon to tell
    ],
)
def test_what_explodes(norms, explodes):
    assert (exploding_gradient([GOOD | {"g_norm": norm} for norm in norms]) is not None) == explodes


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    fids = [8.0, 7, 6, 5, 4, 3, 2, 1]
    assert loss_tells_nothing(fids, fids) is None
    assert loss_tells_nothing(fids[::-1], fids)["rank_correlation"] == pytest.approx(-1)
    assert loss_tells_nothing(fids[:7][::-1], fids[:7]) is None


# ---------- runs built to fail


def test_vanishing_gradient():
    torch.manual_seed(0)
    adam = lambda parameters: torch.optim.Adam(parameters, 0.02)  # noqa: E731
    module = GANModule(MLP([4, 16, 2]), MLP([2, 32, 1]), 4, Minimax(), g_optimizer=sgd(1e-9), d_optimizer=adam)
    batches = [0.1 * x + 8 for x in points(400, batch_size=32)]
    assert said(watched(module, batches)) == ["vanishing_gradient"]


def test_exploding_gradient():
    torch.manual_seed(0)
    grow = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.02)  # noqa: E731
    rates = {"g_optimizer": sgd(1e-5), "d_optimizer": sgd(1e-3), "d_scheduler": grow}
    module = GANModule(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, Wasserstein(), **rates)
    batches = [x + 3 for x in points(260, batch_size=32)]
    assert said(watched(module, batches)) == ["exploding_gradient"]


def test_weak_discriminator():
    module = small(g_optimizer=sgd(0.01), d_optimizer=sgd(1e-7))
    with torch.no_grad():
        for p in module.discriminator.parameters():
            p.mul_(1e-3)
        module.discriminator.layers[-1].bias.zero_()
    batches = [x - x.mean(0) for x in points(200, batch_size=64)]
    assert said(watched(module, batches)) == ["weak_discriminator"]


@pytest.mark.parametrize(
    ("module", "callbacks"),
    [
        (lambda: dirac(0.2, loss=Wasserstein()), []),
        (lambda: dirac(0.05, loss=Minimax()), [Simultaneous]),
    ],
)
def test_oscillation(module, callbacks):
    monitor = watched(module(), zeros(1200), *(make() for make in callbacks), every=50)
    assert said(monitor) == ["oscillation"]


def test_oscillation_has_the_period_of_the_dirac_gan():
    """Alternating Wasserstein steps of rate η turn by arccos(1 − η²/2): 2π / 0.2003 = 31.4 steps."""
    (entry,) = watched(dirac(0.2, loss=Wasserstein()), zeros(300), every=50).verdicts
    assert entry["evidence"]["period"] == pytest.approx(31.4, abs=1)


@pytest.mark.parametrize(
    ("module", "callback"),
    [
        (lambda: dirac(0.2, loss=Minimax()), lambda: R1Penalty(1.0)),
        (lambda: dirac(0.2, loss=Wasserstein()), Extragradient),
    ],
)
def test_what_damps_is_no_oscillation(module, callback):
    assert said(watched(module(), zeros(600), callback(), every=50)) == []


def test_overfitting_discriminator():
    """A perfect generator: only by heart can the discriminator tell the 64 training samples apart."""
    torch.manual_seed(0)
    adam = lambda parameters: torch.optim.Adam(parameters, 2e-3)  # noqa: E731
    perfect = nn.Linear(30, 30)
    with torch.no_grad():
        perfect.weight.copy_(torch.eye(30))
        perfect.bias.zero_()
    module = GANModule(perfect, MLP([30, 256, 256, 1]), 30, g_optimizer=sgd(1e-9), d_optimizer=adam)
    monitor = HealthMonitor(every=20)
    train, held_out = (DataLoader(TensorDataset(torch.randn(n, 30)), batch_size=64) for n in (64, 256))
    with ignoring():
        trainer(callbacks=[monitor], max_steps=300, max_epochs=-1).fit(module, train, held_out)
    assert said(monitor) == ["overfitting_discriminator"]


def test_not_finite(capsys):
    module = small(g_optimizer=sgd(1e30), d_optimizer=sgd(1e30))
    monitor = HealthMonitor(every=2)
    with ignoring(), pytest.raises(FloatingPointError):
        fit(module, points(50), callbacks=[monitor])
    assert said(monitor)[-1] == "not_finite"
    assert "not_finite" in capsys.readouterr().out


class Measure(Callback):
    """Stands for a QualityMonitor, with FIDs that rise or fall with the generator's loss."""

    def __init__(self, direction):
        self.direction = direction

    def on_train_batch_end(self, trainer, module, *_):
        loss = module.iteration // 10
        module.last_step.terms["g"]["adversarial"] = torch.tensor(float(loss))
        if module.iteration % 10 == 0:
            trainer.callback_metrics["quality/fid"] = torch.tensor(100.0 + self.direction * loss)


@pytest.mark.parametrize(("direction", "expected"), [(1, []), (-1, ["loss_tells_nothing"])])
def test_a_loss_that_tells_nothing_is_information(direction, expected):
    monitor = HealthMonitor(every=10)
    fit(small(), points(110), callbacks=[Measure(direction), monitor])  # no warning, which would be an error here
    assert [entry["verdict"] for entry in monitor.verdicts] == expected
    if expected:
        assert monitor.verdicts[0]["step"] == 100  # eight measurements, and two more: patience
        assert monitor.verdicts[0]["evidence"] == {"rank_correlation": pytest.approx(-1), "measurements": 10}


def test_measurements_of_a_quality_monitor_are_found():
    monitor = HealthMonitor(every=10)
    with ignoring():
        run = trainer(
            callbacks=[QualityMonitor(n_samples=100, every=20, metrics=["fid"]), monitor], max_steps=90, max_epochs=-1
        )
        run.fit(small(g_optimizer=sgd(1e-3), d_optimizer=sgd(0.1)), Ring(batch_size=64, val_samples=100))
    assert len(monitor.fids) == 5  # one before the first step


def test_the_generator_is_asked_as_its_module_asks():
    """Translations: conditions are images, and there are no latents."""

    class Translate(GANModule):
        def unpack(self, batch):
            return batch[1], batch[0]

        def generate(self, network, n, condition, latents):
            seen.append(network is self.generator)
            return network(condition)

        def discriminate(self, network, sample, condition):
            return network(torch.cat([sample, condition], 1))

    seen = []
    module = Translate(MLP([3, 8, 2]), MLP([5, 8, 1]))
    pairs = [(torch.randn(8, 3), torch.randn(8, 2)) for _ in range(6)]
    with ignoring():
        fit(module, pairs, callbacks=[HealthMonitor(every=3), GeneratorEMA()])
    assert seen == [True] * 14  # two players' samples in three steps, then the monitor's: of the generator as it is
    assert module.generator_ema is not None


def test_gradients_that_a_scaler_skips():
    """The scale grows again as soon as it has been lowered, so that most steps overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_factor=4.0, backoff_factor=0.999)
    module, monitor = small(), HealthMonitor(every=5)
    start = weights(module)
    with ignoring():
        fit(module, points(30), callbacks=[monitor], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert said(monitor) == ["not_finite"]
    assert monitor.verdicts[0]["evidence"] == {"overflows": 1.0}
    assert torch.equal(weights(module), start)


def test_windows_without_a_generator_step_do_not_count():
    """It moves on every 30th batch: a window of ten in three knows its gradient, which is 0 once D has saturated."""
    module = dirac(1e-9, psi=0.0, loss=Minimax())
    monitor = watched(module, zeros(180), UpdateRatio(30), every=10)
    assert [math.isnan(w["g_norm"]) for w in monitor.windows] == [True, True, False] * 6
    beside_others = {"silent_adversarial", "dominant_adversarial", "head_start", "codebook_collapse", "giveaway"}
    assert set(monitor.counts) == set(HEALTH) - {"loss_tells_nothing"} - beside_others


@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run(seed, capsys):
    torch.manual_seed(seed)
    adam = lambda parameters: torch.optim.Adam(parameters, 1e-3, (0.0, 0.99))  # noqa: E731
    module = GANModule(MLP([8, 32, 2]), MLP([2, 32, 1]), 8, g_optimizer=adam, d_optimizer=adam, noise_seed=seed)
    monitor = HealthMonitor(every=50)
    run = trainer(callbacks=[R1Penalty(0.5), monitor], max_steps=600, max_epochs=-1, limit_val_batches=1)
    run.fit(module, Ring(batch_size=64, seed=seed, val_samples=256))
    assert said(monitor) == []
    assert "no trouble seen in 600 steps" in capsys.readouterr().out


# ---------- what it leaves alone


def began():
    torch.manual_seed(0)
    generator = nn.Sequential(MLP([4, 16, 64], output_shape=[1, 8, 8]), nn.BatchNorm2d(1))
    return GANModule(generator, AutoEncoder(1, 8, width=4, code_dim=4), 4, BoundaryEquilibrium(gamma=0.5, lambda_k=0.1))


KINDS = {
    "plain": (small, [], points(30)),
    "accumulate": (lambda: small(accumulate=2), [], points(30)),
    "ratio": (small, [lambda: UpdateRatio(3)], points(30)),
    "extragradient": (small, [Extragradient], points(30)),
    "simultaneous, R1": (small, [Simultaneous, lambda: R1Penalty(0.1)], points(30)),
    "BEGAN": (began, [], [torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(12)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_with_and_without(kind):
    make, callbacks, batches = KINDS[kind]
    runs = []
    for more in [], [HealthMonitor(every=4)]:
        module = make()
        torch.manual_seed(1)
        with ignoring():
            run = trainer(callbacks=[*(c() for c in callbacks), *more], limit_val_batches=1, num_sanity_val_steps=0)
            run.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:2], batch_size=None))
        runs.append((tensors(module.state_dict()), torch.rand(2)))
    for key, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][key]), key
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("log_every_n_steps", [5, 50])
def test_keys_are_logged(tmp_path, log_every_n_steps):
    """At every decision, whatever steps the losses are logged on."""
    logger = CSVLogger(tmp_path)
    with ignoring():
        run = fit(
            small(), points(23), callbacks=[HealthMonitor(every=5)], logger=logger, log_every_n_steps=log_every_n_steps
        )
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in HEALTH:
        assert [(row["step"], row[f"health/{name}"]) for row in rows if row[f"health/{name}"]] == [
            (str(step), "0.0") for step in (5, 10, 15, 20)
        ]
        assert run.callback_metrics[f"health/{name}"] == 0


class Lines(IterableDataset):
    def __iter__(self):
        yield from points(3, batch_size=100)


class Two(GANModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


@pytest.mark.parametrize(
    ("loaders", "held"),
    [
        (lambda: DataLoader(Lines(), batch_size=None), 256),  # has no length
        (lambda: [DataLoader(points(2), batch_size=None), DataLoader(points(9), batch_size=None)], 16),
        (lambda: {"a": DataLoader(TensorDataset(torch.randn(300, 2)), batch_size=64)}, 256),
        (lambda: None, 0),
    ],
)
def test_held_out_data(loaders, held):
    monitor = HealthMonitor(every=2)
    module = Two(MLP([4, 16, 2]), MLP([2, 16, 1]), 4)
    with ignoring():
        trainer(callbacks=[monitor]).fit(module, DataLoader(points(4), batch_size=None), loaders())
    assert sum(len(part.real) for part in monitor._held) == held
    assert all(math.isfinite(window["r_v"]) for window in monitor.windows)


def test_held_out_data_are_left_alone_if_so_wished():
    monitor = HealthMonitor(every=2, held_out=False)
    data = DataLoader(points(4), batch_size=None)
    trainer(callbacks=[monitor]).fit(small(), data, data)
    assert monitor._held == []


def test_packs_and_averages():
    """An incomplete pack is left out; the players are judged, not the average that `sample` shows."""
    torch.manual_seed(0)
    module = GANModule(MLP([4, 16, 2]), Packed(MLP([6, 16, 1]), 3), 4)
    fit(module, points(4), callbacks=[HealthMonitor(every=2)])
    apart = []
    for more in [], [GeneratorEMA(decay=0.999999)]:
        monitor = HealthMonitor(every=10)
        with ignoring():
            fit(small(g_optimizer=sgd(0.3)), points(40), callbacks=[*more, monitor])
        apart.append([window["apart"] for window in monitor.windows])
    assert apart[0] == apart[1]


def test_the_table_is_printed_when_a_run_is_broken_off(capsys):
    class Break(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 7:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(small(), points(9), callbacks=[HealthMonitor(every=2), Break()])
    said = capsys.readouterr().out
    assert "It stopped: RuntimeError: broken." in said
    assert "no trouble seen in 7 steps." in said


def test_resumed_equals_uninterrupted(tmp_path):
    """At a step between two decisions, and before the verdict."""
    runs = []
    for stop in (None, 130):
        monitor = HealthMonitor(every=50)
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=130, save_top_k=-1)
        options = {"enable_checkpointing": True, "max_epochs": -1, "limit_val_batches": 0}
        data = DataLoader(zeros(10), batch_size=None)
        with ignoring():
            if stop:
                trainer(callbacks=[HealthMonitor(every=50), save], max_steps=stop, **options).fit(dirac(0.2), data)
            run = trainer(callbacks=[monitor, save], max_steps=400, **options)
            run.fit(dirac(0.2, loss=None), data, ckpt_path=str(tmp_path / "step=130.ckpt") if stop else None)
        runs.append(monitor.state_dict())
    assert runs[0].keys() == runs[1].keys()
    assert str(runs[0]) == str(runs[1])


def test_resumed_with_measurements_equals_uninterrupted(tmp_path):
    """The checkpoint lies between a measurement and the decision that looks at it."""
    runs = []
    for stop in (None, 25):
        options = {"enable_checkpointing": True, "max_epochs": -1, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        for steps in (25, 60) if stop else (60,):
            callbacks = [QualityMonitor(n_samples=64, every=12, metrics=["fid"]), HealthMonitor(every=10)]
            monitor = callbacks[1]
            save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=25, save_top_k=-1)
            path = str(tmp_path / "step=25.ckpt") if stop and steps == 60 else None
            with ignoring():
                run = trainer(callbacks=[*callbacks, save], max_steps=steps, **options)
                run.fit(small(), Ring(batch_size=32, epoch_length=20, val_samples=64), ckpt_path=path)
        runs.append(monitor.state_dict())
    assert len(runs[0]["fids"]) == 6
    assert str(runs[0]) == str(runs[1])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"every": 0}, "`every` must be a positive integer, got 0"),
        ({"patience": 1.5}, "`patience` must be a positive integer, got 1.5"),
        ({"held_out": "no"}, "`held_out` must be True or False, got 'no'"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        HealthMonitor(**arguments)


def test_the_steps_that_were_watched_are_counted(capsys):
    class Back(Callback):
        """As a rollback does."""

        def on_train_batch_end(self, trainer, module, *_):
            module.iteration = 1

    module = small()
    fit(module, points(4), callbacks=[HealthMonitor(every=2), Back()])
    fit(module, points(3), callbacks=[HealthMonitor(every=2)])
    assert re.findall(r"in (\d+) steps", capsys.readouterr().out) == ["4", "3"]
