"""The best recipes for the ring and the grid, `configs/best_ring.yaml` and `configs/best_grid.yaml`, on ten seeds.

    python examples/benchmarks/recipes.py           # about an hour on one core
    python examples/benchmarks/recipes.py --smoke   # seconds; only shows that it runs

Every run is the config as it is, with another seed for weights, noise and data, in a process of its own with one
thread. From the checkpoint at its end come 2,500 samples. A mode counts with 20 of them within three standard
deviations of its centre; a perfect generator has 98.9 % of its samples there. "Width" is the standard deviation of
these samples around their centre over that of the data's: a generator that shrinks its modes to points has less than 1.
The second row of a seed is of samples that `DiscriminatorRejection` chose, calibrated on 10,000 points that the
discriminator has not seen; of the candidates it accepts the share in the last column.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from ring import coverage
from torch import Tensor

from lightning_gan_stability import DiscriminatorRejection, GANModule, Grid, Ring

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES: dict[str, Any] = {"best_ring": Ring, "best_grid": Grid}


def train(recipe: str, seed: int, folder: str, more: list[str]) -> tuple[GANModule, float]:
    """Run a config; the module of its last checkpoint, and CPU seconds."""
    command = [sys.executable, "-W", "ignore", "-m", "lightning_gan_stability", "fit"]
    command += ["--config", str(CONFIGS / f"{recipe}.yaml"), f"--seed_everything={seed}", f"--model.noise_seed={seed}"]
    command += [f"--data.init_args.seed={seed}", f"--trainer.logger.init_args.save_dir={folder}", *more]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JSONARGPARSE_DEPRECATION_WARNINGS": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (checkpoint,) = Path(folder).rglob("last.ckpt")
    return GANModule.load_from_checkpoint(checkpoint, map_location="cpu"), after.ru_utime - before.ru_utime


def width(samples: Tensor, centers: Tensor, std: float) -> float:
    """The standard deviation within modes over the data's, of samples within three standard deviations."""
    distance, _ = torch.cdist(samples, centers).min(dim=1)
    near = distance[distance <= 3 * std]
    return (near.square().mean() / 2).sqrt().item() / (std * 0.9744)  # √(1 − 4.5 e⁻⁴·⁵/(1 − e⁻⁴·⁵)), cut at 3σ


class Row(NamedTuple):
    """What is said of a seed's samples."""

    modes: float
    share: float
    kl: float
    width: float
    seconds: float
    accepted: float


def judge(samples: Tensor, data: Any, seconds: float, accepted: float) -> Row:
    found = coverage(samples, data.centers, data.std)
    return Row(found.modes, found.share, found.kl, width(samples, data.centers, data.std), seconds, accepted)


def held_out(recipe: str) -> Tensor:
    """Points of a seed that no run has."""
    return torch.cat([*islice(RECIPES[recipe](batch_size=1000, seed=10_000).train_dataloader(), 10)])


def cells(row: Row) -> str:
    numbers = " | ".join(f"{value:.4f}" for value in (row.share, row.kl, row.width))
    return f"{row.modes:g} | {numbers} | {row.seconds:.0f} | {row.accepted:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--smoke", action="store_true", help="one seed, three steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    more = ["--trainer.enable_progress_bar=false"] + ["--trainer.max_steps=3"] * arguments.smoke
    print(f"torch {torch.__version__}; CPU seconds of one thread\n")
    print("| recipe | seed | modes | high quality | reverse KL | width | seconds | accepted |\n|---" + "|---" * 7 + "|")
    for recipe in arguments.recipes:
        data = RECIPES[recipe]()
        rows: dict[str, list[Row]] = {"as drawn": [], "rejection": []}
        for seed in arguments.seeds[: 1 if arguments.smoke else None]:
            with tempfile.TemporaryDirectory() as folder:
                gan, seconds = train(recipe, seed, folder, more)
            gan.eval()
            with torch.no_grad():
                rows["as drawn"].append(judge(gan.sample(2500), data, seconds, 1.0))
            if not arguments.smoke:  # an untrained discriminator may tell all real points from all others
                start, choose = process_time(), DiscriminatorRejection(batch_size=2500)
                samples = gan.sample(2500, reject=choose.calibrate(gan, held_out(recipe)))
                seconds += process_time() - start
                rows["rejection"].append(judge(samples, data, seconds, choose.acceptance))
            for kind, found in rows.items():
                if found:
                    print(f"| {recipe}, {kind} | {seed} | {cells(found[-1])} |", flush=True)
        for kind, found in rows.items():
            if found:
                print(f"| {recipe}, {kind} | mean | {cells(Row(*map(statistics.mean, zip(*found, strict=True))))} |")
                worst = [min, min, max, min, max, min]
                columns = zip(worst, zip(*found, strict=True), strict=True)
                print(f"| {recipe}, {kind} | worst | {cells(Row(*(f(column) for f, column in columns)))} |")


if __name__ == "__main__":
    main()
