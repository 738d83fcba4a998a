"""Schedules against R3GAN's formula and its published values; numbers of optimizers that follow them."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from toys import fit, points, sgd, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    AdaptiveAdversarialWeight,
    AdaptiveAugmentation,
    ApproximateR1Penalty,
    ApproximateR2Penalty,
    AugmentPipe,
    ConsensusOptimization,
    ConsistencyPenalty,
    DRAGANPenalty,
    FakePool,
    GANModule,
    GeneratorEMA,
    GradientPenalty,
    LeCam,
    Lookahead,
    LossBalancer,
    NegativeMomentum,
    OptimizerSchedule,
    PathLengthPenalty,
    R1Penalty,
    Ring,
    ScaleLearningRate,
    Schedule,
    WeightClipping,
)
from lightning_gan_stability.schedules import check_scheduled, value_at


def published(n, base, final, total, warm_up=0, hold=0, warm_up_value=0.0):
    """R3GAN's schedule, as a fact sheet says it: images n, and the lengths in images."""
    if n < warm_up:
        return warm_up_value + (base - warm_up_value) * n / warm_up
    if n <= warm_up + hold:
        return base
    if n > total:
        return final
    c = 0.5 * (1 + math.cos(math.pi * (n - warm_up - hold) / (total - warm_up - hold)))
    return base + (1 - c) * (final - base)


@pytest.mark.parametrize("case", [(2e-4, 5e-5, 2e7), (0.0, 5e6, 2e7), (150, 15, 2e7), (1.0, 0.1, 2e8)])
@pytest.mark.parametrize("batch", [512, 256, 100])
def test_cosine(case, batch):
    base, final, total = case
    schedule = Schedule(base, final, total / batch)
    for step in (0, 1, 7, 1000, 20_000, 39_062, 39_063, 78_125, 10**6, 10**7):
        expected = published(step * batch, base, final, total)
        assert schedule(step) == pytest.approx(expected, rel=1e-12, abs=1e-15 * max(base, final))


def test_warm_up_and_hold():
    schedule = Schedule(3.0, 1.0, 100, warm_up=10, hold=20, warm_up_from=0.5)
    for step in range(130):
        assert schedule(step) == pytest.approx(published(step, 3.0, 1.0, 100, 10, 20, 0.5), rel=1e-12)


def test_values_of_the_published_presets():
    """CIFAR-10 at 10 million of 20 million images."""
    half = 1e7 / 512
    values = [
        Schedule(a, b, 2e7 / 512)(half) for a, b in ((0.05, 0.005), (2e-4, 5e-5), (0, 0.55), (0.9, 0.99), (0, 5e6))
    ]
    assert values == pytest.approx([0.0275, 1.25e-4, 0.275, 0.945, 2.5e6], rel=1e-12)
    assert Schedule(0.05, 0.005, 2e7 / 512)(half / 2) == pytest.approx(0.04341, abs=5e-6)


def test_a_line():
    schedule = Schedule(4.0, 0.0, 8, "linear")
    assert [schedule(step) for step in (0, 2, 4, 8, 20)] == [4.0, 3.0, 2.0, 0.0, 0.0]


def test_multiples():
    schedule = Schedule(4.0, 1.0, 8, warm_up=2, warm_up_from=3.0)
    for step in range(10):
        assert (schedule / 2)(step) == pytest.approx(schedule(step) / 2)
        assert (3 * schedule)(step) == (schedule * 3)(step) == pytest.approx(3 * schedule(step))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan, 1.0, 5), "`start` must be a finite number, got nan"),
        ((1.0, "a", 5), "`end` must be a finite number, got 'a'"),
        ((1.0, 2.0, 0), "`steps` must be a positive finite number, got 0"),
        ((1.0, 2.0, 5, "square"), "`shape` must be one of"),
        ((1.0, 2.0, 5, "linear", -1), "`warm_up` must be a finite number that is not negative, got -1"),
        ((1.0, 2.0, 5, "linear", 3, 2), "`steps` must be more than `warm_up` and `hold` together, got 5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_numbers_are_schedules_that_stay():
    assert value_at(2.5, 99) == 2.5
    assert check_scheduled("x", 2.5) == 2.5
    with pytest.raises(ValueError, match="`x` must be a finite number that is not negative, got 'a'"):
        check_scheduled("x", "a")


# ---------- optimizers


class Groups(Callback):
    """Keeps the numbers that the optimizers step with."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        group = optimizer.param_groups[0]
        self.seen.append(("dg"[trainer.optimizers.index(optimizer)], group["lr"], group["betas"]))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1.0, betas=(0.0, 0.5))


def test_optimizers_step_with_the_numbers_of_their_batch():
    groups = Groups()
    values = {"lr": Schedule(0.4, 0.0, 4, "linear"), "betas.1": Schedule(0.9, 0.99, 4)}
    fit(small(g_optimizer=adam, d_optimizer=adam), points(6), callbacks=[OptimizerSchedule(values), groups])
    assert len(groups.seen) == 12
    for i, (player, rate, betas) in enumerate(groups.seen):
        assert player == "dg"[i % 2]
        assert rate == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0][i // 2])
        assert betas == pytest.approx((0.0, published(i // 2, 0.9, 0.99, 4)))


def test_one_players_optimizer():
    groups = Groups()
    fit(small(g_optimizer=adam, d_optimizer=adam), points(2), callbacks=[OptimizerSchedule({"lr": 0.1}, "g"), groups])
    assert [(player, rate) for player, rate, _ in groups.seen] == [("d", 1.0), ("g", 0.1)] * 2


def test_a_resumed_run_goes_on_with_the_schedule(tmp_path):
    def run(steps, path=None):
        callbacks = [OptimizerSchedule({"lr": Schedule(0.1, 0.0, 8)}), R1Penalty(Schedule(1.0, 0.0, 8))]
        callbacks += [GeneratorEMA(half_life=Schedule(0.0, 5.0, 8))]
        module = small(g_optimizer=adam, d_optimizer=adam)
        run = trainer(callbacks=callbacks, max_steps=steps, max_epochs=-1)
        run.fit(module, Ring(batch_size=8, epoch_length=6), ckpt_path=path)
        return run, module

    _, whole = run(8)
    half, _ = run(4)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(8, tmp_path / "half.ckpt")
    assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("key", ["rate", "betas", "betas.2", "lr.0", "params", "amsgrad", "foreach", "eps.", "betas."])
def test_numbers_that_an_optimizer_does_not_have(key):
    with pytest.raises(MisconfigurationException, match=rf"OptimizerSchedule sets '{key}', which Adam does not have"):
        fit(small(g_optimizer=adam, d_optimizer=adam), points(2), callbacks=[OptimizerSchedule({key: 0.5})])


def test_two_that_set_a_rate_are_refused():
    module = small(g_optimizer=adam, d_optimizer=adam, d_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))
    with pytest.raises(MisconfigurationException, match="`lr` of the optimizer 'd', which also has a scheduler"):
        fit(module, points(2), callbacks=[OptimizerSchedule({"lr": 0.5})])
    fit(module, points(2), callbacks=[OptimizerSchedule({"lr": 0.5}, player="g")])
    remedy = ScaleLearningRate(0.5)

    class Apply(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            remedy(trainer, module)

    with pytest.raises(MisconfigurationException, match="OptimizerSchedule sets the learning rate on every batch"):
        fit(small(), points(2), callbacks=[OptimizerSchedule({"lr": 0.5}), Apply()])


def test_two_that_set_a_number_are_refused():
    schedules = [OptimizerSchedule({"lr": 0.5, "eps": 1e-8}), OptimizerSchedule({"eps": 1e-7}, player="g")]
    with pytest.raises(MisconfigurationException, match="Two OptimizerSchedules set 'eps' of one optimizer"):
        fit(small(), points(2), callbacks=schedules)
    fit(small(), points(2), callbacks=[OptimizerSchedule({"lr": 0.5}, "d"), OptimizerSchedule({"lr": 0.4}, "g")])


def test_a_negative_momentum_may_change():
    def negative(parameters):
        return NegativeMomentum(parameters, lr=0.1)

    module = small(g_optimizer=negative, d_optimizer=negative)
    fit(module, points(3), callbacks=[OptimizerSchedule({"momentum": Schedule(-0.5, -0.1, 2)})])
    assert module.optimizer("d").param_groups[0]["momentum"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("betas.1", 1.0, r"in \[0, 1\), got 1.0"),
        ("betas.0", Schedule(0.5, 5.0, 9), r"in \[0, 1\), got 5.0"),
        ("lr", -1.0, "a finite number that is not negative, got -1.0"),
        ("weight_decay", math.nan, "a finite number that is not negative, got nan"),
        ("momentum", math.inf, "a finite number, got inf"),
        ("foreach", True, "a finite number, got True"),
    ],
)
def test_what_no_optimizer_takes(key, value, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSchedule({key: value})


@pytest.mark.parametrize("divisor", [0, 0.0, math.nan, "2"])
def test_a_schedule_over_nothing(divisor):
    with pytest.raises(ValueError, match="`divisor` must be a finite number other than 0"):
        Schedule(1.0, 0.0, 5) / divisor


@pytest.mark.parametrize("values", [{}, None, [1], {1: 0.5}])
def test_values_are_checked(values):
    with pytest.raises(ValueError, match="`values` must be a dict of numbers or schedules"):
        OptimizerSchedule(values)


# ---------- numbers of callbacks


class Reconstructing(GANModule):
    """Its generator's loss has another term."""

    def auxiliary_losses(self, player, outputs):
        return {"norm": outputs.fake.square().mean()} if player == "g" else {}


NUMBERS = {
    "WeightClipping.limit": (WeightClipping, {}, (0.4, 0.1)),
    "FakePool.probability": (FakePool, {"size": 8}, (1.0, 0.0)),
    "Lookahead.alpha": (Lookahead, {"k": 1}, (1.0, 0.2)),
    "ConsistencyPenalty.radius": (ConsistencyPenalty, {"kind": "latent"}, (0.5, 0.1)),
    "ApproximateR1Penalty.sigma": (ApproximateR1Penalty, {"weight": 1.0}, (0.5, 0.1)),
    "ApproximateR2Penalty.sigma": (ApproximateR2Penalty, {"weight": 1.0}, (0.5, 0.1)),
    "GradientPenalty.target": (GradientPenalty, {}, (0.0, 2.0)),
    "DRAGANPenalty.target": (DRAGANPenalty, {}, (0.0, 2.0)),
    "AdaptiveAdversarialWeight.weight": (AdaptiveAdversarialWeight, {"layer": "layers.0"}, (0.0, 2.0)),
    "ConsensusOptimization.gamma": (ConsensusOptimization, {}, (0.0, 0.5)),
    "R1Penalty.weight": (R1Penalty, {}, (0.0, 2.0)),
    "LeCam.decay": (LeCam, {"start": 0}, (0.0, 0.9)),
    "PathLengthPenalty.decay": (PathLengthPenalty, {"every": 1, "include_batch": False}, (0.0, 0.9)),
    "PathLengthPenalty.decay, with the batch": (PathLengthPenalty, {"every": 1}, (0.0, 0.9)),
    "AdaptiveAdversarialWeight.max": (AdaptiveAdversarialWeight, {"layer": "layers.0"}, (0.0, 0.1)),
    "LossBalancer.total_norm": (LossBalancer, {"weights": {"adversarial": 1.0, "norm": 1.0}}, (0.1, 2.0)),
    "LossBalancer.decay": (LossBalancer, {"weights": {"adversarial": 1.0, "norm": 1.0}}, (0.0, 0.9)),
    "AdaptiveAugmentation.speed": (
        AdaptiveAugmentation, {"interval": 1, "p": 0.5, "augment": AugmentPipe("noise")}, (1000.0, 10.0)
    ),
    "AdaptiveAugmentation.target": (
        AdaptiveAugmentation, {"interval": 1, "speed": 20.0, "p": 0.5, "augment": AugmentPipe("noise")}, (1.0, -1.0)
    ),
}  # fmt: skip


class Setting(Callback):
    """Sets a number by hand before every batch."""

    def __init__(self, callback, name, values):
        self.callback, self.name, self.values = callback, name, values

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        setattr(self.callback, self.name, self.values[batch_idx])


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_follows_a_schedule_is_the_one_of_its_batch(key):
    kind, arguments, (start, end) = NUMBERS[key]
    attribute = key.partition(".")[2].partition(",")[0]
    name = {"R1Penalty.weight": "gamma"}.get(key, attribute)
    found = []
    for given in (Schedule(start, end, 4, "linear"), start, None):
        callback = kind(**arguments, **{name: start if given is None else given})
        by_hand = [start + i / 4 * (end - start) for i in range(4)] + [end]
        if key == "R1Penalty.weight":
            by_hand = [value / 2 for value in by_hand]  # γ / 2
        more = [Setting(callback, attribute, by_hand)] if given is None else []
        torch.manual_seed(0)
        module = Reconstructing(MLP([3, 8, 2]), MLP([2, 8, 1]), 3)
        fit(module, points(5), callbacks=[callback, *more])
        found.append(weights(module))
    scheduled, constant, by_hand = found
    assert torch.equal(scheduled, by_hand)
    assert not torch.equal(scheduled, constant)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (WeightClipping, {"limit": Schedule(0.1, 0.0, 5)}),
        (FakePool, {"probability": Schedule(0.1, 1.5, 5)}),
        (Lookahead, {"alpha": Schedule(0.1, 0.0, 5)}),
        (AdaptiveAugmentation, {"target": Schedule(0.6, 1.2, 5)}),
        (GradientPenalty, {"target": Schedule(1.0, -1.0, 5)}),
    ],
)
def test_the_end_of_a_schedule_must_fit_too(kind, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"^`{name}.end` must be "):
        kind(**arguments)


# ---------- averages


def test_a_half_life_that_rises():
    """R3GAN: β = ½^(batch / images of the half-life), which is 0 at first: a copy."""
    average = GeneratorEMA(half_life=Schedule(0.0, 500.0, 100))
    assert average.decay_at(0) == 0.0
    for n in (1, 10, 50, 100, 1000):
        half_life = published(n, 0.0, 500.0, 100)
        assert average.decay_at(n) == pytest.approx(0.5 ** (1 / half_life), rel=1e-12)
    decay = GeneratorEMA(decay=Schedule(0.5, 0.9, 10, "linear"))
    assert [decay.decay_at(n) for n in (0, 5, 10)] == pytest.approx([0.5, 0.7, 0.9])
    with pytest.raises(ValueError, match=r"`decay.end` must be in \[0, 1\), got 1.0"):
        GeneratorEMA(decay=Schedule(0.5, 1.0, 10))


def test_a_half_life_acts_in_training():
    class Keep(Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer, module, *_):
            self.steps.append((weights(module.generator), weights(module.generator_ema)))

    keep = Keep()
    gan = GANModule(
        torch.nn.Linear(2, 2), torch.nn.Linear(2, 1), 2, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1)
    ).double()
    batches = [batch.double() for batch in points(5)]
    fit(gan, batches, callbacks=[GeneratorEMA(half_life=Schedule(0.0, 4.0, 4)), keep])
    mean = None
    for n, (now, average) in enumerate(keep.steps):
        half_life = published(n, 0.0, 4.0, 4)
        beta = 0.5 ** (1 / half_life) if half_life else 0.0
        mean = now if mean is None else beta * mean + (1 - beta) * now
        assert torch.allclose(average, mean, rtol=0, atol=1e-12)
