"""What is given anew when a run goes on: options of an optimizer are taken, other optimizers and schedules refused."""

import logging
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, Adam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader
from toys import points, small, trainer, weights

from lightning_gan_stability import OptimizerSchedule, ScaleLearningRate, Schedule

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")

ENDLESS = {"max_epochs": -1, "enable_checkpointing": True}
DATA = DataLoader(points(20), batch_size=None)


def run(steps, ckpt_path=None, callbacks=(), **options):
    """A module after so many steps in all."""
    gan = small(**options)
    saves = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(**ENDLESS, max_steps=steps, callbacks=[saves, *callbacks]).fit(gan, DATA, ckpt_path=ckpt_path)
    return gan


def adam(**options):
    return lambda parameters: Adam(parameters, **options)


def groups(gan):
    return [optimizer.param_groups[0] for optimizer in gan.trainer.optimizers]


def state(steps):
    return f"saved/step={steps}.ckpt"


def test_a_new_rate_is_taken_and_said(caplog):
    run(3, d_optimizer=adam(lr=2e-4), g_optimizer=adam(lr=1e-4))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        gan = run(5, state(3), d_optimizer=adam(lr=5e-5), g_optimizer=adam(lr=1e-4))
    assert [group["lr"] for group in groups(gan)] == [5e-5, 1e-4]
    [said] = [record.message for record in caplog.records if "instead of" in record.message]
    assert said == (
        "The discriminator's optimizer: goes on with `lr` 5e-05 instead of 0.0002, which the run of the checkpoint had."
    )


def test_it_acts_on_the_steps_that_follow():
    """A step of plain gradient descent is a quarter of the usual one with a quarter of the rate."""
    options = {"g_optimizer": lambda p: SGD(p, lr=0.1)}
    gan = run(3, d_optimizer=lambda p: SGD(p, lr=0.1), **options)
    before = weights(gan.discriminator)
    resumed = run(4, state(3), d_optimizer=lambda p: SGD(p, lr=0.025), **options)
    same = run(4, state(3), d_optimizer=lambda p: SGD(p, lr=0.1), **options)
    change, usual = (weights(one.discriminator) - before for one in (resumed, same))
    assert usual.abs().max() > 1e-4
    torch.testing.assert_close(change, usual / 4, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"betas": (0.5, 0.9)}, {"betas": (0.0, 0.99)}),
        ({"weight_decay": 0.0}, {"weight_decay": 0.01}),
        ({"eps": 1e-8}, {"eps": 1e-6}),
        ({"amsgrad": False}, {"amsgrad": False, "lr": 0.3}),
    ],
)
def test_any_option_of_an_optimizer_is_taken(before, after):
    run(2, d_optimizer=adam(**before))
    group = groups(run(3, state(2), d_optimizer=adam(**after)))[0]
    assert {key: group[key] for key in after} == after


def test_what_was_not_changed_is_the_checkpoints():
    """A rate that a callback or the user has moved during the run is not put back to the first one."""
    gan = small(d_optimizer=adam(lr=0.1))
    saves = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run_ = trainer(**ENDLESS, max_steps=2, callbacks=[saves])
    run_.fit(gan, DATA)
    run_.optimizers[0].param_groups[0]["lr"] = 0.03
    run_.save_checkpoint("moved.ckpt")
    assert groups(run(3, "moved.ckpt", d_optimizer=adam(lr=0.1)))[0]["lr"] == 0.03
    assert groups(run(3, "moved.ckpt", d_optimizer=adam(lr=0.2)))[0]["lr"] == 0.2


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (lambda o: ExponentialLR(o, 0.5), lambda t: 0.5**t),
        (lambda o: LambdaLR(o, lambda t: 1 / (1 + t)), lambda t: 1 / (1 + t)),
        (lambda o: CosineAnnealingLR(o, 20), lambda t: (1 + math.cos(math.pi * t / 20)) / 2),
        (
            lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 2), ExponentialLR(o, 0.5)], [2]),
            lambda t: 0.1 + 0.45 * t if t < 2 else 0.5 ** (t - 2),
        ),
    ],
    ids=["exponential", "lambda", "cosine", "sequential"],
)
def test_a_new_rate_under_a_schedule_goes_on_along_it(make, factor):
    run(3, d_optimizer=adam(lr=0.1), d_scheduler=make)
    for steps in 4, 7:
        group = groups(run(steps, state(3), d_optimizer=adam(lr=0.02), d_scheduler=make))[0]
        assert group["lr"] == pytest.approx(0.02 * factor(steps), rel=1e-9)


def test_another_schedule_is_refused():
    run(2, d_scheduler=lambda o: CosineAnnealingLR(o, 100))
    with pytest.raises(MisconfigurationException, match=r"discriminator's scheduler has T_max=50, and .* T_max=100"):
        run(3, state(2), d_scheduler=lambda o: CosineAnnealingLR(o, 50))
    with pytest.raises(MisconfigurationException, match=r"scheduler is ExponentialLR.*CosineAnnealingLR"):
        run(3, state(2), d_scheduler=lambda o: ExponentialLR(o, 0.9))
    with pytest.raises(MisconfigurationException, match=r"discriminator's scheduler is not there"):
        run(3, state(2))
    assert groups(run(3, state(2), d_scheduler=lambda o: CosineAnnealingLR(o, 100)))[0]["lr"] < 2e-4


def test_another_optimizer_is_refused():
    run(2, g_optimizer=adam(lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"The generator's optimizer is SGD, and .* it was Adam"):
        run(3, state(2), g_optimizer=lambda p: SGD(p, lr=0.1))


@pytest.mark.parametrize(
    ("optimizer", "option", "value"),
    [(Adam, "amsgrad", True), (RMSprop, "centered", True), (RMSprop, "momentum", 0.9)],
)
def test_an_option_whose_state_the_checkpoint_has_not_is_refused(optimizer, option, value):
    run(2, d_optimizer=lambda p: optimizer(p, 0.1))
    with pytest.raises(MisconfigurationException, match=rf"discriminator's optimizer has `{option}`, and .* had not"):
        run(3, state(2), d_optimizer=lambda p: optimizer(p, 0.1, **{option: value}))
    run(2, d_optimizer=lambda p: optimizer(p, 0.1, **{option: value}))
    resumed = run(3, state(2), d_optimizer=lambda p: optimizer(p, 0.1))
    assert not groups(resumed)[0][option]


@pytest.mark.parametrize("make", [lambda o: ExponentialLR(o, 0.5), lambda o: LambdaLR(o, lambda t: 0.5**t)])
def test_a_new_rate_takes_the_place_of_one_that_a_remedy_has_scaled(make):
    gan = small(d_optimizer=adam(lr=0.1), d_scheduler=make)
    saves = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(**ENDLESS, max_steps=2, callbacks=[saves])
    fit.fit(gan, DATA)
    ScaleLearningRate(10.0, player="d")(fit, gan)
    fit.save_checkpoint("scaled.ckpt")
    same = run(4, "scaled.ckpt", d_optimizer=adam(lr=0.1), d_scheduler=make)
    assert groups(same)[0]["lr"] == pytest.approx(1.0 * 0.5**4)
    new = run(4, "scaled.ckpt", d_optimizer=adam(lr=0.2), d_scheduler=make)
    assert groups(new)[0]["lr"] == pytest.approx(0.2 * 0.5**4)


def test_other_groups_are_refused():
    run(2)

    def two(parameters):
        first, *others = parameters
        return Adam([{"params": [first], "lr": 0.1}, {"params": others}])

    with pytest.raises(MisconfigurationException, match=r"has 2 groups of parameters, and .* it had 1"):
        run(3, state(2), d_optimizer=two)


def test_a_schedule_of_values_stays_in_charge():
    schedule = {"lr": Schedule(0.1, 0.1, steps=10)}
    run(2, callbacks=[OptimizerSchedule(schedule, player="d")])
    gan = run(3, state(2), callbacks=[OptimizerSchedule(schedule, player="d")], d_optimizer=adam(lr=0.5))
    assert groups(gan)[0]["lr"] == pytest.approx(0.1)


def test_checkpoints_without_a_record_go_on():
    run(2, d_optimizer=adam(lr=0.1))
    checkpoint = torch.load(state(2), weights_only=True)
    assert checkpoint.pop("gan_optimizers")
    torch.save(checkpoint, "old.ckpt")
    assert groups(run(3, "old.ckpt", d_optimizer=adam(lr=0.2)))[0]["lr"] == 0.1
