"""What callbacks declare of their state, and what follows: checkpoints, resets, devices, rollbacks; without a fit."""

import math
import pickle
from copy import copy, deepcopy
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader
from toys import fit, points, public_callbacks, small, trainer

import lightning_gan_stability
from lightning_gan_stability import (
    Alternating,
    CollapseDetector,
    GANCallback,
    HealthMonitor,
    QualityMonitor,
    R1Penalty,
    Regularizer,
    Schedule,
    UpdateRule,
)
from lightning_gan_stability.callback import check_once, refuse_after_weight_averaging
from lightning_gan_stability.monitors.rollback import put_back, take


class Stateful(GANCallback):
    """Has a state of every kind, and never calls the `__init__` of its base."""

    def __init__(self):
        self.add_state("batches", 0)
        self.add_state("seen", {"d": [], "g": []})
        self.add_state("mean", torch.zeros(2))
        self.add_state("kept", [torch.ones(1)], on_device=False)
        self.add_state("last", None)

    def change(self):
        self.batches += 1
        self.seen["d"].append(self.batches)
        self.mean += 1
        self.kept.append(torch.zeros(1))
        self.last = "g"


class Monitor(Stateful):
    """Remembers what was, whatever is put back."""

    rolled_back = False


class Stateless(GANCallback):
    """Remembers nothing."""


DEFAULT = {"batches": 0, "seen": {"d": [], "g": []}, "mean": [0.0, 0.0], "kept": [[1.0]], "last": None}
CHANGED = {"batches": 1, "seen": {"d": [1], "g": []}, "mean": [1.0, 1.0], "kept": [[1.0], [0.0]], "last": "g"}


def plain(state):
    """A state without tensors."""
    return state | {"mean": state["mean"].tolist(), "kept": [x.tolist() for x in state["kept"]]}


def module(iteration=0, device="cpu"):
    """What callbacks ask of a module when a fit begins."""
    return SimpleNamespace(iteration=iteration, device=torch.device(device))


# ---------- declarations


def test_declared_attributes_are_the_state():
    callback = Stateful()
    assert plain(callback.state_dict()) == DEFAULT
    callback.change()
    callback.other = 5
    assert plain(callback.state_dict()) == CHANGED
    assert list(callback.state_dict()) == list(DEFAULT)


def test_nothing_declared_is_no_state():
    callback = Stateless()
    callback.other = 5
    assert callback.state_dict() == {}
    assert "state_dict" not in vars(callback)


def test_defaults_are_copied():
    first, second = Stateful(), Stateful()
    first.change()
    assert plain(second.state_dict()) == DEFAULT
    first.reset(None)
    first.change()
    first.reset(None)
    assert plain(first.state_dict()) == DEFAULT


def test_the_attribute_is_a_copy_of_the_default():
    default = {"a": torch.zeros(1)}
    callback = Stateless()
    callback.add_state("value", default)
    assert callback.value is not default
    callback.value["a"] += 1
    assert default["a"] == 0


def test_what_becomes_of_a_default_does_not_matter():
    default = {"a": 0}
    callback = Stateless()
    callback.add_state("value", default)
    default["a"] = 5
    callback.reset(None)
    assert callback.value == {"a": 0}


def test_a_subclass_adds_to_the_state():
    class More(Stateful):
        def __init__(self):
            super().__init__()
            self.add_state("more", 1)

    assert list(More().state_dict()) == [*DEFAULT, "more"]
    assert list(Stateful().state_dict()) == [*DEFAULT]


def test_a_state_may_be_declared_again():
    callback = Stateful()
    callback.add_state("batches", 7)
    callback.batches = 1
    assert callback.state_dict()["batches"] == 1
    callback.reset(None)
    assert callback.batches == 7


def test_a_subclass_may_have_a_state_dict_of_its_own():
    class Own(Stateful):
        def state_dict(self):
            return super().state_dict() | {"own": 1}

    assert Own().state_dict()["own"] == 1


@pytest.mark.parametrize("duplicate", [deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies_have_a_state_of_their_own(duplicate):
    first = Stateful()
    first.change()
    second = duplicate(first)
    assert plain(second.state_dict()) == CHANGED
    second.reset(None)
    assert plain(second.state_dict()) == DEFAULT
    assert plain(first.state_dict()) == CHANGED


def test_shallow_copies_give_their_own_state():
    first = Stateful()
    second = copy(first)
    second.batches = 5
    assert second.state_dict()["batches"] == 5


# ---------- checkpoints


def test_two_without_a_state_may_be_in_one_trainer():
    """Lightning wants a key for each callback with a state, by which it tells them apart in a checkpoint."""
    trainer(callbacks=[Stateless(), Stateless(), R1Penalty(1.0), R1Penalty(2.0), Stateful()])
    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type `Stateful`"):
        trainer(callbacks=[Stateful(), Stateful()])


def test_a_state_goes_through_a_checkpoint():
    first, second = Stateful(), Stateful()
    first.change()
    torch.save(first.state_dict(), "state.pt")
    second.load_state_dict(torch.load("state.pt", weights_only=True))
    assert plain(second.state_dict()) == CHANGED


class Count(Stateful):
    def on_train_batch_end(self, *args):
        self.change()


def test_checkpoints_hold_the_states_that_there_are():
    run = fit(small(), points(1), callbacks=[Count(), Stateless()])
    run.save_checkpoint("run.ckpt")
    states = torch.load("run.ckpt", weights_only=True)["callbacks"]
    assert list(states) == ["Count"]
    assert plain(states["Count"]) == CHANGED


# ---------- the beginning of a fit


def begin(callback, gan, loaded=None, global_step=0):
    """What the Trainer does before the first batch."""
    callback.setup(None, small(), "fit")
    if loaded is not None:
        callback.load_state_dict(loaded)
    callback.on_train_start(SimpleNamespace(global_step=global_step), gan)


def test_a_first_fit_begins_with_defaults():
    callback = Stateful()
    callback.change()
    begin(callback, module())
    assert plain(callback.state_dict()) == DEFAULT


def test_a_second_fit_of_the_same_module_goes_on():
    callback, gan = Stateful(), module()
    begin(callback, gan)
    callback.change()
    callback.iteration = gan.iteration = 1
    begin(callback, gan)
    assert plain(callback.state_dict()) == CHANGED


@pytest.mark.parametrize(("global_step", "kept"), [(2, CHANGED), (0, DEFAULT)])
def test_what_a_monitor_remembers_is_of_one_count_of_steps(global_step, kept):
    """A second Trainer begins to count anew, and steps of two of them in one history would not be told apart."""
    callback, monitor, gan = Stateful(), Monitor(), module()
    for each in (callback, monitor):
        begin(each, gan)
        each.change()
        each.global_step, each.iteration = 2, 2
    gan.iteration = 2
    for each in (callback, monitor):
        begin(each, gan, global_step=global_step)
    assert plain(callback.state_dict()) == CHANGED
    assert plain(monitor.state_dict()) == kept
    # a checkpoint brings the steps of its own run
    begin(monitor, gan, loaded=callback.state_dict(), global_step=global_step)
    assert plain(monitor.state_dict()) == CHANGED


def test_a_module_that_has_trained_without_the_callback_is_another_one():
    callback, gan = Stateful(), module()
    begin(callback, gan)
    callback.change()
    callback.iteration, gan.iteration = 1, 2
    begin(callback, gan)
    assert plain(callback.state_dict()) == DEFAULT
    assert callback.iteration == 2


def test_another_module_begins_anew():
    callback = Stateful()
    begin(callback, module())
    callback.change()
    begin(callback, module())
    assert plain(callback.state_dict()) == DEFAULT


def test_a_checkpoint_wins():
    callback, other = Stateful(), Stateful()
    other.change()
    begin(callback, module(iteration=5), loaded=other.state_dict())
    assert plain(callback.state_dict()) == CHANGED
    assert callback.iteration == 5
    # and holds for this fit alone
    begin(callback, module(iteration=5))
    assert plain(callback.state_dict()) == DEFAULT


def test_a_checkpoint_of_a_fit_that_failed_is_none_of_the_next_ones():
    callback, other = Stateful(), Stateful()
    other.change()
    callback.setup(None, small(), "fit")
    callback.load_state_dict(other.state_dict())  # and no batch was trained on
    begin(callback, module())
    assert plain(callback.state_dict()) == DEFAULT


def test_tensors_go_to_the_modules_device():
    callback = Stateful()
    callback.add_state("deep", {"a": [torch.zeros(1), "text", None, 3]})
    begin(callback, module(device="meta"))
    assert callback.mean.device.type == "meta"
    assert callback.deep["a"][0].device.type == "meta"
    assert callback.deep["a"][1:] == ["text", None, 3]
    assert callback.kept[0].device.type == "cpu"
    assert callback.batches == 0


def test_a_state_that_was_loaded_goes_to_the_modules_device():
    callback = Stateful()
    begin(callback, module(device="meta"), loaded=Stateful().state_dict())
    assert callback.mean.device.type == "meta"
    assert callback.kept[0].device.type == "cpu"


@pytest.mark.parametrize("callback", [Stateless(), R1Penalty(1.0), Alternating()])
def test_other_modules_are_refused(callback):
    name = type(callback).__name__
    message = f"{name} acts on a GANModule, but the module is a BoringModel: subclass GANModule, or remove {name}"
    with pytest.raises(MisconfigurationException, match=message):
        callback.setup(None, BoringModel(), "fit")
    callback.setup(None, small(), "fit")


# ---------- rollbacks


def run_of(*callbacks):
    """A Trainer as far as rollbacks look at it."""
    return SimpleNamespace(callbacks=[Callback(), *callbacks], optimizers=[], lr_scheduler_configs=[])


def test_a_rollback_puts_the_state_back_of_those_that_want_it():
    gan, other, callback, monitor = small(), Stateless(), Stateful(), Monitor()
    run = run_of(callback, other, monitor)
    for each in (callback, monitor):
        each.change()
    kept = take(run, gan)
    callback.change()
    monitor.change()
    gan.iteration = 9
    put_back(run, gan, kept)
    assert plain(callback.state_dict()) == CHANGED
    assert monitor.batches == 2
    assert gan.iteration == callback.iteration == 0
    # what was taken is a copy, and can be put back again
    callback.change()
    put_back(run, gan, kept)
    assert plain(callback.state_dict()) == CHANGED


def test_monitors_are_not_rolled_back():
    kinds = {name: getattr(lightning_gan_stability, name) for name in public_callbacks()}
    remembering = {name for name, kind in kinds.items() if not getattr(kind, "rolled_back", True)}
    assert remembering == {
        "Autopilot",
        "CollapseDetector",
        "HealthMonitor",
        "MemorizationMonitor",
        "PairedMonitor",
        "QualityMonitor",
        "SampleLogger",
        "TableMonitor",
    }


@pytest.mark.filterwarnings("ignore")
def test_no_monitor_tells_of_steps_that_go_backwards():
    """In three fits of one module, of which the last two are of one Trainer, and then of another module."""
    quality = QualityMonitor(nn.Identity(), ["fid", "coverage", "diversity"], n_samples=50, every=2)
    detector, health = CollapseDetector(patience=1), HealthMonitor(every=2, patience=1)
    monitors = [quality, detector, health]
    gan, other = small(), small()
    with torch.no_grad():
        for each in (gan, other):
            each.generator.layers[-1].weight.mul_(0)  # which collapses

    def records():
        return [[row["step"] for row in rows] for rows in (quality.history, detector.events, health.verdicts)]

    data = points(6, 20)
    run = fit(gan, data, callbacks=monitors)
    first = records()
    assert first[0] == [0, 2, 4, 6]
    assert first[1]
    run = fit(gan, data, callbacks=monitors)
    assert records()[0] == [0, 2, 4, 6]
    run.fit_loop.max_epochs = 2
    run.fit(gan, DataLoader(data, batch_size=None))
    assert records()[0] == [0, 2, 4, 6, 8, 10, 12]
    assert all(steps == sorted(steps) for steps in records())
    fit(other, data, callbacks=monitors)
    assert records() == first


# ---------- what does nothing by itself


def test_a_callback_leaves_steps_alone():
    callback, parameters = Stateless(), [torch.ones(1)]
    assert callback.constrain(None, "d", parameters) is parameters
    assert callback.weigh_terms(None, "g", None, {"adversarial": torch.ones(())}) == {}
    assert callback.watch_terms(None, "g", None, {"adversarial": torch.ones(())}) is None
    assert callback.rescue(None, None) is False
    assert callback.rescues is False


def test_averages_of_lightning_come_after_what_adds_to_the_module():
    callback, averaging = Stateless(), EMAWeightAveraging()
    refuse_after_weight_averaging(callback, SimpleNamespace(callbacks=[callback, averaging]))
    message = "EMAWeightAveraging copies the module before Stateless adds to it, so its copy would not match: put State"
    with pytest.raises(MisconfigurationException, match=message):
        refuse_after_weight_averaging(callback, SimpleNamespace(callbacks=[averaging, callback]))


class Mean(Regularizer):
    player = "d"
    weight, every = 2.0, 3

    def penalty(self, module, outputs):
        return outputs.fake.mean()


class R1LikePenalty(Mean):
    pass


class HTTPServerPenalty(Mean):
    pass


def test_regularizers_have_names_in_snake_case():
    names = {R1LikePenalty: "r1_like", Mean: "mean", HTTPServerPenalty: "httpserver"}
    for kind, name in names.items():
        assert kind().name == name


def test_the_weight_of_a_class_is_a_default():
    assert (Mean().weight, Mean().every) == (2.0, 3)
    assert (Mean(weight=0.5, every=1).weight, Mean(weight=0.5, every=1).every) == (0.5, 1)
    assert Mean(weight=0).weight == 0
    assert Mean().weight_at(10**6) == 2.0


@pytest.mark.parametrize("step", [0, 1, 25, 50, 99, 100, 1000])
def test_weights_follow_a_cosine(step):
    penalty = Mean(weight=Schedule(8.0, 2.0, 100))
    progress = (1 - math.cos(math.pi * min(step, 100) / 100)) / 2
    assert penalty.weight_at(step) == pytest.approx(8 - 6 * progress)
    assert penalty.weight_at(0) == 8
    assert penalty.weight_at(50) == pytest.approx(5)
    assert penalty.weight_at(100) == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": -1}, "`weight` must be a finite number that is not negative, got -1"),
        ({"every": 0}, "`every` must be a positive integer, got 0"),
        ({"weight": Schedule(1.0, -1.0, 5)}, "`weight.end` must be a finite number that is not negative, got -1"),
        ({"weight": Schedule(-1.0, 1.0, 5)}, "`weight.start` must be a finite number that is not negative, got -1"),
    ],
)
def test_bad_arguments_of_regularizers(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Mean(**kwargs)


@pytest.mark.parametrize("network", ["discriminator", "generator"])
def test_penalties_of_single_samples_refuse_batch_norm(network):
    class PerSample(Mean):
        player = network[0]
        per_sample = True

    gan = small()
    PerSample().on_fit_start(None, gan)
    gan.get_submodule(network).layers.append(nn.BatchNorm1d(1))
    Mean().on_fit_start(None, gan)
    with pytest.raises(MisconfigurationException, match=rf"but the BatchNorm layer `{network}\.layers\.\d` mixes"):
        PerSample().on_fit_start(None, gan)
    gan.get_submodule(network).layers[-1].eval()
    PerSample().on_fit_start(None, gan)


# ---------- rules


class Order(list):
    """A module that notes what a rule asks of it."""

    plan = ("d", "g", "d")

    def compute_gradients(self, player, batch):
        self.append(f"gradients of {player} on {batch}")

    def apply_gradients(self, player):
        self.append(f"step of {player}")

    def separate_steps(self, player, batch):
        self.append(f"separate steps of {player} on {batch}")


def test_alternating_takes_each_gradient_after_the_step_before():
    order = Order()
    Alternating()(order, "x")
    what = ("gradients of {} on x", "step of {}", "separate steps of {} on x")
    step = {player: [text.format(player) for text in what] for player in ("d", "g")}
    assert order == step["d"] + step["g"] + step["d"]


class Joint(Alternating):
    joint = True


@pytest.mark.parametrize("plan", [("d",), ("d", "d", "g"), ("g", "d", "g")])
def test_rules_refuse_plans_that_they_do_not_follow(plan):
    gan = small()
    gan.plan = plan
    Alternating().check_plan(gan)
    with pytest.raises(MisconfigurationException, match=r"Joint steps both players on every batch, but the plan is \("):
        Joint().check_plan(gan)


def test_rules_that_move_everybody_once():
    gan = small()
    for plan in (("d", "g"), ("g", "d"), ("d",)):
        gan.plan = plan
        check_once(Joint(), gan)
    gan.plan = ("d", "g", "d")
    with pytest.raises(MisconfigurationException, match="Joint steps every player once, but the plan is"):
        check_once(Joint(), gan)


def test_rules_and_regularizers_are_abstract():
    for kind in (UpdateRule, Regularizer):
        with pytest.raises(TypeError, match="abstract"):
            kind()
