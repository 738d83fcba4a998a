"""Runs the trials of a sweep with Optuna, in a database that processes share and that a sweep can resume from."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from lightning_gan_stability._checks import require
from lightning_gan_stability.cli.sweep_plan import Plan, recipe
from lightning_gan_stability.cli.sweep_space import rounded, short_names
from lightning_gan_stability.cli.sweep_trial import Process, Pruned, Record, State, prepare, result, run_here
from lightning_gan_stability.run_folder import settings_of

EXTRA = "sweep"
BEAT, STALE = 30.0, 900.0  # seconds between signs of life, and without one until a trial counts as broken off
POLL = 0.2  # seconds


def run_trials(plan: Plan, say: Callable[[str], None] = print) -> list[Record]:
    """Run the remaining trials of a sweep.

    Args:
        plan: plan of the sweep.
        say: called with a line for each trial that ends.

    Returns:
        All trials of the study, including those of other processes.

    Raises:
        ValueError: if the study exists with another search space, metric or config.
        KeyboardInterrupt: if it is interrupted; its trials are stopped, and the same call resumes the sweep.
        ModuleNotFoundError: without Optuna.
    """
    studies = Studies(plan)
    with _terminated_as_interrupted():
        if plan.jobs:
            _in_processes(plan, studies, say)
        else:
            while (claim := studies.claim()) is not None:
                _in_this_process(plan, studies, claim, say)
    return studies.records()


class Claim(NamedTuple):
    """A trial that this process runs.

    Attributes:
        side: the value of ``side_by_side``.
        number: number of the trial on its side, from 0.
        trial: Optuna's trial.
        started: start time by ``time.monotonic``.
        values: measurements so far.
    """

    side: str
    number: int
    trial: Any
    started: float
    values: list[float]


class Studies:
    """The studies of all sides, in one database.

    Args:
        plan: plan of the sweep.

    Raises:
        ValueError: if a study exists with another search space, metric or config.
    """

    def __init__(self, plan: Plan) -> None:
        self.optuna = _quiet(require("optuna", EXTRA))
        self.plan = plan
        self.me = {"host": socket.gethostname(), "process": os.getpid()}
        self._beats: dict[int, float] = {}
        storage, direction = _storage(plan, self.optuna), "minimize" if plan.mode == "min" else "maximize"
        names = {side: f"{plan.study}/{side}" if side else plan.study for side in plan.sides}
        self.studies = {}
        for side, name in names.items():
            study = self.optuna.create_study(
                storage=storage, study_name=name, direction=direction, load_if_exists=True, pruner=_pruner(plan)
            )
            self._check(study)
            self.studies[side] = study

    def _check(self, study: Any) -> None:
        """Refuse another sweep under the same name."""
        config = yaml.safe_dump(recipe(self.plan.unsearched.arguments({})))
        now = {**self.plan.identity, **{f"config: {key}": value for key, value in settings_of(config).items()}}
        if "sweep" not in study.user_attrs:
            study.set_user_attr("sweep", json.dumps(now))
            return
        before = json.loads(study.user_attrs["sweep"])
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            said = [f"{key} was {before.get(key, 'not there')}, and is {now.get(key, 'not there')}" for key in changed]
            more = f", and {len(said) - 4} more" if len(said) > 4 else ""
            raise ValueError(
                f"The study {self.plan.study!r} exists and is another one ({'; '.join(said[:4])}{more}): its trials do "
                "not compare with new ones. Give another `study`, or put it back."
            )

    # ---------- a trial's life

    def claim(self) -> Claim | None:
        """A trial that nobody runs or has run, with its parameters; None if there is none."""
        while True:
            free = {side: self._free(study) for side, study in self.studies.items()}
            side = max(free, key=lambda side: len(free[side]))  # the one with the fewest trials so far
            if not free[side]:
                return None
            if (claim := self._try(side, free[side][0])) is not None:
                return claim

    def _try(self, side: str, number: int) -> Claim | None:
        """Take a number; None if another process has been quicker."""
        study = self.studies[side]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            study.sampler = _sampler(self.plan, number, self.optuna)
            trial = study.ask()
            for key, value in self.me.items():
                trial.set_user_attr(key, value)
            trial.set_user_attr("alive", time.time())
            trial.set_user_attr("number", number)
            claim = Claim(side, number, trial, time.monotonic(), [])
            while any("number" not in t.user_attrs for t in self._alive(study) if t.number < trial.number):
                time.sleep(0.02)  # it will say its own in a moment
            if any(t.user_attrs["number"] == number for t in self._counted(study) if t.number < trial.number):
                self.give_up(claim)
                return None
            for parameter in self.plan.space:
                parameter.suggest(trial)
        return claim

    def beat(self, claim: Claim) -> None:
        """Report from time to time that a trial is still running."""
        now = time.time()
        if now - self._beats.get(claim.trial.number, claim.trial.user_attrs["alive"]) > BEAT:
            self._beats[claim.trial.number] = now
            claim.trial.set_user_attr("alive", now)

    def report(self, claim: Claim, step: int, value: float) -> bool:
        """Report a measurement, and return whether to stop the trial."""
        claim.values.append(value)
        claim.trial.report(value, step)
        return bool(claim.trial.should_prune())

    def end(self, claim: Claim, state: State, error: str = "") -> Record:
        """Record how a trial has ended."""
        study, states = self.studies[claim.side], self.optuna.trial.TrialState
        value = result(claim.values, self.plan.value, self.plan.mode) if claim.values else None
        if state == "complete" and (value is None or not np.isfinite(value)):
            state, error = "failed", f"diverged: {self.plan.metric} is {value}"
        seconds = time.monotonic() - claim.started
        claim.trial.set_user_attr("seconds", seconds)
        if state == "complete":
            study.tell(claim.trial, value)
        elif state == "pruned":
            study.tell(claim.trial, state=states.PRUNED)
        else:
            claim.trial.set_user_attr("error", error[:1000])
            study.tell(claim.trial, state=states.FAIL)
        folder = self.plan.place(claim.side, claim.number)
        return Record(claim.side, claim.number, state, value, claim.trial.params, folder, seconds, error)

    def give_up(self, claim: Claim) -> None:
        """Release the number of a trial that was interrupted."""
        self._forget(self.studies[claim.side], claim.trial.number)

    def _forget(self, study: Any, number: int) -> None:
        study.set_user_attr(f"broken off {number}", True)
        with suppress(ValueError, RuntimeError):  # another process has done it
            study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    # ---------- those of all processes

    def _free(self, study: Any) -> list[int]:
        for trial in self._alive(study):
            if self._is_stale(trial):
                self._forget(study, trial.number)
        taken = {trial.user_attrs.get("number") for trial in self._counted(study)}
        return [number for number in range(self.plan.trials) if number not in taken]

    def _counted(self, study: Any) -> list[Any]:
        broken = {key for key in study.user_attrs if key.startswith("broken off ")}
        trials = study.get_trials(deepcopy=False)
        return [t for t in trials if f"broken off {t.number}" not in broken and "number" in t.user_attrs]

    def _alive(self, study: Any) -> list[Any]:
        running = [t for t in study.get_trials(deepcopy=False) if t.state == self.optuna.trial.TrialState.RUNNING]
        broken = study.user_attrs
        return [trial for trial in running if f"broken off {trial.number}" not in broken]

    def _is_stale(self, trial: Any) -> bool:
        last = trial.user_attrs.get("alive", trial.datetime_start.timestamp())
        if time.time() - last > STALE:
            return True
        here = trial.user_attrs.get("host") == self.me["host"]
        return here and not _is_running(trial.user_attrs.get("process", os.getpid()))

    def records(self) -> list[Record]:
        """All trials that count, those of other processes too."""
        states: Mapping[Any, State] = {
            self.optuna.trial.TrialState.COMPLETE: "complete",
            self.optuna.trial.TrialState.PRUNED: "pruned",
            self.optuna.trial.TrialState.FAIL: "failed",
            self.optuna.trial.TrialState.RUNNING: "running",
        }
        found = []
        for side, study in self.studies.items():
            for trial in sorted(self._counted(study), key=lambda trial: trial.user_attrs["number"]):
                number, state = trial.user_attrs["number"], states[trial.state]
                value = trial.value if state in ("complete", "pruned") else None
                more = trial.user_attrs.get("seconds", 0.0), trial.user_attrs.get("error", "")
                found.append(Record(side, number, state, value, trial.params, self.plan.place(side, number), *more))
        return found


# ---------- running


def _start(plan: Plan, studies: Studies, claim: Claim) -> None:
    """Make the folder of a trial."""
    folder = plan.place(claim.side, claim.number)
    content = recipe(plan.arguments(claim.trial.params, claim.side), folder)
    of = f" of {claim.side}" if claim.side else ""
    prepare(folder, content, f"trial {claim.number}{of} in the study {plan.study}: as its run goes into this folder")


def _in_this_process(plan: Plan, studies: Studies, claim: Claim, say: Callable[[str], None]) -> None:
    def report(step: int, value: float) -> None:
        if studies.report(claim, step, value):
            raise Pruned

    try:
        _start(plan, studies, claim)
        folder = plan.place(claim.side, claim.number)
        error = run_here(folder, plan.metric, report, lambda: studies.beat(claim))
        record = studies.end(claim, "failed" if error else "complete", error)
    except Pruned:
        record = studies.end(claim, "pruned")
    except BaseException:
        studies.give_up(claim)
        raise
    say(in_a_line(plan, record))


def _in_processes(plan: Plan, studies: Studies, say: Callable[[str], None]) -> None:
    running: dict[int, tuple[Claim, Process]] = {}
    left = True
    claim: Claim | None = None
    try:
        while True:
            for place in range(plan.jobs):
                if left and place not in running:
                    claim = studies.claim()
                    if claim is None:
                        left = False
                        break
                    _start(plan, studies, claim)
                    folder = plan.place(claim.side, claim.number)
                    running[place] = claim, Process(folder, plan.metric, environment_of(plan.jobs, place))
                    claim = None
            if not running:
                return
            for place, (own, process) in [*running.items()]:
                studies.beat(own)
                if (state := _advance(studies, own, process)) is not None:
                    say(in_a_line(plan, studies.end(own, state, process.error if state == "failed" else "")))
                    del running[place]
            time.sleep(POLL)
    except BaseException:
        for own, process in running.values():
            process.stop()
            studies.give_up(own)
        if claim is not None:
            studies.give_up(claim)
        raise


def _advance(studies: Studies, claim: Claim, process: Process) -> State | None:
    """Take what a process has measured; how it has ended, if it has."""
    ended = process.ended  # first, so that nothing is written after the last look
    for step, value in process.measurements():
        if studies.report(claim, step, value) and not ended:
            process.stop()
            return "pruned"
    if not ended:
        return None
    return "failed" if process.error else "complete"


def environment_of(jobs: int, place: int) -> dict[str, str]:
    """The environment of one of several processes: its share of cores and of GPUs, unless the user has said.

    Example:
        >>> environment_of(jobs=1, place=0) == {**os.environ}
        True
    """
    environment = {**os.environ}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        given = environment.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place % len(gpus) :: jobs])
    return environment


def in_a_line(plan: Plan, record: Record) -> str:
    """What is said of a trial that has ended."""
    name = f"trial {record.number}" + (f" of {record.side}" if record.side else "")
    value = "" if record.value is None else f"{plan.metric} {record.value:.5g}, "
    names = short_names([*record.parameters])
    drawn = ", ".join(f"{name} {rounded(x)}" for name, x in zip(names, record.parameters.values(), strict=True))
    how = {"pruned": "pruned, ", "failed": f"died ({record.error}; see {record.folder}), "}.get(record.state, "")
    return f"{name}: {how}{value}{record.seconds:.0f} s" + (f" ({drawn})" if drawn else "")


# ---------- parts of Optuna


def _quiet(optuna: Any) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(plan: Plan, optuna: Any) -> Any:
    """The database, whose tables several processes may want to make at once."""
    url = plan.storage
    if "://" not in url:
        file = plan.home / "study.db" if not url else plan.home.__class__(url)
        file.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{file}"
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for tries in range(20):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
        except Exception as error:
            begun = any(word in str(error) for word in ("already exists", "UNIQUE", "locked"))
            if not begun or tries == 19:
                raise ValueError(f"`storage`: the database {url!r} cannot be opened: {error}") from error
            time.sleep(0.1)
    raise AssertionError


def _sampler(plan: Plan, number: int, optuna: Any) -> Any:
    """A sampler for one trial, so that draws depend on its number and not on who makes them."""
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    if plan.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: trials that others run now count too
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _pruner(plan: Plan) -> Any:
    pruners, after = require("optuna.pruners", EXTRA), plan.prune_after or 1
    if plan.pruner == "none":
        return pruners.NopPruner()
    if plan.pruner == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=after, reduction_factor=3)
    return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=after)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A scheduler's SIGTERM ends a sweep as an interrupt does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def importance(plan: Plan, records: Sequence[Record]) -> dict[str, float]:
    """How much of the variation of a metric over complete trials each parameter explains, by functional ANOVA.

    Returns:
        Parts by key, the greatest first, which add up to 1; nothing if there are too few trials, or if they are alike.
    """
    optuna = _quiet(require("optuna", EXTRA))
    side = plan.side_by_side
    searched = [*plan.space, *([] if side is None else [side])]
    done = [record for record in records if record.state == "complete" and record.value is not None]
    if len(done) < 3 or len({record.value for record in done}) < 2 or not searched:
        return {}
    study = optuna.create_study(direction="minimize" if plan.mode == "min" else "maximize")
    for record in done:
        drawn = dict(record.parameters)
        if side is not None:
            drawn[side.key] = side.labels[plan.sides.index(record.side)]
        study.add_trial(
            optuna.trial.create_trial(
                params={parameter.key: drawn[parameter.key] for parameter in searched},
                distributions={parameter.key: parameter.for_optuna() for parameter in searched},
                value=record.value,
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=plan.seed)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(value) for key, value in found.items()}
