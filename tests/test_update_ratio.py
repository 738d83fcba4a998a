"""Who moves on which batch: fixed ratios, the Wasserstein GAN's warm-up, and rules that look at statistics."""

import math
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from toys import fit, points, sgd, small, spy_on_samples, weights

from lightning_gan_stability import (
    AdaptiveUpdateRatio,
    CompetitiveGradientDescent,
    ConsensusOptimization,
    Extragradient,
    GANModule,
    Minimax,
    Regularizer,
    SampleLogger,
    Simultaneous,
    Unrolling,
    UpdateRatio,
    Wasserstein,
)
from lightning_gan_stability.callbacks.update_ratio import RULES, who_rests


class Moves(Callback):
    """Who stepped on each batch, in order, and on which samples."""

    def __init__(self):
        self.batches, self.seen = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append("")
        self.batch = batch

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.batches[-1] += "dg"[trainer.optimizers.index(optimizer)]
        self.seen.append(("dg"[trainer.optimizers.index(optimizer)], self.batch))


def moves(module, callbacks, n, **kwargs):
    watch = Moves()
    run = fit(module, points(n), callbacks=[*callbacks, watch], **kwargs)
    return watch, run


# ---------- UpdateRatio


@pytest.mark.parametrize(
    ("d_steps", "g_steps", "expected"),
    [
        (1, 1, ["dg"] * 6),
        (2, 1, ["d", "dg"] * 3),
        (3, 1, ["d", "d", "dg"] * 2),
        (1, 2, ["dgg"] * 6),
        (2, 3, ["d", "dggg"] * 3),
        (5, 1, ["d", "d", "d", "d", "dg", "d"]),
    ],
)
@pytest.mark.parametrize("rule", [None, Unrolling])
def test_ratio(d_steps, g_steps, expected, rule):
    watch, run = moves(small(), [UpdateRatio(d_steps, g_steps), *([rule(2)] if rule else [])], 6)
    assert watch.batches == expected
    assert run.global_step == 6


def test_every_discriminator_step_sees_fresh_data():
    watch, _ = moves(small(), [UpdateRatio(3)], 6)
    seen = [batch for player, batch in watch.seen if player == "d"]
    assert len({id(batch) for batch in seen}) == 6


def test_generator_steps_see_fresh_latents():
    latents = []
    module = small()
    spy_on_samples(module, lambda player, outputs: latents.append(outputs.latents[0, 0].item()))
    moves(module, [UpdateRatio(1, 3)], 2)
    assert len(set(latents)) == len(latents) == 8


def test_warm_up_is_the_wasserstein_gans():
    """Its code: 100 critic steps while gen_iterations < 25 or gen_iterations % 500 == 0, else Diters."""
    ratio = UpdateRatio(5, warm_up=True)
    for cycle in [0, 1, 24, 25, 26, 499, 500, 501, 1000]:
        long = 100 if cycle < 25 or cycle % 500 == 0 else 5
        assert [ratio.plan_at(cycle, step) for step in range(long)] == [("d",)] * (long - 1) + [("d", "g")]
    watch, _ = moves(small(), [UpdateRatio(5, warm_up=True)], 210)
    assert [i for i, batch in enumerate(watch.batches) if "g" in batch] == [99, 199]


def test_ratio_goes_on_in_a_second_fit_and_starts_anew_with_another_module():
    ratio, module, watch = UpdateRatio(3), small(), Moves()
    fit(module, points(4), callbacks=[ratio, watch])
    fit(module, points(4), callbacks=[ratio, watch])
    assert watch.batches == ["d", "d", "dg", "d", "d", "dg", "d", "d"]
    assert module.plan == ("d", "g")
    fresh, _ = moves(small(), [ratio], 3)
    assert fresh.batches == ["d", "d", "dg"]


def test_the_plan_is_given_back_after_an_error():
    class Break(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("broken")

    module = small()
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, points(2), callbacks=[UpdateRatio(3), Break()])
    assert module.plan == ("d", "g")


def test_a_refused_fit_leaves_the_plan():
    module = small()
    module.plan = ("d", "d", "g")
    with pytest.raises(
        MisconfigurationException,
        match=r"but `module.plan` is \('d', 'd', 'g'\), which does not contain both players exactly once",
    ):
        fit(module, points(1), callbacks=[UpdateRatio(2)])
    assert module.plan == ("d", "d", "g")


class Due(Regularizer):
    """Counts the steps on which it is due, and their scale."""

    def __init__(self, player, every):
        super().__init__(1.0, every)
        self.player, self.due = player, []

    def penalty(self, module, outputs):
        self.due.append(module.iteration)
        return 0 * outputs.fake.sum()


@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize("d_steps", [1, 2, 3, 4, 5])
def test_lazy_penalties_count_their_players_steps(d_steps, every):
    """Under UpdateRatio(4) the generator moves on batches 3, 7, 11, ..., none of which 4 divides."""
    d, g, watch = Due("d", every), Due("g", every), Moves()
    fit(small(), points(40), callbacks=[UpdateRatio(d_steps), d, g, watch])
    moved = {player: [i for i, who in enumerate(watch.batches) if player in who] for player in "dg"}
    assert d.due == moved["d"][::every]
    assert g.due == moved["g"][::every]


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_lazy_penalties_of_a_player_that_rests(rest):
    d, watch = Due("d", rest + 1), Moves()
    # the discriminator rests whenever it may
    fit(small(), points(24), callbacks=[AdaptiveUpdateRatio("logit_gap", -9, -9, max_rest=rest), d, watch])
    moved = [i for i, who in enumerate(watch.batches) if "d" in who]
    assert len(moved) < 16
    assert d.due == moved[:: rest + 1]


def test_an_overflowing_gradient_is_no_norm():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    ratio = AdaptiveUpdateRatio("gradient_norm")
    fit(small(), points(6), callbacks=[ratio], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert all(math.isfinite(norm) for norm in ratio.state_dict()["norms"].values())


class Draw(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.noise.randn(3, 4)


def test_noise_that_others_draw_between_batches_changes_nothing():
    found = []
    for more in ([], [Draw()]):
        ratio = AdaptiveUpdateRatio("logit_gap", -9, -9, max_rest=2)
        module = small()
        fit(module, points(8), callbacks=[ratio, *more])
        found.append((ratio.state_dict(), weights(module)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("rule", RULES)
def test_the_adaptive_ratio_can_be_sent_to_another_process(rule):
    assert pickle.loads(pickle.dumps(AdaptiveUpdateRatio(rule))).low == AdaptiveUpdateRatio(rule).low


def test_what_a_callback_monitors_is_logged_on_every_batch():
    class Seen(Callback):
        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, module, *_):
            self.values.append(trainer.callback_metrics["balance/logit_gap"].item())

    stop = EarlyStopping("balance/logit_gap", check_on_train_epoch_end=True)
    seen = Seen()
    fit(small(), points(6), callbacks=[AdaptiveUpdateRatio("logit_gap"), seen, stop], log_every_n_steps=50)
    assert len(set(seen.values)) == 6


def test_schedules_step_with_their_player():
    schedule = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)  # noqa: E731
    module = small(d_optimizer=sgd(1.0), g_optimizer=sgd(1.0), d_scheduler=schedule, g_scheduler=schedule)
    _, run = moves(module, [UpdateRatio(3)], 6)
    assert [o.param_groups[0]["lr"] for o in run.optimizers] == [0.5**6, 0.5**2]


@pytest.mark.parametrize("callback", [UpdateRatio(2), AdaptiveUpdateRatio()])
@pytest.mark.parametrize("rule", [Extragradient, ConsensusOptimization, CompetitiveGradientDescent])
def test_rules_that_move_both_players_are_refused(callback, rule):
    module = small(loss=Minimax(), d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
    expected = rf"^{rule.__name__} steps both players once on every batch, which {type(callback).__name__} would change"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(module, points(1), callbacks=[callback, rule()])


def test_simultaneous_takes_one_generator_step_alone():
    watch, _ = moves(small(), [UpdateRatio(2), Simultaneous()], 4)
    assert watch.batches == ["d", "dg"] * 2
    with pytest.raises(MisconfigurationException, match="Simultaneous steps both players once on every batch"):
        fit(small(), points(1), callbacks=[UpdateRatio(2, 2), Simultaneous()])


@pytest.mark.parametrize("plan", [("d",), ("g",), ("d", "g", "d")])
@pytest.mark.parametrize("callback", [UpdateRatio(2), AdaptiveUpdateRatio()])
def test_a_plan_without_both_players_once_is_refused(callback, plan):
    module = small()
    module.plan = plan
    with pytest.raises(MisconfigurationException, match=r"sets which players of the plan step, but `module.plan` is"):
        fit(module, points(1), callbacks=[callback])


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (UpdateRatio(2, 1), ["d", "gd"]),
        (UpdateRatio(1, 2), ["ggd", "ggd"]),
        (AdaptiveUpdateRatio(low=0, high=1), ["gd"] * 2),
    ],
)
def test_the_order_of_the_players_is_that_of_the_plan(callback, expected):
    """The generator first, as in most recipes with a reconstruction."""
    module = small()
    module.plan = ("g", "d")
    watch, _ = moves(module, [callback], 2)
    assert watch.batches == expected
    assert module.plan == ("g", "d")


def test_two_owners_of_the_plan_are_refused():
    with pytest.raises(
        MisconfigurationException, match="UpdateRatio and AdaptiveUpdateRatio both set which player steps"
    ):
        fit(small(), points(1), callbacks=[UpdateRatio(2), AdaptiveUpdateRatio()])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_steps": 0}, "`d_steps` must be a positive integer, got 0."),
        ({"d_steps": -1}, "`d_steps` must be a positive integer, got -1."),
        ({"warm_up": "no"}, "`warm_up` must be True or False, got 'no'."),
        ({"g_steps": 1.5}, "`g_steps` must be a positive integer, got 1.5."),
        ({"d_steps": 200, "warm_up": True}, "`warm_up` means 100 discriminator steps at first, but `d_steps` is 200."),
    ],
)
def test_bad_arguments_of_the_ratio(kwargs, message):
    with pytest.raises(ValueError, match=message):
        UpdateRatio(**kwargs)


# ---------- rules as functions


@pytest.mark.parametrize(
    ("value", "resting", "expected"),
    [
        (0.6, None, None),
        (0.81, None, "d"),
        (0.39, None, "g"),
        (0.78, "d", "d"),  # not yet back by the hysteresis
        (0.74, "d", None),
        (0.42, "g", "g"),
        (0.46, "g", None),
        (0.3, "d", "g"),  # from one end to the other
        (0.9, "g", "d"),
    ],
)
def test_who_rests(value, resting, expected):
    assert who_rests(value, resting, low=0.4, high=0.8, hysteresis=0.05) == expected


@pytest.mark.parametrize("value", [-1.0, -0.2, 0.2, 1.0])
@pytest.mark.parametrize("resting", [None, "d", "g"])
def test_without_a_band_exactly_one_player_rests(value, resting):
    assert who_rests(value, resting, low=0.0, high=0.0, hysteresis=0.0) == ("d" if value > 0 else "g")


def value_of(rule, now, before=None):
    return RULES[rule][0](now, before or {})


@pytest.mark.parametrize(
    ("now", "before", "d_moves"),
    [
        ({"d": 1.2, "g": 2.0}, {"d": 1.0, "g": 2.0}, True),  # 20 % against 0 %
        ({"d": 1.0, "g": 2.2}, {"d": 1.0, "g": 2.0}, False),
        ({"d": 1.1, "g": 1.6}, {"d": 1.0, "g": 2.0}, False),  # 10 % against 20 %
        ({"d": 0.7, "g": 1.6}, {"d": 1.0, "g": 2.0}, True),  # 30 % against 20 %
        ({"d": -0.9, "g": 0.0}, {"d": -1.0, "g": 0.0}, True),  # a loss that is 0
    ],
)
def test_loss_change(now, before, d_moves):
    """Ouyang & Agam: update the discriminator if r_d > λ r_g, else the generator; λ = 1."""
    _, low, high, hysteresis = RULES["loss_change"]
    resting = who_rests(value_of("loss_change", now, before), None, low, high, hysteresis)
    assert resting == ("g" if d_moves else "d")


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_lambda_of_loss_change(lam):
    rule = AdaptiveUpdateRatio("loss_change", low=-math.log(lam), high=-math.log(lam))
    for r_d, r_g in ((0.1, 0.11), (0.2, 0.11), (0.05, 0.11), (0.3, 0.11)):
        value = value_of("loss_change", {"d": 1 + r_d, "g": 1 + r_g}, {"d": 1.0, "g": 1.0})
        resting = who_rests(value, None, rule.low, rule.high, rule.hysteresis)
        assert resting == ("g" if r_d > lam * r_g else "d")


def test_logit_gap_is_hypergans_rule():
    """Step the discriminator if E l(x) < E l(G(z)) + 0.1, else the generator."""
    _, low, high, hysteresis = RULES["logit_gap"]
    for gap in (-1.0, 0.05, 0.15, 2.0):
        assert who_rests(gap, None, low, high, hysteresis) == ("g" if gap < 0.1 else "d")


def test_gradient_norm_is_symmetric():
    one = value_of("gradient_norm", {"d_norm": 2.0, "g_norm": 3.0})
    other = value_of("gradient_norm", {"d_norm": 3.0, "g_norm": 2.0})
    assert one == pytest.approx(math.log(1.5))
    assert other == pytest.approx(-one)


# ---------- rules in a run


class Fixed(GANModule):
    """A discriminator with given logits for real and fake samples."""

    def discriminate(self, network, sample, condition):
        logits = super().discriminate(network, sample, condition)
        value = self.real_value if sample is self.seen else self.fake_value
        return logits.squeeze(1) * 0 + torch.as_tensor(value, device=logits.device)

    def compute_samples(self, player, batch, regularizers=None):
        outputs = super().compute_samples(player, batch, regularizers)
        self.seen = outputs.real
        return outputs


def fixed(real, fake, **kwargs):
    module = small(**kwargs)
    module.__class__ = Fixed
    module.real_value, module.fake_value, module.seen = real, fake, None
    return module


def test_a_discriminator_that_is_always_right_rests_but_does_not_starve():
    watch, _ = moves(fixed(2.0, -2.0), [AdaptiveUpdateRatio("accuracy", max_rest=3)], 13)
    assert watch.batches == ["dg", *["g", "g", "g", "dg"] * 3]


def test_a_discriminator_that_is_always_wrong_lets_the_generator_rest():
    watch, _ = moves(fixed(-2.0, 2.0), [AdaptiveUpdateRatio("accuracy", max_rest=2)], 7)
    assert watch.batches == ["dg", *["d", "d", "dg"] * 2]


def test_in_the_band_both_move():
    module = fixed(torch.tensor([2.0, 2.0, -2.0, 2.0] * 2), -2.0)  # 7 of 8 right would be too good
    watch, _ = moves(module, [AdaptiveUpdateRatio("accuracy", high=0.9)], 4)
    assert watch.batches == ["dg"] * 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("max_rest", [1, 4])
def test_nobody_rests_longer_than_allowed(rule, max_rest):
    make = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
    module = small(d_optimizer=make, g_optimizer=make)
    run = AdaptiveUpdateRatio(rule, max_rest=max_rest)
    watch, _ = moves(module, [run], 60)
    for player in "dg":
        rests = "".join("x" if player in batch else "-" for batch in watch.batches)
        assert max(map(len, rests.split("x"))) <= max_rest
    assert all(watch.batches)
    assert weights(module).isfinite().all()
    assert {*watch.batches} <= {"d", "g", "dg"}
    if rule in ("loss_change", "logit_gap"):
        assert len({*watch.batches}) == 3  # both ways; and both move after a rest that lasted too long


def test_the_statistics_are_those_of_the_batch_before_anybody_moved():
    """On a batch on which D rests they come from a look of their own, which leaves no trace."""
    seen = []
    torch.manual_seed(0)
    module = small()
    module.discriminator = torch.nn.Sequential(torch.nn.BatchNorm1d(2, affine=False), module.discriminator)

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            self.buffers = [b.clone() for b in module.buffers()]

        def on_train_batch_end(self, trainer, module, *_):
            same = all(torch.equal(a, b) for a, b in zip(self.buffers, module.buffers(), strict=True))
            seen.append((same, "d" in module.moved))

    rule = AdaptiveUpdateRatio("accuracy", low=0.0, high=0.0, max_rest=1)

    class Before(Callback):
        """Behind the rule in the list: after its look."""

        def on_train_batch_start(self, trainer, module, *_):
            assert len([*module.buffers()]) == 3

    first = Look()
    fit(module, points(6), callbacks=[first, rule, Before()])
    moved = [d for _, d in seen]
    assert moved == [True, False] * 3
    # G's own turn moves D's statistics as in plain training, by its one forward pass: the look added none
    counts = module.discriminator[0].num_batches_tracked.item()
    assert counts == 3 * (2 + 1) + 3 * 1


def test_values_and_shares_are_logged():
    module = fixed(2.0, -2.0)
    run = fit(module, points(9), callbacks=[AdaptiveUpdateRatio("logit_gap", max_rest=2)], log_every_n_steps=1)
    logged = run.callback_metrics
    assert logged["balance/logit_gap"] == 4
    assert logged["balance/d_share"] == pytest.approx(3 / 9)
    assert logged["balance/g_share"] == pytest.approx(9 / 9)


@pytest.mark.parametrize("loss", [Wasserstein(), Minimax()])
@pytest.mark.parametrize("rule", RULES)
def test_with_other_callbacks(rule, loss):
    callbacks = [AdaptiveUpdateRatio(rule), Unrolling(2), SampleLogger(every=3, n=10), ModelCheckpoint("saved")]
    module = small(loss=loss)
    fit(module, points(6), callbacks=callbacks, enable_checkpointing=True)
    assert weights(module).isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"rule": "loss"},
            "`rule` must be one of 'accuracy', 'loss_change', 'logit_gap', 'gradient_norm', got 'loss'.",
        ),
        ({"low": 0.9}, "`low` must not be above `high`, got 0.9 and 0.8."),
        ({"high": float("nan")}, "`high` must be a finite number, got nan."),
        ({"low": "0.4"}, "`low` must be a finite number, got '0.4'."),
        ({"hysteresis": -0.1}, "`hysteresis` must be a finite number that is not negative, got -0.1."),
        ({"max_rest": 0}, "`max_rest` must be a positive integer, got 0."),
    ],
)
def test_bad_arguments_of_the_adaptive_ratio(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveUpdateRatio(**kwargs)
