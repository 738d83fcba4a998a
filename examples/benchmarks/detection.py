"""How many collapses CollapseDetector catches, how soon, and how often it cries wolf.

    python examples/benchmarks/detection.py                         # all: hours on one core
    python examples/benchmarks/detection.py --runs scripted         # generators that follow a script
    python examples/benchmarks/detection.py --runs trained --n 256  # real ones, 256 samples in a measurement
    python examples/benchmarks/detection.py --smoke                 # seconds; only shows that it runs

Scripted: generators of which it is known at each step what they are (scripted.py), measured 30 times, and 10 times
where a measurement has 1,000 samples or more. Healthy ones are perfect from the start, narrow, get some modes late, or
have uneven modes; the others go bad at half of the run, or are bad all the time. That is said after step 500 alone, so
that these runs have 600 steps; others have one for each measurement. No two runs of a number of samples share data or
latents.

Trained: healthy recipes on the ring, the grid and real digits, the digits seen by a classifier (modes known) and as
pixels (not known); and the same with a generator that is damaged from half of the run on: in what the monitor sees, a
class is dropped, one after the other is lost, only one is left, or one that changes. Besides, runs that collapse by
themselves: a generator that learns ten times too fast, one that does not learn, and one that learns far too fast.
Measured every 160 of 1,600 steps.

Patience is 3. A run is caught if there is an event after it has gone bad, at which it ends. A false alarm is an event
at a step at which the generator is healthy: in a scripted run, if it holds every mode with a fifth of its share; in a
trained one, if the recipe is and there is no damage yet. Bounds are exact ones of 95 % for the share of such runs,
one-sided.
"""

import argparse
import logging
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import scripted
import torch
from jobs import finish
from lightning.pytorch import Trainer, seed_everything
from scipy.stats import binomtest
from torch import Tensor, nn

from lightning_gan_stability import (
    MLP,
    CollapseDetector,
    DigitClassifier,
    Digits,
    GANModule,
    Grid,
    QualityMonitor,
    R1Penalty,
    R2Penalty,
    Relativistic,
    Ring,
)

HEALTHY = ["ring", "ring, R1 alone", "grid", "digits", "pixels"]
DAMAGES = ["a class dropped", "classes lost slowly", "one class left", "hopping"]
FAILURES = ["rates 10 : 1", "frozen generator", "rates too high"]
FROM_HALF = [*DAMAGES, *scripted.FROM_HALF]
BAD = [*FROM_HALF, *FAILURES, *scripted.FROM_START]
SAMPLES = [64, 256, 512, 2500]
Row = dict[str, Any]


class Damaged(GANModule):
    """A GAN of which the monitor sees, from a step on, only some classes."""

    damage, since, every, classify = "", 10**9, 160, None

    def sample(self, n: int | None = None, condition: Tensor | None = None, latents: Tensor | None = None) -> Tensor:
        samples = super().sample(n, condition, latents)
        n = len(samples)
        if self.training or self.iteration < self.since:
            return samples
        with torch.no_grad():
            kinds = self.classify(samples)
        rows = self.keep(kinds).nonzero().flatten()
        return samples[rows[torch.arange(n) % len(rows)]] if len(rows) else samples

    def keep(self, kinds: Tensor) -> Tensor:
        """Whether a sample of some class is still made."""
        age = (self.iteration - self.since) // self.every
        if self.damage == "a class dropped":
            return kinds != 1
        if self.damage == "classes lost slowly":
            return kinds > age
        return kinds == (1 if self.damage == "one class left" else 1 + age % 3)


def adam(lr: float) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.99), fused=True)


def make(data: str, failure: str) -> tuple[Damaged, Any, nn.Module | None, list[Any]]:
    """A recipe: module, data, extractor and penalties."""
    pixels = data in ("digits", "pixels")
    lr = 5e-4 if pixels else 1e-3
    rates = {"rates 10 : 1": (2 * lr, 0.1 * lr), "frozen generator": (0.0, lr), "rates too high": (0.3, 0.3)}
    g_lr, d_lr = rates.get(failure, (lr, lr))
    if pixels:
        generator = MLP([32, 128, 128, 64], output_activation=nn.Tanh, output_shape=[1, 8, 8])
        discriminator, source = MLP([64, 128, 128, 1], activation=nn.LeakyReLU), Digits()
    else:
        generator, discriminator = MLP([32, 128, 128, 128, 2]), MLP([2, 128, 128, 1])
        source = Grid(batch_size=128) if data == "grid" else Ring(batch_size=128)
    module = Damaged(generator, discriminator, 32, Relativistic(), adam(g_lr), adam(d_lr))
    classifier = DigitClassifier()
    module.classify = (
        (lambda x: classifier.classify(x).argmax(1)) if pixels else lambda x: torch.cdist(x, source.centers).argmin(1)
    )
    extractor = {"digits": classifier, "pixels": nn.Flatten()}.get(data)
    penalties = [R1Penalty(0.3)] if data == "ring, R1 alone" else [R1Penalty(1.0), R2Penalty(1.0)]
    return module, source, extractor, [] if failure in ("rates 10 : 1", "rates too high") else penalties


def trained(
    data: str, kind: str, seed: int, steps: int, every: int
) -> tuple[Damaged, Any, nn.Module | None, list[Any]]:
    """What a run of a recipe needs."""
    module, source, extractor, penalties = make(data, kind)
    module.noise_seed = source.seed = seed
    module.damage, module.since, module.every = kind, steps // 2 if kind in DAMAGES else 10**9, every
    return module, source, extractor, penalties


def follow(part: str, data: str, kind: str, seed: int, n: int, steps: int, every: int) -> Row:
    """One run; its events, each with whether the generator was bad at that step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    make_run = trained if part == "trained" else scripted.make
    module, source, extractor, penalties = make_run(data, kind, seed, steps, every)
    monitor = QualityMonitor(extractor, ["fid", "recall", "coverage", "diversity"], n_samples=n, every=every)
    detector = CollapseDetector(partial(end, kind))
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        enable_progress_bar=False,
        callbacks=[*penalties, monitor, detector],
        **options,
    )
    try:
        trainer.fit(module, source)
        error = ""
    except FloatingPointError as stopped:  # a run that stops by itself needs no detector
        error = str(stopped)[:60]
    events = [(event["step"], event["verdict"], was_bad(module, kind, event["step"])) for event in detector.events]
    return {"events": events, "looks": detector.looks, "error": error}


def end(kind: str, trainer: Trainer, module: Damaged | scripted.Scripted, event: dict[str, Any]) -> None:
    """Stop a run that is caught."""
    if kind in BAD and was_bad(module, kind, event["step"]):
        trainer.should_stop = True


def was_bad(module: Damaged | scripted.Scripted, kind: str, step: int) -> bool:
    """Whether the generator was bad at a step."""
    if isinstance(module, scripted.Scripted):
        return not module.generator.is_healthy(step)
    return kind in FAILURES or (kind in DAMAGES and step >= module.since)


def trained_jobs(n: int, steps: int, seeds: int) -> list[Row]:
    """Runs of recipes; twice the seeds for healthy ones."""
    bases = ["ring", "grid", "digits", "pixels"]
    plan = [(data, "healthy", seed) for seed in range(2 * seeds) for data in HEALTHY]
    plan += [(data, damage, seed) for seed in range(seeds) for damage in DAMAGES for data in bases]
    plan += [(data, failure, seed) for seed in range(seeds) for failure in FAILURES for data in bases[:3]]
    job = {"part": "trained", "n": n, "steps": steps, "every": max(1, steps // 10)}
    return [job | {"data": data, "kind": kind, "seed": seed} for data, kind, seed in plan]


def scripted_jobs(n: int, healthy: int, bad: int) -> list[Row]:
    """Runs of scripts, each with a seed of its own."""
    kinds = [*scripted.HEALTHY, *scripted.FROM_HALF, *scripted.FROM_START]
    measured = 30 if n < 1000 else 10
    jobs = []
    for i, kind in enumerate(kinds):
        steps = 600 if kind in scripted.FROM_START else measured
        for j, data in enumerate(scripted.DATA):
            first, runs = 10_000 * i + 1000 * j, healthy if kind in scripted.HEALTHY else bad
            job = {"part": "scripted", "data": data, "kind": kind, "n": n, "steps": steps, "every": steps // measured}
            jobs += [job | {"seed": seed} for seed in range(first, first + runs)]
    return jobs


# ---------- what came out


def since(row: Row) -> int:
    """The first measurement that is judged of a bad generator."""
    return row["steps"] // 2 if row["kind"] in FROM_HALF else row["every"]


def onset(row: Row) -> int | None:
    """Steps from when the generator is bad to the first event; of a generator that fails by itself from the start."""
    if row["kind"] not in BAD:
        return None
    start = since(row) if row["kind"] in FROM_HALF else 0
    return next((step - start for step, _, bad in row["events"] if bad), None)


def measurements(row: Row) -> int:
    """How many of a bad generator were judged until the first event."""
    step = next(step for step, _, bad in row["events"] if bad)
    return (step - since(row)) // row["every"] + 1


def is_false(row: Row) -> bool:
    return not all(bad for _, _, bad in row["events"])


def spread(values: list[int]) -> str:
    return f"{statistics.median(values):.0f} ({min(values)}–{max(values)})" if values else "–"


def share(count: int, of: int, worst: str) -> str:
    """A count, and the exact bound of 95 % for its share."""
    if not of:
        return "–"
    test = binomtest(count, of, alternative="less" if worst == "high" else "greater")
    bound = getattr(test.proportion_ci(0.95, "exact"), worst)
    return f"{count} of {of} ({'≤' if worst == 'high' else '≥'} {100 * bound:.1f} %)"


def verdicts(rows: list[Row]) -> str:
    """What was said: of bad generators the first, and all that was false, or of modes that had not come yet."""
    said: Counter[str] = Counter()
    for row in rows:
        right = [verdict for _, verdict, bad in row["events"] if bad]
        said.update(right[:1] if row["kind"] in BAD else [f"{verdict} (rightly)" for verdict in right])
        said.update(f"{verdict} (false)" for _, verdict, bad in row["events"] if not bad)
    return ", ".join(f"{count} {verdict}" for verdict, count in said.most_common()) or "–"


def line(rows: list[Row]) -> str:
    """Runs, healthy ones with a false alarm, bad ones with one before, caught ones, delays and verdicts."""
    healthy, bad = [row for row in rows if row["kind"] not in BAD], [row for row in rows if row["kind"] in BAD]
    caught = [row for row in bad if onset(row) is not None]
    cells = [
        share(sum(map(is_false, healthy)), len(healthy), "high"),
        f"{sum(map(is_false, bad))} of {len(bad)}" if bad else "–",
        share(len(caught), len(bad), "low"),
        spread([measurements(row) for row in caught]),
        spread([onset(row) for row in caught]),
        verdicts(rows),
    ]
    return " | ".join(cells)


def table(rows: list[Row], *by: str) -> str:
    """A line for all rows that are the same in some columns."""
    heads = [*by, "false alarms in healthy runs", "in bad ones before", "caught", "measurements", "steps", "verdicts"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in by) == key]
        lines.append(f"| {' | '.join(map(str, key))} | {line(mine)} |")
    return "\n".join(lines)


def report(rows: list[Row], parts: Iterable[str]) -> str:
    """For each part, and each number of samples: in all, by kind of run, and by data."""
    tables = []
    for part in parts:
        mine = sorted((row for row in rows if row["part"] == part), key=lambda row: row["n"])
        tables += [part, table(mine, "n"), table(mine, "kind", "n"), table(mine, "data", "n")]
    return "\n\n".join(tables)


def planned(arguments: argparse.Namespace) -> list[Row]:
    """All runs; fewer scripted ones of many samples, which are slow."""
    if arguments.smoke:
        short = [job | {"steps": 16, "every": 4} for job in scripted_jobs(64, 1, 1)[::6]]
        return [*short, *trained_jobs(64, 10, 1)[::6]]
    jobs = []
    for n in arguments.n if "scripted" in arguments.runs else []:
        slow = n >= 1000
        jobs += scripted_jobs(n, -(-arguments.healthy // (4 if slow else 1)), -(-arguments.bad // (2 if slow else 1)))
    for n in arguments.n if "trained" in arguments.runs else []:
        jobs += trained_jobs(n, arguments.steps, arguments.seeds)
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["scripted", "trained"]
    parser.add_argument("--runs", nargs="+", choices=parts, default=parts)
    parser.add_argument("--n", nargs="+", type=int, default=SAMPLES, help="samples in a measurement")
    parser.add_argument("--healthy", type=int, default=15, help="of each script and data; a quarter for n >= 1000")
    parser.add_argument("--bad", type=int, default=2, help="of each script and data; half for n >= 1000")
    parser.add_argument("--seeds", type=int, default=3, help="of each trained run; twice as many of healthy ones")
    parser.add_argument("--steps", type=int, default=1600, help="of each trained run")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--results", type=Path, default=Path("runs/detection.jsonl"), help="finished runs, one a line")
    parser.add_argument("--smoke", action="store_true", help="a few runs of few steps")
    arguments = parser.parse_args()
    rows = finish(follow, planned(arguments), arguments.jobs, None if arguments.smoke else arguments.results)
    print(f"torch {torch.__version__}\n\n{report(rows, arguments.runs)}")


if __name__ == "__main__":
    main()
