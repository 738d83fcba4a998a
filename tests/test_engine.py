"""One batch is one step, whatever the plan; noise, micro-batches, clipping, and what is shown and checked."""

import csv
import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from toys import fit, points, sgd, small, spy_on_samples, trainer, weights

from lightning_gan_stability import (
    MLP,
    Extragradient,
    GANModule,
    GradientPenalty,
    Hinge,
    LeastSquares,
    R1Penalty,
    R2Penalty,
    Reconstruction,
    Relativistic,
    RelativisticAverage,
    Simultaneous,
    Unrolling,
    UpdateRatio,
    UpdateRule,
    Wasserstein,
)

PLANS = [("d", "g"), ("d",), ("d", "d", "g"), ("g", "d")]


@pytest.mark.parametrize("plan", PLANS)
def test_max_steps_counts_batches(plan):
    gan = small()
    gan.plan = plan
    run = fit(gan, points(20), max_steps=7, max_epochs=-1)
    assert gan.iteration == run.global_step == 7
    assert run.fit_loop.epoch_loop._batches_that_stepped == 7


@pytest.mark.parametrize("plan", PLANS)
def test_every_n_train_steps_saves_every_n_batches(plan, tmp_path):
    gan = small()
    gan.plan = plan
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(gan, points(10), callbacks=[saver], enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]


def test_optimizer_steps_are_those_of_the_plan():
    gan = small(g_optimizer=sgd(0.0), d_optimizer=sgd(0.0))
    gan.plan = ("d", "d", "g", "d")
    seen = []

    class Recorder(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append("dg"[trainer.optimizers.index(optimizer)])

    fit(gan, points(2), callbacks=[Recorder()])
    assert seen == ["d", "d", "g", "d"] * 2


def test_a_rule_that_leaves_the_players_alone_still_counts():
    class Rest(UpdateRule):
        def __call__(self, module, batch):
            pass

    gan = small()
    before = weights(gan)
    run = fit(gan, points(5), callbacks=[Rest()])
    assert run.global_step == gan.iteration == 5
    assert torch.equal(before, weights(gan))


def test_two_rules_are_refused():
    with pytest.raises(Exception, match="Simultaneous and Simultaneous are update rules, but a run has only one"):
        fit(small(), points(2), callbacks=[Simultaneous(), Simultaneous()])


@pytest.mark.parametrize("plan", [(), ("x",), ("d", "G"), None])
def test_plan_is_checked(plan):
    with pytest.raises(ValueError, match="`plan` must be a sequence of 'd' and 'g'"):
        GANModule(MLP([2, 2]), MLP([2, 1]), latent_dim=2, plan=plan)
    with pytest.raises(ValueError, match="`plan` must be a sequence of 'd' and 'g'"):
        small().plan = plan


def test_a_second_fit_goes_on_and_doubles_nothing():
    batches = points(6)
    whole, parts = small(g_optimizer=sgd(0.1), d_optimizer=sgd(0.1)), small(g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
    fit(whole, batches, callbacks=[R1Penalty(0.5)])
    penalty = R1Penalty(0.5)
    fit(parts, batches[:3], callbacks=[penalty])
    fit(parts, batches[3:], callbacks=[penalty])
    assert torch.equal(weights(whole), weights(parts))


def test_alternating_equals_a_loop_by_hand():
    """Plain SGD steps in plain PyTorch, with the latents that the module drew."""
    gan = small(g_optimizer=sgd(0.1), d_optimizer=sgd(0.2))
    torch.manual_seed(0)
    generator, discriminator = MLP([4, 16, 2]), MLP([2, 16, 1])
    latents = []

    spy_on_samples(gan, lambda player, outputs: latents.append(outputs))
    batches = points(5)
    fit(gan, batches)
    softplus = nn.functional.softplus
    for i, real in enumerate(batches):
        z_d, z_g = latents[2 * i].latents, latents[2 * i + 1].latents
        assert not torch.equal(z_d, z_g)
        loss = softplus(-discriminator(real)).mean() + softplus(discriminator(generator(z_d).detach())).mean()
        gradients = torch.autograd.grad(loss, list(discriminator.parameters()))
        with torch.no_grad():
            for p, g in zip(discriminator.parameters(), gradients, strict=True):
                p -= 0.2 * g
        gradients = torch.autograd.grad(softplus(-discriminator(generator(z_g))).mean(), list(generator.parameters()))
        with torch.no_grad():
            for p, g in zip(generator.parameters(), gradients, strict=True):
                p -= 0.1 * g
    expected = torch.cat([p.detach().flatten() for n in (generator, discriminator) for p in n.parameters()])
    torch.testing.assert_close(weights(gan), expected, rtol=1e-6, atol=1e-7)


def test_simultaneous_differs_from_alternating_in_the_generator_alone_after_one_step():
    a, b = small(), small()
    fit(a, points(1))
    fit(b, points(1), callbacks=[Simultaneous()])
    assert torch.equal(weights(a.discriminator), weights(b.discriminator))
    assert not torch.equal(weights(a.generator), weights(b.generator))


def test_simultaneous_refuses_a_player_that_moves_twice():
    gan = small()
    gan.plan = ("d", "d", "g")
    with pytest.raises(Exception, match="Simultaneous steps every player once, but the plan is"):
        fit(gan, points(1), callbacks=[Simultaneous()])


# ---------- accumulate


@pytest.mark.parametrize("batch_size", [8, 7, 2, 1])
@pytest.mark.parametrize("callbacks", [[], [R1Penalty(1.0)], [R2Penalty(1.0, every=2)], [GradientPenalty(1.0)]])
def test_micro_batches_equal_the_full_batch(batch_size, callbacks):
    batches = points(5, batch_size, dtype=torch.float64) + points(1, 3, seed=1, dtype=torch.float64)
    results = []
    for accumulate in (1, 3):
        gan = small(loss=LeastSquares(), accumulate=accumulate, g_optimizer=sgd(0.1), d_optimizer=sgd(0.1)).double()
        fit(gan, batches, callbacks=callbacks)
        results.append(weights(gan))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_micro_batches_are_as_small_as_asked():
    sizes = []

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = MLP([2, 4, 1])

        def forward(self, x):
            sizes.append(len(x))
            return self.net(x)

    gan = GANModule(MLP([4, 2]), Seen(), latent_dim=4, accumulate=4)
    fit(gan, points(1, batch_size=10))
    assert max(sizes) == 3
    assert sum(sizes) == 10 + 10 + 10  # real and fake for the discriminator, fake for the generator


def test_outputs_of_micro_batches_is_the_whole_batch():
    gan = small(accumulate=3)
    seen = []

    class Rule(UpdateRule):
        def __call__(self, module, batch):
            seen.append(module.compute_gradients("d", batch))
            module.apply_gradients("d")

    batch = points(1, batch_size=7)
    fit(gan, batch, callbacks=[Rule()])
    torch.testing.assert_close(seen[0].real, batch[0])
    assert seen[0].fake_logits.shape == seen[0].real_logits.shape == (7,)
    assert not seen[0].fake_logits.requires_grad


def test_relativistic_average_refuses_micro_batches():
    with pytest.raises(Exception, match=r"RelativisticAverage compares each sample with the mean .* accumulate=2"):
        fit(small(loss=RelativisticAverage(), accumulate=2), points(1))


# ---------- noise


def test_noise_is_a_function_of_seed_rank_iteration_and_draw():
    a, b = small(), small(noise_seed=1)
    first, second = a.noise.randn(64, 4), a.noise.randn(64, 4)
    assert not torch.equal(first, second)
    assert not torch.equal(first, b.noise.randn(64, 4))
    fresh = small()
    assert torch.equal(fresh.noise.randn(64, 4), first)
    fresh.iteration = 1
    fresh.noise.draw = 0
    assert not torch.equal(fresh.noise.randn(64, 4), first)
    values = small().noise.rand(10000)
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert small().noise.randn(10000).std().item() == pytest.approx(1, abs=4 / (2 * 10000) ** 0.5)


def test_training_leaves_the_global_random_state_alone():
    gan = small()
    run = trainer(callbacks=[GradientPenalty()])
    states = []

    class States(Callback):
        def on_train_batch_start(self, *_):
            states.append(torch.get_rng_state())

        def on_train_batch_end(self, *_):
            states.append(torch.get_rng_state())

    run.callbacks.append(States())
    run.fit(gan, torch.utils.data.DataLoader(points(3), batch_size=None))
    assert all(torch.equal(states[0], state) for state in states)


def test_sampling_between_steps_does_not_change_training():
    class Curious(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.sample(5)

    a, b = small(), small()
    fit(a, points(4))
    fit(b, points(4), callbacks=[Curious()])
    assert torch.equal(weights(a), weights(b))


# ---------- clipping and scheduling


def test_each_players_gradient_is_clipped_by_itself():
    limit = 1e-3
    gan = small(clip_norm=limit, g_optimizer=sgd(1.0), d_optimizer=sgd(1.0), loss=Wasserstein())
    before = [weights(gan.generator), weights(gan.discriminator)]
    fit(gan, points(1))
    for network, w in zip((gan.generator, gan.discriminator), before, strict=True):
        assert (weights(network) - w).norm().item() == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("limits", [{"d": 1e-3, "g": 1e-2}, {"d": 1e-3}, {"g": 1e-2}])
def test_each_player_may_have_a_limit_of_its_own(limits):
    moved = {}
    for clip_norm in (None, limits):
        gan = small(clip_norm=clip_norm, g_optimizer=sgd(1.0), d_optimizer=sgd(1.0), loss=Wasserstein())
        gan.plan = ("d",)
        before = {"d": weights(gan.discriminator), "g": weights(gan.generator)}
        fit(gan, points(1))
        gan.plan = ("g",)
        fit(gan, points(1))
        networks = {"d": gan.discriminator, "g": gan.generator}
        moved[clip_norm is None] = {p: (weights(networks[p]) - before[p]).norm().item() for p in "dg"}
    for player in "dg":
        free = moved[True][player]
        assert free > 2e-2  # a limit binds
        if player in limits:
            assert moved[False][player] == pytest.approx(limits[player], rel=1e-3)
        elif player == "d":
            assert moved[False][player] == free


@pytest.mark.parametrize(
    ("clip_norm", "message"),
    [
        ({}, "`clip_norm` must be a number, or a dict of 'd' and 'g', got {}."),
        ({"d": 1.0, "c": 1.0}, "`clip_norm` must be a number, or a dict of 'd' and 'g', got {'d': 1.0, 'c': 1.0}."),
        ({"d": 0.0}, "`clip_norm['d']` must be a positive finite number, got 0.0."),
        ({"g": "a"}, "`clip_norm['g']` must be"),
        (-1.0, "`clip_norm` must be a positive finite number, got -1.0."),
    ],
)
def test_bad_limits(clip_norm, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(clip_norm=clip_norm)


def test_schedulers_step_after_each_step_of_their_player():
    gan = small(
        g_optimizer=sgd(1.0),
        d_optimizer=sgd(1.0),
        g_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        d_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    )
    gan.plan = ("d", "d", "g")
    run = fit(gan, points(3))
    d, g = (o.param_groups[0]["lr"] for o in run.optimizers)
    assert d == pytest.approx(0.9**6)
    assert g == pytest.approx(0.5**3)


@pytest.mark.parametrize("ratio", [None, 2])
def test_rates_that_are_logged_are_those_of_the_steps(ratio, tmp_path):
    """`LearningRateMonitor` asks Lightning how often a scheduler steps."""
    gan = small(d_optimizer=sgd(1.0), g_optimizer=sgd(1.0), d_scheduler=halving, g_scheduler=halving)
    logger = CSVLogger(tmp_path, name="", version="")
    extra = [] if ratio is None else [UpdateRatio(ratio)]
    fit(gan, points(4), callbacks=[LearningRateMonitor(), *extra], logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    d, g = ([float(row[name]) for row in rows if row[name]] for name in ("lr-SGD", "lr-SGD-1"))
    assert d == [1.0, 0.5, 0.25, 0.125]
    assert g == ([1.0, 0.5, 0.25, 0.125] if ratio is None else [1.0, 1.0, 0.5, 0.5])


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


EXTRAS = {
    "Alternating": list,
    "UpdateRatio(2)": lambda: [UpdateRatio(2)],
    "Simultaneous": lambda: [Simultaneous()],
    "Extragradient": lambda: [Extragradient()],
    "Unrolling": lambda: [Unrolling(2)],
}


@pytest.mark.parametrize("rule", EXTRAS)
@pytest.mark.parametrize("how", ["scheduler_interval", "configure_optimizers"])
def test_schedulers_may_count_epochs(how, rule):
    """A decay to zero over three epochs, whoever moves when: two thirds after one, a third after two."""
    decay = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / 3)  # noqa: E731
    rates = []

    class Own(GANModule):
        def configure_optimizers(self):
            optimizers, _ = super().configure_optimizers()
            return optimizers, [{"scheduler": decay(o), "interval": "epoch"} for o in optimizers]

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append([o.param_groups[0]["lr"] for o in trainer.optimizers])

    networks = MLP([4, 16, 2]), MLP([2, 16, 1])
    arguments = {"latent_dim": 4, "d_optimizer": sgd(0.01), "g_optimizer": sgd(0.03)}
    if how == "scheduler_interval":
        gan = GANModule(*networks, **arguments, d_scheduler=decay, g_scheduler=decay, scheduler_interval="epoch")
    else:
        gan = Own(*networks, **arguments)
    fit(gan, points(5), max_epochs=3, callbacks=[Watch(), *EXTRAS[rule]()])
    expected = [[factor, 3 * factor] for factor in (0.01, 0.02 / 3, 0.01 / 3) for _ in range(5)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


def test_a_scheduler_of_epochs_steps_with_an_epoch_that_is_cut_short():
    gan = small(d_optimizer=sgd(1.0), d_scheduler=halving, scheduler_interval="epoch")
    run = fit(gan, points(5), max_epochs=3, limit_train_batches=2)
    assert run.optimizers[0].param_groups[0]["lr"] == 0.125


class Timm:
    """A scheduler with a `step` of its own, as timm's have it."""

    def __init__(self, optimizer):
        self.optimizer, self.seen = optimizer, []

    def step(self, epoch, metric=None):
        self.seen.append(epoch)
        self.optimizer.param_groups[0]["lr"] = 1.0 / (1 + epoch)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_schedulers_are_stepped_the_way_a_module_says():
    class Own(GANModule):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.steps["d"] + 1)

    gan = Own(MLP([4, 2]), MLP([2, 1]), 4, d_optimizer=sgd(1.0), d_scheduler=Timm)
    run = fit(gan, points(4))
    assert run.lr_scheduler_configs[0].scheduler.seen == [1, 2, 3, 4]
    assert run.optimizers[0].param_groups[0]["lr"] == 0.2


def test_a_scheduler_that_needs_to_be_told_something_is_refused_before_the_first_batch():
    gan = small(d_scheduler=Timm)
    with pytest.raises(
        MisconfigurationException, match="`step` of Timm takes arguments, which only you know: override"
    ):
        fit(gan, points(2))
    assert gan.iteration == 0


@pytest.mark.parametrize("interval", ["batch", "epochs", None, 1])
def test_bad_intervals(interval):
    with pytest.raises(ValueError, match="`scheduler_interval` must be one of 'step', 'epoch', got "):
        small(scheduler_interval=interval)


def test_one_scheduler_alone_belongs_to_its_player():
    gan = small(g_optimizer=sgd(1.0), g_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
    run = fit(gan, points(2))
    assert run.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.25)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(2e-4)


def test_plateau_scheduler_is_refused():
    gan = small(d_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(Exception, match="`d_scheduler` is ReduceLROnPlateau"):
        fit(gan, points(1))


def test_settings_of_a_scheduler_that_have_no_use_are_refused():
    rate = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)  # noqa: E731
    with pytest.raises(MisconfigurationException, match="`g_scheduler` must make a scheduler, got a dict"):
        fit(small(g_scheduler=lambda optimizer: {"scheduler": rate(optimizer), "interval": "epoch"}), points(1))

    class Mine(GANModule):
        def configure_optimizers(self):
            (d, g), _ = super().configure_optimizers()
            return [d, g], [{"scheduler": rate(g), "interval": "step", "frequency": 5}]

    with pytest.raises(
        MisconfigurationException, match="`g_scheduler` is StepLR with interval='step', monitor=None and frequency=5"
    ):
        fit(Mine(MLP([4, 2]), MLP([2, 1]), 4), points(1))


def test_values_in_the_name_of_a_checkpoint_are_those_of_its_step(tmp_path):
    saves = ModelCheckpoint(tmp_path, "{d/adversarial:.6f}", every_n_train_steps=2, save_top_k=-1, monitor=None)
    seen = {}

    class See(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen[trainer.global_step] = f"{module.last_step.values['d/adversarial'].item():.6f}"

    fit(small(), points(6), callbacks=[saves, See()], enable_checkpointing=True)
    assert {path.stem.split("=")[1] for path in tmp_path.rglob("*.ckpt")} == {seen[2], seen[4], seen[6]}


# ---------- not finite


class Poison(nn.Module):
    """A linear discriminator whose logits are NaN from one call on."""

    def __init__(self, calls):
        super().__init__()
        self.net, self.calls = nn.Linear(2, 1), calls

    def forward(self, x):
        self.calls -= 1
        return self.net(x) * (float("nan") if self.calls < 0 else 1.0)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (6, r"the discriminator's update at step 2: `d/adversarial`, `d/grad_norm`"),
        (8, r"the generator's update at step 2: `g/adversarial`, `g/grad_norm`"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(calls, message):
    gan = GANModule(MLP([4, 2]), Poison(calls), latent_dim=4)
    with pytest.raises(FloatingPointError, match=message):
        fit(gan, points(5))
    assert weights(gan).isfinite().all()
    assert gan.iteration == 2


def test_a_penalty_or_a_gradient_that_is_not_finite_is_named():
    class Root(R1Penalty.__bases__[0]):
        def penalty(self, module, outputs):
            return (outputs.real_logits - outputs.real_logits).sqrt()  # value 0, gradient NaN

    with pytest.raises(FloatingPointError, match=r"at step 0: `d/grad_norm`\."):
        fit(small(), points(1), callbacks=[Root()])

    class Infinite(R1Penalty.__bases__[0]):
        player = "g"

        def penalty(self, module, outputs):
            return outputs.fake_logits / 0

    with pytest.raises(FloatingPointError, match=r"the generator's update at step 0: `g/infinite`, `g/grad_norm`\."):
        fit(small(), points(1), callbacks=[Infinite()])


def test_what_was_written_before_an_error_is_not_lost(tmp_path):
    gan = GANModule(MLP([4, 2]), Poison(20), latent_dim=4)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.raises(FloatingPointError):
        fit(gan, points(20), callbacks=[saver], enable_checkpointing=True, logger=logger, log_every_n_steps=1)
    assert len(list((tmp_path / "saved").glob("*.ckpt"))) == 3
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 6  # six steps of three calls each, and the header


# ---------- the log

KEYS = {
    "d/adversarial",
    "g/adversarial",
    "d/real_logit",
    "d/fake_logit",
    "d/accuracy",
    "d/grad_norm",
    "g/grad_norm",
}


def test_log_keys_and_values():
    gan = small(loss=Hinge())
    seen = {}

    class Recorder(UpdateRule):
        def __call__(self, module, batch):
            for player in ("d", "g"):
                seen[player] = module.compute_gradients(player, batch)
                module.apply_gradients(player)

    run = fit(gan, points(3), callbacks=[Recorder(), R1Penalty(0.5), R2Penalty(0.5, every=2)])
    metrics = run.callback_metrics
    assert set(metrics) == KEYS | {"d/r1", "d/r2"}
    real, fake = seen["d"].real_logits, seen["d"].fake_logits
    expected = (1 - real).relu().mean() + (1 + fake).relu().mean()
    torch.testing.assert_close(metrics["d/adversarial"], expected)
    torch.testing.assert_close(metrics["g/adversarial"], -seen["g"].fake_logits.mean())
    torch.testing.assert_close(metrics["d/real_logit"], real.mean())
    torch.testing.assert_close(metrics["d/fake_logit"], fake.mean())
    torch.testing.assert_close(metrics["d/accuracy"], ((real > 0).float() + (fake < 0).float()).mean() / 2)


def test_gradient_norm_is_the_norm_of_the_gradient():
    gan = small(g_optimizer=sgd(1.0), d_optimizer=sgd(1.0))
    before = weights(gan.discriminator)
    run = fit(gan, points(1))
    step = (weights(gan.discriminator) - before).norm()
    torch.testing.assert_close(run.callback_metrics["d/grad_norm"], step, rtol=1e-4, atol=0)


def test_a_lazy_penalty_is_logged_as_it_was_last_seen_and_without_its_interval():
    run = fit(small(), points(3), callbacks=[R1Penalty(0.5, every=3)])
    lazy = run.callback_metrics["d/r1"]  # due at step 0 alone
    run = fit(small(), points(1), callbacks=[R1Penalty(0.5)])
    torch.testing.assert_close(lazy, run.callback_metrics["d/r1"])


def test_two_penalties_of_one_class_both_count():
    gan = small(g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
    run = fit(gan, points(2), callbacks=[R1Penalty(0.5), R1Penalty(1.0)])
    single = small(g_optimizer=sgd(0.1), d_optimizer=sgd(0.1))
    fit(single, points(2), callbacks=[R1Penalty(1.5)])
    torch.testing.assert_close(weights(gan), weights(single))
    assert {"d/r1", "d/r1_2"} <= set(run.callback_metrics)


def test_values_are_logged_when_somebody_looks(tmp_path):
    """Every 4th step for the logger, the first and the last for the progress bar; all for a monitor."""
    counts = []

    class Counting(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            counts.append(module.last_step.visible)

    logger = CSVLogger(tmp_path, name="", version="")
    fit(small(), points(10), callbacks=[Counting()], log_every_n_steps=4, logger=logger)
    assert counts == [i in (0, 3, 7, 9) for i in range(10)]
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[header.split(",").index("step")] for row in rows] == ["3", "7"]
    counts.clear()
    saver = ModelCheckpoint(tmp_path, monitor="g/adversarial", every_n_train_steps=1)
    fit(small(), points(3), callbacks=[Counting(), saver], enable_checkpointing=True, log_every_n_steps=100)
    assert counts == [True] * 3


def test_relativistic_generator_sees_real_logits():
    gan = small(loss=Relativistic())
    seen = []

    class Recorder(UpdateRule):
        def __call__(self, module, batch):
            seen.append(module.compute_gradients("g", batch))
            module.apply_gradients("g")

    run = fit(gan, points(1), callbacks=[Recorder()])
    expected = nn.functional.softplus(seen[0].real_logits - seen[0].fake_logits).mean()
    torch.testing.assert_close(run.callback_metrics["g/adversarial"], expected)


def test_a_third_optimizer_is_the_subclass_s_own():
    class Encoded(GANModule):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.encoder = nn.Linear(2, 2)

        def configure_optimizers(self):
            optimizers, schedulers = super().configure_optimizers()
            third = torch.optim.SGD(self.encoder.parameters(), lr=0.1)
            return [*optimizers, third], [*schedulers, torch.optim.lr_scheduler.ReduceLROnPlateau(third)]

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            third = self.trainer.optimizers[2]
            third.zero_grad()
            (1e6 * self.encoder(batch)).square().mean().backward()
            third.step()

    torch.manual_seed(0)
    plain, encoded = (kind(MLP([4, 8, 2]), MLP([2, 8, 1]), 4, clip_norm=0.1) for kind in (GANModule, Encoded))
    encoded.load_state_dict(plain.state_dict(), strict=False)
    start = encoded.encoder.weight.detach().clone()
    runs = [fit(module, points(4)) for module in (plain, encoded)]
    assert [run.global_step for run in runs] == [4, 4]
    assert torch.equal(weights(plain.generator), weights(encoded.generator))
    assert not torch.equal(encoded.encoder.weight, start)


def test_names_that_the_log_has_for_something_else():
    class Taken(Reconstruction):
        name = "grad_norm"

    with pytest.raises(
        MisconfigurationException, match="name 'grad_norm' of Taken is used for another value in the log"
    ):
        fit(small(), points(1), callbacks=[Taken()])

    class Returns(GANModule):
        returned = ""

        def auxiliary_losses(self, player, outputs):
            return {self.returned: outputs.fake.mean()} if player == "g" else {}

    for name in ("", "adversarial/a", "reconstruction"):
        module = Returns(MLP([4, 2]), MLP([2, 1]), 4)
        module.returned = name
        with pytest.raises(ValueError, match=f"`auxiliary_losses` returned '{name}', which the log has for something"):
            fit(module, points(1), callbacks=[Reconstruction()])


def test_terms_of_one_name_keep_theirs_whatever_is_due():
    module, seen = small(), []
    first, second = R1Penalty(1.0, every=3), R1Penalty(2.0)
    player_loss = module.player_loss

    def spy(player, outputs, adversarial=None):
        found = player_loss(player, outputs, adversarial)
        seen.append({*found[1]} - {"adversarial"})
        return found

    module.player_loss = spy
    fit(module, points(4), callbacks=[first, second])
    assert seen[::2] == [{"r1", "r1_2"}, {"r1_2"}, {"r1_2"}, {"r1", "r1_2"}]
    assert [module.term_name(c) for c in (first, second)] == ["r1", "r1_2"]


class TwoJudges(GANModule):
    """Two discriminators, or one with features, whose outputs come in several forms."""

    form = staticmethod(lambda d, x: None)

    def discriminate(self, network, sample, condition):
        return type(self).form(network, sample)


def two_judges(form):
    torch.manual_seed(0)
    module = type("Judges", (TwoJudges,), {"form": staticmethod(form)})
    return module(MLP([4, 2]), nn.ModuleDict({"a": MLP([2, 8, 1]), "b": MLP([2, 8, 3])}), 4)


IDLE = r"does not depend on `b\.layers\.0\.weight`: .* return them in a list or a dict"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rule", [None, Simultaneous()])
def test_logits_that_are_taken_for_features(rule, accumulate):
    module = two_judges(lambda d, x: (d["a"](x), d["b"](x)))
    module.accumulate = accumulate
    with pytest.warns(UserWarning, match=IDLE) as found:
        fit(module, points(3), callbacks=[rule] if rule else [])
    assert len([w for w in found if "list or a dict" in str(w.message)]) == 1


@pytest.mark.parametrize(
    "form",
    [
        lambda d, x: [d["a"](x), d["b"](x)],
        lambda d, x: {"a": d["a"](x), "b": d["b"](x)},
        lambda d, x: (d["a"](x) + d["b"](x).sum(1, keepdim=True), d["b"](x)),  # features of what judges
        lambda d, x: (d["a"](x), [d["b"](x)]),  # nobody takes a list for logits
    ],
)
def test_logits_and_features_that_are_what_they_are(form):
    fit(two_judges(form), points(2))  # warnings are errors


def test_features_with_frozen_weights():
    module = two_judges(lambda d, x: (d["a"](x), d["b"](x)))
    module.discriminator["b"].requires_grad_(False)
    fit(module, points(2))


def test_features_that_a_loss_of_the_discriminator_reads():
    module = two_judges(lambda d, x: (d["a"](x), d["b"](x)))
    module.auxiliary_losses = lambda player, outputs: {"b": outputs.real_features.square().mean()}
    module.plan = ("d",)
    fit(module, points(2))
