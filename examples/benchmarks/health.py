"""What HealthMonitor costs, and what it says of healthy runs.

    python examples/benchmarks/health.py           # about ten minutes on one core
    python examples/benchmarks/health.py --smoke   # seconds; only shows that it runs

The cost is the ratio of CPU times of a fit with and without it, on a DCGAN pair of 64×64 images, in turn, both of as
many steps. The healthy runs are those of detection.py, of 1,500 steps; `loss_tells_nothing`, which is for information,
needs a QualityMonitor and is not among the verdicts here.
"""

import argparse
import logging
import statistics
import warnings
from time import process_time
from typing import Any

import torch
from detection import HEALTHY, make
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_gan_stability import DCGANDiscriminator, DCGANGenerator, GANModule, HealthMonitor

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
}


class Clock(Callback):
    """CPU time of the steps alone, without the set-up."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = process_time() - self.start


def seconds(callbacks: list[Callback], steps: int, batch: int) -> float:
    """CPU time of some steps of a DCGAN pair."""
    torch.manual_seed(0)
    module = GANModule(DCGANGenerator(64, width=32), DCGANDiscriminator(width=32), 64)
    clock, images = Clock(), [torch.rand(batch, 3, 64, 64) * 2 - 1] * 4
    trainer = Trainer(max_steps=steps, callbacks=[*callbacks, clock], max_epochs=-1, **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=None))  # type: ignore[arg-type]
    return clock.seconds


def verdicts(data: str, seed: int, steps: int) -> list[str]:
    """What is said of a healthy run."""
    seed_everything(seed, verbose=False)
    module, source, _, penalties = make(data, "")
    module.noise_seed = source.seed = seed
    monitor = HealthMonitor()
    Trainer(max_steps=steps, callbacks=[*penalties, monitor], max_epochs=-1, **QUIET).fit(module, source)
    return [said["verdict"] for said in monitor.verdicts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds, seeds, steps, batch, length = arguments.rounds, arguments.seeds, 100, 64, 1500
    if arguments.smoke:
        rounds, seeds, steps, batch, length = 1, 1, 2, 4, 20
    ratios = []
    for _ in range(rounds):
        plain = seconds([], steps, batch)
        ratios.append(seconds([HealthMonitor()], steps, batch) / plain)
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"torch {torch.__version__}; DCGAN 64×64, batch {batch}: {spread} times without, {rounds} rounds\n")
    print("| healthy run | seeds | with a verdict | verdicts |\n|---|---|---|---|")
    for data in [name for name in HEALTHY if name != "pixels"]:
        said = [verdicts(data, 100 + seed, length) for seed in range(seeds)]
        kinds = ", ".join(sorted({name for names in said for name in names})) or "–"
        print(f"| {data} | {seeds} | {sum(map(bool, said))} | {kinds} |", flush=True)


if __name__ == "__main__":
    main()
