"""Generators that follow a script, so that at each step it is known what they are: for detection.py.

They do not learn. Their samples are a mixture of Gaussians, whose weights, width and place the script sets. The real
data are equal shares of 8 modes on a ring or 25 on a grid, of width 0.05, which a monitor knows or does not know, or
of 10 modes in 16 dimensions, of width 0.3, which it does not know.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gan_stability import MLP, GANModule, Grid, Ring
from lightning_gan_stability.metrics.decisions import HELD

HEALTHY = ["perfect", "wide that narrows", "modes that come late", "uneven modes"]
LOSSES = ["a mode dropped", "half of the modes dropped", "modes lost one by one", "one mode left", "hopping"]
FROM_HALF = [*LOSSES, "all samples equal", "off the data"]  # bad from half of the run on, and narrowing all the while
FROM_START = ["never learned", "noise without variation"]  # which is said after step 500, while FID falls
DATA = ["ring", "ring, modes unknown", "grid", "grid, modes unknown", "16 dimensions, modes unknown"]
LATENTS = 64
PLACES = 5000  # real samples, where a loader has so many and no more


class Script(nn.Module):
    """Samples that depend on the latents and on ``step``, which the module sets; nothing is learned.

    "Wide that narrows" has the width 0.3 e^(−3 t) + ``std``, where t is 0 at the start of the run and 1 at its end.

    Args:
        kind: of run.
        centers: of the modes (K, d).
        std: of a real mode.
        steps: of the whole run.
        every: steps between measurements.
        seed: which modes are hit, where samples go that leave the data, and what latents mean: a monitor's are the same
            in all runs, so that without this all seeds would be one.
    """

    def __init__(self, kind: str, centers: Tensor, std: float, steps: int, every: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # an optimizer needs one
        self.kind, self.centers, self.std, self.steps, self.every = kind, centers, std, steps, every
        self.step = 0
        k, d = centers.shape
        generator = torch.Generator().manual_seed(seed)
        self.rank = torch.randperm(k, generator=generator)  # modes of low rank are hit
        self.away = nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        self.axes = torch.linalg.qr(torch.randn(LATENTS, 1 + d, generator=generator))[0]

    @property
    def age(self) -> int:
        """Measurements since the generator went bad, if it is one that does; negative before."""
        return (self.step - self.steps // 2) // self.every

    def shares(self) -> Tensor:
        """Of each mode, at this step."""
        rank, k = self.rank, len(self.rank)
        weights = torch.ones(k, dtype=torch.float64)
        if self.kind == "uneven modes":
            weights = torch.linspace(0.5, 1.6, k, dtype=torch.float64)[rank]
        elif self.kind == "modes that come late":
            weights[rank < k // 4] = float(self.step >= self.steps // 4)
            weights[rank == k - 1] = 1.0 if self.step >= self.steps * 2 // 5 else 0.05
        elif self.kind in FROM_HALF and self.age >= 0:
            weights[~self.kept(rank, k)] = 0.0
        return weights / weights.sum()

    def kept(self, rank: Tensor, k: int) -> Tensor:
        """Which modes are still there when a generator has gone bad."""
        if self.kind == "a mode dropped":
            return rank > 0
        if self.kind == "half of the modes dropped":
            return rank >= k // 2
        if self.kind == "modes lost one by one":
            return rank > min(self.age, k - 2)
        if self.kind == "hopping":
            return rank == self.age % k
        return rank == 0

    def width(self) -> float:
        """Standard deviation of a mode, at this step."""
        if self.kind == "all samples equal" and self.age >= 0:
            return 0.0
        narrows = self.kind == "wide that narrows" or self.kind in FROM_HALF
        return self.std + 0.3 * math.exp(-3 * self.step / self.steps) * narrows

    def elsewhere(self) -> tuple[float, float] | None:
        """How far away all samples are, and how wide, relative to the data; None: they are on the data."""
        if self.kind == "off the data" and self.age >= 0:
            return 3.0, 1.0
        if self.kind in FROM_START:  # FID falls by a fifth or more each time, which is progress
            return 60 * math.exp(-3 * self.step / self.steps), 0.3 if self.kind == "never learned" else 0.02
        return None

    def is_healthy(self, step: int) -> bool:
        """Whether the generator holds every mode with a fifth of its share or more, at a step."""
        self.step = step
        return self.elsewhere() is None and bool((self.shares() >= HELD / len(self.rank)).all())

    def forward(self, latents: Tensor) -> Tensor:
        z = latents @ self.axes
        noise, place = z[:, 1:], self.elsewhere()
        if place is not None:
            size = self.centers.norm(dim=1).mean()
            return size * (place[0] * self.away + place[1] * noise) + 0 * self.weight
        borders = self.shares().cumsum(0)
        chosen = torch.searchsorted(borders / borders[-1], torch.special.ndtr(z[:, 0].double()).clamp(1e-12, 1 - 1e-12))
        return self.centers[chosen] + self.width() * noise + 0 * self.weight


class Scripted(GANModule):
    """A GAN whose generator knows the step."""

    def generate(self, network: nn.Module, n: int, condition: object, latents: Tensor | None) -> Tensor:
        self.generator.step = self.iteration
        return super().generate(network, n, condition, latents)


def real_data(data: str, seed: int) -> tuple[Any, Tensor, float]:
    """Data, where their modes are, and how wide."""
    if data in ("ring", "grid"):
        known = (Ring if data == "ring" else Grid)(std=0.05, batch_size=32, val_samples=64, seed=seed)
        return known, known.centers, known.std
    generator = torch.Generator().manual_seed(seed)
    if data.startswith("16"):
        centers, std = torch.randn(10, 16, generator=generator), 0.3
    else:
        centers, std = (Ring() if data.startswith("ring") else Grid()).centers, 0.05
    modes = torch.randint(len(centers), (PLACES,), generator=generator)
    samples = centers[modes] + std * torch.randn(PLACES, centers.shape[1], generator=generator)
    return DataLoader(samples, batch_size=32, shuffle=True), centers, std


def make(data: str, kind: str, seed: int, steps: int, every: int) -> tuple[Scripted, Any, None, list[Any]]:
    """What a run of a script needs: module, data, no extractor, since samples are vectors, and no callbacks."""
    source, centers, std = real_data(data, seed)
    generator = Script(kind, centers, std, steps, every, seed)
    module = Scripted(generator, MLP([centers.shape[1], 4, 1]), LATENTS)
    module.noise_seed = seed
    return module, source, None, []
