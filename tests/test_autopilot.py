"""Autopilot: what it leaves alone, what it tries, what it chooses, and that its runs are accounted for and resumed."""

import math
from importlib import import_module
from pathlib import Path

import pytest
import scipy.stats
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts
from torch.utils.data import DataLoader, TensorDataset
from toys import Line, Point, fit, points, sgd, small, trainer, weights, zeros

from lightning_gan_stability import (
    MLP,
    AdversarialStart,
    Alternating,
    Autopilot,
    CollapseDetector,
    DCGANDiscriminator,
    DCGANGenerator,
    Extragradient,
    GANModule,
    GeneratorEMA,
    GradientPenalty,
    HealthMonitor,
    OptimizerSchedule,
    QualityMonitor,
    R1Penalty,
    R2Penalty,
    Ring,
    Schedule,
    Simultaneous,
    UpdateRatio,
    Wasserstein,
)
from lightning_gan_stability.events import read_events
from lightning_gan_stability.metrics import RandomConvolutions, energy_distance
from lightning_gan_stability.metrics.energy import mean_distance
from lightning_gan_stability.monitors.rollback import ScaleLearningRate
from lightning_gan_stability.monitors.steering import LIMITS, PORTFOLIO
from lightning_gan_stability.outcome import describe_outcome

TURNS = 1 + len(PORTFOLIO) + 2 * 2  # of a race: all for one length, two for two


def adam(lr, betas=(0.5, 0.999)):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=betas)


def gan(g_lr=1e-3, d_lr=1e-3, seed=0, **kwargs):
    return small(seed, **{"g_optimizer": adam(g_lr), "d_optimizer": adam(d_lr)} | kwargs)


def run(module, autopilot, steps=120, *callbacks, **kwargs):
    """Train on points around (3, 0), of which the untrained generator knows nothing."""
    data = [batch * 0.3 + torch.tensor([3.0, 0.0]) for batch in points(steps, 32)]
    chosen = [] if autopilot is None else [autopilot]
    return fit(module, data, max_steps=steps, callbacks=[*chosen, *callbacks], **kwargs)


class Watch(Callback):
    """The rates, betas and weights of R1 and R2 at each batch, and the iteration."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        groups = [pl_module.optimizer(player).param_groups for player in "dg"]
        penalties = [c for c in trainer.callbacks if isinstance(c, R1Penalty | R2Penalty)]
        self.rows.append(
            {
                "lr": [[group["lr"] for group in part] for part in groups],
                "betas": [part[0].get("betas") for part in groups],
                "gamma": [0.0 if c.rests else 2 * c.weight for c in penalties],
                "iteration": pl_module.iteration,
            }
        )


# ---------- the distance


def test_the_energy_distance_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((1, 1), (7, 5), (200, 300)):
        x, y = torch.randn(n, 1, generator=generator), 2 * torch.randn(m, 1, generator=generator) + 1
        expected = scipy.stats.energy_distance(x[:, 0].double(), y[:, 0].double()) ** 2
        assert energy_distance(x, y) == pytest.approx(expected, rel=1e-9)
    x = torch.randn(50, 3, generator=generator)
    assert energy_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert energy_distance(3 * x, -3 * x) == pytest.approx(3 * energy_distance(x, -x))
    assert math.isnan(energy_distance(x, x * math.nan))


def test_what_is_known_of_real_samples_is_not_computed_again(monkeypatch):
    """And the distance is the same number, bit for bit."""
    x, y = torch.randn(40, 3), torch.randn(50, 3) + 1
    across, real, fake = (torch.cdist(a.double(), b.double()).mean() for a, b in ((x, y), (x, x), (y, y)))
    assert energy_distance(x, y, mean_distance(x)) == energy_distance(x, y) == float(2 * across - real - fake)
    compared, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b, **kwargs: compared.append((len(a), len(b))) or cdist(a, b))
    fit(gan(), points(5, 14), callbacks=[Autopilot(every=10, n_samples=100)], max_epochs=8)
    assert compared == [(70, 70), *[(70, 100), (100, 100)] * 4]


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((4, 2), (4, 3)), ((0, 2), (4, 2))])
def test_the_energy_distance_refuses_other_features(shapes):
    with pytest.raises(ValueError, match="must be features"):
        energy_distance(*map(torch.zeros, shapes))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 17), (2, 50), (1, 4, 6, 5), (3, 1, 1)])
def test_random_convolutions_see_all_shapes_the_same_way_each_time(shape):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    samples = torch.linspace(-1, 1, 2 * math.prod(shape)).reshape(2, *shape)
    first, second = RandomConvolutions(width=8)(samples), RandomConvolutions(width=8)(samples)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dim() == 2
    assert bool(first.isfinite().all())
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, RandomConvolutions(width=8, seed=1)(samples))
    with pytest.raises(ValueError, match="takes samples"):
        RandomConvolutions()(torch.zeros(2, 3))


def test_random_convolutions_tell_a_texture_from_its_mean():
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8).expand(4, 1, 16, 16)
    flat = torch.zeros(4, 1, 16, 16)
    features = RandomConvolutions()
    assert energy_distance(features(checks), features(flat)) > 1.0  # pooled pixels are alike
    assert nn.functional.adaptive_avg_pool2d(checks, 8).abs().max() == 0


# ---------- what it leaves alone


@pytest.mark.parametrize("make", [gan, lambda: gan(loss=Wasserstein())])
def test_a_healthy_run_is_the_same_with_it(make):
    alone, watched = make(), make()
    run(alone, None)
    run(watched, autopilot := Autopilot(every=10))
    assert torch.equal(weights(alone), weights(watched))
    assert watched.generator_ema is None
    assert autopilot.actions == []
    assert len(autopilot.history) == 12
    assert watched.iteration == 120
    assert min(d for _, d in autopilot.history) < autopilot.history[0][1]


def test_it_keeps_the_settings_of_the_user_where_others_are_worse():
    hopeless = {"g_lr": [0.0, 0.0], "d_lr": [0.0, 0.0], "beta1": None, "beta2": None, "gamma": None}
    autopilot, watch = Autopilot("always", limits=hopeless, fall=0.0), Watch()
    run(gan(), autopilot, 120, watch)
    assert autopilot.settings["g_lr"] == autopilot.settings["d_lr"] == 1e-3
    assert watch.rows[-1]["lr"] == [[1e-3], [1e-3]]
    assert autopilot.actions[-1]["what"] == "nothing changes"


# ---------- what it tries and chooses


def test_a_race_tries_each_setting_from_the_same_state_and_counts_its_batches():
    autopilot, watch = Autopilot("always", search=0.5), Watch()
    module = gan()
    run(module, autopilot, 200, watch)
    leg, turns = round(100 / TURNS), len(PORTFOLIO) + 1
    assert autopilot.actions[-1]["step"] == leg * TURNS
    tried = [watch.rows[i * leg] for i in range(turns)]
    expected = [(1e-3, 1e-3, 0.5, 0.999, 0.0), *PORTFOLIO]
    for row, (g_lr, d_lr, beta1, beta2, gamma) in zip(tried, expected, strict=True):
        assert row["lr"] == [[pytest.approx(d_lr)], [pytest.approx(g_lr)]]
        assert row["betas"] == [(beta1, beta2)] * 2
        assert row["gamma"] == [gamma] * 2
        assert row["iteration"] == 1
    assert len(watch.rows) == 200
    assert module.iteration == 200 - TURNS * leg + 3 * leg


@pytest.mark.parametrize("seed", range(6))
def test_it_does_what_the_rule_does_that_was_written_down_without_it(seed, monkeypatch):
    """Dirac-GANs with random rates, losses and optimizers: in closed form, and through a Trainer."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "benchmarks")
    game = import_module("dirac").draw(seed)
    closed_form = import_module("dirac").Pilot(game, 300).run()
    trained = import_module("dirac").through_trainer(game, 300)
    assert trained == pytest.approx(closed_form, rel=1e-9)


def test_a_runner_that_stands_still_loses_to_those_that_move_away_at_first():
    """From (1, 1) the Dirac-GAN goes away from the data at first; with rates of 1e-6 it stays, and looks better."""
    rates = {"g_optimizer": adam(1e-6), "d_optimizer": adam(1e-6)}
    module = GANModule(Point(), Line(), latent_dim=1, loss=Wasserstein(), **rates)
    fit(module, zeros(2000), max_steps=2000, callbacks=[autopilot := Autopilot("always", n_samples=50)])
    assert autopilot.actions[1]["what"].startswith(("g_lr", "d_lr"))
    assert autopilot.settings["g_lr"] > 1e-6
    assert abs(module.generator_ema.theta.item()) < 0.1


def test_among_those_that_are_near_enough_the_known_order_counts():
    """A generator that is right from the beginning: all are as near as can be told, with rates that hardly move it."""
    slow = {"g_lr": [1e-7, 1e-7], "d_lr": [1e-7, 1e-7]}
    module = small(0, g_optimizer=adam(1e-9), d_optimizer=adam(1e-9))
    with torch.no_grad():
        data = [module.sample(32) for _ in range(200)]
    fit(module, data, max_steps=200, callbacks=[autopilot := Autopilot("always", limits=slow, n_samples=200)])
    assert autopilot.settings["r1"] == PORTFOLIO[0][-1]


def test_it_finds_rates_where_those_of_the_user_do_nothing():
    plain, steered = gan(1e-6, 1e-6), gan(1e-6, 1e-6)
    run(plain, None, 400)
    run(steered, autopilot := Autopilot("always"), 400)
    target = torch.tensor([3.0, 0.0])
    far, near = (float((m.eval().sample(500).detach().mean(0) - target).norm()) for m in (plain, steered))
    assert far > 2.5
    assert near < 1.0
    assert autopilot.settings["g_lr"] > 1e-6
    assert autopilot.history[-1][1] < 1.0
    assert "g_lr 1e-06 → " in autopilot.actions[-1]["what"]


def test_the_winner_goes_on_from_where_it_was():
    """A run with the winner's settings alone, on the batches of its turns, comes to the weights after the race."""
    autopilot, seen = Autopilot("always", search=0.5, fall=0.0, average=False), {}

    class Turns(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.setdefault("batches", []).append((dict(autopilot.settings), batch, autopilot.leg_ends))
            if autopilot.leg_ends < 0 and "weights" not in seen:
                seen["weights"] = weights(pl_module).clone()

    run(gan(), autopilot, 200, Turns())
    winner = autopilot.settings
    mine = [batch for settings, batch, ends in seen["batches"] if ends >= 0 and settings == winner]
    assert len(mine) == 3 * 10
    beta = winner["g_beta1"], winner["g_beta2"]
    alone = gan(g_optimizer=adam(winner["g_lr"], beta), d_optimizer=adam(winner["d_lr"], beta))
    times = winner["d_steps"]
    alone.plan = (*["d"] * times, "g")
    kinds = (R1Penalty, "r1"), (R2Penalty, "r2")
    fit(alone, mine, callbacks=[kind(winner[name], every=times) for kind, name in kinds if winner[name]])
    assert torch.equal(weights(alone), seen["weights"])


@pytest.mark.parametrize("when", ["always", "trouble"])
def test_a_loss_that_is_not_finite_ends_no_run(when):
    module = gan(1e18, 1e18)
    with pytest.raises(FloatingPointError):
        run(gan(1e18, 1e18), None, 200)
    run(module, autopilot := Autopilot(when, every=10), 200)
    assert bool(weights(module).isfinite().all())
    assert autopilot.settings["g_lr"] < 1
    assert autopilot.settings["d_lr"] < 1
    whys = [action["why"] for action in autopilot.actions]
    assert any("not finite" in why for why in whys) == (when == "trouble")


def test_it_goes_back_when_samples_go_away():
    """Rates that somebody sets much too high in the middle: back to the best state, with calmer settings."""

    class Break(Callback):
        done = False

        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 300 and not self.done:
                self.done = True
                with torch.no_grad():
                    pl_module.generator.layers[-1].bias.add_(100.0)

    module = gan()
    run(module, autopilot := Autopilot(every=10, fall=0.0), 1000, Break())
    race = next(action for action in autopilot.actions if "race" in action["what"])
    assert race["step"] == 320  # two measurements in a row
    assert "samples went away from the data" in race["why"]
    assert "back to step" in race["why"]
    assert float((module.eval().sample(200).detach().mean(0) - torch.tensor([3.0, 0.0])).norm()) < 2.0


@pytest.mark.parametrize(
    ("kind", "verdict", "acts"),
    [
        ("events", "collapse", True),
        ("events", "ignored condition", False),
        ("verdicts", "oscillation", True),
        ("verdicts", "loss_tells_nothing", False),
    ],
)
def test_it_acts_on_what_a_monitor_says(kind, verdict, acts):
    monitor = CollapseDetector() if kind == "events" else HealthMonitor()

    class Say(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 45:
                said = {"step": 45, "verdict": verdict, "action": "warn", "evidence": {}, "advice": ""}
                getattr(monitor, kind).append(said)

    autopilot = Autopilot(every=10)
    run(gan(), autopilot, 200, Say(), QualityMonitor(n_samples=50, every=10**6), monitor)
    if acts:
        assert autopilot.actions[0]["step"] == 50
        assert f"a monitor says {verdict!r}" in autopilot.actions[0]["why"]
    assert autopilot.races == int(acts)


# ---------- rates, penalties, averages


def test_rates_of_all_groups_fall_to_zero_together():
    def groups(parameters):
        first, *rest = parameters
        return torch.optim.Adam([{"params": [first], "lr": 1e-3}, {"params": rest, "lr": 1e-4}])

    watch, autopilot = Watch(), Autopilot("always", fall=0.5)
    run(gan(g_optimizer=groups), autopilot, 200, watch)
    rate = autopilot.settings["g_lr"]
    for step in (99, 100, 150, 199):
        factor = min(1.0, 2 * (1 - step / 200))
        assert watch.rows[step]["lr"][1] == pytest.approx([rate * factor, rate / 10 * factor])


def test_rates_fall_in_each_turn_of_a_race():
    watch, autopilot = Watch(), Autopilot("always", search=0.5, fall=0.5)
    run(gan(), autopilot, 200, watch)
    lengths = [10] * (1 + len(PORTFOLIO)) + [20] * 2
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for start, length in zip(starts, lengths, strict=True):
        # the last batch of a turn is seen after the next one's rates are set
        rates = [row["lr"][0][0] for row in watch.rows[start : start + length - 1]]
        factors = [min(1.0, (1 - i / length) / 0.5) for i in range(length - 1)]
        assert rates == pytest.approx([rates[0] * factor for factor in factors])
    assert watch.rows[150]["lr"][0][0] == pytest.approx(autopilot.settings["d_lr"] / 2)


def test_a_scheduler_of_the_user_goes_on_from_the_new_rate():
    def halve(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)

    module, watch, autopilot = gan(1e-6, 1e-6, g_scheduler=halve), Watch(), Autopilot("always")
    run(module, autopilot, 200, watch)
    expected = autopilot.settings["g_lr"] * 0.5 ** (module.iteration // 10)
    assert watch.rows[-1]["lr"][1] == [pytest.approx(expected)]
    assert watch.rows[-1]["lr"][0] == [pytest.approx(autopilot.settings["d_lr"] / 100)]  # which no scheduler sets


@pytest.mark.parametrize("make", [CosineAnnealingLR, CosineAnnealingWarmRestarts])
def test_the_rate_that_a_cosine_ends_at_is_scaled_too(make):
    """A scaled run has the scaled rates of a run without, at every step."""

    class Scale(Callback):
        def on_train_start(self, trainer, module):
            ScaleLearningRate(0.1)(trainer, module)

    rates = []
    for callbacks in [], [Scale()]:
        watch = Watch()
        module = gan(d_scheduler=lambda o: make(o, 20, eta_min=5e-4), g_scheduler=lambda o: make(o, 20, eta_min=2e-4))
        fit(module, points(25), callbacks=[*callbacks, watch])
        rates.append(torch.tensor([row["lr"] for row in watch.rows]))
    assert torch.allclose(rates[1], 0.1 * rates[0], rtol=1e-6)
    assert rates[0].min() < 3e-4


class Towards(GANModule):
    """Has a loss beside the adversarial one."""

    def auxiliary_losses(self, player, outputs):
        return {"near": outputs.fake.square().mean()} if player == "g" else {}


@pytest.mark.parametrize("when", ["always", "trouble"])
def test_nothing_is_compared_before_the_adversarial_game_begins(when):
    torch.manual_seed(0)
    options = {"g_optimizer": adam(1e-3), "d_optimizer": adam(1e-3)}
    module = Towards(MLP([4, 16, 2]), MLP([2, 16, 1]), latent_dim=4, **options)
    autopilot, watch = Autopilot(when, every=5, n_samples=50), Watch()
    run(module, autopilot, 120, AdversarialStart(40), watch)
    if when == "always":
        assert autopilot.actions[0]["step"] == 40
        assert autopilot.actions[0]["why"] == "the adversarial game begins"
        assert all(row["iteration"] >= 40 for row in watch.rows[39:])  # runners begin with the game, too
    assert [row["iteration"] for row in watch.rows[:39]] == [*range(1, 40)]
    assert all(step > 40 for step, _ in autopilot.history)
    if autopilot.first is not None:
        assert autopilot.first["step"] == 40


def test_the_penalty_of_the_user_is_steered():
    penalty, watch = R1Penalty(0.5), Watch()
    run(gan(), Autopilot("always", search=0.5), 200, penalty, watch)
    gammas = {tuple(row["gamma"]) for row in watch.rows}
    assert (0.5, 0.0) in gammas
    assert (0.1, 0.1) in gammas
    assert (0.3, 0.3) in gammas


@pytest.mark.parametrize("penalty", [GradientPenalty(), R1Penalty(Schedule(1.0, 0.1, 100))])
def test_other_penalties_stand_as_they_are(penalty):
    run(gan(), autopilot := Autopilot("always"), 60, penalty, watch := Watch())
    assert not {"r1", "r2"} & set(autopilot.settings)
    assert watch.rows
    assert not any(isinstance(c, R2Penalty) and not c.rests for c in [penalty])


class Calls(Callback):
    """Optimizer steps of the discriminator, and passes of the penalties, on each batch."""

    def __init__(self):
        self.rows = []

    def on_train_start(self, trainer, pl_module):
        self.steps, self.passes = 0, 0
        pl_module.optimizer("d").optimizer.register_step_post_hook(lambda *_: self._step())
        for penalty in (c for c in trainer.callbacks if isinstance(c, R1Penalty | R2Penalty)):
            penalty.penalty = self._counted(penalty.penalty)

    def _step(self):
        self.steps += 1

    def _counted(self, penalty):
        def call(*args, **kwargs):
            self.passes += 1
            return penalty(*args, **kwargs)

        return call

    def on_train_batch_start(self, *_):
        self.steps = self.passes = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rows.append((self.steps, self.passes, pl_module.iteration))


def test_known_settings_step_the_discriminator_twice_and_penalize_every_second_batch():
    autopilot, calls, module = Autopilot("always", search=0.5), Calls(), gan()
    run(module, autopilot, 200, calls)
    leg = round(100 / TURNS)
    own, known = calls.rows[1 : leg - 1], calls.rows[leg + 1 : 2 * leg - 1]
    assert {row[:2] for row in own} == {(1, 0)}
    # R1 and R2 in each of the two steps, on batches of an even number, that is before an odd iteration
    assert all(row[:2] == (2, 4 if row[2] % 2 else 0) for row in known)
    assert len({row[1] for row in known}) == 2
    assert module.plan == ("d", "g")


@pytest.mark.parametrize(
    ("callbacks", "limits", "steps"),
    [
        ([UpdateRatio(2)], None, 1),
        ([Simultaneous()], None, 1),
        ([Extragradient()], None, 2),  # of its own: half a step, and a whole one
        ([Alternating(share_fake=True)], None, 1),
        ([], {"d_steps": None}, 1),
    ],
)
def test_the_steps_of_the_discriminator_stay_where_something_else_decides(callbacks, limits, steps):
    autopilot, calls, module = Autopilot("always", limits=limits), Calls(), gan()
    run(module, autopilot, 60, *callbacks, calls)
    assert "d_steps" not in autopilot.settings
    assert max(row[0] for row in calls.rows) == steps


def test_two_steps_are_tried_and_said():
    limits = dict.fromkeys(("g_lr", "d_lr", "beta1", "beta2", "gamma")) | {"d_steps": [1, 2]}
    autopilot = Autopilot("always", limits=limits, average=False)
    run(gan(1e-3, 1e-3), autopilot, 200)
    assert autopilot.actions[0]["what"] == "a race of 2 settings"
    said = {1: "nothing changes", 2: "d_steps 1 → 2"}
    assert autopilot.actions[1]["what"] == said[autopilot.settings["d_steps"]]


def test_a_discriminator_with_batch_norm_has_no_penalty():
    discriminator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    module = GANModule(MLP([4, 8, 2]), discriminator, 4, g_optimizer=adam(1e-3), d_optimizer=adam(1e-3))
    run(module, autopilot := Autopilot("always"), 60)
    assert not {"r1", "r2"} & set(autopilot.settings)


def test_optimizers_without_betas_get_rates_around_their_own():
    autopilot, watch = Autopilot("always", search=0.5), Watch()
    run(gan(g_optimizer=sgd(0.01), d_optimizer=sgd(0.02)), autopilot, 200, watch)
    tried = {tuple(rates[0] for rates in row["lr"]) for row in watch.rows[:36]}  # d, g
    mean = math.sqrt(0.01 * 0.02)
    assert any(pair == pytest.approx((0.02, 0.01)) for pair in tried)
    assert any(pair == pytest.approx((30 * mean, 10 * mean)) for pair in tried)
    assert set(autopilot.settings) == {
        "g_lr",
        "d_lr",
        "r1",
        "r2",
        "d_steps",
    }


def test_limits_hold_for_what_it_sets():
    limits = {"g_lr": [2e-3, 2e-3], "d_lr": None, "beta1": [0.3, 0.4], "gamma": None}
    run(gan(), Autopilot("always", limits=limits, fall=0.0), 100, watch := Watch())
    for row in watch.rows:
        assert row["lr"][0] == [1e-3]
        assert row["lr"][1][0] in (1e-3, 2e-3)
        assert all(betas[0] in (0.5, 0.3, 0.4) for betas in row["betas"])
        assert row["gamma"] == []


def test_it_keeps_an_average_unless_there_is_one():
    module = gan()
    run(module, Autopilot("always"), 100)
    average = torch.cat([p.detach().flatten() for p in module.generator_ema.parameters()])
    assert not torch.equal(average, weights(module.generator))
    other = gan()
    run(other, Autopilot("always", average=False), 100)
    assert other.generator_ema is None
    own = gan()
    run(own, Autopilot("always"), 100, GeneratorEMA(decay=0.0))
    mine = torch.cat([p.detach().flatten() for p in own.generator_ema.parameters()])
    assert torch.equal(mine, weights(own.generator))


def test_images_need_no_download():
    torch.manual_seed(0)
    module = GANModule(DCGANGenerator(4, 1, 8, 4, batch_norm=False), DCGANDiscriminator(1, 8, 4), 4)
    images = torch.rand(64, 1, 8, 8) * 2 - 1
    run = trainer(max_steps=30, max_epochs=-1, callbacks=[autopilot := Autopilot("always", n_samples=50)])
    run.fit(module, DataLoader(TensorDataset(images), 16))
    assert isinstance(autopilot.extractor, RandomConvolutions)
    assert math.isfinite(autopilot.history[-1][1])


def test_what_limits_leave_out_is_left_alone():
    free = dict.fromkeys(("g_lr", "d_lr", "beta1", "beta2"))
    used = set()

    class Steps(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            used.add(optimizer.param_groups[0]["lr"])

    run(gan(), Autopilot("always", limits=free), 100, OptimizerSchedule({"lr": 5e-3}), Steps())
    assert used == {5e-3}
    run(gan(), Autopilot("always", limits={"g_lr": None}), 100, watch := Watch())
    assert {row["lr"][1][0] for row in watch.rows} == {1e-3}
    alone = OptimizerSchedule({"lr": 1e-3}, player="g")
    run(gan(), Autopilot("always", limits={"g_lr": None}), 20, alone)


@pytest.mark.parametrize("first", [0, 1])
def test_a_warm_up_keeps_rates_within_their_limits(first):
    def warm_up(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + first) / 20))

    watch = Watch()
    run(gan(g_scheduler=warm_up, d_scheduler=warm_up), Autopilot("always", search=0.5), 200, watch)
    assert max(rate for row in watch.rows for group in row["lr"] for rate in group) <= LIMITS["d_lr"][1]
    assert max(row["lr"][0][0] for row in watch.rows) > 1e-3


def test_the_momentum_of_one_cycle_stands():
    def cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=500)

    run(gan(g_scheduler=cycle), Autopilot("always"), 60, watch := Watch())
    assert all(row["betas"][1][0] >= 0.85 for row in watch.rows)


# ---------- a run and its end


def test_a_run_that_ends_in_a_race_keeps_the_best_so_far():
    module = gan()
    run(module, autopilot := Autopilot("always"), 15)
    assert autopilot.leg_ends == -1
    assert module.iteration >= 1
    assert len(autopilot.actions) == 2


def test_the_length_of_a_run_is_that_of_its_epochs_too():
    real = torch.randn(160, 2)
    autopilot = Autopilot("always", n_samples=50)
    trainer(max_steps=10**6, max_epochs=10, callbacks=[autopilot]).fit(gan(), DataLoader(TensorDataset(real), 16))
    assert [action["step"] for action in autopilot.actions][:2] == [0, TURNS]


def test_data_that_are_not_finite_end_a_run():
    data = [batch if i % 100 != 80 else batch * math.nan for i, batch in enumerate(points(1000, 8))]
    run = trainer(max_steps=1000, callbacks=[Autopilot("always", n_samples=50)])
    loaders = DataLoader(data, batch_size=None), DataLoader(points(10), batch_size=None)
    with pytest.raises(FloatingPointError, match="data are not finite"):
        run.fit(gan(), *loaders)
    with pytest.raises(ValueError, match="the real samples have features that are not finite"):
        fit(gan(), data, callbacks=[Autopilot("always", n_samples=50)], max_steps=1000)


def test_a_player_that_waits_is_no_trouble():
    alone, watched = gan(plan=("d",)), gan(plan=("d",))
    run(alone, None)
    run(watched, autopilot := Autopilot(every=2))
    assert torch.equal(weights(alone), weights(watched))
    assert not autopilot.actions


def test_a_run_goes_on_with_other_penalties():
    module, autopilot = gan(), Autopilot("always")
    run(module, autopilot, 60, GradientPenalty(0.1))
    fit(module, points(20), callbacks=[autopilot])
    assert {"r1", "r2"} <= set(autopilot.settings)


@pytest.mark.parametrize("when", ["always", "trouble"])
@pytest.mark.parametrize("step", [7, 30, 90, 110])
def test_resumed_equals_uninterrupted(when, step):
    def train(**kwargs):
        module = gan(1e-6, 1e-6) if when == "always" else gan(1e18, 1e-3)
        autopilot = Autopilot(when, every=8, n_samples=50)
        save = ModelCheckpoint(dirpath="saved", filename="{step}", every_n_train_steps=step, save_top_k=-1)
        options = {"max_epochs": -1, "max_steps": 120, "limit_val_batches": 0, "enable_checkpointing": True}
        data = Ring(batch_size=32, epoch_length=40, val_samples=60)
        trainer(callbacks=[autopilot, save], **options).fit(module, data, **kwargs)
        return module, autopilot

    whole, first = train()
    again, second = train(ckpt_path=f"saved/step={step}.ckpt")
    assert second.actions == first.actions
    assert second.history == first.history
    assert first.races
    assert second.settings == first.settings
    assert torch.equal(weights(whole), weights(again))


def test_the_end_of_a_run_says_what_was_done(tmp_path):
    autopilot = Autopilot("always", explain=True)
    run(gan(1e-6, 1e-6), autopilot, 100, logger=CSVLogger(tmp_path, version=0), log_every_n_steps=10)
    outcome = autopilot.outcome(None)
    text = describe_outcome(outcome, 100)
    assert [action.what for action in outcome.actions] == [one["what"] for one in autopilot.actions]
    assert f"step 0, Autopilot: {autopilot.actions[0]['what']}, because the run begins." in text
    events = read_events(tmp_path / "lightning_logs" / "version_0")
    assert [action.why for action in events.actions] == [one["why"] for one in autopilot.actions]
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "autopilot/g_lr" in logged
    assert "autopilot/distance" in logged


def test_explain_prints_why(capsys):
    run(gan(), Autopilot("always", explain=True), 60)
    settings = 1 + len(PORTFOLIO)
    assert f"Autopilot, step 0: a race of {settings} settings, because the run begins." in capsys.readouterr().out
    run(gan(), Autopilot("always"), 60)
    assert "because the run begins" not in capsys.readouterr().out.splitlines()[:1]


def test_an_autopilot_serves_another_module_afterwards():
    autopilot = Autopilot("always")
    run(gan(), autopilot, 60)
    before = autopilot.actions
    run(gan(seed=1), autopilot, 60)
    assert before is not autopilot.actions
    for actions in (before, autopilot.actions):
        assert [action["why"] == "the run begins" for action in actions] == [True, *[False] * (len(actions) - 1)]


def test_a_second_fit_of_its_module_goes_on_with_what_it_found():
    """Under another Trainer, whose steps begin anew: what it tells of is of these."""
    module, autopilot, watch = gan(), Autopilot("always"), Watch()
    run(module, autopilot, 60)
    found, average = autopilot.settings, module.generator_ema
    moved = autopilot.measured["updates"]
    run(module, autopilot, 8, watch)
    assert autopilot.settings == found
    assert autopilot.races == 0
    assert autopilot.actions == []
    steps = [step for step, _ in autopilot.history]
    assert steps
    assert steps == sorted(steps)
    assert steps[-1] == 8
    assert watch.rows[0]["lr"] == [[pytest.approx(found["d_lr"])], [pytest.approx(found["g_lr"])]]
    assert module.generator_ema is average
    assert autopilot.measured["updates"] == moved + 8


def test_a_second_fit_of_a_module_that_it_left_alone_begins_with_the_rates_of_the_user():
    module, autopilot = gan(), Autopilot()
    run(module, autopilot, 10)
    assert not autopilot.steers
    module.make_optimizer["g"] = adam(3e-4)
    run(module, autopilot, 10)
    assert autopilot.own["g_lr"] == 3e-4


class Validated(GANModule):
    """Logs a score of its own in validation, which never gets better."""

    def validation_step(self, batch, batch_idx):
        self.log("score", torch.tensor(1.0))


class Counts(Callback):
    """How many measurements an EarlyStopping has waited, after each epoch, and whether settings raced."""

    def __init__(self, autopilot, stop):
        self.autopilot, self.stop, self.rows = autopilot, stop, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rows.append((self.autopilot.leg_ends >= 0, self.stop.wait_count, float(self.stop.best_score)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("key", ["quality/fid", "score", "score after epochs"])
def test_early_stopping_does_not_count_what_is_measured_in_a_race(key):
    """Those weights are put back; when the race is over, it counts every measurement again."""
    autopilot = Autopilot("always", search=0.5, fall=0.0, average=False)
    stop = EarlyStopping(key.split()[0], patience=10**6, min_delta=1e9, check_on_train_epoch_end=" " in key or None)
    counts, monitor = Counts(autopilot, stop), QualityMonitor(metrics=["fid"], n_samples=50, every=2)
    torch.manual_seed(0)
    module = Validated(MLP([4, 16, 2]), MLP([2, 16, 1]), 4, g_optimizer=adam(1e-3), d_optimizer=adam(1e-3))
    data = DataLoader(points(2, 32), batch_size=None)
    callbacks = [autopilot, monitor, stop, counts]
    trainer(max_epochs=60, callbacks=callbacks, num_sanity_val_steps=0).fit(module, data, data)
    races = [row for row in counts.rows if row[0]]
    assert len(races) > 20
    assert {row[1:] for row in races} == {(0, math.inf)}
    calm = counts.rows[len(races) :]
    assert len(calm) > 20
    # the first one is the best, and before it there was none
    assert [row[1] for row in calm] == [0, *range(len(calm) - 1)]


# ---------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "never"}, "`when` must be one of"),
        ({"limits": {"lr": [0, 1]}}, "`limits` must be a dict with some of the keys g_lr"),
        ({"limits": {"g_lr": [1.0]}}, "must be two numbers"),
        ({"limits": {"g_lr": [1.0, 0.1]}}, "must be two numbers"),
        ({"limits": [1]}, "`limits` must be"),
        ({"limits": {"beta1": [0.0, 1.5]}}, "two numbers below 1"),
        ({"limits": {"d_steps": [0, 2]}}, "two whole numbers from 1 on"),
        ({"limits": {"d_steps": [1, 1.5]}}, "two whole numbers from 1 on"),
        ({"limits": dict.fromkeys(LIMITS)}, "nothing to steer"),
        ({"fall": 1.0}, "`fall`"),
        ({"search": 0.0}, "`search`"),
        ({"n_samples": 10}, "`n_samples`"),
        ({"every": 0}, "`every`"),
        ({"max_races": 0}, "`max_races`"),
        ({"extractor": 3}, "`extractor`"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Autopilot(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([OptimizerSchedule({"lr": 1e-3})], "OptimizerSchedule sets 'lr'"),
        ([OptimizerSchedule({"betas.0": 0.5})], "OptimizerSchedule sets 'betas.0'"),
        ([CollapseDetector("rollback"), QualityMonitor(n_samples=50)], "would both put the run back"),
    ],
)
def test_what_would_steer_against_it_is_refused(callbacks, message):
    with pytest.raises(MisconfigurationException, match=message):
        run(gan(), Autopilot(), 10, *callbacks)
    if isinstance(callbacks[0], OptimizerSchedule):
        free = dict.fromkeys(("g_lr", "d_lr", "beta1", "beta2"))
        run(gan(), Autopilot(limits=free), 10, *callbacks)


class Dicts(GANModule):
    """Samples are dicts."""

    def unpack(self, batch):
        return {"x": batch}, None

    def generate(self, network, n, condition, latents):
        return {"x": network(latents)}

    def discriminate(self, network, sample, condition):
        return network(sample["x"])


@pytest.mark.parametrize("when", ["trouble", "always"])
def test_samples_that_need_an_extractor_are_refused_before_the_first_batch(when):
    module = Dicts(MLP([4, 8, 2]), MLP([2, 8, 1]), latent_dim=4)
    with pytest.raises(MisconfigurationException, match="give Autopilot an `extractor` that makes features of them"):
        fit(module, points(60), callbacks=[Autopilot(when, every=50)])
    assert module.iteration == 0


def test_limits_that_leave_nothing_to_try_are_refused():
    limits = {"g_lr": [1e-3, 1e-3], "d_lr": [1e-3, 1e-3], "beta1": None, "beta2": None, "gamma": None, "d_steps": None}
    with pytest.raises(MisconfigurationException, match="leave no settings to try"):
        run(gan(), Autopilot("always", limits=limits), 10)
