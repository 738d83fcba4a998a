"""What monitors cost: their share of a DCGAN step, a measurement in steps, and memory.

    python examples/benchmarks/monitors.py            # forty minutes on one core
    python examples/benchmarks/monitors.py --smoke    # seconds; only shows that it runs

A DCGAN of 64×64 pixels, batches of 64, one thread, CPU seconds. Each round times in turn ten steps without monitors,
with `HealthMonitor` and `QualityMonitor` that only look on, and with two decisions of `HealthMonitor` in them. Once, a
measurement of 2,500 samples is timed, seen by a network as large as Inception (torchvision's, with random weights,
since its time alone counts), and by one of two layers. Memory is the largest resident set of a process that trains on
128×128 pixels and measures 2,500 samples, over that of one that does not measure.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from jobs import peak_memory
from lightning.pytorch import Callback, Trainer
from overhead import Steps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import inception_v3

from lightning_gan_stability import DCGANDiscriminator, DCGANGenerator, GANModule, HealthMonitor, QualityMonitor

OPTIONS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "max_epochs": 1,
}


class LikeInception(nn.Module):
    """Inception's layers, of 299×299 pixels."""

    def __init__(self, size: int = 299) -> None:
        super().__init__()
        self.size, self.network = size, inception_v3(weights=None, init_weights=False, aux_logits=False)
        self.network.fc = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(nn.functional.interpolate(images, size=(self.size, self.size)))


class Images(Dataset[Tensor]):
    """Noise, made when it is read."""

    def __init__(self, n: int, size: int) -> None:
        self.n, self.size = n, size

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(index)) * 2 - 1


def gan(size: int, width: int) -> GANModule:
    torch.manual_seed(0)
    return GANModule(DCGANGenerator(64, 3, size, width), DCGANDiscriminator(3, size, width), 64)


def seconds(size: int, width: int, batch: int, steps: int, callbacks: list[Callback]) -> float:
    """CPU seconds of some steps, after one to warm up."""
    data = Steps(torch.rand(batch, 3, size, size) * 2 - 1, steps)
    Trainer(callbacks=callbacks, **OPTIONS).fit(gan(size, width), data)
    return data.seconds * steps


class Measurement(Callback):
    """One measurement on the fifth step, of a monitor that has read the real data before."""

    def __init__(self, monitor: QualityMonitor) -> None:
        self.monitor = monitor

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 5:
            self.monitor.every = 1
            self.monitor.observe(trainer, pl_module)
            self.monitor.every = 10**9


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def shares(smoke: bool, rounds: int) -> None:
    size, width, batch, steps, n = (16, 4, 4, 8, 50) if smoke else (64, 64, 64, 10, 2500)

    def measuring(extractor: nn.Module) -> list[Callback]:
        monitor = QualityMonitor(extractor, n_samples=n, n_real=n, every=10**9)
        return [monitor, Measurement(monitor)]

    columns: dict[str, Any] = {
        "nothing": list,
        "looking on": lambda: [HealthMonitor(every=10**9), QualityMonitor(small(), n_samples=50, every=10**9)],
        "a decision": lambda: [HealthMonitor(every=steps // 2)],
    }
    print(f"\nDCGAN {size}×{size}, batch {batch}, {rounds} rounds\n\n| what | steps' worth (range) | share of a step |")
    print("|---|---|---|")
    rows = [{name: seconds(size, width, batch, steps, make()) for name, make in columns.items()} for _ in range(rounds)]
    each = [row["nothing"] / steps for row in rows]
    looking = [(row["looking on"] - row["nothing"]) / steps / one for row, one in zip(rows, each, strict=True)]
    decisions = [(row["a decision"] - row["nothing"]) / 2 / one for row, one in zip(rows, each, strict=True)]
    line("both monitors on every step", looking, 1)
    line("a decision of HealthMonitor, every 100", decisions, 100)
    for name, extractor in ("two layers", small()), ("Inception", LikeInception(75 if smoke else 299)):
        plain = seconds(size, width, batch, steps, [])
        cost = (seconds(size, width, batch, steps, measuring(extractor)) - plain) * steps / plain
        line(f"a measurement of {n:,} samples by {name}, every 1,000", [cost], 1000)
        line(f"a measurement of {n:,} samples by {name}, every 10,000", [cost], 10_000)


def line(name: str, costs: list[float], every: int) -> None:
    cost = statistics.median(costs)
    print(f"| {name} | {cost:.3g} ({min(costs):.3g} to {max(costs):.3g}) | {100 * cost / every:.2f} % |", flush=True)


def resident(size: int, n: int, monitored: bool) -> float:
    """Gigabytes of a process of its own."""
    command = [sys.executable, __file__, "--process", str(size), str(n), str(int(monitored))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def process(size: int, n: int, monitored: bool) -> None:
    callbacks: list[Callback] = [QualityMonitor(small(), n_samples=n, every=2)] if monitored else []
    loader = DataLoader(Images(n + 100, size), 16, shuffle=True)
    Trainer(callbacks=callbacks, max_steps=2, **OPTIONS).fit(gan(size, 16), loader)
    print(peak_memory() / 1024e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, one round")
    parser.add_argument("--process", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.process:
        size, n, monitored = arguments.process
        process(size, n, bool(monitored))
        return
    print(f"torch {torch.__version__}, {Path(__file__).name}")
    shares(arguments.smoke, 1 if arguments.smoke else arguments.rounds)
    size, n = (32, 100) if arguments.smoke else (128, 2500)
    without, measured = (resident(size, n, monitored) for monitored in (False, True))
    print(
        f"\nmemory at {size}×{size}, n = {n:,}: {measured:.2f} GB, without {without:.2f} GB: {measured - without:+.2f}"
    )


if __name__ == "__main__":
    main()
