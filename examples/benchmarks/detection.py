"""How many collapses CollapseDetector catches, how soon, and how often it cries wolf.

    python examples/benchmarks/detection.py --jobs 2         # 105 runs: about half an hour on one core
    python examples/benchmarks/detection.py --smoke          # seconds; only shows that it runs

Healthy recipes on the ring, the grid and real digits, the digits seen by a classifier (modes known) and as pixels (not
known); and the same with a generator that is damaged from half of the run on: in what the monitor sees, a class is
dropped, one after the other is lost, only one is left, or one that changes. Besides, runs that collapse by themselves:
a generator that learns ten times too fast, one that does not learn, and one that learns far too fast. Measured every
160 of 1,600 steps; patience is 3. A run is caught if there is an event after the damage (or at all, where the run is
bad from the start), and a false alarm if there is one in a healthy run, or before the damage.
"""

import argparse
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from jobs import finish
from lightning.pytorch import Trainer, seed_everything
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


def train(data: str, failure: str, seed: int, steps: int) -> dict[str, Any]:
    """One run; its events."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    module, source, extractor, penalties = make(data, failure)
    module.noise_seed = source.seed = seed
    module.damage, module.since = failure, steps // 2 if failure in DAMAGES else 10**9
    every = module.every = max(1, steps // 10)
    monitor, detector = (
        QualityMonitor(extractor, ["fid", "recall", "coverage", "diversity"], every=every),
        CollapseDetector(),
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
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
    events = [(event["step"], event["verdict"]) for event in detector.events]
    return {"events": events, "error": error}


def jobs(steps: int, seeds: int) -> list[dict[str, Any]]:
    """All runs; twice the seeds for healthy ones."""
    bases = ["ring", "grid", "digits", "pixels"]
    plan = [(data, "", seed) for seed in range(2 * seeds) for data in HEALTHY]
    plan += [
        (data, damage, seed) for seed in range(seeds) for damage in DAMAGES for data in bases[: 1 if seeds == 1 else 4]
    ]
    plan += [(data, failure, seed) for seed in range(seeds) for failure in FAILURES for data in bases[:3]]
    return [{"data": data, "failure": failure, "seed": seed, "steps": steps} for data, failure, seed in plan]


def table(rows: list[dict[str, Any]]) -> str:
    """Per kind of run: caught or not, false alarms, delay, and what was said."""
    heads = "run | data | runs | caught | false alarms | steps until the event, median (range) | verdicts"
    lines = [f"| {heads} |", "|---" * 7 + "|"]
    for failure in ["", *DAMAGES, *FAILURES]:
        for data in dict.fromkeys(row["data"] for row in rows if row["failure"] == failure):
            mine = [row for row in rows if (row["failure"], row["data"]) == (failure, data)]
            caught = [row for row in mine if onset(row) is not None]
            false = [row for row in mine if is_false(row)]
            delays = [onset(row) for row in caught]
            said = [next(v for s, v in row["events"] if s >= since(row)) for row in caught if row["events"]]
            spread = f"{statistics.median(delays):.0f} ({min(delays)}–{max(delays)})" if delays else "–"
            verdicts = ", ".join(f"{said.count(v)} {v}" for v in dict.fromkeys(said)) or "–"
            name = failure or "healthy"
            of = "–" if not failure else f"{len(caught)} of {len(mine)}"
            lines.append(f"| {name} | {data} | {len(mine)} | {of} | {len(false)} | {spread} | {verdicts} |")
    bad = [row for row in rows if row["failure"]]
    caught = sum(onset(row) is not None for row in bad)
    false = sum(map(is_false, rows))
    lines.append(f"\ncaught {caught} of {len(bad)}; false alarms in {false} of {len(rows)} runs, before any damage")
    return "\n".join(lines)


def since(row: dict[str, Any]) -> int:
    return row["steps"] // 2 if row["failure"] in DAMAGES else 0


def onset(row: dict[str, Any]) -> int | None:
    """Steps from the damage to the first event after it."""
    if not row["failure"]:
        return None
    steps = [step - since(row) for step, _ in row["events"] if step >= since(row)]
    return min(steps) if steps else None


def is_false(row: dict[str, Any]) -> bool:
    if not row["failure"]:
        return bool(row["events"])
    return row["failure"] in DAMAGES and any(step < since(row) for step, _ in row["events"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of each kind of run; twice as many of healthy ones")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--results", type=Path, default=Path("runs/detection.jsonl"), help="finished runs, one a line")
    parser.add_argument("--smoke", action="store_true", help="a few runs of ten steps")
    arguments = parser.parse_args()
    plan = jobs(10, 1)[::6] if arguments.smoke else jobs(arguments.steps, arguments.seeds)
    rows = finish(train, plan, arguments.jobs, None if arguments.smoke else arguments.results)
    print(f"torch {torch.__version__}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
