"""HealthMonitor: decisions against closed forms, runs built to fail in each way, and none on healthy ones."""

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import dirac, fit, points, sgd, small, trainer, zeros

from lightning_gan_stability import (
    MLP,
    AutoEncoder,
    BoundaryEquilibrium,
    Extragradient,
    GANModule,
    HealthMonitor,
    Minimax,
    QualityMonitor,
    R1Penalty,
    Ring,
    Simultaneous,
    UpdateRatio,
    Wasserstein,
)
from lightning_gan_stability.callbacks.health import (
    ADVICE,
    exploding_gradient,
    loss_tells_nothing,
    noisy_gradient,
    overfitting_discriminator,
    rank_correlation,
    rotation,
    vanishing_gradient,
    weak_discriminator,
)


@contextmanager
def ignoring():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


def test_loss_that_tells_nothing_is_information():
    monitor = HealthMonitor(every=10, patience=1)
    with ignoring():
        run = trainer(
            callbacks=[QualityMonitor(n_samples=100, every=10, metrics=["fid"]), monitor], max_steps=150, max_epochs=-1
        )
        run.fit(small(g_optimizer=sgd(1e-3), d_optimizer=sgd(0.1)), Ring(batch_size=64, val_samples=100))
    assert len(monitor._fids) >= 8
    rho = rank_correlation(*zip(*monitor._fids, strict=True))
    assert ("loss_tells_nothing" in [v["verdict"] for v in monitor.verdicts]) == (rho < 0.3) or rho >= 0.3


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
        runs.append((dict(module.state_dict()), torch.rand(2)))
    for key, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][key]), key
    assert torch.equal(runs[0][1], runs[1][1])


def test_keys_are_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    with ignoring():
        fit(small(), points(20), callbacks=[HealthMonitor(every=5)], logger=logger, log_every_n_steps=5)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    for name in set(ADVICE) - {"not_finite"}:
        assert f"health/{name}" in text


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
