"""Before the start nothing of the discriminator moves; after it the run is one that never waited."""

from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader
from toys import fit, points, sgd, small, trainer, weights

from lightning_gan_stability import (
    MLP,
    AdaptiveUpdateRatio,
    AdversarialStart,
    Alternating,
    ConsensusOptimization,
    Extragradient,
    FeatureMatching,
    GANModule,
    LossBalancer,
    Reconstruction,
    Unrolling,
    UpdateRatio,
)


def state_of_d(module, run):
    """Everything that belongs to the discriminator: weights, statistics, moments."""
    return {
        "network": deepcopy(module.discriminator.state_dict()),
        "optimizer": run.optimizers[0].state_dict()["state"],
    }


def norm_gan(**kwargs):
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    return GANModule(MLP([4, 16, 2]), discriminator, 4, **kwargs)


def calls_of(network):
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.filterwarnings("ignore:AdversarialStart.* comes after the end of this run")
def test_the_discriminator_is_left_alone_before_the_start():
    module = norm_gan()
    calls = calls_of(module.discriminator)
    before = deepcopy(module.discriminator.state_dict())
    run = fit(module, points(4), callbacks=[AdversarialStart(4), Reconstruction(), FeatureMatching(layers=["0"])])
    assert not calls
    assert all(torch.equal(value, before[key]) for key, value in module.discriminator.state_dict().items())
    assert run.optimizers[0].state_dict()["state"] == {}
    assert module.steps == {"d": 0, "g": 4}
    assert {*module.last_step.terms["g"]} == {"reconstruction"}


def test_at_the_start_everything_joins():
    module = norm_gan()
    fit(module, points(5), callbacks=[AdversarialStart(4), Reconstruction(), FeatureMatching(layers=["0"])])
    assert module.steps == {"d": 1, "g": 5}
    assert {*module.last_step.terms["g"]} == {"adversarial", "reconstruction", "feature_matching"}


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("ramp", [0, 2])
def test_across_the_start_by_hand(start, ramp):
    module = small(d_optimizer=sgd(0.3), g_optimizer=sgd(0.2)).double()
    d, g = deepcopy(module.discriminator), deepcopy(module.generator)
    latents = []
    draw = module.draw_latents
    module.draw_latents = lambda n: latents.append(draw(n)) or latents[-1]
    batches = points(5, dtype=torch.float64)
    fit(module, batches, callbacks=[AdversarialStart(start, ramp=ramp), Reconstruction(0.5)])
    draws = iter(latents)
    for i, real in enumerate(batches):
        if i >= start:
            loss = (softplus(-d(real)) + softplus(d(g(next(draws)).detach()))).mean()
            step(d, loss, 0.3)
        fake = g(next(draws))
        loss = 0.5 * (fake - real).abs().mean()
        if i >= start:
            loss = loss + (min(1.0, (i - start + 1) / ramp) if ramp else 1.0) * softplus(-d(fake)).mean()
        step(g, loss, 0.2)
    assert next(draws, None) is None
    expected = torch.cat([p.detach().flatten() for p in (*g.parameters(), *d.parameters())])
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-13)


def step(network, loss, rate):
    gradients = torch.autograd.grad(loss, [*network.parameters()])
    with torch.no_grad():
        for p, gradient in zip(network.parameters(), gradients, strict=True):
            p -= rate * gradient


@pytest.mark.parametrize(("first", "steps"), [(0, 2), (1, 3), (2, 4), (9, 6), (True, 6), (False, 2)])
def test_the_discriminator_may_train_first(first, steps):
    module = small()
    fit(module, points(6), callbacks=[AdversarialStart(4, discriminator_first=first), Reconstruction()])
    assert module.steps == {"d": steps, "g": 6}
    assert "adversarial" in module.last_step.terms["g"]


@pytest.mark.filterwarnings("ignore:AdversarialStart.* comes after the end of this run")
def test_while_the_discriminator_trains_first_the_generator_waits():
    module = small()
    fit(module, points(2), callbacks=[AdversarialStart(9, discriminator_first=True), Reconstruction()])
    assert module.steps == {"d": 2, "g": 2}
    assert {*module.last_step.terms["g"]} == {"reconstruction"}


def test_the_ramp_weighs_feature_matching_too():
    start = AdversarialStart(2, ramp=4)
    factors = []
    weigh = start.weigh_terms
    start.weigh_terms = lambda *arguments: factors.append(weigh(*arguments)) or factors[-1]
    fit(small(), points(7), callbacks=[start, Reconstruction(), FeatureMatching(layers=["layers.0"])])
    ramps = [f["adversarial"] for f in factors if "adversarial" in f]
    assert ramps == [0.25, 0.5, 0.75]
    assert all(f["adversarial"] == f["feature_matching"] for f in factors if "adversarial" in f)
    assert not any("reconstruction" in f for f in factors)


def test_shared_samples_before_the_start():
    module = small()
    calls = calls_of(module.generator)
    fit(module, points(4), callbacks=[AdversarialStart(2), Reconstruction(), Alternating(share_fake=True)])
    assert len(calls) == 4


def test_a_ratio_begins_with_the_start():
    """Before it the generator trains on every batch; from it on two batches make a cycle."""
    module = small()
    ratio = UpdateRatio(2)
    fit(module, points(7), callbacks=[ratio, AdversarialStart(3), Reconstruction()])
    assert module.steps == {"d": 4, "g": 3 + 2}
    assert (ratio.cycle, ratio.position) == (2, 0)


def test_an_adaptive_ratio_waits_too():
    module = small()
    adaptive = AdaptiveUpdateRatio(low=0.0, high=1.0)
    fit(module, points(5), callbacks=[adaptive, AdversarialStart(3), Reconstruction()])
    assert adaptive.batches == 2
    assert module.plan == ("d", "g")


def test_schedulers_of_epochs_wait_for_the_start():
    halve = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    module = small(
        d_scheduler=halve, g_scheduler=halve, d_optimizer=sgd(1.0), g_optimizer=sgd(1e-3), scheduler_interval="epoch"
    )
    run = fit(module, points(2), max_epochs=3, callbacks=[AdversarialStart(5), Reconstruction()])
    d, g = (optimizer.param_groups[0]["lr"] for optimizer in run.optimizers)
    assert d == 0.5
    assert g == 1e-3 / 8


# ---------- the plateau


class Given(Reconstruction):
    """A term whose values are given."""

    def __init__(self, values):
        super().__init__()
        self.values = iter(values)

    def penalty(self, module, outputs):
        return next(self.values) + 0 * outputs.fake.sum()


def plateau(values, **options):
    """The batch on which the game started, and the module."""
    start = AdversarialStart(when="plateau", monitor="g/reconstruction", **{"window": 1} | options)
    module = small()
    fit(module, points(len(values)), callbacks=[start, Given(values)])
    return start.start, module


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        # iterations 0, 1, 2, ...: the third value in a row without an improvement is that of batch 4
        ([5, 4, 4, 4, 4, 4, 4], {"patience": 3}, 5),
        ([5, 4, 3, 2, 1], {"patience": 1}, None),
        # 1 % of 100 is no improvement, and 3 % is one
        ([100, 99.5, 99.2, 50], {"patience": 2}, 3),
        ([100, 97, 94, 91], {"patience": 1, "threshold": 0.02}, None),
        ([100, 97, 94, 91], {"patience": 1, "threshold": 0.05}, 2),
        # means of two: 5, 5, 5
        ([4, 6, 5, 5, 6, 4, 1, 1], {"patience": 2, "window": 2}, 6),
        ([5, 5, 5, 5], {"patience": 1, "discriminator_first": 2}, 4),
        ([-1, -2, -2, -2], {"patience": 1}, 3),
    ],
)
def test_a_plateau(values, options, expected):
    start, module = plateau([float(value) for value in values], **options)
    assert start == expected
    if expected is not None:
        first = expected - options.get("discriminator_first", 0)
        assert module.steps["d"] == len(values) - first


def test_a_plateau_of_validation():
    start = AdversarialStart(when="plateau", monitor="val/g/reconstruction", patience=1)
    module = small(g_optimizer=sgd(0.0))  # it cannot improve
    data = DataLoader(points(2), batch_size=None)
    trainer(callbacks=[start, Reconstruction()], max_epochs=3, num_sanity_val_steps=1).fit(module, data, data)
    assert start.start == 4  # after the second validation
    assert module.steps == {"d": 2, "g": 6}


@pytest.mark.parametrize("monitor", ["g/l1", "val/l1"])
def test_a_monitor_that_is_not_there(monitor):
    start = AdversarialStart(when="plateau", monitor=monitor)
    data = DataLoader(points(2), batch_size=None)
    sentence = rf"waits for `{monitor}` to stop improving, but no such value is logged\. Logged are .*g/reconstruction"
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer(callbacks=[start, Reconstruction()], num_sanity_val_steps=0).fit(small(), data, data)


# ---------- refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "`step` must be given with when='step'"),
        ({"step": -1}, "`step` must"),
        ({"step": 1.5}, "`step` must"),
        ({"step": 1, "when": "plateau", "monitor": "g/l1"}, "`step` must be given with when='step', and with no other"),
        ({"when": "plateau"}, "`monitor` must be given with when='plateau'"),
        ({"step": 1, "monitor": "g/l1"}, "`monitor` must be given with when='plateau', and with no other"),
        ({"step": 1, "when": "later"}, "`when` must"),
        ({"step": 1, "ramp": -1}, "`ramp` must"),
        ({"step": 1, "discriminator_first": -1}, "`discriminator_first` must"),
        ({"when": "plateau", "monitor": "g/l1", "window": 0}, "`window` must"),
        ({"when": "plateau", "monitor": "g/l1", "patience": 0}, "`patience` must"),
        ({"when": "plateau", "monitor": "g/l1", "threshold": 1}, "`threshold` must"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdversarialStart(**options)


@pytest.mark.parametrize("plan", [("d",), ("g",)])
def test_a_plan_without_both(plan):
    module = small()
    module.plan = plan
    with pytest.raises(
        MisconfigurationException, match=r"AdversarialStart starts the discriminator later, but `module.plan`"
    ):
        fit(module, points(1), callbacks=[AdversarialStart(1)])


@pytest.mark.parametrize(
    "rule", [Extragradient(), Unrolling(1), ConsensusOptimization()], ids=lambda r: type(r).__name__
)
def test_rules_that_need_both(rule):
    with pytest.raises(
        MisconfigurationException, match=f"^{type(rule).__name__} needs the discriminator on every batch"
    ):
        fit(small(), points(1), callbacks=[AdversarialStart(1), rule])


@pytest.mark.filterwarnings("ignore:AdversarialStart.* comes after the end of this run")
def test_a_generator_whose_other_terms_are_none_has_nothing_to_learn():
    class Nothing(GANModule):
        def auxiliary_losses(self, player, outputs):
            return {}

    with pytest.raises(ValueError, match="The generator has nothing to learn from: its loss has no term"):
        fit(Nothing(MLP([4, 2]), MLP([2, 1]), 4), points(1), callbacks=[AdversarialStart(1)])


BEHIND = r"AdversarialStart\(step=9\) comes after the end of this run, which has"


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"max_steps": 2}, 2),
        ({"max_epochs": 3}, 9),
        ({"max_epochs": 9, "max_steps": 5}, 5),
        ({"max_epochs": 5, "limit_train_batches": 1}, 5),
    ],
)
def test_a_start_behind_the_end(options, batches):
    with pytest.warns(UserWarning, match=f"{BEHIND} {batches} batches"):
        fit(small(), points(3), callbacks=[AdversarialStart(9), Reconstruction()], **options)


@pytest.mark.parametrize("options", [{"max_steps": 10}, {"max_epochs": 4}])
def test_a_start_that_the_run_reaches(options, tmp_path):
    make = lambda: [AdversarialStart(9), Reconstruction()]  # noqa: E731
    fit(small(), points(3), callbacks=make(), **{"max_epochs": -1} | options)
    with pytest.warns(UserWarning, match=f"{BEHIND} 6 batches"):
        fit(small(), points(3), callbacks=make(), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    module = small()
    fit(module, points(3), ckpt_path=tmp_path / "a.ckpt", callbacks=make(), **{"max_epochs": -1} | options)
    assert module.steps["d"] > 0


def test_a_plateau_of_validation_that_a_run_has_not():
    start = AdversarialStart(when="plateau", monitor="val/g/reconstruction")
    data = DataLoader(points(2), batch_size=None)
    for kwargs, loaders in (({}, [data]), ({"limit_val_batches": 0}, [data, data])):
        with pytest.raises(MisconfigurationException, match=r"`val/g/reconstruction` to .* run has no validation"):
            trainer(callbacks=[start, Reconstruction()], **kwargs).fit(small(), *loaders)


def test_a_start_at_once_needs_no_other_terms():
    module = small()
    fit(module, points(2), callbacks=[AdversarialStart(0, ramp=4)])
    assert module.steps == {"d": 2, "g": 2}
    with pytest.raises(MisconfigurationException, match="AdversarialStart pauses the generator's adversarial loss"):
        fit(small(), points(2), callbacks=[AdversarialStart(1)])


# ---------- the ratio that lets the adversarial part rest alone


def test_reconstruction_goes_on_while_the_adversarial_part_rests():
    module = small()
    adaptive = AdaptiveUpdateRatio(low=2.0, high=3.0, max_rest=9, generator_rests="adversarial")
    terms = []
    compute = module.player_loss

    def spy(player, outputs, adversarial=None):
        total, values = compute(player, outputs, adversarial)
        terms.append((player, {*values}))
        return total, values

    module.player_loss = spy
    fit(module, points(3), callbacks=[adaptive, Reconstruction(), FeatureMatching(layers=["layers.0"])])
    of_generator = [names for player, names in terms if player == "g"]
    assert of_generator == [{"adversarial", "reconstruction", "feature_matching"}, *[{"reconstruction"}] * 2]
    assert module.steps == {"d": 3, "g": 3}
    assert adaptive.moves == {"d": 3, "g": 1}


# ---------- several terms of one name


def two_of_a_name(**lazy):
    return [FeatureMatching(layers=["layers.0"], **lazy), FeatureMatching(layers=["layers.2"])]


@pytest.mark.parametrize("lazy", [{}, {"every": 2}])
def test_the_ramp_weighs_all_terms_of_one_name(lazy):
    start = AdversarialStart(2, ramp=4)
    found = []
    weigh = start.weigh_terms

    def spy(module, player, outputs, terms):
        factors = weigh(module, player, outputs, terms)
        if "adversarial" in terms and factors:
            found.append(({*terms} - {"reconstruction"}, factors))
        return factors

    start.weigh_terms = spy
    module = small()
    fit(module, points(5), callbacks=[start, *two_of_a_name(**lazy), Reconstruction()])
    assert len(found) == 3
    for (names, factors), ramp in zip(found, (0.25, 0.5, 0.75), strict=True):
        assert factors == dict.fromkeys(names, ramp)
        assert "feature_matching_2" in names  # the second one keeps its name on batches without the first


def test_the_balancer_knows_all_terms_of_one_name_before_they_come():
    weighed = dict.fromkeys(("reconstruction", "feature_matching", "feature_matching_2"), 1.0)
    balancer = LossBalancer(weighed)
    module = small()
    fit(module, points(3), callbacks=[AdversarialStart(2), *two_of_a_name(), Reconstruction(), balancer])
    assert {*balancer.sums} == {*weighed}
