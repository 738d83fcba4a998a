"""Compares real and generated samples of a run, to find what gives the generated ones away."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_gan_stability.distributed import gather_rows
from lightning_gan_stability.layers import evaluation
from lightning_gan_stability.metrics.giveaways import Giveaway, find_giveaways
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.latents import fixed_latents
from lightning_gan_stability.monitors.real_data import RealData, loader_to_read
from lightning_gan_stability.outputs import batch_size, shapes, tree_leaves

SAMPLES, LEAST = 256, 64  # of all processes: as many as are there, and as many as must be


def strongest_giveaway(trainer: Trainer, module: GANModule) -> Giveaway | None:
    """The strongest finding of :func:`~lightning_gan_stability.metrics.find_giveaways` on training data, on all ranks.

    None if there is no finding, if reading the data would take them away from training, or if there are fewer than 64
    samples of one shape. Each leaf of a tree of samples is tested separately.
    """
    try:
        with isolate_rng():
            pairs = _pairs(trainer, module)
    except MisconfigurationException:
        return None
    found = list[Giveaway]()
    for real, fake in pairs if trainer.is_global_zero else ():
        if len(real) >= LEAST and bool(real.isfinite().all() and fake.isfinite().all()):
            found += [giveaway for giveaway in find_giveaways(real, fake) if giveaway.strong]
    best = max(found, key=lambda giveaway: giveaway.auc, default=None)
    told: Giveaway | None = trainer.strategy.broadcast(best)
    return told


def _pairs(trainer: Trainer, module: GANModule) -> list[tuple[Tensor, Tensor]]:
    """Real and generated samples of each leaf, of all processes, in main memory."""
    parts, shape = list[tuple[Any, Any]](), None
    with (
        module.noise.of("giveaway"),
        module.frozen_buffers(),
        evaluation(module.generator),
    ):
        for i, (real, condition) in enumerate(RealData(trainer, loader_to_read(trainer, "train"), SAMPLES)):
            n = batch_size(real)
            fake = module.sample(n, condition, fixed_latents(module, n, "giveaway", i))
            parts.append((tree_leaves(real), tree_leaves(fake)))
    if parts:
        shape = [*map(shapes, parts[0][0])]
    shape = trainer.strategy.broadcast(shape)  # samples of other shapes, such as longer ones, are left out
    if shape is None:
        return []
    fitting = [part for part in parts if [*map(shapes, part[0])] == [*map(shapes, part[1])] == shape]
    pairs = []
    for i, size in enumerate(shape):
        empty = torch.zeros(0, *size, device=module.device)
        both = [torch.cat([empty, *(part[side][i].float() for part in fitting)]) for side in (0, 1)]
        real, fake = (torch.cat(gather_rows(rows)).cpu() for rows in both)
        pairs.append((real, fake) if real.dim() > 1 else (real[:, None], fake[:, None]))
    return pairs
