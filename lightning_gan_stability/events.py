"""What happens in a run, in a file beside its log, for reading a run that is still going or was killed.

``events.jsonl`` has an object on each line, and lines are only added: where a fit starts, of which values the courses
tell how good a run is, what a monitor says when it begins to say so and when it ceases to, what was done to the run,
and where a fit ends.
``environment.json`` has the versions and the device of the last fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_gan_stability.outcome import Action, Course, Outcome, Trouble

EVENTS, ENVIRONMENT = "events.jsonl", "environment.json"


class EventLog:
    """Writes what is new in a run's outcome.

    Args:
        folders: of the run's logs; each gets the files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = EventLog([Path(folder)])
        ...     log.start(0, -1, {})
        ...     log.observe(200, Outcome(troubles=[Trouble(100, "collapse")]))
        ...     read_events(Path(folder)).troubles[0].verdict
        'collapse'
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = [*folders]
        self._written: dict[tuple[Any, ...], dict[str, Any]] = {}

    def start(self, step: int, max_steps: int, environment: Mapping[str, Any]) -> None:
        """Note that a fit starts; one that starts at step 0 forgets those before it, as the log of its values does.

        Args:
            step: of the Trainer.
            max_steps: of the Trainer; -1: not known.
            environment: versions and device.
        """
        for folder in self.folders:
            file = folder / EVENTS
            if step == 0:
                file.unlink(missing_ok=True)
            elif file.exists() and not file.read_bytes().endswith(b"\n"):
                _append(file, "\n")  # the last line of a run that was killed is torn, and no other shall be
            (folder / ENVIRONMENT).write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
        self._write({"event": "start", "step": step, "max_steps": max_steps, "time": _now()})

    def observe(self, step: int, outcome: Outcome) -> None:
        """Write what is not written yet: courses, and troubles that begin or cease.

        Args:
            step: of the Trainer.
            outcome: what the callbacks know by now.
        """
        for course in outcome.courses:
            numbers = {"real": _or_none(course.real), "limit": _or_none(course.limit)}
            values = {"event": "course", "name": course.name, "lower_is_better": course.lower_is_better, **numbers}
            self._write_news(("course", course.name), values)
        for trouble in outcome.troubles:
            said = {"event": "trouble", **dict(zip(Trouble._fields, trouble, strict=True))}
            self._write_news(("trouble", trouble.step, trouble.verdict), said, at=step)
        for n, action in enumerate(outcome.actions):
            self._write_news(("action", n), {"event": "action", **dict(zip(Action._fields, action, strict=True))})

    def end(self, step: int, outcome: Outcome, stopped: str = "") -> None:
        """Note that a fit ends.

        Args:
            step: of the Trainer.
            outcome: what the callbacks know.
            stopped: why it did not come to its end.
        """
        self.observe(step, outcome)
        self._write({"event": "end", "step": step, "stopped": stopped, "watched": outcome.watched, "time": _now()})

    def _write_news(self, key: tuple[Any, ...], values: dict[str, Any], **more: Any) -> None:
        if self._written.get(key) != values:
            self._written[key] = values
            self._write(values | more)

    def _write(self, values: dict[str, Any]) -> None:
        for folder in self.folders:
            _append(folder / EVENTS, json.dumps(values) + "\n")


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(text)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


# ---------- reading


@dataclass
class Events:
    """What the file says.

    Attributes:
        courses: by name, without values, the most telling first.
        troubles: what monitors have said.
        actions: what was done to the run.
        spans: of each trouble, from when to when it was so; None: it is so at the last look.
        max_steps: of the last fit; -1: not known.
        first_step: of the first fit.
        last_step: at which the last fit ended; None: it has not said so.
        stopped: why the last fit did not come to its end.
        watched: steps that a monitor looked at for trouble; None: not known.
        times: when the first fit started, and when the last one ended.
    """

    courses: dict[str, Course] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    spans: list[list[tuple[int, int | None]]] = field(default_factory=list)
    max_steps: int = -1
    first_step: int = 0
    last_step: int | None = None
    stopped: str = ""
    watched: int | None = None
    times: tuple[str, str] = ("", "")


def read_events(folder: Path) -> Events | None:
    """Read what is there of a run's events; None if there is no file.

    Lines that are torn are left out.
    """
    file = folder / EVENTS
    if not file.is_file():
        return None
    found, troubles = Events(), dict[tuple[int, str], Trouble]()
    spans = dict[tuple[int, str], list[tuple[int, int | None]]]()
    for line in _lines(file):
        kind = line.pop("event")
        if kind == "start":
            started = found.times[0] or line["time"]
            found.first_step = found.first_step if found.times[0] else line["step"]
            found.max_steps, found.last_step, found.stopped, found.times = line["max_steps"], None, "", (started, "")
        elif kind == "course":
            real, limit = (math.nan if line[key] is None else line[key] for key in ("real", "limit"))
            found.courses[line["name"]] = Course(line["name"], [], [], real, line["lower_is_better"], limit)
        elif kind == "trouble":
            at = line.pop("at")
            key = line["step"], line["verdict"]
            past = spans.setdefault(key, [(line["step"], None)])
            if not line["lasts"]:
                past[-1] = past[-1][0], at
            elif past[-1][1] is not None:
                past.append((at, None))
            troubles[key] = Trouble(**line)
        elif kind == "action":
            action = Action(**line)
            found.actions += [] if action in found.actions else [action]  # a run that goes on tells them again
        elif kind == "end":
            found.last_step, found.stopped, found.watched = line["step"], line["stopped"], line["watched"]
            found.times = found.times[0], line["time"]
    order = sorted(troubles, key=lambda key: key[0])
    found.troubles, found.spans = [troubles[key] for key in order], [spans[key] for key in order]
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # torn
        if isinstance(found, dict) and "event" in found:
            yield found
