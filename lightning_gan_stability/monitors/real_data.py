"""Real data of a run, read without moving its loaders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_gan_stability._compat import loader_of as loader_of
from lightning_gan_stability.data.streams import Stream
from lightning_gan_stability.noise import generator
from lightning_gan_stability.outputs import Condition, batch_size, tree_map


def real_samples(trainer: Trainer, loader: Any, n: int) -> tuple[list[Tensor], Condition]:
    """This rank's share of n real samples, in parts, and their conditions, on its device; the loader does not move.

    A map-style data set gives a random choice of its samples, the same each time; another loader its first ones.
    """
    parts: list[Tensor] = []
    conditions: list[Condition] = []
    left = math.ceil(n / trainer.world_size)
    batches = from_start(loader, n, trainer.global_rank, trainer.world_size)
    if isinstance(loader, CombinedLoader):  # which gives the numbers of the batch and of its loader too
        batches = (batch for batch, *_ in batches)
    for batch in batches:
        moved = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
        real, condition = trainer.lightning_module.unpack(moved)  # type: ignore[operator]
        parts.append(tree_map(lambda leaf, left=left: leaf[:left], real))
        conditions += [] if condition is None else [tree_map(lambda leaf, left=left: leaf[:left], condition)]
        left -= batch_size(real)
        if left <= 0:
            break
    return parts, tree_map(lambda *leaves: torch.cat(leaves), *conditions) if conditions else None


def from_start(loader: Any, n: int, rank: int, world: int) -> Iterator[Any]:
    """Yield a loader's batches from its start, and leave it where it is.

    Of a map-style data set it is a rank's share of n samples chosen at random, the same ones each time.

    Args:
        loader: Any iterable of batches.
        n: Samples of all ranks.
        rank: Whose share.
        world: Number of ranks.
    """
    if isinstance(loader, Stream):
        yield from map(loader.batch, range(len(loader)))
    elif isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        # not by iterating over it: persistent workers have one iterator, which is in use
        data, size = loader.dataset, len(loader.dataset)  # type: ignore[arg-type]
        if loader.batch_size is None and loader.batch_sampler is None:
            yield from (loader.collate_fn(data[row]) for row in range(rank, size, world))
            return
        rows = torch.randperm(size, generator=generator("real"))[:n][rank::world]
        for part in rows.split(loader.batch_size or 64):  # type: ignore[no-untyped-call]
            yield loader.collate_fn([data[row] for row in part.tolist()])
    else:
        state = deepcopy(loader.state_dict()) if hasattr(loader, "state_dict") else None
        try:
            yield from loader
        finally:
            if state is not None:
                loader.load_state_dict(state)
