"""Time of the metrics against other libraries, both sides in turn in one run.

    python examples/benchmarks/metrics.py           # three to fifteen minutes on one core, by the machine's load
    python examples/benchmarks/metrics.py --smoke   # seconds; only shows that it runs

Fréchet distance (d = 2048) against torchmetrics with an identity as its network, three times: ours from features
against their `compute`, which has the sums that `update` made, not counted; ours from means and covariances, which is
what their `compute` starts from; and from features to the value on both sides. Precision and recall of 10,000 against
10,000 such features: torch-fidelity and, if it is installed (`pip install prdc`), prdc. Times are of the wall, with as
many threads as `--threads`; memory is how much the largest resident set of a process of its own grows.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gan_stability.metrics import density_coverage, frechet_distance, frechet_from_moments, precision_recall


def features(n: int, d: int, seed: int) -> Tensor:
    """Positive, correlated features whose spectrum falls, as those of a network."""
    source = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1).float().rsqrt()
    return (torch.randn(n, d, generator=source) * scale + 0.003 * seed).relu()


class Same(nn.Module):
    """The network of a torchmetrics metric that gets features."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.num_features = d

    def forward(self, x: Tensor) -> Tensor:
        return x


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def frechet(n: int, d: int, rounds: int) -> list[str]:
    """Rows of the table: times, their ratio, and by how much the values differ."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = features(n, d, 0), features(n, d, 1)
    times: list[list[tuple[float, float]]] = [[], [], []]
    for _ in range(rounds):
        other = FrechetInceptionDistance(feature=Same(d), normalize=True).set_dtype(torch.float64)
        add, _ = timed(lambda statistic=other: [statistic.update(x.double(), x is real) for x in (real, fake)])
        one, value = timed(lambda: frechet_distance(real, fake))
        moments = [part for x in (real, fake) for part in (x.double().mean(0), torch.cov(x.double().T))]
        two, same = timed(lambda args=moments: frechet_from_moments(*args))
        compute, theirs = timed(other.compute)
        for pairs, pair in zip(times, [(one, compute), (two, compute), (one, add + compute)], strict=True):
            pairs.append(pair)
    differ = f"{max(abs(value - theirs), abs(same - theirs)) / theirs:.0e}"
    starts = ("features against `compute`", "moments against `compute`", "features against `update` and `compute`")
    return [
        row(f"Fréchet distance, n = {n}, d = {d}: {start}", "torchmetrics", pairs, differ)
        for start, pairs in zip(starts, times, strict=True)
    ]


def row(what: str, other: str, times: list[tuple[float, float]], rest: str) -> str:
    ours, theirs = ([pair[i] for pair in times] for i in (0, 1))
    ratios = [b / a for a, b in times]
    spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    return f"| {what} | {other} | {statistics.median(ours):.2f} | {statistics.median(theirs):.2f} | {spread} | {rest} |"


def ours(real: Tensor, fake: Tensor) -> list[float]:
    return [*precision_recall(real, fake, k=5)]


def ours_of_four(real: Tensor, fake: Tensor) -> list[float]:
    return [*precision_recall(real, fake, k=5), *density_coverage(real, fake, k=5)]


def fidelity(real: Tensor, fake: Tensor) -> list[float]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(fake, real, prc_neighborhood=5, prc_batch_size=10_000, verbose=False)
    return [float(found["precision"]), float(found["recall"])]


def prdc(real: Tensor, fake: Tensor) -> list[float]:
    import contextlib
    import io

    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):
        found = compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    return [float(found[name]) for name in ("precision", "recall", "density", "coverage")]


SIDES = {"ours": ours, "ours, all four": ours_of_four, "torch-fidelity": fidelity, "prdc, all four": prdc}


def resident(which: str) -> float:
    """Megabytes of this process's resident set, now or at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def alone(side: str, n: int, d: int, threads: int) -> None:
    """One measurement in a process of its own, for its memory; prints a line."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    real, fake = features(n, d, 0), features(n, d, 1)
    SIDES[side](real[:50], fake[:50])  # imports
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest resident set so far
    before = resident("VmRSS")
    seconds, values = timed(lambda: SIDES[side](real, fake))
    grown = resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "values": values, "megabytes": grown}))


def neighbours(n: int, d: int, rounds: int, threads: int) -> None:
    import importlib.util
    import subprocess
    import sys

    sides = [side for side in SIDES if "prdc" not in side or importlib.util.find_spec("prdc")]
    seen: dict[str, list[Any]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, __file__, "--alone", side, str(n), str(d), str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seen[side].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"\n| Precision and recall, {n:,} × {n:,} × {d} | seconds | memory grows by, MB | values |\n|---|---|---|---|"
    )
    for side, runs in seen.items():
        seconds = [run["seconds"] for run in runs]
        values = ", ".join(f"{value:.4f}" for value in runs[0]["values"])
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"| {side} | {spread} | {max(run['megabytes'] for run in runs):.0f} | {values} |")
    reference = seen["ours"][0]["values"]
    for runs in seen.values():
        assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(runs[0]["values"], reference, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        side, n, d, threads = arguments.alone
        alone(side, int(n), int(d), int(threads))
        return
    torch.set_num_threads(arguments.threads)
    small = arguments.smoke
    rounds = 1 if small else arguments.rounds
    print(f"torch {torch.__version__}, {arguments.threads} threads, {rounds} rounds\n")
    print("| What | Against | Ours, s | Theirs, s | Ratio | Values differ by |\n|---|---|---|---|---|---|")
    for n, d in [(60, 20), (30, 60)] if small else [(5000, 2048), (1000, 2048)]:
        print(*frechet(n, d, rounds), sep="\n", flush=True)
    neighbours(*(200, 40) if small else (10_000, 2048), 1 if small else max(1, rounds - 1), arguments.threads)


if __name__ == "__main__":
    main()
