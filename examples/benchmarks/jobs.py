"""The runs of a benchmark: finished ones from a file, the others in processes of one thread each."""

import json
import resource
import statistics
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def finish(
    run: Callable[..., dict[str, Any]], jobs: list[dict[str, Any]], processes: int = 1, results: Path | None = None
) -> list[dict[str, Any]]:
    """A row for each job, in their order: the job with what `run(**job)` returns.

    Rows that lie in the file `results`, one a line, are not computed again; the others are added to it as they end.
    """
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results and results.exists() else []
    left = [job for job in jobs if not any(row.items() >= job.items() for row in rows)]
    if results and len(left) < len(jobs):
        last = date.fromtimestamp(results.stat().st_mtime)
        print(f"{len(jobs) - len(left)} of {len(jobs)} runs were finished before, until {last}.\n")
    if processes > 1:
        with get_context("spawn").Pool(processes) as pool:
            rows += [_keep(row, results) for row in pool.imap_unordered(partial(_row, run), left)]
    else:
        rows += [_keep(_row(run, job), results) for job in left]
    return [next(row for row in rows if row.items() >= job.items()) for job in jobs]


def spread(values: list[float], digits: int = 3) -> str:
    """The mean, and the smallest and the largest."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _row(run: Callable[..., dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(job | run(**job)))  # as it would be read from the file


def _keep(row: dict[str, Any], results: Path | None) -> dict[str, Any]:
    if results:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def peak_memory() -> int:
    """The largest resident set of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with that of the process that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
