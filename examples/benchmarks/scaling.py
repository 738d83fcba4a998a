"""Time per step and bytes exchanged against the number of processes, and what `find_unused_parameters` costs.

    python examples/benchmarks/scaling.py          # about five minutes on two cores
    python examples/benchmarks/scaling.py --smoke  # seconds; only shows that it runs

A DCGAN pair on 32×32 images, the same batch in each of 1, 2 and 4 gloo processes of one thread (weak scaling), over the
loopback interface. Bytes are what that interface carried, per process and step, less what it carries beside. Expected:
each player's turn exchanges its own gradients, so that a step takes 2 (N − 1)/N · g from each process, g the gradients
of both. The cost of `find_unused_parameters` is that of a plain Lightning module with one network, with and without, on
two processes.
"""

import argparse
import json
import logging
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gan_stability import DCGANDiscriminator, DCGANGenerator, GANModule, R1Penalty, Unrolling

CASES: dict[str, Any] = {
    "plain": list,
    "R1Penalty": lambda: [R1Penalty(1.0)],
    "Unrolling(2)": lambda: [Unrolling(2)],
    "one network": list,
    "one network, find_unused_parameters": list,
}
COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")


class Alone(LightningModule):
    """A discriminator that learns to tell noise from nothing, as a plain Lightning module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = DCGANDiscriminator(size=32, width=32)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.softplus(self.network(batch)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Clock(Callback):
    """Seconds of each step after the first three, and bytes of all of them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.bytes: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.times.append(time.perf_counter())
        self.bytes.append(int(COUNTER.read_text()) if COUNTER.exists() else 0)

    def result(self, processes: int) -> dict[str, float]:
        steps = [b - a for a, b in zip(self.times[2:], self.times[3:], strict=False)]
        carried = (self.bytes[-1] - self.bytes[2]) / max(1, len(steps)) / processes
        return {"seconds": statistics.median(steps), "bytes": carried}


def work(rank: int, processes: int, port: int, case: str, steps: int, batch: int, folder: str) -> None:
    """One process of a run; the first leaves the result in a file."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "scaling"}
    torch.manual_seed(0)
    module: LightningModule
    if case.startswith("one network"):
        module, kwargs = Alone(), {"find_unused_parameters": case.endswith("parameters")}
    else:
        module, kwargs = GANModule(DCGANGenerator(64, size=32, width=32), DCGANDiscriminator(size=32, width=32), 64), {}
    clock = Clock()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", devices=processes, max_steps=steps, callbacks=[*CASES[case](), clock],
        strategy=DDPStrategy(process_group_backend="gloo", **kwargs) if processes > 1 else "auto",
        enable_model_summary=False, use_distributed_sampler=False, **quiet,
    )  # fmt: skip
    images = [torch.rand(batch, 3, 32, 32) * 2 - 1] * (steps + 1)
    trainer.fit(module, DataLoader(images, batch_size=None))  # type: ignore[arg-type]
    if rank == 0:
        result = clock.result(processes) | {"gradients": sum(p.numel() * 4 for p in module.parameters())}
        Path(folder, "result.json").write_text(json.dumps(result))


def measure(processes: int, case: str, steps: int, batch: int) -> dict[str, Any]:
    """One run in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        arguments = (processes, port, case, steps, batch, folder)
        workers = [context.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(600)
        return dict(json.loads(Path(folder, "result.json").read_text()))


def model() -> str:
    """What docs/scaling.md expects of processes that were not tried: t(N) = t(1) + exchange + latency + u."""
    gradients, alone, walk, buckets = 240e6, 200.0, 5.0, 10  # bytes; ms; ms; of 25 MB
    machines = [  # name, processes, bytes a second, hops of an all-reduce, seconds a hop
        ("8 GPUs in one node", 8, 200e9, 2 * 7, 5e-6),
        ("8 nodes of 8, a tree between nodes", 64, 20e9, 2 * 3, 10e-6),
        ("64 nodes of 8, a flat ring", 512, 20e9, 2 * 511, 10e-6),
        ("64 nodes of 8, a tree between nodes", 512, 20e9, 2 * 6, 10e-6),
    ]
    lines = ["| modelled | exchange, ms | latency, ms | efficiency |", "|---|---|---|---|"]
    for name, n, bandwidth, hops, hop in machines:
        exchange = 2 * (n - 1) / n * gradients / bandwidth * 1e3  # of each player's gradients once in a step
        latency = hops * buckets * hop * 1e3
        lines.append(f"| {name} | {exchange:.1f} | {latency:.1f} | {alone / (alone + exchange + latency + walk):.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--smoke", action="store_true", help="two processes, a few steps")
    arguments = parser.parse_args()
    steps, rounds, batch = (5, 1, 2) if arguments.smoke else (arguments.steps, arguments.rounds, arguments.batch)
    counts = [1, 2] if arguments.smoke else [1, 2, 4]
    cases = ["plain", "one network"] if arguments.smoke else list(CASES)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, batch {batch} per process, {rounds} rounds in turn\n")
    print("| run | processes | ms per step: median of rounds (range) | MB sent per process and step | gradients, MB |")
    print("|---|---|---|---|---|")
    seen: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for case in cases:
            for n in counts if not case.startswith("one") else [2]:
                seen.setdefault((case, n), []).append(measure(n, case, steps, batch))
    for (case, n), runs in seen.items():
        times = [1000 * run["seconds"] for run in runs]
        spread = f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f})"
        sent, own = (statistics.median(run[key] for run in runs) / 1e6 for key in ("bytes", "gradients"))
        print(f"| {case} | {n} | {spread} | {sent:.2f} | {own:.2f} |")
    print(f"\n{model()}")


if __name__ == "__main__":
    main()
