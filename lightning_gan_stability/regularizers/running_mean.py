"""Base of penalties that compare with running means."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability._checks import check_share
from lightning_gan_stability.callback import Regularizer, as_gan
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class RunningMeanRegularizer(Regularizer):
    """A penalty that compares with running means, updated once per batch with the mean over all processes.

    Args:
        weight: not negative.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        decay: weight of the old mean in the new one, in [0, 1].
        separate: take an optimizer step for this penalty alone.

    Attributes:
        means: the running means; None before the first batch.
    """

    means: Tensor | None

    def __init__(self, weight: Scheduled, every: int, decay: Scheduled, separate: bool = False) -> None:
        super().__init__(weight, every, separate=separate)
        self.decay = check_scheduled("decay", decay, check_share)
        self.add_state("means", None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the means."""
        module = as_gan(pl_module)
        if self.player in module.moved and (seen := self.observe(module)) is not None:
            now = trainer.strategy.reduce(seen, reduce_op="mean")
            before = self.start_from(now) if self.means is None else self.means
            self.means = torch.lerp(now, before, self.decay_at(module.steps[self.player] - 1))

    def observe(self, module: GANProtocol) -> Tensor | None:
        """The values of this batch that enter the means; None if there are none."""
        raise NotImplementedError

    def start_from(self, now: Tensor) -> Tensor:
        """The means before the first batch."""
        return now

    def decay_at(self, step: int) -> float:
        """The weight of the old mean at a step of the player."""
        return value_at(self.decay, step)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert to float32 if the precision is lower, in which small updates of a running mean would be lost.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
