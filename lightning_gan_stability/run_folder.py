"""What the folder of a run holds, whether the run has ended, is still going or was killed."""

from __future__ import annotations

import csv
import json
import math
import re
from array import array
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_gan_stability.advice import ADVICE, HEALTH
from lightning_gan_stability.events import ENVIRONMENT, Events, read_events
from lightning_gan_stability.monitors import quality
from lightning_gan_stability.outcome import Course, Outcome, Trouble, courses_of, judgement

LOG, CONFIG, HPARAMS = "metrics.csv", "config.yaml", "hparams.yaml"
NO_VALUES = ("step", "epoch")


class Curve(NamedTuple):
    """The values under one key of the log, with their steps."""

    steps: array[float]
    values: array[float]


class Picture(NamedTuple):
    """A file that a callback has drawn at a step."""

    step: int
    file: Path


class Run(NamedTuple):
    """A run, from the files in its folder.

    Attributes:
        folder: where they lie.
        curves: of the log, by key.
        step: the last one that is known of.
        events: what happened, spans of troubles among it.
        outcome: courses and troubles, of which the end of a run says the same.
        verdict: a sentence on whether the run worked.
        ended: it has come to its end, or said why not.
        written: when the log was last written.
        hparams: of the module, with the protocols of monitors.
        config: the text of the file that says it all, or else of the hyperparameters.
        environment: versions and device.
        pictures: by the name of the callback, or of the part of samples.
        notes: what could not be read.
    """

    folder: Path
    curves: dict[str, Curve]
    step: int
    events: Events
    outcome: Outcome
    verdict: str
    ended: bool
    written: datetime
    hparams: Mapping[str, Any]
    config: str
    environment: Mapping[str, str]
    pictures: dict[str, list[Picture]]
    notes: list[str]


def read_run(path: str | PathLike[str]) -> Run:
    """Read the folder that a run's CSVLogger writes, such as ``runs/digits/version_0``.

    Raises:
        FileNotFoundError: if there is no such folder, or if it has no log.
        ValueError: if the log has no values yet.
    """
    folder = Path(path)
    file = find_log(folder)
    notes: list[str] = []
    curves = read_log(file, notes)
    hparams, environment = _read_hparams(folder, notes), _read_environment(folder)
    events = read_events(folder)
    if events is None:
        events = _events_of_log(curves, hparams)
    last = int(max(max(curve.steps) for curve in curves.values()))
    step = max(last, events.last_step or 0)
    outcome = Outcome(
        _courses(events, curves), events.troubles, watched=_watched(events, curves), actions=events.actions
    )
    of = f" of {events.max_steps:,}" if events.max_steps > 0 else ""
    going = "" if events.last_step is not None else f"At step {step:,}{of}, still going, or ended without a word."
    config = next((folder / name for name in (CONFIG, HPARAMS) if (folder / name).is_file()), None)
    return Run(
        folder=folder,
        curves=curves,
        step=step,
        events=events,
        outcome=outcome,
        verdict=judgement(outcome, events.stopped, going),
        ended=events.last_step is not None,
        written=datetime.fromtimestamp(file.stat().st_mtime, timezone.utc),
        hparams=hparams,
        config="" if config is None else config.read_text(encoding="utf-8", errors="replace"),
        environment=environment,
        pictures=find_pictures(folder),
        notes=notes,
    )


def find_log(folder: Path) -> Path:
    """The file of a run's values.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    file = folder / LOG
    if not file.is_file():
        below = sorted((f.parent for f in folder.rglob(LOG)), key=lambda f: (f / LOG).stat().st_mtime)
        hint = f"did you mean {str(below[-1])!r}?" if below else "a run with the logger CSVLogger leaves one."
        raise FileNotFoundError(f"The folder {str(folder)!r} has no {LOG}: {hint}")
    return file


def read_log(file: Path, notes: list[str]) -> dict[str, Curve]:
    """The curves of a log; values that are not there, and what a killed run has left of a line, are left out.

    Args:
        file: the log.
        notes: get a sentence on what was left out.

    Raises:
        ValueError: if there is no value.
    """
    curves: dict[str, Curve] = {}
    torn = 0
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        rows = csv.reader(line for line in lines if line.endswith("\n"))  # the last line may be half there
        keys = next(rows, [])
        place = keys.index("step") if "step" in keys else -1
        for row in rows:
            try:
                step = float(row[place])
                numbers = [(key, float(cell)) for key, cell in zip(keys, row, strict=True) if cell]
            except (ValueError, IndexError):
                torn += 1
                continue
            for key, value in numbers:
                if key not in NO_VALUES:
                    curve = curves.setdefault(key, Curve(array("d"), array("d")))
                    curve.steps.append(step)
                    curve.values.append(value)
    if not curves:
        raise ValueError(f"{str(file)!r} has no values yet: a CSVLogger writes them every 100 logged steps by default.")
    if torn:
        notes.append(f"{torn:,} lines of {LOG} could not be read, and are left out.")
    return curves


def find_pictures(folder: Path) -> dict[str, list[Picture]]:
    """The pictures ``<name>/<step>.png``, and ``<name>/<step>_<part>.png``, by name and part, in order of steps."""
    found: dict[str, list[Picture]] = {}
    for file in sorted(folder.rglob("*.png")):
        parts = re.fullmatch(r"(\d+)_?(.*)", file.stem)
        if parts is not None and file.parent != folder:
            name = "/".join([*file.relative_to(folder).parent.parts, *([parts[2]] if parts[2] else [])])
            found.setdefault(name, []).append(Picture(int(parts[1]), file))
    return {name: sorted(pictures) for name, pictures in found.items()}


# ---------- courses and troubles


def _courses(events: Events, curves: Mapping[str, Curve]) -> list[Course]:
    """The courses with their values, which the log has."""
    return [
        Course(name, [*map(int, curves[name].steps)], [*curves[name].values], *course[3:])
        for name, course in events.courses.items()
        if name in curves
    ]


def _watched(events: Events, curves: Mapping[str, Curve]) -> int:
    if events.watched is not None:
        return events.watched
    steps = [max(curves[f"health/{name}"].steps) for name in HEALTH if f"health/{name}" in curves]
    return max(int(max(steps, default=0)) - events.first_step, 0)


def _events_of_log(curves: Mapping[str, Curve], hparams: Mapping[str, Any]) -> Events:
    """What a log tells by itself, of a run without a file of events."""
    events = Events()
    protocols = {name: part["null"] for name, part in hparams.items() if isinstance(part, dict) and "null" in part}
    for name in dict.fromkeys(["quality", *protocols]):
        there = {key.removeprefix(f"{name}/") for key in curves if key.startswith(f"{name}/")}
        real = (protocols.get(name) or {}) | dict.fromkeys(quality.OF_CONDITIONS, 1.0)
        once = [{"step": 0.0} | dict.fromkeys(there, math.nan)]
        courses = courses_of(name, once, quality.LOWER_IS_BETTER, real, quality.LIMITS)
        events.courses |= {course.name: course for course in courses}
    for key, curve in curves.items():
        if key.startswith("health/") and 1.0 in curve.values:
            name = key.removeprefix("health/")
            verdict = name if name in ADVICE else name.replace("_", " ")
            step, lasts = int(curve.steps[curve.values.index(1.0)]), curve.values[-1] == 1.0
            events.troubles.append(Trouble(step, verdict, "", ADVICE.get(verdict, ""), lasts=lasts))
    events.troubles.sort(key=lambda trouble: trouble.step)
    events.spans = [[(trouble.step, None if trouble.lasts else trouble.step)] for trouble in events.troubles]
    return events


# ---------- other files


class _Plain(yaml.SafeLoader):
    """Reads what Lightning writes of Python's own types, such as tuples, as lists, dicts and text; makes no objects."""


def _plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return str(node.value) or tag


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def _read_hparams(folder: Path, notes: list[str]) -> Mapping[str, Any]:
    file = folder / HPARAMS
    if not file.is_file():
        return {}
    try:
        found = yaml.load(file.read_text(encoding="utf-8", errors="replace"), _Plain)
    except yaml.YAMLError:
        notes.append(f"{HPARAMS} could not be read, and is left out.")
        return {}
    return found if isinstance(found, dict) else {}


def _read_environment(folder: Path) -> Mapping[str, str]:
    try:
        found = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or torn
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


# ---------- settings


def settings_of(text: str) -> dict[str, str]:
    """The settings of a config, flat, with the names of classes in place of ``init_args`` and numbers in lists.

    Example:
        >>> settings_of("trainer: {callbacks: [{class_path: R1Penalty, init_args: {gamma: 1.0}}]}")
        {'trainer.callbacks.R1Penalty.gamma': '1.0'}
    """
    try:
        return dict(_flat("", yaml.load(text, _Plain)))
    except yaml.YAMLError:
        return {}


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        path = f"{prefix}.{name}" if prefix else name
        rest = value.get("init_args") or {}
        return _flat(path, rest) if rest else [(path, "yes")]
    if isinstance(value, dict) and value:
        return [item for key, part in value.items() for item in _flat(f"{prefix}.{key}" if prefix else str(key), part)]
    if isinstance(value, Sequence) and any(isinstance(part, dict) and "class_path" in part for part in value):
        names = [str(part.get("class_path", "")) if isinstance(part, dict) else "" for part in value]
        several = [names[:i].count(name) for i, name in enumerate(names)]  # of one class, as of two monitors
        places = [f"{prefix}[{n}]" if n else prefix for n in several]
        return [item for place, part in zip(places, value, strict=True) for item in _flat(place, part)]
    return [(prefix, "" if value is None else str(value))]
