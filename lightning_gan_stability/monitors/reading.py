"""Features of real and generated samples for monitors, and the conditions that samples were generated from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_gan_stability._checks import describe
from lightning_gan_stability._compat import original_module
from lightning_gan_stability.distributed import gather_objects, gather_rows
from lightning_gan_stability.layers import evaluation, hears_condition
from lightning_gan_stability.metrics.extractors import Inception
from lightning_gan_stability.metrics.statistics import Seen
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.conditions import Told, parts_of
from lightning_gan_stability.monitors.latents import fixed_latents
from lightning_gan_stability.monitors.real_data import RealData, rebatched
from lightning_gan_stability.outputs import Condition, Sample, Unpacked, batch_size, take_rows, tree_leaves, tree_map

BATCH, VALUES = 256, 2**20  # samples that are generated at once, and their values, of which networks hold many more
KEPT = 2**27  # bytes of conditions that are kept


# ---------- features


def extractor_for(samples: Sample, asker: str) -> nn.Module:
    """The default extractor: vectors are their own features, and images go through Inception.

    Args:
        samples: some of the samples.
        asker: name of the caller, for the error message.

    Example:
        >>> extractor_for(torch.zeros(4, 2), "QualityMonitor")
        Identity()
    """
    if not isinstance(samples, Tensor):
        raise MisconfigurationException(
            f"{asker} takes samples for images where no extractor is given, and these are {describe(samples)}: give "
            f"{asker} an `extractor` that makes features of them."
        )
    extractor = nn.Identity() if samples.dim() == 2 else Inception()
    rank_zero_info(f"{asker}: no extractor is given, so it takes {type(extractor).__name__}.")
    return extractor


def features_of(extractor: nn.Module, samples: Sample) -> Tensor:
    """Features (n, d) of samples, in eval mode and full precision, on the device that metrics are computed on.

    Args:
        extractor: maps samples to features (n, ...); it is moved to their device.
        samples: (n, ...), or a tree of such tensors.

    Raises:
        ValueError: if there is not exactly one row of features for each sample.

    Example:
        >>> features_of(nn.Identity(), torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 64])
    """
    samples = tree_map(lambda leaf: leaf.detach().float(), samples)
    device, n = tree_leaves(samples)[0].device, batch_size(samples)
    with evaluation(extractor), torch.autocast(device.type, enabled=False):
        features = extractor.to(device)(samples)
    if not isinstance(features, Tensor) or not features.dim() or len(features) != n:
        raise ValueError(
            f"`extractor` must give one row of features per sample, a tensor of shape ({n}, ...) for {n} samples, got "
            f"{describe(features)} from {type(extractor).__name__}."
        )
    return features.reshape(n, -1).to(home(device))


def home(device: torch.device) -> torch.device:
    """The device that metrics are computed on: the given one if it supports float64, otherwise the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def interleaved(rows: Tensor) -> Tensor:
    """The rows of all ranks, in the order of a single process that takes one row of each rank in turn."""
    parts = gather_rows(rows)
    whole = _woven(parts)
    return torch.cat(parts) if whole is None else whole


def _woven(parts: list[Tensor]) -> Tensor | None:
    """Interleave the rows of ranks; None unless each rank has its share of them."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    if any(len(whole[rank :: len(parts)]) != len(part) for rank, part in enumerate(parts)):
        return None
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def is_conditional(module: GANModule) -> bool:
    """Whether a module's samples can depend on conditions; data may have labels that its generator does not take.

    Example:
        >>> from lightning_gan_stability.nets import MLP
        >>> is_conditional(GANModule(MLP([4, 2]), MLP([2, 1]), latent_dim=4))
        False
    """
    if module.latent_dim is None or is_overridden("generate", module, GANModule):
        return True
    return hears_condition(original_module(module.generator))


# ---------- what was read


class Kept:
    """Conditions, kept in main memory while they are small."""

    def __init__(self) -> None:
        self.parts: list[Condition] | None = []
        self.n = self.bytes = 0

    def add(self, condition: Condition) -> None:
        self.n += batch_size(condition)
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves(condition))
        if self.parts is not None:
            self.parts.append(move_data_to_device(condition, "cpu"))
        if self.bytes > KEPT:
            self.parts = None  # they are read again for each measurement


class Reading:
    """Real samples as they were read: their features, and the conditions of this rank.

    Args:
        data: the real data.
        condition: conditions of the first batch, which tell whether there are any to keep.
        repeated: reuse conditions from the first one on, if more samples are wanted than there are conditions.
        describe: maps what was read to labels (n,) or to rows of numbers (n, d) that describe its conditions.

    Attributes:
        seen: features of the real samples of all ranks.
        told: their conditions, if they are described and each rank has its share.
    """

    seen: Seen

    def __init__(
        self,
        data: RealData,
        condition: Condition,
        repeated: bool = False,
        describe: Callable[[Unpacked], Tensor] | None = None,
    ) -> None:
        self.data, self.repeated, self.describe = data, repeated, describe
        self.conditions = Kept() if tree_leaves(condition) else None
        self.n = 0
        self.told: Told | None = None
        self._parts = parts_of(condition)
        self._described: list[Tensor] = []

    def read(self) -> Iterator[Sample]:
        """The real samples, in parts; their conditions are kept."""
        self.conditions, self._described = None if self.conditions is None else Kept(), []
        for part in self.data:
            if self.conditions is not None:
                self.conditions.add(part.condition)
                self._described += [] if self.describe is None else [self.describe(part)]
            yield part.real

    def see(self, seen: Seen) -> None:
        """Store the features of all ranks."""
        self.seen, self.n = seen, len(seen.features)
        sizes = gather_objects({tuple(rows.shape[1:]) for rows in self._described})
        several = not all(sizes) or len(set.union(*sizes)) > 1
        # conditions of several sizes do not compare, nor do they where generated samples do not stand beside theirs
        told = None if several else _woven(gather_rows(torch.cat(self._described)))
        if told is not None and bool(told.isfinite().all()):
            self.told = Told(told, seen.features, self._parts)
        self._described = []

    def finite(self) -> Reading:
        """The same reading, without samples whose features are not finite."""
        good = self.seen.features.isfinite().all(1)
        if not bool(good.all()):
            self.seen, self.told = Seen(*(column[good] for column in self.seen)), None
        return self

    def conditions_of(self, n: int) -> int:
        """The number of samples that can be generated if n are wanted: at most that of conditions, unless repeated."""
        return n if self.conditions is None or self.repeated else min(n, self.n)

    def each_condition(self, n: int, at_once: int) -> Iterator[Condition]:
        """The conditions of n samples, in parts; the size of each part if there are no conditions."""
        if self.conditions is None:
            yield from (min(at_once, n - start) for start in range(0, n, at_once))
            return
        parts = self.conditions.parts
        while n > 0:
            for part in rebatched((part.condition for part in self.data) if parts is None else parts, at_once):
                if n <= 0:
                    return
                yield take_rows(part, 0, n)
                n -= batch_size(part)
            if not self.repeated:
                return


# ---------- generated samples


def samples_at_once(samples: Sample) -> int:
    """The number of samples to generate at once, given samples of the same size.

    Example:
        >>> samples_at_once(torch.zeros(4, 2)), samples_at_once(torch.zeros(4, 3, 1024, 1024))
        (256, 1)
    """
    values: int = sum(leaf[0].numel() for leaf in tree_leaves(samples))
    return max(1, min(BATCH, VALUES // max(values, 1)))


def generated(module: GANModule, real: Reading, n: int, at_once: int, *key: object, **asked: Any) -> Iterator[Sample]:
    """This rank's share of n generated samples, in parts, from the same latents and conditions each time.

    Rank r of w generates the samples r, r + w, r + 2w, ...; there are at most as many samples as conditions, unless
    these are repeated.

    Args:
        module: the GAN, in eval mode.
        real: the real data with their conditions.
        n: number of samples of all ranks.
        at_once: number of samples in a part.
        key: tells the latents of different monitors apart.
        asked: further arguments of :meth:`GANModule.sample`.
    """
    trainer, n = module.trainer, real.conditions_of(n)
    latents = fixed_latents(module, n, *key)
    mine = torch.arange(trainer.global_rank, n, trainer.world_size, device=module.device)
    for condition in real.each_condition(len(mine), at_once):
        size = condition if isinstance(condition, int) else batch_size(condition)
        rows, mine = mine[:size], mine[size:]
        given = None if isinstance(condition, int) else condition
        with evaluation(module):
            samples = module.sample(size, given, None if latents is None else latents[rows], **asked)
        yield samples
