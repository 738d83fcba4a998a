"""Batches as functions of their position in a stream, the basis of all data modules."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.noise import generator

Batch: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, tuple[Tensor, ...]]


class Stream(Dataset[Batch]):
    """A loader of `batch(0), batch(1), ...` that saves and restores its position.

    It is not a :class:`torch.utils.data.DataLoader`, so Lightning neither wraps it nor injects a sampler. A pass yields
    `length` batches from the current position on. After a resume inside an epoch Lightning itself ends the pass with
    that epoch; ended here too, `limit_train_batches` or a changed `length` would make epochs too short.

    Args:
        batch: Pure function from a position to a batch.
        length: Number of batches in an epoch.
        num_workers: Number of processes that load batches; `position` counts only batches that were yielded.
        repeat: Start every pass at position 0, as validation does.

    Example:
        >>> stream = Stream(lambda position: torch.tensor(position), length=2)
        >>> [int(batch) for epoch in range(2) for batch in stream], stream.state_dict()
        ([0, 1, 2, 3], {'position': 4})
    """

    def __init__(self, batch: Callable[[int], Batch], length: int, num_workers: int = 0, repeat: bool = False) -> None:
        self.batch = batch
        self.length = check_integer("length", length)
        self.num_workers = check_integer("num_workers", num_workers, least=0)
        self.repeat = repeat
        self.position = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Batch:
        return self.batch(position)

    def __iter__(self) -> Iterator[Batch]:
        # A generator on purpose: Lightning calls `iter()` once just to see whether it can, and that starts no workers.
        if self.repeat:
            self.position = 0
        for batch in self._batches(range(self.position, self.position + self.length)):
            self.position += 1  # before the yield: a checkpoint written during this batch resumes with the next
            yield batch

    def _batches(self, positions: range) -> Iterator[Batch]:
        if self.num_workers == 0:
            return map(self.batch, positions)
        own = torch.Generator()  # without one, the loader draws its workers' seeds from the global generator
        return iter(DataLoader(self, None, sampler=positions, num_workers=self.num_workers, generator=own))

    def state_dict(self) -> dict[str, int]:
        """Return the position of the next batch."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the position in `state_dict`."""
        self.position = state_dict["position"]


@dataclass(frozen=True)
class Mixture:
    """Batches of a mixture of Gaussians; `key` tells the random streams apart."""

    centers: Tensor
    std: float
    balanced: bool
    batch_size: int
    samples: int  # in one epoch
    key: tuple[int, str, int]

    def __len__(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def __call__(self, position: int) -> Tensor:
        source = generator(*self.key, position)
        n = min(self.batch_size, self.samples - position % len(self) * self.batch_size)
        noise = torch.randn(n, 2, generator=source)
        mode = torch.arange(n) % len(self.centers)
        if not self.balanced:
            mode = torch.randint(len(self.centers), (n,), generator=source)
        return self.centers[mode] + self.std * noise


@dataclass(frozen=True)
class Rows:
    """Batches of some rows of a data set; each rank takes every `world`-th row of a batch of all ranks together."""

    samples: Any  # by index: an image (C, H, W), or a tuple that starts with one
    rows: Tensor
    batch_size: int
    rank: int
    world: int
    seed: int
    shuffle: bool = False
    drop_last: bool = False

    def __len__(self) -> int:
        batches = len(self.rows) / (self.batch_size * self.world)
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __call__(self, position: int) -> Tensor | tuple[Tensor, ...]:
        batch = default_collate([self.samples[row] for row in self.share(position).tolist()])
        return tuple(batch) if isinstance(batch, list) else batch

    def share(self, position: int) -> Tensor:
        """Return the rows of one batch of this rank."""
        epoch, step = divmod(position, len(self))
        total = self.batch_size * self.world
        part = slice(step * total, (step + 1) * total)
        together = self.rows[_permutation(self.seed, epoch, len(self.rows))[part] if self.shuffle else part]
        share = together[self.rank :: self.world]
        # Every rank needs as many batches as the others, or a collective call in validation waits for ever.
        return share if len(share) else together[:1]


@lru_cache(maxsize=4)  # asked for at every batch of an epoch
def _permutation(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order of `n` rows in one epoch."""
    return torch.randperm(n, generator=generator(seed, "train", epoch))
