"""Penalties on the discriminator's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gan_stability import penalties
from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.callback import Regularizer
from lightning_gan_stability.outputs import GANOutputs
from lightning_gan_stability.penalties import sum_over_entries
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.regularizers.running_mean import RunningMeanRegularizer, at_least_float32
from lightning_gan_stability.schedules import Scheduled


class LeCam(RunningMeanRegularizer):
    """Adds weight · E[relu(l(x) − α_F)² + relu(α_R − l(G(z)))²] to the discriminator's loss.

    α_R and α_F are running means of the real and fake logits, kept for each discriminator separately. "Regularizing
    Generative Adversarial Networks under Limited Data", https://arxiv.org/abs/2104.03310, with the relu of the authors'
    code. Before step ``start`` there is no penalty, and the means are those of the last batch. It is meant for small
    datasets. For images, try augmentations first: with 500 digits LeCam made samples worse, and augmentations made them
    better. Costs no forward pass.

    Args:
        weight: λ, not negative.
        decay: weight of the old mean in the new one, in [0, 1].
        start: steps of the discriminator without penalty, 0 or more.
        every: n: compute the penalty on every n-th step only, and multiply it by n.

    Attributes:
        means: α_R and α_F, (2,), or (discriminators, 2) if there are several; None before the first batch.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> LeCam(start=0).name
        'le_cam'
    """

    differentiates = ()
    second_order = False
    weight = 0.3

    def __init__(self, weight: Scheduled = 0.3, decay: Scheduled = 0.99, start: int = 1000, every: int = 1) -> None:
        super().__init__(weight, every, decay)
        self.start = check_integer("start", start, least=0)

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The penalty of each pair of logits; 0 before ``start``."""
        pairs, direction = outputs.pairs(), module.loss.direction
        if self.means is None or module.steps[self.player] < self.start:
            return torch.zeros_like(pairs[0].real)
        rows = zip(pairs, self.means.reshape(-1, 2), strict=True)
        values = [penalties.lecam(direction * real, direction * fake, *means) for (_, real, fake), means in rows]
        return values[0] if len(values) == 1 else torch.stack([value.mean() for value in values]).sum()

    def observe(self, module: GANProtocol) -> Tensor | None:
        """The means of the logits from the discriminator's last step."""
        rows = [[at_least_float32(logits).mean() for logits in pair[1:]] for pair in module.last_step.pairs]
        return module.loss.direction * torch.stack([torch.stack(row) for row in rows]).squeeze(0) if rows else None

    def decay_at(self, step: int) -> float:
        return super().decay_at(step) if step >= self.start else 0.0


class LogitDrift(Regularizer):
    """Adds weight · E l(x)² over real samples to the discriminator's loss, to keep its logits near 0.

    "Progressive Growing of GANs", https://arxiv.org/abs/1710.10196. It is meant for the Wasserstein loss, which does
    not change if a constant is added to all logits. Costs no forward pass.

    Args:
        weight: ε, not negative.
        every: n: compute the penalty on every n-th step only, and multiply it by n.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> LogitDrift().weight
        0.001
    """

    differentiates = ()
    second_order = False

    def __init__(self, weight: Scheduled = 1e-3, every: int = 1) -> None:
        super().__init__(weight, every)

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The mean of l(x)² over real logits, summed over discriminators."""
        return sum_over_entries(lambda logits: logits.square().mean(), outputs.real_logits)
