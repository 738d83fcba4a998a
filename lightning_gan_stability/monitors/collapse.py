"""CollapseDetector: detects in code that a generator has collapsed, and reacts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_gan_stability._checks import check, check_integer, check_share, check_type
from lightning_gan_stability.advice import COLLAPSE
from lightning_gan_stability.callback import GANCallback, callbacks_of
from lightning_gan_stability.files import save_atomically
from lightning_gan_stability.metrics.decisions import level, samples_to_decide, samples_to_decide_on_conditions
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.quality import MAY_MISS, QualityMonitor, Values
from lightning_gan_stability.monitors.rollback import Remedy, Weights, give_weights, put_back, take, weights_of
from lightning_gan_stability.outcome import Outcome, Trouble, in_words
from lightning_gan_stability.protocols import GANProtocol

Verdict = Literal[
    "collapse",
    "partial collapse",
    "mode hopping",
    "divergence",
    "no variation",
    "never learned",
    "ignored condition",
    "class collapse",
]
Event: TypeAlias = dict[str, Any]
Act = Literal["warn", "alert", "stop", "rollback"]

NOWHERE = 0.02  # if coverage is below this part of its null, samples are nowhere near the data
VARIED = 0.2  # if diversity is below this part of the real data's, samples do not vary
IGNORED = 0.25  # if the dependence on conditions is below this part of real samples', they are ignored
COVERED = 0.1  # smallest coverage of a healthy generator in confirmation tests, as a part of its null
YOUNG = 500  # steps before any verdict of not having learned
SHARES = ("recall", "coverage", "dependence", "class_consistency", "class_diversity")  # values relative to real data
CONCENTRATED = ("collapse", "partial collapse", "mode hopping")  # names of one failure that changes in extent
CONFIRMED = ("missing", "diversity", "coverage")
CONFIRMED_BY: dict[str, tuple[str, ...]] = {  # tests that confirm each verdict
    "ignored condition": ("dependence", "class_consistency"),
    "class collapse": ("class_diversity",),
}
GAIN = 0.05  # increase of a share that counts as progress; twice this part for FID


def is_bad(values: Mapping[str, float], best: Mapping[str, float], null: Mapping[str, float]) -> bool:
    """Whether a single measurement is that of a failing generator.

    This is the case if samples miss more than 3 % of the real data's mass; if they are less than a tenth as far from
    each other as real ones; if coverage is below 2 % of its null; if recall and coverage are both below half of their
    best; if samples depend on their conditions less than a quarter as much as real ones, or less than half of their
    best; or if a class varies less than a fifth as much as its real samples.

    Args:
        values: a measurement of :class:`~lightning_gan_stability.monitors.quality.QualityMonitor`.
        best: the best of each value so far.
        null: the value of each metric for real data.

    Example:
        >>> is_bad({"missing": 0.125, "coverage": 0.8}, {}, {"coverage": 0.96})
        True
    """
    if not _finite(values):
        return True
    return (
        values["missing"] > MAY_MISS
        or values.get("diversity", 1.0) < 0.1
        or values.get("coverage", 1.0) < NOWHERE * null.get("coverage", 1.0)
        or _fell(values, best)
        or _ignores(values, best)
        or values.get("class_diversity", 1.0) < VARIED
    )


def _fell(values: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether recall and coverage are both below half of their best."""
    fell = [values[name] < best.get(name, 0.0) / 2 for name in ("recall", "coverage") if name in values]
    return bool(fell) and all(fell)


def _ignores(values: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether samples do not match their conditions, or match them less than half as well as before."""
    names = [name for name in ("dependence", "class_consistency") if name in values]
    return any(values[name] < max(IGNORED, best.get(name, 0.0) / 2) for name in names)


def has_lost(values: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether modes with 3 % of the real data's mass or more are missing that were held before.

    Modes count as held (:func:`held`) only if the samples also lay on the data, because samples of a young generator
    are spread everywhere. No other improvement makes up for lost modes.

    Example:
        >>> has_lost({"missing": 0.1}, {"held": 0.0})
        True
    """
    return values["missing"] > best.get("held", 1.0) + MAY_MISS


def name_trouble(recent: Sequence[Mapping[str, float]]) -> Verdict:
    """Name the failure that bad measurements in a row have in common.

    * ``"divergence"``: values are not finite, or samples lie off the data without being concentrated anywhere.
    * ``"mode hopping"``: most of the mass is in few modes (imbalance ≥ ½), which change each time (moved ≥ ½).
    * ``"collapse"``: most of the mass stays in few modes, or all samples are alike.
    * ``"partial collapse"``: less than half of the mass is missed.
    * ``"ignored condition"``, ``"class collapse"``: no mode is missed overall, but samples do not depend on their
      conditions or do not look like their class; or all samples of a class are alike.

    Example:
        >>> name_trouble([{"missing": 0.9, "imbalance": 0.9, "moved": 0.0, "diversity": 0.1}])
        'collapse'
    """
    names = [name for name in recent[-1] if all(name in values for values in recent)]
    mean = {name: sum(values[name] for values in recent) / len(recent) for name in names}
    if not _finite(recent[-1]):
        return "divergence"
    if mean["imbalance"] >= 0.5:
        return "mode hopping" if mean["moved"] >= 0.5 else "collapse"
    if mean.get("diversity", 1.0) < 0.3:
        return "collapse"
    if mean["missing"] >= 0.5 or mean.get("coverage", 1.0) < NOWHERE:
        return "divergence"
    told = of_conditions(recent) if mean["missing"] <= MAY_MISS else []
    return told[0] if told else "partial collapse"


def of_conditions(recent: Sequence[Mapping[str, float]]) -> list[Verdict]:
    """Failures of conditions that all given measurements share: ``"ignored condition"``, ``"class collapse"``, or both.

    Example:
        >>> of_conditions([{"dependence": 0.0}, {"dependence": 0.1}])
        ['ignored condition']
    """
    found: list[Verdict] = []
    if all(_ignores(values, {}) for values in recent):
        found.append("ignored condition")
    if all(values.get("class_diversity", 1.0) < VARIED for values in recent):
        found.append("class collapse")
    return found


def stuck(course: Sequence[Mapping[str, float]], null: Mapping[str, float]) -> Verdict | None:
    """Name the failure of a generator that never was good, whatever its FID does.

    * ``"no variation"``: no measurement has a fifth of the real data's diversity, and diversity has not grown.
    * ``"never learned"``: samples never lie among the data: coverage is below 2 % of its null, and precision and
      recall are below 2 %.
    * ``"ignored condition"``: samples never depend on their conditions a quarter as much as real ones, and the
      dependence has not grown.

    Example:
        >>> stuck([{"diversity": 0.1}, {"diversity": 0.1}], {})
        'no variation'
    """
    varied = [values["diversity"] for values in course if "diversity" in values]
    if varied and max(varied) < min(VARIED, varied[0] + GAIN):
        return "no variation"
    shares = [values[name] for values in course for name in ("precision", "recall") if name in values]
    covered = [values["coverage"] for values in course if "coverage" in values]
    if covered and max(covered) < NOWHERE * null.get("coverage", 1.0) and max(shares, default=0.0) < NOWHERE:
        return "never learned"
    told = [values["dependence"] for values in course if "dependence" in values]
    return "ignored condition" if told and max(told) < min(IGNORED, told[0] + GAIN) else None


def is_progress(values: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether a measurement is better than the best so far: in FID by 10 %, or in a share by 0.05.

    This tells a young generator, which covers little but improves, from a collapsed one, which does not improve.

    Example:
        >>> is_progress({"missing": 0.5, "coverage": 0.2}, {"missing": 0.5, "coverage": 0.1})
        True
    """
    if not _finite(values):
        return False
    shares = [name for name in SHARES if name in values and name in best]  # some appear later than others
    return (
        not best
        or values["missing"] < best["missing"] - GAIN
        or any(values[name] > best[name] + GAIN for name in shares)
        or ("fid" in values and values["fid"] < (1 - 2 * GAIN) * best["fid"])
    )


def held(recent: Sequence[Mapping[str, float]], null: Mapping[str, float], patience: int) -> float:
    """The missed share of a generator that has certainly learned the other modes; 1 if that is not yet certain.

    It is certain after one measurement with a coverage of a tenth of its null, or after ``patience`` in a row with 2 %
    of it. ``recent`` holds the last measurements, at most ``patience``.

    Example:
        >>> held([{"missing": 0.0, "coverage": 0.5}], {"coverage": 0.9}, patience=3)
        0.0
        >>> held([{"missing": 0.0, "coverage": 0.05}], {"coverage": 0.9}, patience=3)
        1.0
    """
    coverage = [values.get("coverage", 1.0) / null.get("coverage", 1.0) for values in recent]
    if coverage[-1] > 0.1:
        return recent[-1]["missing"]
    sure = len(coverage) == patience and min(coverage) >= NOWHERE
    return max(values["missing"] for values in recent) if sure else 1.0


def better_of(values: Mapping[str, float], best: Mapping[str, float]) -> Values:
    """The best of each value so far."""
    low = ("fid", "kid", "missing", "imbalance", "reverse_kl", "held")
    pairs = {name: (value, best.get(name, value)) for name, value in values.items()}
    return {name: min(pair) if name in low else max(pair) for name, pair in pairs.items()}


def _text(evidence: Mapping[str, float]) -> str:
    return in_words({name: value for name, value in evidence.items() if "best" not in name})


def _finite(values: Mapping[str, float]) -> bool:
    # KL is infinite where no sample is good, fluctuation where all are alike, which is bad and not broken
    return all(math.isfinite(value) for name, value in values.items() if name not in ("reverse_kl", "fluctuation"))


Action: TypeAlias = Act | Callable[[Trainer, Any, Event], None]


class CollapseDetector(GANCallback):
    """Detects that a generator has collapsed, names the kind of collapse, and reacts.

    After each measurement of the run's :class:`~lightning_gan_stability.monitors.quality.QualityMonitor` it checks
    whether the measurement is bad (:func:`is_bad`) and whether it is better than all before (:func:`is_progress`).
    ``patience`` bad measurements in a row without progress, or all of which lack modes that were held before
    (:func:`has_lost`), give a ``"collapse"``, ``"partial collapse"``, ``"mode hopping"``, ``"divergence"``,
    ``"ignored condition"`` or ``"class collapse"`` (:func:`name_trouble`). After step 500, three times as many in a row
    whose samples do not vary, do not lie among the data, or ignore their conditions give ``"no variation"``,
    ``"never learned"`` or ``"ignored condition"`` (:func:`stuck`). Samples that are not finite give a divergence at
    once. All ranks decide from the same reduced values.

    So far this is only a suspicion, since few samples miss modes by chance. Before it is reported, it is confirmed with
    2,500 or more new samples and as many real ones, by exact tests
    (:mod:`lightning_gan_stability.metrics.decisions`). The i-th test has the level 6 / (π i)² times ``false_alarms``.
    A false alarm is one for a generator that holds every mode with a fifth of its share, varies a fifth as much as the
    data, and covers a tenth of what real data cover, or half of the best so far where coverage was lost. With
    conditions, such a generator also depends on them half as much as real samples do, and its classes look like
    themselves half as often and vary a fifth as much. At most a share of ``false_alarms`` of its runs gets a verdict.

    Every event has ``step`` (the Trainer's), ``verdict``, ``action`` and ``evidence``: the measurement, the best so
    far, and ``p``, the p-value under a healthy generator. It is appended to ``events``, logged as ``health/<verdict>``
    and ``collapse/<evidence>``, and raised as a warning. The same failure is reported once, until a measurement is good
    or shows progress; with rollbacks it is reported each time.

    Args:
        action: ``"warn"``; ``"alert"``: also send an alert of Weights & Biases; ``"stop"``: end training;
            ``"rollback"``: restore the last healthy measurement's state, or that of the start: networks, optimizers,
            schedulers, GAN counters, averages (also Lightning's ``WeightAveraging``) and the declared state of each
            :class:`~lightning_gan_stability.GANCallback`. Data, ``global_step``, monitors and other callbacks of
            Lightning are not restored. Or a function of (trainer, module, event).
        patience: number of bad measurements in a row before a verdict.
        max_rollbacks: maximum number of rollbacks; after these it only warns.
        remedy: what to change with each rollback, so that the failure does not recur:
            :class:`~lightning_gan_stability.monitors.rollback.ScaleLearningRate`, ``ScalePenalty``, functions of
            (trainer, module), or a list of these. It is applied again with each rollback.
        folder: folder for the healthy state, one file per process. None: in memory, and in checkpoints.
        alert_every: seconds between alerts.
        false_alarms: largest share of healthy runs that get a verdict, in (0, 1).
        monitor: ``name`` of the QualityMonitor to use, if the run has several; None: the first one.

    Attributes:
        events: list of all events.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if there is no QualityMonitor (of that name), or no WandbLogger for alerts.

    Example:
        >>> CollapseDetector(action="rollback", remedy=lambda trainer, module: None).events
        []
    """

    rolled_back = False

    events: list[Event]
    best: Values
    seen: list[Values]
    recent: list[Values]
    course: list[Values]
    said: list[Verdict]
    looks: int
    rollbacks: int
    healthy: dict[str, Any] | None
    weights: Weights

    def __init__(
        self,
        action: Action = "warn",
        patience: int = 3,
        max_rollbacks: int = 3,
        remedy: Remedy | list[Remedy] | Callable[[Trainer, Any], None] | None = None,
        folder: str | Path | None = None,
        alert_every: int = 300,
        false_alarms: float = 0.01,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(action):
            check(action in get_args(Act), "action", f"one of {', '.join(get_args(Act))}, or a function", action)
        remedies = [] if remedy is None else [remedy] if callable(remedy) else remedy
        functions = isinstance(remedies, list | tuple) and all(map(callable, remedies))
        check(functions, "remedy", "one or several functions of (trainer, module)", remedy)
        if action != "rollback" and (remedy is not None or folder is not None):
            raise ValueError(f"`remedy` and `folder` belong to action='rollback', got action={action!r}.")
        self.action = action
        self.rescues = action == "rollback"
        self.patience = check_integer("patience", patience)
        self.max_rollbacks = check_integer("max_rollbacks", max_rollbacks)
        self.remedies = remedies
        self.folder = folder
        self.alert_every = check_integer("alert_every", alert_every)
        self.false_alarms = check_share("false_alarms", false_alarms, open_start=True, open_end=True)
        self.monitor = None if monitor is None else check_type("monitor", monitor, str)
        self.add_state("events", [])
        self.add_state("looks", 0)  # number of suspicions
        self.add_state("course", [])  # the last measurements, three times ``patience``
        self.add_state("best", {})  # best of each value so far
        self.add_state("seen", [])  # the last measurements
        self.add_state("recent", [])  # bad measurements in a row
        self.add_state("said", [])  # verdicts already given for these
        self.add_state("rollbacks", 0)
        self.add_state("healthy", None, on_device=False)  # state for rollbacks
        self.add_state("weights", [])  # weights of penalties after remedies
        self._given: Weights = []  # weights before any remedy
        self._warned = False  # whether it has warned of few samples

    def _begin(self) -> None:
        self.best, self.seen, self.course, self.recent, self.said = {}, [], [], [], []

    def reset(self, module: GANProtocol) -> None:
        """Reset the state, and undo the remedies applied to the previous module."""
        super().reset(module)
        give_weights(module.trainer, self._given)
        self._given = []

    # ---------- what the Trainer calls

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run without measurements, or without a logger for alerts."""
        self._monitor(trainer)
        if self.action == "alert" and not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            raise MisconfigurationException(
                "CollapseDetector(action='alert') alerts by Weights & Biases, but the run has no WandbLogger: add one, "
                "or use action='warn'."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state at the start; after a resume, give penalties the weights set by earlier remedies."""
        super().on_train_start(trainer, pl_module)
        self._given = self._given or weights_of(trainer)
        give_weights(trainer, self.weights)
        if self.action == "rollback" and self.healthy is None:
            self._keep(trainer, pl_module)  # type: ignore[arg-type]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge a measurement if there is a new one."""
        module: GANModule = pl_module  # type: ignore[assignment]
        monitor = self._monitor(trainer)
        if monitor.observe(trainer, module):
            self._judge(trainer, module, monitor)

    # ---------- deciding

    def _warn_of_few(self, monitor: QualityMonitor) -> None:
        """Warn of what cannot be decided from the available samples, and how many are needed."""
        self._warned, first, n = True, level(self.false_alarms, 1), monitor.n_seen
        if monitor.n_real is not None and n >= monitor.n_real:
            return  # confirmation can read more samples
        needed = {}
        if "coverage" in monitor.null:
            least = min(COVERED * monitor.null["coverage"], 0.5)
            needed["'never learned' and a loss of coverage"] = samples_to_decide(max(least, 1e-3), first)
        if names := [name for name in CONFIRMED_BY["ignored condition"] if name in monitor.of_conditions]:
            needed["an 'ignored condition'"] = samples_to_decide_on_conditions(first, len(names))
        for what, number in needed.items():
            if n < number:
                rank_zero_warn(
                    f"CollapseDetector cannot decide on {what} at false_alarms={self.false_alarms}: the data have {n} "
                    f"samples, and it takes {number}."
                )

    def _judge(self, trainer: Trainer, module: GANModule, monitor: QualityMonitor) -> None:
        if not self._warned:
            self._warn_of_few(monitor)
        values, null, best = monitor.values, monitor.null, self.best
        finite = _finite(values)
        progress = is_progress(values, best) and not has_lost(values, best)
        bad = is_bad(values, best, null)
        self.course = [*self.course, dict(values)][-3 * self.patience :]
        if finite:
            self.seen = [*self.seen, dict(values)][-self.patience :]
            self.best = better_of(values | {"held": held(self.seen, null, self.patience)}, best)
        self.recent = [] if progress or not bad else [*self.recent, dict(values)][-self.patience :]
        if not bad and self.action == "rollback":
            self._keep(trainer, module)
        suspected = self._suspicions(module, finite, null)
        if not suspected and not self.recent:
            self.said = []
        suspected = [verdict for verdict in suspected if not self._has_said(verdict)]
        if not suspected:
            return
        found = self._p_values(trainer, module, monitor, best, suspected) if finite else {suspected[0]: 0.0}
        sure = [
            verdict for verdict in suspected if not finite or found[verdict] <= level(self.false_alarms, self.looks)
        ]
        if not sure:
            self.recent, self.course = [], []
            return
        verdict, p = sure[0], found[sure[0]]
        self.said = [*self.said, verdict]
        evidence = values | {f"best_{name}": value for name, value in self.best.items()} | {"p": p}
        self._act(trainer, module, verdict, evidence)

    def _has_said(self, verdict: Verdict) -> bool:
        """Whether this failure has been reported already, perhaps under another name."""
        if verdict in CONCENTRATED:
            return any(said in CONCENTRATED for said in self.said)
        return verdict in self.said

    def _suspicions(self, module: GANModule, finite: bool, null: Values) -> list[Verdict]:
        """Failures that the last measurements suggest, the most serious first."""
        if len(self.recent) == self.patience or not finite:
            verdict = name_trouble(self.recent)
            # samples that are all alike, or nowhere, do not depend on conditions either
            more: list[Verdict] = [] if verdict in ("collapse", "divergence") else of_conditions(self.recent)
            return [*dict.fromkeys([verdict, *more])]
        late = len(self.course) == 3 * self.patience and module.iteration >= YOUNG
        found = stuck(self.course, null) if late else None
        return [] if found is None else [found]

    def _p_values(
        self,
        trainer: Trainer,
        module: GANModule,
        monitor: QualityMonitor,
        best: Values,
        suspected: Sequence[Verdict],
    ) -> dict[Verdict, float]:
        """For each verdict the p-value under a healthy generator, from new samples; all verdicts tested together."""
        self.looks += 1
        least = COVERED * monitor.null.get("coverage", 1.0)
        if self.recent and all(_fell(values, best) for values in self.recent):
            least = max(least, best.get("coverage", 0.0) / 2)
        found = monitor.confirm(trainer, module, least)
        found["missing"] = found["missing"] if found["mass"] > MAY_MISS else 1.0
        tests = {verdict: CONFIRMED_BY.get(verdict, CONFIRMED) for verdict in suspected}
        number = len({name for names in tests.values() for name in names if name in found})
        return {v: min(1.0, number * min(found.get(name, 1.0) for name in names)) for v, names in tests.items()}

    def _act(self, trainer: Trainer, module: Any, verdict: Verdict, evidence: Values) -> None:
        action = self.action if isinstance(self.action, str) else getattr(self.action, "__name__", "function")
        if action == "rollback" and self.rollbacks >= self.max_rollbacks:
            action = "warn"
        event = {"step": trainer.global_step, "verdict": verdict, "action": action, "evidence": dict(evidence)}
        self.events.append(event)
        self._say(trainer, event)
        if callable(self.action):
            self.action(trainer, module, event)
        elif action == "stop":
            trainer.should_stop = True
        elif action == "rollback":
            self._roll_back(trainer, module)

    def _say(self, trainer: Trainer, event: Event) -> None:
        verdict, advice = event["verdict"], COLLAPSE[event["verdict"]]
        text = f"{verdict} at step {event['step']}: {_text(event['evidence'])}. Action: {event['action']}. {advice}"
        rank_zero_warn(text)
        key = f"health/{verdict.replace(' ', '_')}"
        numbers = {f"collapse/{name}": float(value) for name, value in event["evidence"].items()}
        for logger in trainer.loggers:
            logger.log_metrics({key: 1.0} | numbers, step=event["step"])
            if event["action"] == "alert" and isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.alert(verdict, text, "WARN", self.alert_every)

    def _monitor(self, trainer: Trainer) -> QualityMonitor:
        monitors = callbacks_of(trainer, QualityMonitor)
        named = [monitor for monitor in monitors if self.monitor in (None, monitor.name)]
        if monitors and not named:
            names = ", ".join(repr(monitor.name) for monitor in monitors)
            raise MisconfigurationException(
                f"CollapseDetector(monitor={self.monitor!r}) finds no QualityMonitor of that name; there are {names}."
            )
        if not monitors:
            raise MisconfigurationException(
                "CollapseDetector decides from what a QualityMonitor measures, but the run has none: add one, or "
                "remove CollapseDetector."
            )
        return named[0]

    def outcome(self, trainer: Trainer) -> Outcome:
        """The events; the last one is ongoing while no measurement has been good since."""
        troubles = [
            Trouble(
                event["step"],
                event["verdict"],
                _text(event["evidence"]),
                COLLAPSE[event["verdict"]],
                "" if event["action"] == "warn" else event["action"],
                lasts=event["verdict"] in self.said and event in self.events[-len(self.said) :],
            )
            for event in self.events
        ]
        return Outcome(troubles=troubles)

    # ---------- rolling back

    def rescue(self, trainer: Trainer, module: GANProtocol) -> bool:
        """Roll back from a step whose loss or gradient is not finite."""
        if not self.rescues or self.rollbacks >= self.max_rollbacks:
            return False
        self._act(trainer, module, "divergence", {"finite": 0.0})
        return True

    def _keep(self, trainer: Trainer, module: GANModule) -> None:
        state = take(trainer, module) | {"rollbacks": self.rollbacks}
        if self.folder is not None:
            save_atomically(state, self._file(trainer))
        self.healthy = state if self.folder is None else {}

    def _file(self, trainer: Trainer) -> Path:
        return Path(self.folder or ".") / f"healthy-{trainer.global_rank}.pt"

    def _roll_back(self, trainer: Trainer, module: GANModule) -> None:
        state = self.healthy if self.folder is None else torch.load(self._file(trainer), weights_only=True)
        assert state is not None
        self.rollbacks += 1
        put_back(trainer, module, state)
        for _ in range(self.rollbacks - state["rollbacks"]):  # the saved state has only the earlier remedies
            for remedy in self.remedies:
                remedy(trainer, module)
        self.weights = weights_of(trainer)
        self._begin()
