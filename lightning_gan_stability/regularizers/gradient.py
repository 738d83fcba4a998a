"""Gradient penalties as callbacks, for any loss and any update rule."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from lightning_gan_stability import penalties
from lightning_gan_stability._checks import check_bool, check_choice
from lightning_gan_stability.callback import Regularizer
from lightning_gan_stability.outputs import GANOutputs, batch_size, tree_leaves
from lightning_gan_stability.penalties import Patches
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class _ZeroCentered(Regularizer):
    """Base of R1 and R2."""

    per_sample = True

    def __init__(
        self,
        gamma: Scheduled = 1.0,
        every: int = 1,
        patches: Patches = "sum",
        separate: bool = False,
        augmented: bool = False,
    ) -> None:
        super().__init__(check_scheduled("gamma", gamma) / 2, every, separate)
        self.patches: Patches = check_choice("patches", patches, get_args(Patches))
        self.augmented = check_bool("augmented", augmented)


class R1Penalty(_ZeroCentered):
    """Adds γ/2 · E‖∇ₓD(x)‖² over real samples to the discriminator's loss.

    "Which Training Methods for GANs do actually Converge?", https://arxiv.org/abs/1801.04406. The factor ½ is that of
    the paper. The authors' code has none, so its value of 10 is 20 here. The gradient is that of the logit with respect
    to the sample before augmentation. It shares the forward pass of the loss.

    Args:
        gamma: γ, not negative; a number or a :class:`~lightning_gan_stability.Schedule`. A good value depends on data,
            networks and loss: begin with 1, and change it by factors of ten (docs/guides/recipes.md explains the values
            in the configs). StyleGAN2's rule, 0.0002 · pixels / batch size, is for its own networks and gives far
            smaller values.
        every: n: compute the penalty on every n-th step only, and multiply it by n. With 16 it costs almost nothing.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.
        patches: what to differentiate if the discriminator returns several logits for a sample: their ``"sum"``, as in
            papers, which grows with the size of the sample, or their ``"mean"``, which does not.
        augmented: the gradient is with respect to what the discriminator saw, after augmentations; False: to the sample
            before them, as in the code of StyleGAN2-ADA and R3GAN.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> R1Penalty(gamma=0.1, every=16).weight
        0.05
    """

    differentiates = ("real",)
    reads = ("real",)

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """‖∇ₓD(x)‖² of each real sample, (n,)."""
        points = outputs.real_augmented if self.augmented else outputs.real
        return penalties.zero_centered(points, outputs.real_logits, self.patches)


class R2Penalty(_ZeroCentered):
    """Adds γ/2 · E‖∇ₓD(x)‖² over fake samples to the discriminator's loss.

    "Which Training Methods for GANs do actually Converge?", https://arxiv.org/abs/1801.04406; with R1 and a
    relativistic loss in "The GAN is dead; long live the GAN!", https://arxiv.org/abs/2501.05441. Conventions as for
    :class:`R1Penalty`.

    Args:
        gamma: γ, not negative; a number or a :class:`~lightning_gan_stability.Schedule`. All configs here use the same
            value as for R1.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.
        patches: what to differentiate if the discriminator returns several logits for a sample: their ``"sum"``, as in
            papers, which grows with the size of the sample, or their ``"mean"``, which does not.
        augmented: the gradient is with respect to what the discriminator saw, after augmentations; False: to the sample
            before them, as in the code of StyleGAN2-ADA and R3GAN.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> R2Penalty(gamma=0.1).weight
        0.05
    """

    differentiates = ("fake",)
    reads = ("fake",)

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """‖∇ₓD(x)‖² of each fake sample, (n,)."""
        points = outputs.fake_augmented if self.augmented else outputs.fake
        return penalties.zero_centered(points, outputs.fake_logits, self.patches)


class _Centered(Regularizer):
    """Base of penalties that pull the gradient norm to a target, at points that they construct."""

    differentiates = ()
    per_sample = True
    weight = 10.0

    def __init__(
        self,
        weight: Scheduled = 10.0,
        target: Scheduled = 1.0,
        every: int = 1,
        patches: Patches = "sum",
        separate: bool = False,
    ) -> None:
        super().__init__(weight, every, separate=separate)
        self.target = check_scheduled("target", target)
        self.patches: Patches = check_choice("patches", patches, get_args(Patches))


class GradientPenalty(_Centered):
    """Adds weight · E(‖∇ₓD(x̂)‖ − target)² over points x̂ between real and fake samples to the discriminator's loss.

    x̂ = αx + (1 − α)G(z), one α ~ U[0, 1] for each sample. "Improved Training of Wasserstein GANs",
    https://arxiv.org/abs/1704.00028. ``one_sided=True`` gives max(0, ‖∇ₓD(x̂)‖ − target)²,
    https://arxiv.org/abs/1709.08894. ``target=0`` gives the zero-centred penalty of "Improving Generalization and
    Stability of Generative Adversarial Networks", https://arxiv.org/abs/1902.03984. Costs a forward pass of its own.

    Args:
        weight: λ, not negative: 10 for images, 0.1 for two-dimensional data.
        target: the gradient norm that costs nothing, not negative.
        one_sided: penalize only norms above the target.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.
        patches: what to differentiate if the discriminator returns several logits for a sample: their ``"sum"``, as in
            papers, which grows with the size of the sample, or their ``"mean"``, which does not.

    Raises:
        ValueError: if ``weight``, ``target`` or ``every`` has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> GradientPenalty(weight=0.1, one_sided=True).target
        1.0
    """

    def __init__(
        self,
        weight: Scheduled = 10.0,
        target: Scheduled = 1.0,
        one_sided: bool = False,
        every: int = 1,
        patches: Patches = "sum",
        separate: bool = False,
    ) -> None:
        super().__init__(weight, target, every, patches, separate)
        self.one_sided = check_bool("one_sided", one_sided)

    @property
    def name(self) -> str:
        """``gradient_penalty``."""
        return "gradient_penalty"

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """(‖∇ₓD(x̂)‖ − target)² of each pair, (n,)."""
        points = penalties.interpolate(outputs.real, outputs.fake, _shares(module, outputs))
        logits = module.logits(points, outputs.condition)
        target = value_at(self.target, module.iteration)
        return penalties.centered(points, logits, target, self.one_sided, self.patches)


class DRAGANPenalty(_Centered):
    """Adds weight · E(‖∇ₓD(x̂)‖ − target)² over points x̂ around the data to the discriminator's loss.

    x̂ = x + ½·α·std(x)·u with α ~ U[0, 1] for each sample and u ~ U[0, 1) for each value. "On Convergence and Stability
    of GANs", https://arxiv.org/abs/1705.07215, as in the authors' code. std(x) is computed over the batch of all
    processes; with ``accumulate``, over the micro-batch. Costs a forward pass of its own.

    Args:
        weight: λ, not negative.
        target: the gradient norm that costs nothing, not negative.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.
        patches: what to differentiate if the discriminator returns several logits for a sample: their ``"sum"``, as in
            papers, which grows with the size of the sample, or their ``"mean"``, which does not.

    Raises:
        ValueError: if ``weight``, ``target`` or ``every`` has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> DRAGANPenalty().weight
        10.0
    """

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """(‖∇ₓD(x̂)‖ − target)² of each real sample, (n,)."""
        alpha = _shares(module, outputs)
        points = penalties.perturb(outputs.real, alpha, module.noise.rand_like(outputs.real))
        logits = module.logits(points, outputs.condition)
        target = value_at(self.target, module.iteration)
        return penalties.centered(points, logits, target, patches=self.patches)


def _shares(module: GANProtocol, outputs: GANOutputs) -> Tensor:
    """α ~ U[0, 1) for each sample; all samples of a pack share one."""
    n, pack = batch_size(outputs.real), module.packing
    return module.noise.rand(n, dtype=tree_leaves(outputs.real)[0].dtype)[::pack].repeat_interleave(pack)
