"""Autopilot: candidate settings compete in short races within a run, and training continues with the best one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_gan_stability._checks import check, check_bool, check_choice, check_integer, check_share, check_type
from lightning_gan_stability.callback import GANCallback, Regularizer, callbacks_of
from lightning_gan_stability.callbacks.averaging import GeneratorEMA, make_room
from lightning_gan_stability.callbacks.optimizer_schedule import OptimizerSchedule
from lightning_gan_stability.layers import has_batch_norm
from lightning_gan_stability.metrics.energy import energy_distance, mean_distance
from lightning_gan_stability.metrics.extractors import RandomConvolutions
from lightning_gan_stability.metrics.statistics import Seen
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.collapse import CollapseDetector
from lightning_gan_stability.monitors.health import HealthMonitor
from lightning_gan_stability.monitors.reading import (
    Reading,
    extractor_for,
    features_of,
    generated,
    interleaved,
    samples_at_once,
)
from lightning_gan_stability.monitors.real_data import RealData, loader_to_read, overfits
from lightning_gan_stability.monitors.rollback import put_back, take
from lightning_gan_stability.monitors.steering import LIMITS, PORTFOLIO, Settings, Steering, in_words, repeated
from lightning_gan_stability.outcome import Action, Course, Outcome
from lightning_gan_stability.outputs import PLAYERS, Player, Sample
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.regularizers.gradient import R1Penalty, R2Penalty

When = Literal["trouble", "always"]
Runner: TypeAlias = dict[str, Any]  # settings, its place among the candidates, score, rank, and its state

KEPT = (2, 1)  # number of candidates kept after each round of a race, each round twice as long
CHECKS = 50  # measurements in a run
STEPS = 60  # of the first round, in a run of unknown length
WORSE = 4.0  # two measurements in a row above this many times the best distance since the last race are a failure
NEAR = 4.0  # distances below this many times that between real data count as equally good
PATIENCE = 10  # measurements without progress
PROGRESS = 0.9  # a distance below this part of the best one is progress
STILL = 0.02  # samples that moved less than this part of the initial distance to the data have not moved
#: Verdicts that other rates, momentum or penalties may help against.
ANSWERED = (
    "vanishing_gradient",
    "exploding_gradient",
    "noisy_gradient",
    "weak_discriminator",
    "oscillation",
    "collapse",
    "partial collapse",
    "mode hopping",
    "divergence",
    "no variation",
    "never learned",
    "class collapse",
)


class Autopilot(GANCallback):
    r"""Tunes learning rates, momentum and penalties of a run while it trains, and recovers from failures.

    Whether a GAN trains depends on its hyperparameters more than on its loss ("Are GANs Created Equal?",
    https://arxiv.org/abs/1711.10337). The autopilot therefore compares settings in races within the run, as in
    successive halving (https://arxiv.org/abs/1603.06560) and population based training
    (https://arxiv.org/abs/1711.09846). All candidates start from the same state of networks and optimizers: the user's
    settings and some others that are known to work for many GANs. Each trains for some steps; the best two continue for
    twice as many, and the better one wins. Learning rates decay at the end of each candidate's steps, because high
    rates look bad until they decay. A candidate is scored by the energy distance of generated to real samples,
    2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖, computed on validation data if there are any (and ``overfit_batches`` is not
    set). The score is the mean of the distances of the averaged generator and of the current one, so that a candidate
    that oscillates loses. There are two further rules. A candidate that has hardly moved loses to candidates that have,
    even if these first moved away from the data, as happens in games that circle. Candidates within four times the
    distance between two sets of real data count as equally good, and are ordered by how widely their settings work.

    The autopilot controls the learning rate of each player; β₁ and β₂ of optimizers that have them; γ of
    :class:`~lightning_gan_stability.R1Penalty` and :class:`~lightning_gan_stability.R2Penalty`; and the number of
    discriminator steps on each batch (one or two, with new latents for each), unless another callback sets the plan or
    the update rule needs both players to step once. It adds these two penalties with γ = 0, unless the discriminator
    has BatchNorm or the run has another penalty for it; with two steps on a batch, they are computed on every second
    batch (``every=2``). It also keeps an average of the generator, unless the run has one, and decays rates to zero at
    the end, unless a scheduler sets them.

    With ``when="trouble"`` it only observes until something is wrong: a verdict of the run's
    :class:`~lightning_gan_stability.CollapseDetector` or :class:`~lightning_gan_stability.HealthMonitor` that other
    settings may help against, a loss that is not finite, a distance above four times its best since the last race in
    two measurements in a row, or a distance far from the data that has not decreased in ten. Until then the run is
    bitwise identical to one without the autopilot. Then a race starts: from the beginning of the run if little was
    learned, otherwise from the best state so far with more cautious settings. With ``when="always"`` the run begins
    with a race, and the autopilot then observes in the same way. While an
    :class:`~lightning_gan_stability.AdversarialStart` disables the adversarial term, settings cannot be compared, so
    the autopilot waits until the term is enabled.

    Batches of candidates that lose are batches of the run: ``trainer.global_step`` counts them, while
    ``module.iteration`` is set back. Loggers, monitors and checkpoints that are due during a race see the current
    candidate. Each action and its reason are logged as ``autopilot/<setting>``, appear in the final table and in the
    report, and are restored exactly on resume. All processes decide from the same numbers.

    It costs fifty measurements of ``n_samples`` samples, and memory: copies of both networks and optimizers, in main
    memory and in checkpoints, two outside of a race and up to four during one.

    Args:
        when: ``"trouble"`` or ``"always"``.
        limits: smallest and largest number that it may set, by ``"g_lr"``, ``"d_lr"``, ``"beta1"``, ``"beta2"`` and
            ``"gamma"`` and ``"d_steps"``; None for a name: leave that setting unchanged. Names that are missing have
            the limits of :data:`~lightning_gan_stability.monitors.steering.LIMITS`. The user's settings are tried as
            they are.
        average: keep an average of the generator, whose half-life is a fiftieth of the steps so far.
        fall: final share of the run in which rates decay linearly to zero, in [0, 1); 0: no decay. The same share
            applies to each candidate's steps in a race. A run of unknown length has only the decay in races.
        search: share of the run that a race takes, in (0, 1).
        extractor: maps samples to features (n, ...), between which distances are computed. None: vectors are used as
            they are, and images, series and volumes go through
            :class:`~lightning_gan_stability.metrics.RandomConvolutions`, so that nothing is downloaded.
        n_samples: number of generated and of real samples in a measurement.
        every: steps between measurements. None: fifty measurements in a run.
        max_races: maximum number of races. After these it only lowers rates, at most as many times, and then observes.
        explain: print each action and its reason.

    Attributes:
        actions: list of its actions with step, change and reason.
        settings: the current values of the settings.

    Raises:
        ValueError: if an argument has a bad value, or if no setting is left to control.
        MisconfigurationException: with callbacks that set the same numbers (OptimizerSchedule) or also restore earlier
            states (``CollapseDetector(action="rollback")``); under ModelParallelStrategy; with limits that allow no
            settings other than the user's.

    Example:
        >>> Autopilot(when="always", limits={"gamma": None}).limits["g_lr"]
        (1e-07, 1.0)
    """

    rolled_back = False
    rescues = True

    own: Settings
    settings: Settings
    shares: dict[Player, list[float]]
    steers: bool
    races: int
    returns: int
    moved: int
    answered: int
    turn: int
    round: int
    leg: int
    leg_ends: int
    runners: list[Runner]
    start: dict[str, Any] | None
    start_distance: float
    start_seen: Tensor | None
    first: dict[str, Any] | None
    best: dict[str, Any] | None
    actions: list[dict[str, Any]]
    history: list[list[float]]
    measured: dict[str, Any]
    _waiting = False  # for the adversarial game to begin
    _null: float = math.nan  # the mean distance between sets of real data of this size

    def __init__(
        self,
        when: When = "trouble",
        limits: Mapping[str, Sequence[float] | None] | None = None,
        average: bool = True,
        fall: float = 0.5,
        search: float = 0.1,
        extractor: nn.Module | None = None,
        n_samples: int = 1000,
        every: int | None = None,
        max_races: int = 3,
        explain: bool = False,
    ) -> None:
        super().__init__()
        self.when: When = check_choice("when", when, get_args(When))
        self.limits = _checked_limits(limits)
        self.average = check_bool("average", average)
        self.fall = check_share("fall", fall, open_end=True)
        self.search = check_share("search", search, open_start=True, open_end=True)
        if not self.limits:
            raise ValueError("`limits` leave Autopilot nothing to steer: give one of them two numbers, or remove it.")
        self.extractor = extractor if extractor is None else check_type("extractor", extractor, nn.Module)
        self.n_samples = check_integer("n_samples", n_samples, least=50)
        self.every = None if every is None else check_integer("every", every)
        self.max_races = check_integer("max_races", max_races)
        self.explain = check_bool("explain", explain)
        self.add_state("own", {})  # settings of the user
        self.add_state("settings", {})
        self.add_state("shares", {})  # rates of parameter groups, relative to the first group
        self.add_state("steers", False)  # whether it has taken control of the run
        self.add_state("races", 0)
        self.add_state("returns", 0)  # number of returns to the best state without a race
        self.add_state("actions", [])
        self.add_state("history", [])  # step and distance, outside of races
        self.add_state("answered", 0)  # number of monitors' verdicts that it has reacted to
        self.add_state("moved", -1)  # steps of the generator at the last measurement
        self.add_state("runners", [], on_device=False)
        self.add_state("turn", 0)  # index of the current candidate
        self.add_state("round", 0)
        self.add_state("leg", 0)  # number of steps in the first round of this race
        self.add_state("leg_ends", -1)  # global step at which the current candidate's steps end
        self.add_state("start", None, on_device=False)  # state at the start of a race
        self.add_state("start_distance", math.inf)
        self.add_state("start_seen", None, on_device=False)  # features of that state's samples
        self.add_state("first", None, on_device=False)  # initial state of the run
        self.add_state("best", None, on_device=False)  # best state since the last race
        self.add_state("measured", {}, on_device=False)  # latest measurement of the average
        self._brought: list[Regularizer] = []
        self._ema: GeneratorEMA | None = None

    # ---------- before a run

    def companions(self, trainer: Trainer, module: GANProtocol) -> Sequence[Callback]:
        """Add R1 and R2 with γ = 0 if the run has no penalty of its own for the discriminator."""
        others = [c for c in callbacks_of(trainer, Regularizer) if c not in self._brought]  # type: ignore[type-abstract]
        own = {type(c) for c in others if c.player == "d"}
        possible = own <= {R1Penalty, R2Penalty} and not any(map(has_batch_norm, module.discriminator.modules()))
        if "gamma" not in self.limits or not possible:
            self._brought = []
            return []
        kinds = [kind for kind in (R1Penalty, R2Penalty) if kind not in own]
        self._brought = [kind(0.0) for kind in kinds]
        for penalty in self._brought:
            penalty.rests = True
        return self._brought

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse callbacks that set the same numbers; reserve a place for the average."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._refuse(trainer)
        averaged = bool(callbacks_of(trainer, GeneratorEMA)) or bool(callbacks_of(trainer, WeightAveraging))
        self._ema = GeneratorEMA(half_life=1e9, ramp_up=1 / CHECKS) if self.average and not averaged else None
        if self._ema is not None and self.when == "always":
            make_room(pl_module)  # type: ignore[arg-type]  # before strategies wrap the module

    def _refuse(self, trainer: Trainer) -> None:
        for schedule in callbacks_of(trainer, OptimizerSchedule):
            rates = tuple(f"{player}_lr" for player in schedule.players)
            names = {"lr": rates, "betas.0": ("beta1",), "betas.1": ("beta2",)}
            for key in schedule.values:
                both = dict.fromkeys(name for name in names.get(key, ()) if name in self.limits)
                if both:
                    raise MisconfigurationException(
                        f"OptimizerSchedule sets {key!r} on every batch, which Autopilot steers: remove it from the "
                        f"one, or set Autopilot(limits={both})."
                    )
        if any(detector.action == "rollback" for detector in callbacks_of(trainer, CollapseDetector)):
            raise MisconfigurationException(
                "CollapseDetector(action='rollback') and Autopilot would both put the run back: use action='warn', "
                "whose verdicts Autopilot acts on, or remove Autopilot."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse sharded networks."""
        module: GANModule = pl_module  # type: ignore[assignment]
        if module.device_mesh is not None:
            raise MisconfigurationException(
                "Autopilot keeps copies of whole networks, which ModelParallelStrategy shards: use strategy='ddp', or "
                "remove Autopilot."
            )
        if self._moving is not None:
            module.average_rests = False

    def count_anew(self, module: GANProtocol) -> None:
        """Keep the settings and the average that were found; actions and measurements belong to another run."""
        if not self.steers or self.leg_ends >= 0:  # settings of the user, or of some candidate
            self.reset(module)
            return
        found = {name: getattr(self, name) for name in ("own", "settings", "shares", "steers", "measured")}
        self.reset(module)
        for name, value in found.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the user's settings; begin a race, or continue as before."""
        super().on_train_start(trainer, pl_module)
        module: GANModule = pl_module  # type: ignore[assignment]
        self._steering = Steering(trainer, module, self._brought, self.limits)
        self._real: Reading | None = None
        with isolate_rng(), module.noise.of("autopilot"):
            self._read(trainer, module)  # refuses samples that cannot be compared before the first batch
        self._horizon = self._steps_of(trainer)
        self._waiting = _game_rests(trainer, module)
        if self.own:
            self._steering.shares = self.shares
            there = self._steering.read()  # a resumed run may have other penalties
            self.own = there | {name: value for name, value in self.own.items() if name in there}
            self.settings = there | {name: value for name, value in self.settings.items() if name in there}
            if self.steers:
                self._steering.apply(self.settings, self.settings, self._fall_at(trainer))
            if self._moving is not None:
                self._moving.load_state_dict(self.measured)
                self._moving.go_on(module)
            return
        self._steering.note_rates()
        self.own = self._steering.read()
        self.settings, self.shares = dict(self.own), dict(self._steering.shares)
        candidates = self._steering.candidates(self.own)
        if len(candidates) == 1:
            raise MisconfigurationException(
                "The limits of Autopilot leave no settings to try beside those of the run: widen `limits`, or remove "
                "Autopilot."
            )
        if self.when == "always":
            self._take_over(trainer, module)
        if not self._waiting:
            self._begin(trainer, module, "the run begins")

    def _begin(self, trainer: Trainer, module: GANModule, why: str) -> None:
        """Called when the adversarial game starts: begin a race, or keep the state for a first race to start from."""
        if self.when == "always":
            self._race(trainer, module, self._steering.candidates(self.own), why)
        else:
            self.first = self._take(trainer, module)

    # ---------- during a run

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Apply the decay of the learning rates."""
        if not self.steers:
            return
        for player in PLAYERS:
            if f"{player}_lr" in self.limits and not self._steering.scheduled(player):
                self._steering.set_rates(player, self.settings[f"{player}_lr"], self._fall_at(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average; end a candidate's steps, or check whether something is wrong."""
        module: GANModule = pl_module  # type: ignore[assignment]
        if self._moving is not None:
            self._moving.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self.measured = self._moving.state_dict()
        if self._waiting:
            self._waiting = _game_rests(trainer, module)
            if not self._waiting:
                self._begin(trainer, module, "the adversarial game begins")
        elif self.leg_ends >= 0:
            if trainer.global_step >= self.leg_ends:
                self._end_leg(trainer, module, self._see(trainer, module))
        elif trainer.global_step % self._every(trainer) == 0:
            self._look(trainer, module)

    def adjust_plan(self, module: GANProtocol, plan: tuple[Player, ...]) -> tuple[Player, ...]:
        """Step the discriminator as often as the current settings say."""
        return repeated(plan, int(self.settings.get("d_steps", 1)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a race for which the run has no steps left: the best candidate so far wins, or else the earlier state."""
        if self.leg_ends >= 0:
            ranking = sorted((one for one in self.runners if one["state"]), key=_rank)
            self.runners = ranking[:1]
            self._finish(trainer, pl_module)  # type: ignore[arg-type]

    def rescue(self, trainer: Trainer, module: GANProtocol) -> bool:
        """During a race, the candidate whose loss is not finite loses; otherwise restore a state and begin a race."""
        gan: GANModule = module  # type: ignore[assignment]
        if self.leg_ends >= 0:
            self._end_leg(trainer, gan, [])
            self.leg_ends += 1 if self.leg_ends >= 0 else 0  # the current batch is not counted yet
            return True
        return self._act(trainer, gan, "the loss or a gradient is not finite", went_wrong=True)

    # ---------- observing

    def _look(self, trainer: Trainer, module: GANModule) -> None:
        """Measure the distance; act if something is wrong."""
        if module.steps["g"] == self.moved:
            return  # the generator waits for the discriminator
        self.moved = module.steps["g"]
        distance = self._distance(trainer, self._see(trainer, module))
        self._log(trainer, {"distance": distance})
        past = self._looks()
        before = min(past, default=math.inf)
        self.history.append([trainer.global_step, distance])
        away = max(WORSE * before, NEAR * self._null)
        wrong = distance > away and past[-1] > away  # at high rates, samples may move away briefly and come back
        why = self._trouble(trainer, [*past, distance], wrong)
        # rates rise again after a race, and samples may go away for a while: its winner is better than that
        if distance < before and (self.best is None or distance <= WORSE * self.best["distance"]):
            self.best = self._take(trainer, module) | {"distance": distance}
        if why:
            self._act(trainer, module, why, went_wrong=wrong)

    def _looks(self) -> list[float]:
        """The distances since the last race, without the race's own, which was measured at decayed rates."""
        return [distance for _, distance in self.history[1 if self.races else 0 :]]

    def _trouble(self, trainer: Trainer, looks: list[float], wrong: bool) -> str:
        """A description of what is wrong; empty if nothing is."""
        events = _verdicts(trainer)
        new, self.answered = len(events) > self.answered, len(events)
        if new:
            return f"a monitor says {events[-1]['verdict']!r}"
        if not math.isfinite(looks[-1]):
            return "samples are not finite"
        if wrong:
            return f"samples went away from the data: distance {looks[-1]:.3g}, {min(looks[:-1]):.3g} before"
        recent, earlier = looks[-PATIENCE:], looks[:-PATIENCE]
        if earlier and min(recent) > PROGRESS * min(earlier) and min(looks) > NEAR * self._null:
            return f"samples do not come nearer to the data: distance {min(looks):.3g}, real data {self._null:.3g}"
        return ""

    def _act(self, trainer: Trainer, module: GANModule, why: str, went_wrong: bool) -> bool:
        """Begin a race, from the beginning or from the best state; return whether something was done."""
        left = math.inf if self._horizon is None else self._horizon - trainer.global_step
        first = self.history[0][1] if self.history else math.inf
        learned = self.best is not None and (self.races > 0 or self.best["distance"] < first / 2)
        may_race = self.races < self.max_races and left > 2 * self._cost()
        if not may_race and not (learned and went_wrong and self.returns < self.max_races):
            return False
        if not self.steers:
            self._take_over(trainer, module)
        if learned and went_wrong:
            assert self.best is not None
            why = f"{why}; back to step {self.best['step']:,}"
            self._put_back(trainer, module, self.best)
            calmer = self._steering.calmer(self.settings)
            if not may_race:  # no time left for a race
                self.returns += 1
                before, now = self.settings, calmer[min(1, len(calmer) - 1)]
                self._set(trainer, now)
                self.best = self._take(trainer, module) | {name: self.best[name] for name in ("distance", "step")}
                self._note(trainer, in_words(now, before), why)
                return True
            self._race(trainer, module, calmer, why)
        elif learned or self.first is None:
            self._race(trainer, module, self._steering.candidates(self.settings), why)
        else:
            self._put_back(trainer, module, self.first)
            why = f"{why}; back to the beginning"
            self._race(trainer, module, self._steering.candidates(self.own), why)
        return True

    def _take_over(self, trainer: Trainer, module: GANModule) -> None:
        """Take control of the run: average the generator, and let the rates decay."""
        self.steers = True
        if self._ema is not None:
            make_room(module)
            self._ema.go_on(module)
            self._ema.reset(module)
            self.measured = self._ema.state_dict()

    # ---------- a race

    def _race(self, trainer: Trainer, module: GANModule, candidates: list[Settings], why: str) -> None:
        self.races += 1
        self.start = self._take(trainer, module)
        *_, self.start_seen = seen = self._see(trainer, module)
        self.start_distance = self._distance(trainer, seen)
        places = [len(candidates), *range(1, len(candidates))]  # known settings before the present ones
        self.runners = [
            {"settings": settings, "place": place, "score": math.inf, "rank": None, "state": None}
            for settings, place in zip(candidates, places, strict=True)
        ]
        self.leg, self.round, self.turn = self._leg_of(len(candidates)), 0, 0
        self._note(trainer, f"a race of {len(candidates)} settings", why)
        self._begin_leg(trainer, module)

    def _leg_of(self, n: int) -> int:
        """Steps of the first round of a race."""
        return STEPS if self._horizon is None else max(1, round(self.search * self._horizon / _rounds(n)))

    def _cost(self) -> int:
        """Steps of a race."""
        return STEPS * _rounds(1 + len(PORTFOLIO)) if self._horizon is None else round(self.search * self._horizon)

    def _begin_leg(self, trainer: Trainer, module: GANModule) -> None:
        runner = self.runners[self.turn]
        self._put_back(trainer, module, runner["state"] or self.start)
        self.leg_ends = trainer.global_step + self.leg * 2**self.round
        self._set(trainer, runner["settings"])

    def _end_leg(self, trainer: Trainer, module: GANModule, seen: list[Tensor]) -> None:
        runner = self.runners[self.turn]
        runner["score"] = score = self._distance(trainer, seen)
        near = score <= NEAR * self._null
        # who has moved comes first, then who is as near to the data as can be told, then who is nearer
        lost = self._stands(trainer, seen) or not math.isfinite(score)
        runner["rank"] = (lost, not near, runner["place"] if near else score)
        runner["state"] = self._take(trainer, module) if math.isfinite(score) else None
        self._log(trainer, {"distance": score})
        self.turn += 1
        ranking = sorted(self.runners[: self.turn], key=_rank)
        for one in ranking[KEPT[self.round] :]:
            one["state"] = None  # it has lost; free its memory
        if self.turn < len(self.runners):
            self._begin_leg(trainer, module)
            return
        self.runners = [one for one in ranking[: KEPT[self.round]] if math.isfinite(one["score"])]
        self.turn = 0
        self.round += 1
        if len(self.runners) > 1:
            self._begin_leg(trainer, module)
        else:
            self._finish(trainer, module)

    def _finish(self, trainer: Trainer, module: GANModule) -> None:
        """Continue with the best candidate."""
        self.leg_ends = -1
        self.answered = len(_verdicts(trainer))  # verdicts on candidates that were dropped
        if not self.runners:
            self._put_back(trainer, module, self.start)
            self._set(trainer, self.settings)
            self._note(trainer, "nothing changes", "no settings came to the end of their turn with finite losses")
        else:
            winner = self.runners[0]
            self._put_back(trainer, module, winner["state"])
            self._set(trainer, winner["settings"])
            self.history = [[trainer.global_step, winner["score"]]]
            self.best = self._take(trainer, module) | {"distance": winner["score"]}
            self._note(
                trainer,
                in_words(winner["settings"], self.own),
                f"the distance to the data is {winner['score']:.3g} with it, real data {self._null:.3g}",
            )
        self.runners, self.start, self.start_seen, self.first = [], None, None, None

    def _take(self, trainer: Trainer, module: GANModule) -> dict[str, Any]:
        """Everything that training changes, and the settings that it belongs to."""
        kept = {"settings": dict(self.settings), "average": deepcopy(self.measured), "step": trainer.global_step}
        return take(trainer, module) | kept

    def _put_back(self, trainer: Trainer, module: GANModule, state: dict[str, Any] | None) -> None:
        assert state is not None
        put_back(trainer, module, state)
        self.settings = dict(state["settings"])
        if self._moving is None:
            return
        if state["average"]:
            self._moving.load_state_dict(deepcopy(state["average"]))
            self._moving.go_on(module)
        else:  # the state has no average yet: it starts from the restored weights
            self._moving.reset(module)
        self.measured = self._moving.state_dict()

    def _set(self, trainer: Trainer, settings: Settings) -> None:
        self._steering.apply(settings, self.settings, self._fall_at(trainer))
        self.settings = dict(settings)

    # ---------- scoring

    def _see(self, trainer: Trainer, module: GANModule) -> list[Tensor]:
        """Features of samples of the averaged generator, if there is one, and of the current generator."""
        with isolate_rng(), module.noise.of("autopilot"):
            real = self._read(trainer, module)
            seen = [self._draw(module, real)] if module.generator_ema is not None else []
            with _without_average(module):
                return [*seen, self._draw(module, real)]

    def _draw(self, module: GANModule, real: Reading) -> Tensor:
        return self._features(generated(module, real, self.n_samples, self._at_once, "autopilot"))

    def _distance(self, trainer: Trainer, seen: list[Tensor]) -> float:
        """The energy distance to real samples; infinite if features are not finite."""
        if self._real is None or not _finite(seen):
            return math.inf
        return _mean_distance(trainer, self._real.seen.features, seen, self._within)

    def _stands(self, trainer: Trainer, seen: list[Tensor]) -> bool:
        """Whether samples have hardly changed since the beginning of the race, where they were far from the data."""
        assert self.start_seen is not None
        if self.start_distance <= NEAR * self._null or not _finite(seen):
            return False
        went = _mean_distance(trainer, self.start_seen.to(seen[0].device), seen)
        return went <= STILL * self.start_distance

    def _read(self, trainer: Trainer, module: GANModule) -> Reading:
        """The real samples, read once."""
        if self._real is not None:
            return self._real
        held_out = loader_to_read(trainer, "val")
        there = not (isinstance(held_out, list) and not held_out)
        there &= not overfits(trainer)  # otherwise it would steer away from the batches to be memorized
        data = RealData(trainer, held_out if there else loader_to_read(trainer, "train"), self.n_samples)
        first = next(iter(data), None)
        if first is None:
            raise MisconfigurationException("Autopilot compares samples with real ones, and there are none to read.")
        if self.extractor is None:
            spatial = isinstance(first.real, Tensor) and first.real.dim() > 2
            self.extractor = RandomConvolutions() if spatial else extractor_for(first.real, "Autopilot")
        self._at_once = samples_at_once(first.real)
        reading = Reading(data, first.condition)
        features = self._features(reading.read())
        reading.see(Seen(features, features.new_empty(len(features), 0)))
        if not bool(features.isfinite().all()):
            raise ValueError("Autopilot: the real samples have features that are not finite.")
        apart = float(torch.pdist(features.double()).mean()) if len(features) > 1 else 0.0
        self._null = apart * (1 / len(features) + 1 / self.n_samples)
        self._within = mean_distance(features)
        self._real = reading
        return reading

    def _features(self, parts: Iterable[Sample]) -> Tensor:
        """Features of the samples of all ranks."""
        assert self.extractor is not None
        return interleaved(torch.cat([features_of(self.extractor, samples) for samples in parts]))

    # ---------- helpers

    @property
    def tries(self) -> bool:  # type: ignore[override]
        """Whether a race is running, so that measurements belong to one of several candidates."""
        return self.leg_ends >= 0

    @property
    def _moving(self) -> GeneratorEMA | None:
        """The average that it updates itself, once it controls the run."""
        return self._ema if self.steers else None

    def _steps_of(self, trainer: Trainer) -> int | None:
        """The number of batches in the run, if known."""
        steps = trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) else None

    def _every(self, trainer: Trainer) -> int:
        if self.every is not None:
            return self.every
        return 500 if self._horizon is None else max(1, self._horizon // CHECKS)

    def _fall_at(self, trainer: Trainer) -> float:
        """The decay factor of rates without a scheduler, at the end of the run and of each turn in a race."""
        if not self.fall:
            return 1.0
        left = 1.0 if self._horizon is None else 1 - trainer.global_step / self._horizon
        if self.leg_ends >= 0:
            left = min(left, (self.leg_ends - trainer.global_step) / (self.leg * 2**self.round))
        return min(1.0, max(left, 0.0) / self.fall)

    def _note(self, trainer: Trainer, what: str, why: str) -> None:
        self.actions.append({"step": trainer.global_step, "what": what, "why": why})
        self._log(trainer, self.settings)
        if self.explain:
            trainer.print(f"Autopilot, step {trainer.global_step:,}: {what}, because {why}.")

    def _log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"autopilot/{k}": v for k, v in values.items()}, step=trainer.global_step)

    def outcome(self, trainer: Trainer) -> Outcome:
        """Its actions and their reasons, and the history of the distance."""
        actions = [Action(one["step"], "Autopilot", one["what"], one["why"]) for one in self.actions]
        courses = []
        if self.history:
            steps, values = zip(*self.history, strict=True)
            courses = [Course("autopilot/distance", [*map(int, steps)], [*values], self._null, True)]
        return Outcome(courses=courses, actions=actions)


def _game_rests(trainer: Trainer, module: GANModule) -> bool:
    """Whether the adversarial term is disabled, so that settings of the game cannot be compared."""
    return not all(callback.allows_adversarial(module) for callback in callbacks_of(trainer, GANCallback))


def _verdicts(trainer: Trainer) -> list[dict[str, Any]]:
    """Verdicts of monitors that other settings may help against, in the order of steps."""
    events = [event for detector in callbacks_of(trainer, CollapseDetector) for event in detector.events]
    events += [verdict for monitor in callbacks_of(trainer, HealthMonitor) for verdict in monitor.verdicts]
    return sorted((e for e in events if e["verdict"] in ANSWERED), key=lambda event: event["step"])


def _checked_limits(limits: Mapping[str, Sequence[float] | None] | None) -> dict[str, tuple[float, float]]:
    given = {} if limits is None else limits
    check(isinstance(given, Mapping), "limits", "a dict of limits by name", limits)
    unknown = [name for name in given if name not in LIMITS]
    check(not unknown, "limits", f"a dict with some of the keys {', '.join(LIMITS)}", limits)
    found: dict[str, tuple[float, float]] = dict(LIMITS)
    for name, pair in given.items():
        if pair is None:
            del found[name]
            continue
        fits = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair)
        check(fits and 0 <= pair[0] <= pair[1], f"limits[{name!r}]", "two numbers, the smaller one first", pair)
        check("beta" not in name or pair[1] < 1, f"limits[{name!r}]", "two numbers below 1", pair)
        counts = pair[0] >= 1 and all(float(x).is_integer() for x in pair)
        check(name != "d_steps" or counts, f"limits[{name!r}]", "two whole numbers from 1 on", pair)
        found[name] = float(pair[0]), float(pair[1])
    return found


def _rank(runner: Runner) -> tuple[bool, bool, float]:
    rank: tuple[bool, bool, float] = runner["rank"]
    return rank


def _finite(seen: list[Tensor]) -> bool:
    return bool(seen) and all(bool(fake.isfinite().all()) for fake in seen)


def _mean_distance(trainer: Trainer, real: Tensor, seen: list[Tensor], within: float | None = None) -> float:
    """The mean distance, the same on all ranks; ``within`` is that among the real samples, if known."""
    within = mean_distance(real) if within is None else within
    mean = sum(energy_distance(real, fake, within) for fake in seen) / len(seen)
    found: float = trainer.strategy.broadcast(mean)
    return found


def _rounds(n: int) -> int:
    """Legs of the first round's length that a race of n takes."""
    legs, length = n, 2
    for kept in KEPT[:-1]:
        legs, length = legs + min(kept, n) * length, 2 * length
    return legs


@contextmanager
def _without_average(module: GANModule) -> Iterator[None]:
    average, module.generator_ema = module.generator_ema, None
    try:
        yield
    finally:
        module.generator_ema = average
