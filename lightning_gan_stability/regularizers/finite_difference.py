"""R1 and R2 by finite differences: gradient penalties on the discriminator without second derivatives."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from lightning_gan_stability import penalties
from lightning_gan_stability._checks import check_choice
from lightning_gan_stability.callback import Regularizer
from lightning_gan_stability.outputs import Condition, GANOutputs, Sample, tree_map
from lightning_gan_stability.penalties import Patches
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class _FiniteDifference(Regularizer):
    """Base of the approximate R1 and R2."""

    differentiates = ()
    per_sample = True
    second_order = False
    weight = 100.0

    def __init__(
        self,
        weight: Scheduled = 100.0,
        sigma: Scheduled = 0.01,
        every: int = 1,
        patches: Patches = "sum",
        separate: bool = False,
    ) -> None:
        super().__init__(weight, every, separate=separate)
        self.sigma = check_scheduled("sigma", sigma, positive=True)
        self.patches: Patches = check_choice("patches", patches, get_args(Patches))

    def _values(self, module: GANProtocol, samples: Sample, condition: Condition) -> Tensor:
        noise = module.noise.randn_like(samples)
        sigma = value_at(self.sigma, module.iteration)
        moved = tree_map(lambda x, n: x + sigma * n, samples, noise)
        # both passes share dropout masks, augmentations and spectral norm, so that only the points differ
        with module.frozen_buffers():
            with module.replay_randomness():
                logits = module.logits(samples, condition)
            return penalties.differences(logits, module.logits(moved, condition), self.patches)


class ApproximateR1Penalty(_FiniteDifference):
    """Adds weight · E(l(x) − l(x + σ n))² over real samples, n ~ N(0, I), to the discriminator's loss.

    This approximates :class:`R1Penalty` with γ = 2 · weight · σ² by finite differences; for a linear critic the
    expectations are equal. "Diffusion Adversarial Post-Training for One-Step Video Generation",
    https://arxiv.org/abs/2501.08316. Needs no second derivatives, so it works with compiled and sharded networks and
    with fused attention. The estimate is noisy, from one direction per sample and step. Costs two forward passes of the
    discriminator.

    Args:
        weight: not negative.
        sigma: σ, positive, in units of the data. Much below 0.001 the difference is lost to rounding in float32.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.
        patches: what to compare if the discriminator returns several logits for a sample: their ``"sum"``, as in
            papers, which grows with the size of the sample, or their ``"mean"``, which does not.

    Raises:
        ValueError: if ``weight``, ``sigma`` or ``every`` has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> ApproximateR1Penalty(weight=100.0, sigma=0.01).name
        'approximate_r1'
    """

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """(l(x) − l(x + σ n))² of each real sample, (n,)."""
        return self._values(module, outputs.real, outputs.condition)


class ApproximateR2Penalty(_FiniteDifference):
    """Adds weight · E(l(x) − l(x + σ n))² over fake samples, n ~ N(0, I), to the discriminator's loss.

    This approximates R2 by finite differences, https://arxiv.org/abs/2501.08316. Everything else is as for
    :class:`ApproximateR1Penalty`.

    Args:
        weight: not negative.
        sigma: σ, positive, in units of the data.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.
        patches: what to compare if the discriminator returns several logits for a sample: their ``"sum"``, as in
            papers, which grows with the size of the sample, or their ``"mean"``, which does not.

    Raises:
        ValueError: if ``weight``, ``sigma`` or ``every`` has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> ApproximateR2Penalty(every=2).sigma
        0.01
    """

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """(l(x) − l(x + σ n))² of each fake sample, (n,)."""
        return self._values(module, outputs.fake, outputs.fake_condition)
