"""CollapseDetector: what it says of measurements, what it does then, and that going back goes back."""

import logging
import math
import re
from copy import deepcopy
from itertools import pairwise
from typing import get_args

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader
from toys import fit, ignoring, points, sgd, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    CollapseDetector,
    GANModule,
    GeneratorEMA,
    LeCam,
    Lookahead,
    QualityMonitor,
    R1Penalty,
    Ring,
    ScaleLearningRate,
    ScalePenalty,
    UpdateRatio,
)
from lightning_gan_stability._compat import averaged_model
from lightning_gan_stability.advice import COLLAPSE
from lightning_gan_stability.monitors import collapse
from lightning_gan_stability.monitors.collapse import is_bad, is_progress, name_trouble
from lightning_gan_stability.monitors.rollback import give_weights, put_back, take, weights_of

GOOD = {"fid": 1.0, "missing": 0.0, "imbalance": 0.05, "moved": 0.05, "diversity": 1.0, "coverage": 0.9, "recall": 0.9}
NULL = {"coverage": 0.97, "recall": 0.97}
LOST = GOOD | {"missing": 0.875, "imbalance": 0.875, "diversity": 0.05, "coverage": 0.1, "recall": 0.1, "fid": 9.0}


def ring(**kwargs):
    return Ring(batch_size=32, epoch_length=6, val_samples=120, **kwargs)


def monitored(values):
    """A monitor whose measurements are given, one per step from the untrained generator on; the last one is repeated.

    The first that is judged is that of step 1, and always progress.
    """
    monitor = QualityMonitor(n_samples=50, every=1)
    rest = iter(values)
    last = [GOOD]

    def measure(trainer, module):
        last[0] = next(rest, last[0])
        monitor.values, monitor.null, monitor.measured_at = dict(last[0]), NULL, trainer.global_step

    def confirm(trainer, module, least_coverage):
        """A generator that is as bad as it was measured is as bad when it is looked at again."""
        values = last[0]
        doubts = {
            "missing": values.get("missing", 0) > 0.03,
            "diversity": values.get("diversity", 1) < 0.2,
            "coverage": values.get("coverage", 1) < least_coverage,
        }
        return {"mass": values["missing"]} | {name: 0.0 if doubt else 1.0 for name, doubt in doubts.items()}

    monitor._measure, monitor.confirm = measure, confirm
    return monitor


def run(values, detector, *callbacks, module=None, steps=None, **kwargs):
    module = small() if module is None else module
    options = {"max_steps": steps or len(values) - 1, "max_epochs": -1, "limit_val_batches": 0} | kwargs
    fit = trainer(callbacks=[*callbacks, monitored(values), detector], **options)
    fit.fit(module, ring())
    return module, fit


def said(values, **kwargs):
    detector = CollapseDetector(**kwargs)
    with ignoring():
        run(values, detector)
    return [(event["step"], event["verdict"]) for event in detector.events]


# ---------- one measurement


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({}, False),
        ({"missing": 0.125}, True),
        ({"missing": 0.02}, False),
        ({"diversity": 0.05}, True),
        ({"coverage": 0.01}, True),
        ({"coverage": 0.3, "recall": 0.3}, True),
        ({"coverage": 0.3}, False),  # of low quality, but spread as widely as before
        ({"fid": math.nan}, True),
        ({"reverse_kl": math.inf}, False),
    ],
)
def test_bad_measurements(change, bad):
    assert is_bad(GOOD | change, GOOD, NULL) is bad


@pytest.mark.parametrize(
    ("change", "progress"),
    [
        ({}, False),
        ({"fid": 0.85}, True),
        ({"fid": 0.95}, False),
        ({"coverage": 0.96}, True),
        ({"recall": 0.94}, False),
        ({"fid": math.nan, "coverage": 0.99}, False),
    ],
)
def test_progress(change, progress):
    assert is_progress(GOOD | change, GOOD) is progress
    assert is_progress(GOOD, {})


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "collapse"),
        ({"moved": 0.9}, "mode hopping"),
        ({"imbalance": 0.2, "missing": 0.125, "diversity": 0.9, "coverage": 0.8}, "partial collapse"),
        ({"imbalance": 0.2, "missing": 0.1, "diversity": 0.1}, "collapse"),
        ({"imbalance": 0.2, "missing": 0.1, "diversity": 3.0, "coverage": 0.0}, "divergence"),
        ({"fid": math.nan}, "divergence"),
    ],
)
def test_names(change, verdict):
    assert name_trouble([LOST | change] * 3) == verdict


# ---------- measurements in a row


def test_three_bad_ones_in_a_row_are_a_collapse():
    assert said([GOOD, GOOD, LOST, LOST, GOOD, LOST, LOST, LOST, LOST]) == [(7, "collapse")]


def test_a_young_generator_that_gets_better_is_none():
    young = [LOST | {"fid": 10.0 * 0.8**i} for i in range(12)]
    assert said([*young, GOOD]) == []


def test_nothing_makes_up_for_a_mode_that_was_held():
    better = [GOOD | {"missing": 0.1, "fid": 0.8**i, "coverage": 0.9} for i in range(1, 5)]
    assert said([GOOD, GOOD, *better]) == [(4, "partial collapse")]
    young = [LOST | {"missing": missing, "fid": 0.8**i} for i, missing in enumerate((0.0, 0.9, 0.9, 0.9, 0.9))]
    assert said([GOOD, *[values | {"coverage": 0.02} for values in young]]) == []  # its samples were nowhere


def test_modes_are_held_after_as_many_measurements_in_a_row_as_are_lost():
    """A loss hides behind progress in coverage, which is low throughout, until `patience` measurements are sure."""
    rough = [GOOD | {"coverage": 0.05 * 1.3**i, "fid": 0.85**i} for i in range(8)]
    dropped = [values | {"missing": 0.125} for values in rough]
    assert said([GOOD, *rough[:3], *dropped[3:6]]) == [(6, "partial collapse")]
    assert said([GOOD, *rough[:2], *dropped[2:5]]) == []
    assert said([GOOD, *[values | {"coverage": 0.01} for values in rough[:3]], *dropped[3:6]]) == []


def test_the_same_trouble_is_said_again_after_it_was_gone():
    assert said([GOOD, GOOD, LOST, LOST, LOST, LOST, GOOD, LOST, LOST, LOST]) == [(4, "collapse"), (9, "collapse")]


def test_a_suspicion_that_is_not_confirmed_is_dropped():
    detector = CollapseDetector()
    monitor = monitored([GOOD] * 2 + [LOST] * 20)
    looked = []

    def healthy(trainer, module, least_coverage):
        looked.append(trainer.global_step)
        return {"mass": 0.5, "missing": 0.01, "diversity": 1.0, "coverage": 1.0}

    monitor.confirm = healthy
    trainer(callbacks=[monitor, detector], max_steps=11, max_epochs=-1, limit_val_batches=0).fit(small(), ring())
    assert detector.events == []
    assert detector.looks == len(looked) == 3  # each after three more measurements
    sure = CollapseDetector(false_alarms=0.5)
    monitor = monitored([GOOD] * 2 + [LOST] * 20)
    monitor.confirm = healthy
    with ignoring():
        trainer(callbacks=[monitor, sure], max_steps=11, max_epochs=-1, limit_val_batches=0).fit(small(), ring())
    assert [event["evidence"]["p"] for event in sure.events] == [0.03]  # three times that of one of three tests


NOISE = GOOD | {"missing": 0.9, "imbalance": 0.4, "diversity": 0.6, "coverage": 0.0, "recall": 0.0, "precision": 0.0}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [({}, "never learned"), ({"diversity": 0.1, "coverage": 0.5}, "no variation"), ({"coverage": 0.5}, None)],
)
def test_a_generator_that_never_was_good_is_said_whatever_its_fid_does(change, verdict, monkeypatch):
    monkeypatch.setattr(collapse, "YOUNG", 5)
    falling = [NOISE | change | {"fid": 1000 * 0.8**i} for i in range(14)]
    assert said(falling) == ([] if verdict is None else [(9, verdict)])
    monkeypatch.setattr(collapse, "YOUNG", 500)
    assert said(falling) == []


def test_diversity_that_grows_is_none():
    assert collapse.stuck([{"diversity": 0.02 * i} for i in range(9)], {}) is None
    assert collapse.stuck([{"diversity": 0.1}] * 9, {}) == "no variation"


def test_what_is_not_finite_is_a_divergence_at_once():
    assert said([GOOD, GOOD | {"fid": math.nan}, GOOD]) == [(1, "divergence")]


def test_evidence_and_events(tmp_path):
    detector, logger = CollapseDetector(patience=2), CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"collapse at step 3: .*missing 0.875.* Action: warn. To keep modes, wrap"):
        run([GOOD, GOOD, LOST, LOST], detector, logger=logger)
    (event,) = detector.events
    assert set(event) == {"step", "verdict", "action", "evidence"}
    assert event["evidence"]["missing"] == 0.875
    assert event["evidence"]["best_coverage"] == 0.9
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "health/collapse" in text
    assert "collapse/missing" in text


def test_the_order_of_monitor_and_detector_does_not_matter():
    seen = []
    for turn in (1, -1):
        callbacks = [QualityMonitor(n_samples=60, every=2), CollapseDetector(patience=1)][::turn]
        with ignoring():
            fit = trainer(callbacks=callbacks, max_steps=4, max_epochs=-1, limit_val_batches=0)
            fit.fit(small(), ring())
        detector = next(c for c in callbacks if isinstance(c, CollapseDetector))
        seen.append([(e["step"], e["verdict"]) for e in detector.events])
    assert seen[0] == seen[1]


# ---------- actions


def test_stop():
    with ignoring():
        _, fit = run([GOOD, GOOD, LOST, LOST, LOST], CollapseDetector("stop"), steps=50)
    assert fit.global_step == 4


def test_a_function_gets_the_event():
    got = []

    def act(trainer, module, event):
        got.append((trainer.global_step, module.iteration, event["verdict"], event["action"]))

    with ignoring():
        run([GOOD, GOOD, LOST, LOST, LOST], CollapseDetector(act))
    assert got == [(4, 4, "collapse", "act")]


def test_alerts_go_to_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    alerts = []
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    monkeypatch.setattr(logger.experiment, "alert", lambda *arguments: alerts.append(arguments))
    with ignoring():
        run([GOOD, GOOD, LOST, LOST, LOST], CollapseDetector("alert", alert_every=60), logger=logger)
    logger.experiment.finish()
    ((title, text, level, wait),) = alerts
    assert (title, level, wait) == ("collapse", "WARN", 60)
    assert "missing 0.875" in text


# ---------- going back


class Record(Callback):
    """Weights, learning rates and counters at the end of each step, before anybody goes back."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.seen[trainer.global_step] = state(trainer, module)


def state(trainer, module):
    optimizers = [[v["exp_avg"].sum().item() for v in o.state_dict()["state"].values()] for o in trainer.optimizers]
    rates = [o.param_groups[0]["lr"] for o in trainer.optimizers]
    average = [] if module.generator_ema is None else weights(module.generator_ema).tolist()
    return weights(module).tolist(), average, optimizers, rates, module.iteration, dict(module.steps)


@pytest.mark.parametrize("folder", [False, True])
def test_a_rollback_restores_all_that_training_moves(folder, tmp_path):
    torch.manual_seed(0)
    decay = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # noqa: E731
    module = GANModule(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, g_scheduler=decay, d_scheduler=decay)
    others = [GeneratorEMA(decay=0.9), Lookahead(k=3), UpdateRatio(2, 1)]
    record, detector = Record(), CollapseDetector("rollback", folder=tmp_path if folder else None)
    memory = {}

    class Memory(Callback):
        def on_train_batch_end(self, trainer, *_):
            memory[trainer.global_step] = deepcopy([callback.state_dict() for callback in others])

    last = {}

    class Last(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            last["state"] = state(trainer, module)
            last["memory"] = deepcopy([callback.state_dict() for callback in others])

    with ignoring():
        fit = trainer(
            callbacks=[*others, Memory(), record, monitored([GOOD, GOOD, GOOD, LOST, LOST, LOST]), detector, Last()],
            max_steps=5,
            max_epochs=-1,
            limit_val_batches=0,
        )
        fit.fit(module, ring())
    assert last["state"] == record.seen[2] != record.seen[5]
    memory = {step: move_data_to_device(kept, "cpu") for step, kept in (memory | last).items()}
    assert str(memory["memory"]) == str(memory[2]) != str(memory[5])
    assert fit.global_step == 5
    assert module.iteration == 2
    assert (tmp_path / "healthy-0.pt").exists() is folder


def test_without_a_healthy_measurement_it_goes_back_to_the_start():
    module = small()
    start = weights(module)
    with ignoring():
        run([LOST] * 5, CollapseDetector("rollback"), module=module)
    assert torch.equal(weights(module), start)
    assert module.iteration == 0


def test_going_back_is_as_if_it_had_not_happened():
    """With the same data and no remedy, the steps after a rollback are the steps after the snapshot."""
    module, batch = small(), torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    record = Record()
    detector = CollapseDetector("rollback", max_rollbacks=1)
    with ignoring():
        fit = trainer(
            callbacks=[monitored([GOOD, GOOD, LOST, LOST, LOST, GOOD]), record, detector], max_steps=7, max_epochs=-1
        )
        fit.fit(module, DataLoader([batch] * 20, batch_size=None))
    assert record.seen[5] == record.seen[2]
    assert record.seen[7] == record.seen[4]


@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides")
def test_a_rollback_restores_the_average_of_lightning():
    class Averages(Callback):
        """The average's weights, its counter and its last update, after each step."""

        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, module, *_):
            average = averaged_model(averaging)
            self.seen[trainer.global_step] = weights(average), int(average.n_averaged), averaging.state_dict()

    class Tell(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if trainer.global_step == 5:
                seen.append((weights(averaged_model(averaging)), averaging.state_dict()))

    torch.manual_seed(0)
    module, seen = GANModule(MLP([4, 8, 2]), MLP([2, 8, 1]), 4), []
    averaging, record = EMAWeightAveraging(decay=0.9), Averages()

    class Back(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 2:
                self.state = take(trainer, module)
            if trainer.global_step == 5:
                put_back(trainer, module, self.state)

    fit(module, points(7), callbacks=[averaging, record, Back(), Tell()])
    (found, state), (kept, _, declared) = seen[0], record.seen[2]
    assert torch.equal(found, kept)
    assert state == declared
    assert not torch.equal(record.seen[5][0], kept)
    assert record.seen[6][1] == record.seen[2][1] + 1


def test_rollbacks_have_a_cap():
    detector = CollapseDetector("rollback", patience=1, max_rollbacks=2)
    with ignoring():
        run([LOST] * 10, detector)
    assert [event["action"] for event in detector.events][:3] == ["rollback", "rollback", "warn"]


def test_remedies_add_up():
    torch.manual_seed(0)
    constant = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000)  # noqa: E731
    rates = {"g_optimizer": sgd(1.0), "d_optimizer": sgd(1.0), "g_scheduler": constant}
    module = GANModule(MLP([4, 8, 2]), MLP([2, 8, 1]), 4, **rates)
    penalty = R1Penalty(0.1)

    remedy = [ScaleLearningRate(0.5, player="g"), ScalePenalty(10)]
    detector = CollapseDetector("rollback", patience=1, remedy=remedy)
    with ignoring():
        _, fit = run([LOST] * 7, detector, penalty, module=module)
    assert [o.param_groups[0]["lr"] for o in fit.optimizers] == [1.0, 0.125]
    assert fit.lr_scheduler_configs[0].scheduler.base_lrs == [0.125]
    assert penalty.weight == pytest.approx(1000 * R1Penalty(0.1).weight)


class Overflows(nn.Module):
    """A generator whose samples are NaN in one step of training."""

    def __init__(self, at):
        super().__init__()
        self.net, self.at, self.calls = MLP([4, 8, 2]), at, 0

    def forward(self, latents):
        self.calls += self.training
        return self.net(latents) * (math.nan if self.training and self.calls == self.at else 1.0)


def test_a_loss_that_is_not_finite_is_rolled_back():
    torch.manual_seed(0)
    module = GANModule(Overflows(at=7), MLP([2, 8, 1]), 4)
    record, detector = Record(), CollapseDetector("rollback")
    with pytest.warns(UserWarning, match="divergence at step"):
        run([GOOD], detector, record, module=module, steps=8)
    assert [event["verdict"] for event in detector.events] == ["divergence"]
    assert record.seen[8][4] == 7  # one step was lost
    assert all(math.isfinite(x) for x in weights(module).tolist())
    torch.manual_seed(0)
    with pytest.raises(FloatingPointError, match="Not finite"):
        run([GOOD], CollapseDetector("stop"), module=GANModule(Overflows(at=7), MLP([2, 8, 1]), 4), steps=8)


def test_ranks_go_back_together_from_a_loss_that_is_finite_here(monkeypatch):
    """Another process counts a value that is not finite, once."""
    module, detector, record = small(), CollapseDetector("rollback"), Record()

    elsewhere = [6]

    def reduce(strategy, tensor, *_, **__):
        return tensor + (strategy.lightning_module.trainer.global_step in elsewhere and elsewhere.pop() > 0)

    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce", reduce)
    with pytest.warns(UserWarning, match="divergence at step"):
        run([GOOD], detector, record, module=module, steps=8)
    assert [event["verdict"] for event in detector.events] == ["divergence"]
    assert record.seen[8][4] == 7  # one step was lost


def test_take_and_put_back_share_no_memory():
    module = small()
    kept = {}

    class Take(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 2:
                kept["state"], kept["then"] = take(trainer, module), state(trainer, module)
            if trainer.global_step in (4, 6):
                put_back(trainer, module, kept["state"])
                assert state(trainer, module) == kept["then"]

    fit = trainer(callbacks=[Take()], max_steps=6, max_epochs=-1, limit_val_batches=0)
    fit.fit(module, ring())


# ---------- generators of which it is known what they are


class Narrowing(nn.Module):
    """All modes of a ring, in equal shares, and narrower with each step: 0.3 exp(−t / 80) + 0.05."""

    def __init__(self, centers):
        super().__init__()
        self.register_buffer("centers", centers)
        self.weight = nn.Parameter(torch.zeros(1))
        self.step = 0

    def forward(self, latents):
        chosen = (torch.special.ndtr(latents[:, 0]) * len(self.centers)).long().clamp(max=len(self.centers) - 1)
        return self.centers[chosen] + (0.3 * math.exp(-self.step / 80) + 0.05) * latents[:, 1:] + 0 * self.weight


class Fading(nn.Module):
    """Nearly the same noise picture each time, and fainter with each step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("picture", torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)))
        self.weight = nn.Parameter(torch.zeros(1))
        self.step = 0

    def forward(self, latents):
        varied = 0.001 * latents[:, :1, None, None] * self.picture
        return 20 * math.exp(-self.step / 300) * self.picture + varied + 0 * self.weight


class Stepping(GANModule):
    """Tells its generator the step."""

    def generate(self, network, n, condition, latents):
        self.generator.step = self.iteration
        return super().generate(network, n, condition, latents)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_generator_that_narrows_is_none(known, seed):
    data = Ring(batch_size=32, std=0.05, val_samples=64, seed=seed)
    if not known:
        generator = torch.Generator().manual_seed(seed)
        points = data.centers[torch.randint(8, (5000,), generator=generator)]
        data = DataLoader(points + 0.05 * torch.randn(5000, 2, generator=generator), 32, shuffle=True)
    torch.manual_seed(seed)
    module = Stepping(Narrowing(Ring().centers), MLP([2, 4, 1]), 3)
    monitor, detector = QualityMonitor(every=8, n_samples=512), CollapseDetector()
    fit = trainer(callbacks=[monitor, detector], max_steps=160, max_epochs=-1, limit_val_batches=0)
    fit.fit(module, data)
    assert monitor.history[-1]["coverage"] > 0.8 > monitor.history[0]["coverage"]  # it does get better
    assert detector.events == []


def shapes(n):
    """Squares, discs and crosses, at random places."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    places = torch.randint(4, 12, (n, 2, 1, 1), generator=generator)
    across, down = (rows - places[:, 0]).abs(), (columns - places[:, 1]).abs()
    kinds = torch.stack(
        [
            torch.maximum(across, down) <= 2,
            across.square() + down.square() <= 9,
            (torch.minimum(across, down) == 0) & (torch.maximum(across, down) <= 3),
        ]
    )
    chosen = torch.randint(3, (n,), generator=generator)
    return 2.0 * kinds[chosen, torch.arange(n)][:, None] - 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_pictures_that_do_not_vary_are_said_though_their_fid_falls():
    torch.manual_seed(0)
    module = Stepping(Fading(), MLP([256, 4, 1]), 3)
    monitor, detector = QualityMonitor(nn.Flatten(), every=50, n_samples=100), CollapseDetector()
    fit = trainer(callbacks=[monitor, detector], max_steps=550, max_epochs=-1, limit_val_batches=0)
    with ignoring():
        fit.fit(module, DataLoader(shapes(400), batch_size=8, shuffle=True))
    distances = [values["fid"] for values in monitor.history]
    assert all(later < 0.9 * earlier for earlier, later in pairwise(distances))
    assert max(values[name] for values in monitor.history for name in ("precision", "recall", "coverage")) == 0
    assert [(event["step"], event["verdict"]) for event in detector.events] == [(500, "no variation")]


# ---------- bad input


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"action": "panic"}, "`action` must be one of warn, alert, stop, rollback, or a function, got 'panic'"),
        ({"patience": 0}, "`patience` must be a positive integer, got 0"),
        ({"max_rollbacks": -1}, "`max_rollbacks` must be a positive integer"),
        ({"alert_every": 0}, "`alert_every` must be a positive integer"),
        (
            {"action": "rollback", "remedy": 0.5},
            "`remedy` must be one or several functions of .*, got 0.5",
        ),
        ({"remedy": ScalePenalty()}, "`remedy` and `folder` belong to action='rollback', got action='warn'"),
        ({"action": "stop", "folder": "x"}, "`remedy` and `folder` belong to action='rollback'"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        CollapseDetector(**arguments)


@pytest.mark.parametrize("kind", [ScaleLearningRate, ScalePenalty])
def test_bad_factors(kind):
    with pytest.raises(ValueError, match="`factor` must be a positive finite number, got 0"):
        kind(0)


def test_a_bad_player():
    with pytest.raises(ValueError, match="`player` must be one of 'd', 'g', None, got 'e'"):
        ScaleLearningRate(player="e")


def test_a_detector_needs_a_monitor():
    fit = trainer(callbacks=[CollapseDetector()], max_steps=1)
    with pytest.raises(MisconfigurationException, match="what a QualityMonitor measures, but the run has none"):
        fit.fit(small(), ring())


def test_an_alert_needs_somebody_to_alert():
    with pytest.raises(MisconfigurationException, match=re.escape("action='alert') alerts by Weights & Biases, but")):
        run([GOOD, GOOD], CollapseDetector("alert"))


def test_stronger_penalties_need_penalties():
    detector = CollapseDetector("rollback", patience=1, remedy=ScalePenalty())
    with ignoring(), pytest.raises(MisconfigurationException, match="ScalePenalty makes penalties stronger, but"):
        run([GOOD, GOOD, LOST, LOST], detector)


def test_every_verdict_has_advice():
    assert set(COLLAPSE) == {*get_args(collapse.Verdict)}


# ---------- remedies under schedulers, and what they leave


class Broken(Callback):
    """One value that is not finite, at an iteration."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.iteration == self.at:
            self.at = None
            next(module.generator.parameters()).data.fill_(math.nan)


def rescued(module, *callbacks):
    detector = next(callback for callback in callbacks if isinstance(callback, CollapseDetector))
    with ignoring():
        run = trainer(
            callbacks=[QualityMonitor(n_samples=64, every=5), *callbacks, Broken(12)],
            max_steps=14,
            max_epochs=-1,
            limit_val_batches=0,
        )
        run.fit(module, Ring(batch_size=32, val_samples=64))
    assert detector.rollbacks == 1
    return [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]


schedules = torch.optim.lr_scheduler
SCHEDULERS = {
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=5), schedules.StepLR(o, 3)], [5]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler([schedules.LinearLR(o), schedules.StepLR(o, 3)]),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 1e-3, total_steps=100, cycle_momentum=False),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-4, 1e-3, cycle_momentum=False),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda n: 0.9**n),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_scaled_under_every_scheduler(name):
    rates = []
    for factor in (0.1, 1.0):
        module = small(g_scheduler=SCHEDULERS[name], d_scheduler=SCHEDULERS[name])
        rates.append(rescued(module, CollapseDetector("rollback", remedy=[ScaleLearningRate(factor)])))
    assert rates[0] == pytest.approx([0.1 * rate for rate in rates[1]], rel=1e-6)


def test_penalties_have_their_own_weights_in_the_next_run():
    callbacks = [R1Penalty(0.1), CollapseDetector("rollback", remedy=[ScalePenalty(10.0)])]
    for seed in range(2):
        rescued(small(seed), *callbacks)
        assert callbacks[0].weight == 0.5


def test_remedied_weights_go_to_penalties_of_the_same_name():
    run = trainer(callbacks=[LeCam(0.3), R1Penalty(0.1)])
    give_weights(run, [("R1Penalty", 0.5), ("R2Penalty", 7.0)])
    assert weights_of(run) == [("LeCam", 0.3), ("R1Penalty", 0.5)]


class Constant(nn.Module):
    def forward(self, x):
        return torch.arange(len(x), device=x.device)[:, None].expand(-1, 2) / len(x)


@pytest.mark.filterwarnings("ignore")
def test_it_decides_from_the_monitor_that_is_named():
    """One monitor looks through an extractor by which all samples are well, the other one at the samples."""
    found = {}
    for name in ("kind", "honest"):
        kind = QualityMonitor(Constant(), ["fid", "recall", "coverage"], n_samples=100, every=2, name="kind")
        honest = QualityMonitor(n_samples=100, every=2, name="honest")
        detector = CollapseDetector(monitor=name)
        run = trainer(callbacks=[kind, honest, detector], max_steps=9, max_epochs=-1, limit_val_batches=0)
        run.fit(small(g_optimizer=sgd(0.0)), DataLoader(20 * torch.randn(200, 2), 32))
        found[name] = len(detector.events)
    assert found == {"kind": 0, "honest": 1}
    with pytest.raises(MisconfigurationException, match=r"finds no QualityMonitor of that name; there are 'kind'"):
        trainer(callbacks=[kind, CollapseDetector(monitor="other")], max_steps=2).fit(small(), ring())


def test_names_of_one_trouble_that_change_are_one_event():
    partial = LOST | {"imbalance": 0.3, "diversity": 0.8, "missing": 0.3}
    values = [GOOD, GOOD, *[partial] * 4, *[LOST] * 4, *[LOST | {"moved": 0.9}] * 4]
    assert [verdict for _, verdict in said(values)] == ["partial collapse"]


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_the_users_own_is_no_divergence():
    class Own(GANModule):
        def auxiliary_losses(self, player, outputs):
            if self.iteration == 3:
                raise FloatingPointError("mine")
            return {}

    detector = CollapseDetector("rollback")
    module = Own(MLP([4, 16, 2]), MLP([2, 16, 1]), 4)
    run = trainer(callbacks=[QualityMonitor(n_samples=50, every=1), detector], max_steps=9, max_epochs=-1)
    with pytest.raises(FloatingPointError, match="mine"):
        run.fit(module, ring())
    assert detector.events == []


def test_a_collapse_is_no_news_of_conditions():
    good, whole = (part | {"dependence": 0.0, "class_consistency": 0.0} for part in (GOOD, LOST))
    assert [verdict for _, verdict in said([good, GOOD, *[whole] * 8])] == ["collapse"]


def test_a_value_that_comes_up_late_is_no_progress():
    """Of the first measurements, too, one may lack it."""
    assert not is_progress(GOOD | {"class_diversity": 0.9}, GOOD)
    assert is_progress(GOOD | {"class_diversity": 0.9}, GOOD | {"class_diversity": 0.8})


def test_a_run_of_a_silenced_lightning_says_nothing(capsys):
    logger = logging.getLogger("lightning.pytorch")
    for level, silent in ((logging.ERROR, True), (logging.INFO, False)):
        logger.setLevel(level)
        trainer(callbacks=[QualityMonitor(n_samples=50, every=1)], max_steps=2, max_epochs=-1).fit(small(), ring())
        assert (capsys.readouterr().out == "") is silent
