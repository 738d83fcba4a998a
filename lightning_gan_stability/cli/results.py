"""The results of an evaluation, as text for a terminal and as files."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import lightning_gan_stability as package
from lightning_gan_stability.evaluation import Difference, Evaluation
from lightning_gan_stability.files import written_whole

WIDTH = 120
SUFFIXES = (".json", ".csv", ".md")
_HEAD, _CELL = 26, 30  # characters of a column of names, and of one of values


class Checkpoint(NamedTuple):
    """A checkpoint that was evaluated.

    Attributes:
        path: path of the file.
        step: optimizer steps of a player at which it was saved; None if unknown.
        weights: ``"average"`` or ``"last"``.
    """

    path: Path
    step: int | None
    weights: str


class Results(NamedTuple):
    """All results for tables and files; ``checkpoints`` by the names of evaluations."""

    evaluations: Sequence[Evaluation]
    differences: Sequence[Difference]
    checkpoints: Mapping[str, Checkpoint]


def as_text(results: Results) -> str:
    """Tables of at most 120 columns: metrics below each other, checkpoints and real data beside each other."""
    lines = []
    for name, checkpoint in results.checkpoints.items():
        lines += [f"{name}: {checkpoint.path} ({_of(checkpoint)})"]
    at_once = max(1, (WIDTH - _HEAD) // _CELL - 1)
    for start in range(0, len(results.evaluations), at_once):
        header, *rows = _table(results, results.evaluations[start : start + at_once])
        lines += ["", *(row[0].ljust(_HEAD) + "".join(x.ljust(_CELL) for x in row[1:]) for row in (header, *rows))]
    lines = [line.rstrip() for line in lines]
    said = _conclusions(results)
    lines += ["", *said] if said else []
    lines += ["", *_protocol(results)]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, WIDTH, drop_whitespace=False) or [""])


def as_markdown(results: Results) -> str:
    """A table, with the protocol under it."""
    header, *rows = _table(results, results.evaluations)
    lines = [_row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    lines += [f"- {name}: `{checkpoint.path}`, {_of(checkpoint)}" for name, checkpoint in results.checkpoints.items()]
    lines += ["", *(f"- {line}" for line in _conclusions(results))] if results.differences else []
    return "\n".join([*lines, "", *_protocol(results), ""])


def as_json(results: Results) -> str:
    """All results; numbers that are not finite are null."""
    checkpoints = []
    for evaluation in results.evaluations:
        checkpoint = results.checkpoints[evaluation.name]
        metrics = {
            row["metric"]: {key: row[key] for key in ("value", "low", "high", "null")} for row in _long(evaluation)
        }
        checkpoints.append(
            {
                "name": evaluation.name,
                "path": str(checkpoint.path),
                "step": checkpoint.step,
                "weights": checkpoint.weights,
                "metrics": metrics,
                "notes": evaluation.notes,
            }
        )
    content = {
        "package": package.__version__,
        "protocol": results.evaluations[0].protocol,
        "checkpoints": checkpoints,
        "differences": [dict(zip(Difference._fields, difference, strict=True)) for difference in results.differences],
    }
    return json.dumps(_finite(content), indent=2, default=str) + "\n"


def as_csv(results: Results) -> str:
    """One row for each checkpoint and metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ["metric", "value", "low", "high", "null"]
    writer.writerow(["checkpoint", "step", *columns])
    for evaluation in results.evaluations:
        checkpoint = results.checkpoints[evaluation.name]
        for row in _long(evaluation):
            writer.writerow([str(checkpoint.path), checkpoint.step, *(row[column] for column in columns)])
    return file.getvalue()


FORMATS = {".json": as_json, ".csv": as_csv, ".md": as_markdown}


def check_files(files: Sequence[Path], overwrite: bool) -> None:
    """Refuse files of unknown kinds, and those that exist.

    Raises:
        ValueError: if a name has another ending.
        FileExistsError: if a file exists and may not be overwritten.
    """
    for file in files:
        if file.suffix not in SUFFIXES:
            raise ValueError(f"`--out` must end in {', '.join(SUFFIXES)}, got {str(file)!r}.")
        if file.is_dir():
            raise ValueError(f"`--out` must be a file, and {str(file)!r} is a folder.")
        if file.exists() and not overwrite:
            raise FileExistsError(f"{str(file)!r} exists: add --overwrite, or name another file.")


def write(results: Results, files: Sequence[Path]) -> None:
    """Write all files, each of them completely or not at all.

    Raises:
        OSError: if one cannot be written; existing files are kept.
    """
    try:
        with ExitStack() as all_written:
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
                place = all_written.enter_context(written_whole(file))
                place.write_text(FORMATS[file.suffix](results), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"The results could not be written to {str(error.filename or files[0])!r}: {reason}.") from error


# ---------- what they are made of


def _of(checkpoint: Checkpoint) -> str:
    step = "step unknown" if checkpoint.step is None else f"step {checkpoint.step}"
    return f"{step}, {checkpoint.weights} weights"


def _names(results: Results) -> list[str]:
    return [*dict.fromkeys(name for evaluation in results.evaluations for name in evaluation.values)]


def _table(results: Results, evaluations: Sequence[Evaluation]) -> list[list[str]]:
    null = results.evaluations[0].null
    rows = [["metric", *(evaluation.name for evaluation in evaluations), "real halves"]]
    for name in _names(results):
        rows.append([name, *(_cell(evaluation, name) for evaluation in evaluations), _number(null.get(name))])
    return rows


def _cell(evaluation: Evaluation, name: str) -> str:
    value, ends = _number(evaluation.values.get(name)), evaluation.intervals.get(name)
    return value if ends is None else f"{value} ({_number(ends.low)} to {_number(ends.high)})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _conclusions(results: Results) -> list[str]:
    """The differences that are larger than noise, and in one line those that are not."""
    lines = [str(difference) for difference in results.differences if difference.better is not None]
    alike: dict[tuple[str, str], list[str]] = {}
    for difference in results.differences:
        if difference.better is None:
            alike.setdefault((difference.first, difference.second), []).append(difference.metric)
    return lines + [f"{a} and {b}: no difference larger than noise in {', '.join(x)}" for (a, b), x in alike.items()]


def _protocol(results: Results) -> list[str]:
    protocol = results.evaluations[0].protocol
    settings = ", ".join(f"{key} {value}" for key, value in protocol.items())
    lines = [f"Protocol: {settings}; gan-stability {package.__version__}."]
    if any(evaluation.intervals for evaluation in results.evaluations):
        lines.append(
            f"Intervals ({protocol['level']:.0%}) are for the mean over other samples, as many, of these generators."
        )
    if results.differences:
        lines.append("Intervals of differences hold for all pairs together, each metric by itself (Bonferroni).")
    notes = [(evaluation.name, note) for evaluation in results.evaluations for note in evaluation.notes]
    several = len(results.evaluations) > 1
    return lines + [f"{name}: {note}" if several else note for name, note in notes]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _long(evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = []
    for name, value in evaluation.values.items():
        ends = evaluation.intervals.get(name)
        low, high = (None, None) if ends is None else ends
        rows.append({"metric": name, "value": value, "low": low, "high": high, "null": evaluation.null.get(name)})
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
