"""One trial of a sweep: a run of ``gan-stability fit`` that reports the measurements of its monitors.

In a separate process it is ``python -m lightning_gan_stability.cli.sweep_trial RECIPE METRIC``, which processes of
`ddp` start again as they do with ``gan-stability fit``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_gan_stability.callback import GANCallback, callbacks_of
from lightning_gan_stability.cli.diagnosis import meant
from lightning_gan_stability.cli.training import train

RECIPE, OUTPUT, TRACEBACK, MEASUREMENTS = "recipe.yaml", "output.txt", "traceback.txt", "measurements.jsonl"
GRACE = 20.0  # seconds that a process has to end after it is asked to
State = Literal["complete", "pruned", "failed", "running"]
#: Whoever calls for a measurement, by step and value.
Report = Callable[[int, float], None]


class Record(NamedTuple):
    """The record of a trial.

    Attributes:
        side: the value of ``side_by_side``; empty if there is none.
        number: number of the trial on its side, from 0.
        state: how it ended.
        value: value of the metric; the last one of a pruned trial; None if there is none.
        parameters: the drawn values, by key.
        folder: folder of its run.
        seconds: duration.
        error: the error of a failed trial, on one line.
    """

    side: str
    number: int
    state: State
    value: float | None
    parameters: Mapping[str, Any]
    folder: Path
    seconds: float = 0.0
    error: str = ""


class Pruned(Exception):
    """Raised to stop a trial because others are better."""


class Measured(Callback):
    """Reports each new measurement of a value, except that of the untrained generator.

    Args:
        key: key of the value in the log.
        report: called with step and value, in one process.
        beat: called after each batch.

    Raises:
        ValueError: at the end of a run without a measurement.
    """

    def __init__(self, key: str, report: Report, beat: Callable[[], None] = lambda: None) -> None:
        self.key = key
        self.report = report
        self.beat = beat
        self._last = 0  # step of the last measurement
        self._monitor: GANCallback | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the monitor that measures it."""
        monitors = callbacks_of(trainer, GANCallback)
        self._monitor = next((monitor for monitor in monitors if self.key in monitor.logged(trainer)), None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look where a measurement may be new."""
        self.beat()
        every = None if self._monitor is None else self._monitor.logged(trainer)[self.key]
        if isinstance(every, int) and trainer.global_step % every == 0:
            self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what validation has measured."""
        if not trainer.sanity_checking:
            self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is there at the end.

        Raises:
            ValueError: if nothing was measured.
        """
        self._look(trainer)
        if not self._last:
            known = sorted({*map(str, trainer.callback_metrics), *trainer.logged_metrics})
            hint = meant(self.key, known)
            if self._monitor is not None or self.key in known:
                hint = f" after the first step: let the monitor measure more often than every {trainer.global_step}."
            raise ValueError(f"The run has not measured {self.key!r}{hint}")

    def _look(self, trainer: Trainer) -> None:
        new = list[tuple[int, float]]()
        if self._monitor is not None:
            courses = [course for course in self._monitor.outcome(trainer).courses if course.name == self.key]
            new = [pair for course in courses for pair in zip(course.steps, course.values, strict=True)]
        if not new and self.key in trainer.callback_metrics:
            new = [(trainer.global_step, float(trainer.callback_metrics[self.key]))]
        for step, value in new:
            if step > self._last:
                self._last = step
                if trainer.is_global_zero:
                    self.report(step, float(value))


def result(values: list[float], which: str, mode: str) -> float:
    """The value of a trial from its measurements.

    Example:
        >>> result([3.0, 1.0, 2.0], "last", "min"), result([3.0, 1.0, 2.0], "best", "min")
        (2.0, 1.0)
    """
    finite = [value for value in values if value == value]
    return values[-1] if which == "last" or not finite else (min if mode == "min" else max)(finite)


def prepare(folder: Path, recipe: Mapping[str, Any], where: str) -> Path:
    """Make the folder of a trial, with its config."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (OUTPUT, TRACEBACK, MEASUREMENTS):  # of a try that was broken off
        (folder / name).unlink(missing_ok=True)
    file = folder / RECIPE
    file.write_text(f"# {where}\n{yaml.safe_dump(dict(recipe), sort_keys=False)}", encoding="utf-8")
    return file


# ---------- in this process


def run_here(folder: Path, metric: str, report: Report, beat: Callable[[], None] = lambda: None) -> str:
    """Run a trial, and save its output, and the traceback if it fails.

    Returns:
        The error; empty if there was none.

    Raises:
        Pruned: from ``report``.
        KeyboardInterrupt: if it is interrupted.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (folder / OUTPUT).open("w", encoding="utf-8") as out, _all_output_in(out):
        try:
            _fit(folder, Measured(metric, report, beat))
        except Pruned:
            raise
        except SystemExit as error:  # which Lightning makes of an interrupt
            raise KeyboardInterrupt from error
        except Exception as error:
            return _in_a_line(error)
        finally:
            for number, handler in handlers.items():
                with suppress(ValueError, TypeError):  # in another thread; a handler that is not Python's
                    signal.signal(number, handler)
    return ""


def _fit(folder: Path, measured: Measured) -> None:
    """Run the recipe of a trial, and keep the traceback if it dies."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")
        try:
            train(["fit", "--config", str(folder / RECIPE)], callbacks=[measured])
        except Pruned:
            raise
        except Exception:
            (folder / TRACEBACK).write_text(traceback.format_exc(), encoding="utf-8")
            raise


@contextmanager
def _all_output_in(file: TextIO) -> Iterator[None]:
    """Also what loggers write, which hold on to the stream that they began with."""
    loggers = [logging.getLogger(name) for name in (None, "lightning", "lightning.pytorch", "lightning.fabric")]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    streams = [(handler, handler.stream) for handler in handlers if type(handler) is logging.StreamHandler]
    with redirect_stdout(file), redirect_stderr(file):
        for handler, _ in streams:
            handler.setStream(file)
        try:
            yield
        finally:
            for handler, stream in streams:
                handler.setStream(stream)


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---------- in a process of its own


class Process:
    """A trial that runs in a separate process.

    Args:
        folder: the prepared folder of the trial.
        metric: the metric to report.
        environment: environment variables of the process.
    """

    def __init__(self, folder: Path, metric: str, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._read = 0
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, str(folder / RECIPE), metric]
        with (folder / OUTPUT).open("w", encoding="utf-8") as out:
            # in a session of its own, so that an interrupt of the terminal comes to the sweep alone
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environment},
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    @property
    def error(self) -> str:
        """The error, on one line; empty if there was none."""
        code = self._process.returncode
        if not code:
            return ""
        file = self.folder / TRACEBACK
        if file.is_file():
            return " ".join(file.read_text(encoding="utf-8").strip().splitlines()[-1].split())
        return f"ended by signal {-code}" if code < 0 else f"ended with status {code}"

    def measurements(self) -> list[tuple[int, float]]:
        """New measurements, with their steps."""
        file = self.folder / MEASUREMENTS
        if not file.is_file():
            return []
        lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        new, self._read = lines[self._read :], len(lines)
        return [(entry["step"], entry["value"]) for entry in map(json.loads, new)]

    def stop(self) -> None:
        """Stop it, and the processes that it has started."""
        for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            if self.ended:
                return
            with suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, number)
                else:
                    self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)


def main(recipe: str, metric: str) -> None:
    """Run a trial in this process, for a sweep that reads its files."""
    folder, parent = Path(recipe).parent, os.getppid()

    def report(step: int, value: float) -> None:
        with (folder / MEASUREMENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "value": value, "time": time.time()}) + "\n")
        if os.getppid() != parent:
            raise SystemExit("The sweep that began this trial is gone.")

    _fit(folder, Measured(metric, report))


if __name__ == "__main__":
    main(*sys.argv[1:])
