"""What a step costs on a GPU: time and peak memory.

    python examples/benchmarks/gpu.py           # two minutes on one GPU
    python examples/benchmarks/gpu.py --smoke   # seconds, also without a GPU; only shows that it runs

Times are seconds of the clock until the device is done, over 60 steps after 12; each round runs all rows in turn, and
ratios are to hand-written Lightning (manual optimization, two logged losses) of the same round.
"""

import argparse
import contextlib
import gc
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from overhead import HandWritten, plain_torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gan_stability import (
    DCGANDiscriminator,
    DCGANGenerator,
    Extragradient,
    GANModule,
    GeneratorEMA,
    GradientPenalty,
    HealthMonitor,
    R1Penalty,
    Unrolling,
)

CUDA = torch.cuda.is_available()


class Clock(Callback):
    """Seconds of a step."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm_up:
            self.start = now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = (now() - self.start) / (trainer.num_training_batches - self.warm_up)


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def run(module: LightningModule, batch: Tensor, n: int, callbacks: list[Callback], **kwargs: Any) -> float:
    """Seconds of a step."""
    clock = Clock(n // 6)
    trainer = Trainer(
        accelerator="gpu" if CUDA else "cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[clock, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # without HealthMonitor's table
        trainer.fit(module, DataLoader([batch] * n, batch_size=None))
    return clock.seconds


def by_hand(pair: tuple[nn.Module, nn.Module], latent_dim: int, batch: Tensor, n: int) -> float:
    """Seconds of a step of plain PyTorch."""
    device = "cuda" if CUDA else "cpu"

    class Steps:
        seconds = 0.0

        def __iter__(self) -> Iterator[Tensor]:
            for i in range(n):
                if i == n // 6:
                    start = now()
                yield batch.to(device)
            self.seconds = (now() - start) / (n - n // 6)

    return plain_torch(*(network.to(device) for network in deepcopy(pair)), latent_dim, Steps())


def measure(title: str, pair: tuple[nn.Module, nn.Module], latent_dim: int, batch: Tensor, n: int, rounds: int) -> None:
    """Print a table for a pair of networks."""

    def gan(*callbacks: Callback, compile: bool | dict[str, Any] = False, **kwargs: Any) -> float:
        module = GANModule(*deepcopy(pair), latent_dim=latent_dim, compile=compile)
        return run(module, batch, n, list(callbacks), **kwargs)

    rows: dict[str, Callable[[], float]] = {
        "plain PyTorch": lambda: by_hand(pair, latent_dim, batch, n),
        "hand-written Lightning": lambda: run(HandWritten(*deepcopy(pair), latent_dim), batch, n, []),
        "`GANModule`": gan,
        "`precision: bf16-mixed`": lambda: gan(precision="bf16-mixed"),
        "`precision: 16-mixed`": lambda: gan(precision="16-mixed"),
        "`GANModule(compile=True)`": lambda: gan(compile=True),
        'with `{"mode": "reduce-overhead"}`': lambda: gan(compile={"mode": "reduce-overhead"}),
        "`R1Penalty`": lambda: gan(R1Penalty(0.1)),
        "`R1Penalty(every=16)`": lambda: gan(R1Penalty(0.1, every=16)),
        "`GradientPenalty`": lambda: gan(GradientPenalty(10.0)),
        "`Extragradient`": lambda: gan(Extragradient()),
        "`Unrolling(5)`": lambda: gan(Unrolling(5)),
        "`Unrolling(5, checkpoint=True)`": lambda: gan(Unrolling(5, checkpoint=True)),
        "`GeneratorEMA`": lambda: gan(GeneratorEMA()),
        "`HealthMonitor`": lambda: gan(HealthMonitor()),
    }
    if not CUDA:
        for name in ("`precision: 16-mixed`", "`GANModule(compile=True)`", 'with `{"mode": "reduce-overhead"}`'):
            del rows[name]
    times: dict[str, list[float]] = {name: [] for name in rows}
    memory = dict.fromkeys(rows, "–")
    for _ in range(rounds):
        for name, row in rows.items():
            gc.collect()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            times[name].append(row())
            if CUDA:
                memory[name] = f"{torch.cuda.max_memory_allocated() / 1e6:.0f}"
    print(f"\n| {title} | ms per step | ratio | peak MB |\n|---|---|---|---|")
    for name in rows:
        ratios = [a / b for a, b in zip(times[name], times["hand-written Lightning"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {1000 * statistics.median(times[name]):.2f} | {spread} | {memory[name]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, few steps")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row")
    arguments = parser.parse_args()
    if not CUDA and not arguments.smoke:
        parser.error("no GPU here; --smoke runs without one.")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    smoke, torch.backends.cudnn.benchmark = arguments.smoke, True
    rounds, size, width, n = (1, 8, 4, 6) if smoke else (arguments.rounds, 64, 64, 72)
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}; float32 as PyTorch sets it: convolutions may use TF32")
    pair = DCGANGenerator(128, 3, size, width), DCGANDiscriminator(3, size, width, batch_norm=False)
    measure(f"DCGAN {size}×{size}, batch 64", pair, 128, torch.rand(64, 3, size, size) * 2 - 1, n, rounds)


if __name__ == "__main__":
    main()
