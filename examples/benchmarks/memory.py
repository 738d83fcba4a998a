"""Peak memory of a run beside that of plain Lightning: shared samples, unrolling with checkpoints, a monitor.

    python examples/benchmarks/memory.py          # some minutes on one core
    python examples/benchmarks/memory.py --smoke  # half a minute; only shows that it runs

A DCGAN pair, two steps, each run in a process of its own. On a CPU the peak is that of the process's resident memory,
on a GPU that of what PyTorch has allocated there; from either, what there was before the fit, with the networks and the
data, is taken off. What is left are gradients, states of optimizers, activations and what a method keeps.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from multiprocessing import get_context

import torch
from jobs import peak_memory
from lightning.pytorch import Callback, LightningModule, Trainer
from overhead import HandWritten
from torch import nn
from torch.utils.data import DataLoader

from lightning_gan_stability import (
    Alternating,
    DCGANDiscriminator,
    DCGANGenerator,
    GANModule,
    QualityMonitor,
    R1Penalty,
    Unrolling,
)

CUDA = torch.cuda.is_available()
PIXELS = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten())  # in the place of Inception, whose size is known
RUNS: dict[str, Callable[[], list[Callback]] | None] = {
    "plain Lightning": None,
    "`GANModule`": list,
    "`Alternating(share_fake=True)`": lambda: [Alternating(share_fake=True)],
    "`R1Penalty`": lambda: [R1Penalty(0.1)],
    "`QualityMonitor`": lambda: [QualityMonitor(PIXELS, n_samples=256, every=2)],
    "`Unrolling(5)`": lambda: [Unrolling(5)],
    "`Unrolling(5, checkpoint=True)`": lambda: [Unrolling(5, checkpoint=True)],
}


def peak() -> float:
    """The most memory that there was so far, in MB."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    return peak_memory() / 1e6


def measure(job: tuple[str, int, int, int]) -> float:
    """What a fit adds to the peak, in MB."""
    name, size, width, batch = job
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    make = RUNS[name]
    pair = DCGANGenerator(64, 3, size, width), DCGANDiscriminator(3, size, width, batch_norm=False)
    module: LightningModule = HandWritten(*pair, 64) if make is None else GANModule(*pair, 64)
    images = [torch.rand(batch, 3, size, size) * 2 - 1] * 2
    before = peak()
    Trainer(
        accelerator="gpu" if CUDA else "cpu", devices=1, max_epochs=1, logger=False,
        callbacks=[] if make is None else make(), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(images, batch_size=None))  # type: ignore[arg-type]  # fmt: skip
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small size, two runs")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each run")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    sizes = [(8, 4, 2)] if smoke else [(32, 32, 32), (32, 64, 32), (64, 64, 16)]  # images, width, batch
    names, rounds = (list(RUNS)[:2], 1) if smoke else (list(RUNS), arguments.rounds)
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"torch {torch.__version__}, {device}; MB above the start of the fit: median (range), ratio to plain")
    found: dict[tuple[int, ...], dict[str, list[float]]] = {size: {name: [] for name in names} for size in sizes}
    context = get_context("forkserver")  # each run in a process that has the libraries already, and nothing else
    context.set_forkserver_preload(["overhead"])
    for _ in range(rounds):
        for size in sizes:
            for name in names:
                with context.Pool(1) as alone:
                    found[size][name].append(alone.apply(measure, [(name, *size)]))
    titles = [f"{size}×{size}, width {width}, batch {batch}" for size, width, batch in sizes]
    print(f"\n| Run | {' | '.join(titles)} |\n|---|{'---|' * len(sizes)}")
    for name in names:
        cells = []
        for size in sizes:
            values, plain = found[size][name], statistics.median(found[size]["plain Lightning"])
            middle = statistics.median(values)
            cells.append(f"{middle:.0f} ({min(values):.0f} to {max(values):.0f}), {middle / max(plain, 1e-9):.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
