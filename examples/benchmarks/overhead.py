"""What a step of GANModule costs, each time against the same step without it, in turn in one run.

`python examples/benchmarks/overhead.py --rounds 3` takes ten minutes to three quarters of an hour on one core, by the
machine's load, and nine rounds, the default, three times as long; `--smoke` takes seconds and says nothing.
Times are CPU seconds of one thread, so that other work on the machine disturbs them less.
"""

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, IterableDataset

from lightning_gan_stability import (
    MLP,
    Alternating,
    AugmentPipe,
    DCGANDiscriminator,
    DCGANGenerator,
    GANModule,
    GradientPenalty,
    R1Penalty,
    R2Penalty,
)


class Steps(IterableDataset):
    """A fixed batch, n times after a warm-up; notes when the first and the last of them are done."""

    def __init__(self, batch: Tensor, n: int, warm_up: int = 1) -> None:
        self.batch, self.n, self.warm_up = batch, n, warm_up

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.warm_up + self.n):
            if i == self.warm_up:
                self.start = time.process_time()
            yield self.batch
        self.seconds = (time.process_time() - self.start) / self.n


class HandWritten(LightningModule):
    """The GAN as a tutorial writes it: manual optimization, toggled optimizers, two logged losses."""

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent_dim: int,
        logs: bool = True,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator, self.latent_dim = generator, discriminator, latent_dim
        self.logs, self.fused = logs, fused

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        d_optimizer, g_optimizer = self.optimizers()
        latents = torch.randn(2, len(real), self.latent_dim, device=self.device)
        self.toggle_optimizer(d_optimizer)
        d_optimizer.zero_grad()
        fake = self.generator(latents[0]).detach()
        loss = (softplus(-self.discriminator(real)) + softplus(self.discriminator(fake))).mean()
        if self.logs:
            self.log("d/adversarial", loss, prog_bar=True)
        self.manual_backward(loss)
        d_optimizer.step()
        self.untoggle_optimizer(d_optimizer)
        self.toggle_optimizer(g_optimizer)
        g_optimizer.zero_grad()
        loss = softplus(-self.discriminator(self.generator(latents[1]))).mean()
        if self.logs:
            self.log("g/adversarial", loss, prog_bar=True)
        self.manual_backward(loss)
        g_optimizer.step()
        self.untoggle_optimizer(g_optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [adam(net.parameters(), self.fused) for net in (self.discriminator, self.generator)]


def adam(parameters: Iterable[nn.Parameter], fused: bool | None = None) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), fused=fused)


def plain_torch(generator: nn.Module, discriminator: nn.Module, latent_dim: int, steps: Steps) -> float:
    """The same steps without Lightning."""
    d_optimizer, g_optimizer = adam(discriminator.parameters()), adam(generator.parameters())
    for real in steps:
        latents = torch.randn(2, len(real), latent_dim, device=real.device)
        d_optimizer.zero_grad()
        with torch.no_grad():
            fake = generator(latents[0])
        (softplus(-discriminator(real)) + softplus(discriminator(fake))).mean().backward()
        d_optimizer.step()
        discriminator.requires_grad_(False)
        g_optimizer.zero_grad()
        softplus(-discriminator(generator(latents[1]))).mean().backward()
        g_optimizer.step()
        discriminator.requires_grad_(True)
    return steps.seconds


def lightning(module: LightningModule, steps: Steps, *callbacks: object) -> float:
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=CSVLogger(folder),
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, DataLoader(steps, batch_size=None))
    return steps.seconds


def compare(title: str, rounds: int, goal: float, ours: Callable[[], float], theirs: Callable[[], float]) -> float:
    """Time both in turn, print the ratio of each round's times: its median, smallest and largest."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    ours_ms, theirs_ms = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(ratios)
    print(
        f"{title:<52} {ours_ms:9.2f} ms {theirs_ms:9.2f} ms  {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        + (f"  goal <= {goal:g}" if math.isfinite(goal) else "")
    )
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny networks, two rounds: only shows that it runs")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of measurements for each row")
    parser.add_argument("--only", default="", help="rows with this in their title alone")
    arguments = parser.parse_args()

    def row(title: str, *columns: Any) -> None:
        if arguments.only in title:
            compare(title, *columns)

    smoke = arguments.smoke
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds, size, width, batch, few, many = (2, 8, 4, 4, 2, 16) if smoke else (arguments.rounds, 64, 64, 64, 4, 400)

    pair = DCGANGenerator(128, 3, size, width), DCGANDiscriminator(3, size, width)
    ring = MLP([256, 128, 128, 2]), MLP([2, 128, 128, 1])
    few_neurons, eight = (MLP([16, 8, 2]), MLP([2, 8, 1])), torch.randn(8, 2)  # only overhead counts
    images, points = torch.rand(batch, 3, size, size) * 2 - 1, torch.randn(512, 2)

    def steps(data: Tensor, n: int) -> Steps:
        return Steps(data, n)

    def gan(networks: tuple[nn.Module, nn.Module], latent_dim: int) -> GANModule:
        return GANModule(*deepcopy(networks), latent_dim=latent_dim)

    print(
        f"torch {torch.__version__}, one thread; time per step, ratio: median (smallest to largest of {rounds} rounds)"
    )
    row(
        f"DCGAN {size}x{size}, batch {batch}: GANModule / plain PyTorch",
        rounds,
        1.03,
        lambda: lightning(gan(pair, 128), steps(images, few)),
        lambda: plain_torch(*deepcopy(pair), 128, steps(images, few)),
    )
    row(
        "ring MLPs, batch 512: GANModule / hand-written Lightning",
        rounds,
        1.0,
        lambda: lightning(gan(ring, 256), steps(points, many)),
        lambda: lightning(HandWritten(*deepcopy(ring), 256), steps(points, many)),
    )
    fused = partial(adam, fused=True)
    row(
        "few neurons, batch 8: GANModule / hand-written, no logs",
        rounds,
        1.15,
        lambda: lightning(
            GANModule(*deepcopy(few_neurons), 16, g_optimizer=fused, d_optimizer=fused), steps(eight, 5 * many)
        ),
        lambda: lightning(HandWritten(*deepcopy(few_neurons), 16, logs=False, fused=True), steps(eight, 5 * many)),
    )
    row(
        f"DCGAN {size}x{size}: samples shared / made for each player",
        rounds,
        0.92,
        lambda: lightning(gan(pair, 128), steps(images, few), Alternating(share_fake=True)),
        lambda: lightning(gan(pair, 128), steps(images, few)),
    )
    row(
        f'DCGAN {size}x{size}: with AugmentPipe("bgc") / without',
        rounds,
        1.15,
        lambda: lightning(GANModule(*deepcopy(pair), 128, augment=AugmentPipe("bgc")), steps(images, few)),
        lambda: lightning(gan(pair, 128), steps(images, few)),
    )
    for title, goal, callback, n in (
        ("R1Penalty", 1.9, lambda: R1Penalty(0.1), few),
        ("R1Penalty(every=16)", 1.08, lambda: R1Penalty(0.1, every=16), 4 * few),
        ("R1Penalty + R2Penalty", float("inf"), lambda: R2Penalty(0.1), few),
        ("GradientPenalty", float("inf"), lambda: GradientPenalty(10.0), few),
    ):
        extra = [R1Penalty(0.1)] if "+" in title else []
        row(
            f"DCGAN {size}x{size}: with {title} / without",
            rounds if n == few else max(2, rounds // 3),
            goal,
            lambda callback=callback, n=n, extra=extra: lightning(gan(pair, 128), steps(images, n), callback(), *extra),
            lambda n=n: lightning(gan(pair, 128), steps(images, n)),
        )


if __name__ == "__main__":
    main()
