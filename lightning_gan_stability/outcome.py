"""The outcome of a run: a table of measurements, failures, files, and a sentence of judgement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

WORSE = 0.25  # of its best, or of what real data have: a loss of more is one
RISING = 0.1  # of its last value: what the last measurement gains at least if training is not over
LITTLE = 0.5  # of the way from the first measurement to real data: less is little
TOO_EARLY = "It is too early to judge"
SELDOM = 3  # measurements: fewer show no course, so that nothing is called a failure by them


class Course(NamedTuple):
    """The history of one value in a run.

    Attributes:
        name: its key in the log.
        steps: steps of the measurements, by ``trainer.global_step``.
        values: the measurements.
        real: the value of real data; NaN if unknown.
        lower_is_better: None if neither is.
        limit: a value beyond it means that the run has failed, whatever the other values are; NaN if there is none.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    real: float = math.nan
    lower_is_better: bool | None = None
    limit: float = math.nan

    @property
    def fails(self) -> bool:
        """Whether it ends on the wrong side of its limit."""
        last = self.values[-1]
        return last > self.limit if self.lower_is_better else last < self.limit

    @property
    def best(self) -> int | None:
        """The number of the best measurement; None if there is none."""
        finite = [i for i, value in enumerate(self.values) if math.isfinite(value)]
        if self.lower_is_better is None or not finite:
            return None
        choose = min if self.lower_is_better else max
        return choose(finite, key=self.values.__getitem__)


class Trouble(NamedTuple):
    """A failure that a monitor has reported.

    Attributes:
        step: when it began, by ``trainer.global_step``.
        verdict: name of the failure.
        evidence: the numbers behind it, as text.
        advice: what to do.
        done: what was done: ``"rollback"``, ``"stop"``; empty: nothing.
        lasts: whether it was present at the end.
    """

    step: int
    verdict: str
    evidence: str = ""
    advice: str = ""
    done: str = ""
    lasts: bool = True


class Action(NamedTuple):
    """An action of a callback that controls a run.

    Attributes:
        step: when, by ``trainer.global_step``.
        who: name of the callback.
        what: the action, as text.
        why: the reason.
    """

    step: int
    who: str
    what: str
    why: str


class Outcome(NamedTuple):
    """The findings of one callback at the end of a run.

    Attributes:
        courses: histories of its measurements, the most informative first.
        troubles: the failures that it reported.
        files: where to look, each a kind and a place.
        watched: number of steps that it checked for failures.
        actions: its actions on the run.
    """

    courses: Sequence[Course] = ()
    troubles: Sequence[Trouble] = ()
    files: Sequence[tuple[str, str]] = ()
    watched: int = 0
    actions: Sequence[Action] = ()


def courses_of(
    name: str,
    history: Sequence[Mapping[str, float]],
    lower_is_better: Mapping[str, bool | None],
    real: Mapping[str, float] | None = None,
    limits: Mapping[str, float] | None = None,
) -> list[Course]:
    """The histories of a monitor's values.

    Args:
        name: prefix of the log's keys.
        history: measurements, each with its ``step``.
        lower_is_better: by the names of the values, in the order of the table; values that were never measured are left
            out.
        real: values of real data.
        limits: values beyond which a run has failed.

    Example:
        >>> [course.values for course in courses_of("quality", [{"step": 0, "fid": 3.0}], {"fid": True, "kid": True})]
        [[3.0]]
    """
    found = []
    for value, lower in lower_is_better.items():
        rows = [row for row in history if value in row]
        steps, values = [int(row["step"]) for row in rows], [row[value] for row in rows]
        if values:
            known, limit = ((part or {}).get(value, math.nan) for part in (real, limits))
            found.append(Course(f"{name}/{value}", steps, values, known, lower, limit))
    return found


def in_words(evidence: Mapping[str, float]) -> str:
    """Numbers with their names as text, as in warnings and the table.

    Example:
        >>> in_words({"fid": 12.3456, "p": 1e-9})
        'fid 12.3, p 1e-09'
    """
    return ", ".join(f"{name} {value:.3g}" for name, value in evidence.items())


def joined(outcomes: Iterable[Outcome]) -> Outcome:
    """The combined outcome of several callbacks.

    Example:
        >>> joined([Outcome(watched=5), Outcome(troubles=[Trouble(3, "collapse")])]).watched
        5
    """
    known = [*outcomes]
    return Outcome(
        courses=[course for one in known for course in one.courses],
        troubles=sorted((trouble for one in known for trouble in one.troubles), key=lambda trouble: trouble.step),
        files=[*dict.fromkeys(file for one in known for file in one.files)],
        watched=max((one.watched for one in known), default=0),
        actions=sorted((action for one in known for action in one.actions), key=lambda action: action.step),
    )


def describe_outcome(outcome: Outcome, steps: int, stopped: str = "") -> str:
    """The table, followed by a sentence of judgement.

    Args:
        outcome: outcome of all callbacks.
        steps: number of steps of the run.
        stopped: why it stopped early.

    Example:
        >>> fid = Course("quality/fid", [0, 100, 200], [57.0, 8.0, 8.5], real=1.0, lower_is_better=True)
        >>> print(describe_outcome(Outcome([fid]), steps=200))
        200 steps    first  best  at step  last  real data
        quality/fid     57     8      100   8.5          1
        It worked: quality/fid fell from 57 to 8.5 (best 8 at step 100, real data 1).
    """
    lines = [f"{steps:,} steps"]
    if outcome.courses:
        lines = _table(f"{steps:,} steps", outcome.courses)
    for trouble in outcome.troubles:
        until = "" if trouble.lasts else " (not at the end)"
        done = f" Done: {trouble.done}." if trouble.done else ""
        reason = f": {trouble.evidence}." if trouble.evidence else "."
        lines.append(f"step {trouble.step:,}, {trouble.verdict}{until}{reason}{done} {trouble.advice}".rstrip())
    lines += [f"step {one.step:,}, {one.who}: {one.what}, because {one.why}." for one in outcome.actions]
    lines += [f"{kind}: {place}" for kind, place in outcome.files]
    return "\n".join([*lines, judgement(outcome, stopped)])


def judgement(outcome: Outcome, stopped: str = "", going: str = "") -> str:
    """A sentence that says whether a run worked, from its most informative value and the reported failures.

    Args:
        outcome: outcome of all callbacks.
        stopped: why the run stopped early.
        going: a sentence on the progress of a run that may still be going; such a run is not judged yet.

    Example:
        >>> fid = Course("quality/fid", [0, 100, 200], [52.0, 54.0, 57.0], lower_is_better=True)
        >>> judgement(Outcome([fid]))
        'It did not work: quality/fid rose from 52 to 57.'
    """
    course = next((one for one in outcome.courses if one.lower_is_better is not None), None)
    lasting = [trouble for trouble in outcome.troubles if trouble.lasts]
    early = bool(stopped or going)
    parts = [f"It stopped: {stopped.rstrip('.')}."] if stopped else [going] if going else []
    if lasting:
        names = ", ".join(f"{trouble.verdict} (since step {trouble.step:,})" for trouble in lasting)
        parts.append(f"{'Trouble at the end' if stopped else 'Trouble' if going else 'It did not work'}: {names}.")
    failed = [one for one in outcome.courses if one.fails and len(one.values) > 1]
    judged = failed or ([] if course is None else [course])
    reasons = [_too_early(one) for one in judged]
    young = reasons[0] if reasons and all(reasons) and not early and not lasting else ""
    if failed and not lasting:
        at_the_end = "" if going else " at the end"
        found = ", ".join(f"{one.name} is {_number(one.values[-1])}{at_the_end}" for one in failed)
        head = "At the end" if stopped else "So far" if going else TOO_EARLY if young else "It did not work"
        parts.append(f"{head}: {found}.")
    if course is not None:
        parts.append(_progress(course, bad=bool(early or lasting or failed), young=young))
        if failed and young:
            parts.append(young)
    elif not lasting:
        parts.append(
            "Nobody measured how good the samples are: add a QualityMonitor, or a PairedMonitor if each has a target."
        )
    if outcome.watched and not outcome.troubles and any("It did not work" in part for part in parts):
        parts.append(f"No monitor found a cause in {outcome.watched:,} steps.")
    elif outcome.watched and not outcome.troubles:
        parts.append(f"There was no trouble seen in {outcome.watched:,} steps.")
    return " ".join(parts)


def _too_early(course: Course) -> str:
    """Why a run cannot be called a failure yet, and what to do; empty if it can."""
    values = course.values
    if not math.isfinite(values[-1]) or len(values) < 2:  # which is said in other words
        return ""
    if len(values) < SELDOM:
        return f"There are only {len(values)} measurements: measure more often, or train longer."
    return "It still got better at the end: train longer." if _still_better(course) else ""


def _still_better(course: Course) -> bool:
    """Whether the last measurement is the best, and better than the one before by more than a little."""
    sign = 1 if course.lower_is_better else -1
    gain = sign * (course.values[-2] - course.values[-1])
    return course.best == len(course.values) - 1 and gain > RISING * abs(course.values[-1])


def _progress(course: Course, bad: bool, young: str = "") -> str:
    """What became of a value; as a judgement, unless there is a worse one."""
    name, first, last, best = course.name, course.values[0], course.values[-1], course.best
    sign = 1 if course.lower_is_better else -1
    if len(course.values) == 1:
        return f"{name} was measured once, at step {course.steps[0]:,} ({_number(first)}): measure more often."
    if best is None or not math.isfinite(last):
        return f"{'' if bad else 'It did not work: '}{name} is not finite at the end."
    top = course.values[best]
    real = "" if math.isnan(course.real) else f", real data {_number(course.real)}"
    change = f"{name} {'rose' if last > first else 'fell'} from {_number(first)} to {_number(last)}"
    if last == first:
        change = f"{name} stayed at {_number(first)}"
    found = f"{change} (best {_number(top)} at step {course.steps[best]:,}{real})"
    if bad:
        return f"{found}."
    if not math.isfinite(first) or sign * (last - course.real) <= 0:
        return f"It worked: {found}."
    if sign * last >= sign * first:
        head = TOO_EARLY if young else "It did not work"
        advice = f" {young}" if young else ""
        return f"{head}: {change}{'' if best in (0, len(course.values) - 1) else found[len(change) :]}.{advice}"
    if sign * (last - top) > WORSE * max(abs(top), abs(course.real) if math.isfinite(course.real) else 0.0):
        return f"It got worse after step {course.steps[best]:,}: {found}. Take the checkpoint of that step."
    way = (first - last) / (first - course.real) if math.isfinite(course.real) and first != course.real else math.nan
    if way < LITTLE and young:
        return f"{TOO_EARLY}: {found}. {young}"
    if way < LITTLE:
        return f"It learned little: {found}. Train longer, or with other learning rates."
    rising = _still_better(course)
    return f"It worked: {found}.{' It still got better at the end: train longer.' if rising else ''}"


def table_rows(title: str, courses: Sequence[Course]) -> list[list[str]]:
    """The table, cell by cell: a row of headings, and one for each value.

    Example:
        >>> table_rows("", [Course("quality/fid", [0, 100], [57.0, 8.0], lower_is_better=True)])[1]
        ['quality/fid', '57', '8', '100', '8', '']
    """
    rows = [[title, "first", "best", "at step", "last", "real data"]]
    for course in courses:
        best = course.best
        rows.append(
            [
                course.name,
                _number(course.values[0]),
                "" if best is None else _number(course.values[best]),
                "" if best is None else f"{course.steps[best]:,}",
                _number(course.values[-1]),
                "" if math.isnan(course.real) else _number(course.real),
            ]
        )
    return rows


def _table(title: str, courses: Sequence[Course]) -> list[str]:
    rows = table_rows(title, courses)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    """Three digits, without an exponent where it can be read without."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
