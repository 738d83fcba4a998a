"""A pool of generated samples, so that the discriminator also sees earlier ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability._checks import check_bool, check_integer, check_share
from lightning_gan_stability.callback import GANCallback, as_gan, find_rule
from lightning_gan_stability.distributed import gather_rows, is_distributed
from lightning_gan_stability.noise import generator
from lightning_gan_stability.outputs import GANOutputs, Player, detach, tree_leaves, tree_map
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class FakePool(GANCallback):
    """Replaces some of the discriminator's fake samples with generated samples of earlier batches.

    Until the pool is full, each new sample is stored and shown. After that, with ``probability``, a random sample of
    the pool is shown and the new one replaces it in the pool; otherwise the new sample is shown and not stored.
    "Learning from Simulated and Unsupervised Images through Adversarial Training", https://arxiv.org/abs/1612.07828, as
    in the code of CycleGAN, https://arxiv.org/abs/1703.10593. A sample keeps its condition. All processes share one
    pool. It is saved in checkpoints and kept on the device, where it takes the memory of ``size`` samples. Its random
    draws depend on the module's noise seed and the number of samples seen, so one process and several draw the same. A
    run that resumes with another ``size`` continues to fill a larger pool, and keeps the first samples for a smaller
    one.

    Args:
        size: number of samples in the pool.
        probability: probability of showing an earlier sample once the pool is full, in [0, 1].
        independent: give each leaf of a tree of samples its own pool and random draws, as for the two domains of
            CycleGAN; conditions then remain those of the batch. False: the leaves of a sample stay together.

    Raises:
        ValueError: if an argument has a bad value, or if the shapes of samples differ from those in the pool.
        MisconfigurationException: with an update rule that needs both players to see the same samples.

    Example:
        >>> FakePool().size
        50
    """

    pools: list[list[Tensor]]
    seen: int

    def __init__(self, size: int = 50, probability: Scheduled = 0.5, independent: bool = False) -> None:
        super().__init__()
        self.size = check_integer("size", size)
        self.probability = check_scheduled("probability", probability, check_share)
        self.independent = check_bool("independent", independent)
        self.add_state("pools", [])  # groups of leaves that stay together, each with its stored rows, (<= size, ...)
        self.add_state("seen", 0)  # samples of all processes so far

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse packing, and update rules in which both players need the same samples."""
        rule = find_rule(trainer)
        if rule.joint or rule.whole_batch:
            name = type(rule).__name__
            raise MisconfigurationException(
                f"FakePool shows the discriminator samples of earlier batches, but {name} needs the generator's "
                f"current ones: remove {name} or FakePool."
            )
        if as_gan(pl_module).packing > 1:
            raise MisconfigurationException(
                "FakePool replaces samples one by one, but Packed judges several together: remove one of them."
            )

    @torch.no_grad()
    def change_samples(self, module: GANProtocol, player: Player, outputs: GANOutputs) -> GANOutputs:
        """Replace fake samples on the discriminator's steps."""
        if player == "g":
            return outputs
        shown: Any = {"fake": outputs.fake}
        if not self.independent:
            shown["condition"] = outputs.fake_condition
        leaves = [detach(leaf) for leaf in tree_leaves(shown)]
        groups = [[leaf] for leaf in leaves] if self.independent else [leaves]
        changed, total = [], 0
        for i, group in enumerate(groups):
            rows, total = self._exchange(module, i, group)
            changed += rows
        self.seen += total
        found = iter(changed)
        shown = tree_map(lambda leaf: next(found).requires_grad_(leaf.requires_grad), shown)
        condition = shown.get("condition", outputs.fake_condition)
        return outputs.replace(fake=shown["fake"], fake_condition=condition, latents=None)

    def _exchange(self, module: GANProtocol, number: int, leaves: list[Tensor]) -> tuple[list[Tensor], int]:
        """Exchange rows of leaves that stay together with their pool; also return the row count of all processes."""
        if number < len(self.pools):
            self._check_shapes(self.pools[number], leaves)
        gathered = [gather_rows(leaf) for leaf in leaves]
        rows = [torch.cat(parts) for parts in gathered]
        if len(self.pools) == number:
            self.pools.append([_empty(row) for row in rows])
        pool = self.pools[number]
        room = self.size - len(pool[0])
        if room > 0:
            pool = [torch.cat([kept, row[:room].to(kept.dtype)]) for kept, row in zip(pool, rows, strict=True)]
        elif room < 0:
            pool = [kept[: self.size].clone() for kept in pool]
        self.pools[number] = pool
        shown = [row.clone() for row in rows]
        probability = value_at(self.probability, module.iteration)
        for i in range(max(room, 0), len(rows[0])):
            coin, place = torch.rand(
                2, generator=generator(module.noise.seed, "pool", number, self.seen + i), dtype=torch.float64
            )
            if coin < probability:
                slot = int(place * self.size)
                for kept, row, old in zip(pool, rows, shown, strict=True):
                    old[i] = kept[slot]
                    kept[slot] = row[i]
        sizes = [len(part) for part in gathered[0]]
        start = sum(sizes[: dist.get_rank()]) if is_distributed() else 0
        return [row[start : start + len(leaf)] for row, leaf in zip(shown, leaves, strict=True)], len(rows[0])

    def _check_shapes(self, pool: list[Tensor], leaves: list[Tensor]) -> None:
        """Refuse samples or conditions whose shapes differ from those of earlier batches."""
        old, new = ([tuple(leaf.shape[1:]) for leaf in group] for group in (pool, leaves))
        if old != new:
            what = "samples" if self.independent else "samples with their conditions"
            raise ValueError(
                f"FakePool mixes {what} of several batches, which must have equal shapes: the pool has "
                f"{', '.join(map(str, old))}, and this batch has {', '.join(map(str, new))}. Crop or pad them in the "
                "data, or remove FakePool."
            )


def _empty(rows: Tensor) -> Tensor:
    """An empty pool, in at least float32, because autocast gives half precision on some steps only."""
    dtype = torch.promote_types(rows.dtype, torch.float32) if rows.is_floating_point() else rows.dtype
    return rows[:0].to(dtype)
