"""Gradient penalties as callbacks: each one is one entry in a YAML file, on any loss and any update rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor

from lightning_gan_stability import penalties
from lightning_gan_stability.callbacks.base import Regularizer, check_bool, check_number, check_schedule

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule, Play


class _ZeroCentered(Regularizer):
    """What R1 and R2 share."""

    per_sample = True

    def __init__(
        self, gamma: float = 1.0, every: int = 1, final_gamma: float | None = None, steps: int | None = None
    ) -> None:
        check_number("gamma", gamma)
        check_schedule("gamma", final_gamma, steps)
        super().__init__(gamma / 2, every, None if final_gamma is None else final_gamma / 2, steps)


@final
class R1Penalty(_ZeroCentered):
    """Adds γ/2 · E‖∇ₓD(x)‖² over real samples to the discriminator's loss.

    "Which Training Methods for GANs do actually Converge?", https://arxiv.org/abs/1801.04406. ``gamma`` has the paper's
    ½: the authors' code, which has none, says 10 where this says 20. The gradient is of the logit, with respect to the
    sample before augmentation, and shares the forward pass of the loss.

    Args:
        gamma: γ, not negative. A start for images is 0.0002 · pixels / batch size, times 4 or ¼ as the run asks.
        every: due on every so many steps, and scaled by as much. 16 costs almost nothing.
        final_gamma: what γ becomes along half a cosine over ``steps`` steps, as in R3GAN; None: it stays.
        steps: how many steps that takes.

    Raises:
        ValueError: if an argument has a bad value, or one of ``final_gamma`` and ``steps`` comes without the other.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> R1Penalty(gamma=0.1, every=16).weight
        0.05
    """

    differentiates = ("real",)

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """‖∇ₓD(x)‖² of each real sample, (n,)."""
        assert play.real_logits is not None
        return penalties.zero_centered(play.real, play.real_logits)


@final
class R2Penalty(_ZeroCentered):
    """Adds γ/2 · E‖∇ₓD(x)‖² over fake samples to the discriminator's loss.

    "Which Training Methods for GANs do actually Converge?", https://arxiv.org/abs/1801.04406; with R1 and a
    relativistic loss in "The GAN is dead; long live the GAN!", https://arxiv.org/abs/2501.05441. Conventions as for
    :class:`R1Penalty`.

    Args:
        gamma: γ, not negative.
        every: due on every so many steps, and scaled by as much.
        final_gamma: what γ becomes along half a cosine over ``steps`` steps, as in R3GAN; None: it stays.
        steps: how many steps that takes.

    Raises:
        ValueError: if an argument has a bad value, or one of ``final_gamma`` and ``steps`` comes without the other.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> R2Penalty(gamma=0.1).weight
        0.05
    """

    differentiates = ("fake",)

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """‖∇ₓD(x)‖² of each fake sample, (n,)."""
        return penalties.zero_centered(play.fake, play.fake_logits)


@final
class GradientPenalty(Regularizer):
    """Adds weight · E(‖∇ₓD(x̂)‖ − target)² over points x̂ between real and fake samples to the discriminator's loss.

    x̂ = αx + (1 − α)G(z), one α ~ U[0, 1] for each sample. "Improved Training of Wasserstein GANs",
    https://arxiv.org/abs/1704.00028; ``one_sided``: max(0, ‖∇ₓD(x̂)‖ − target)², https://arxiv.org/abs/1709.08894;
    ``target=0``, zero-centred: "Improving Generalization and Stability of Generative Adversarial Networks",
    https://arxiv.org/abs/1902.03984. Costs a forward pass of its own.

    Args:
        weight: λ, not negative: 10 for images, 0.1 for two-dimensional data.
        target: the gradient norm that costs nothing, not negative.
        one_sided: charge only norms above the target.
        every: due on every so many steps, and scaled by as much.

    Raises:
        ValueError: if ``weight``, ``target`` or ``every`` has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> GradientPenalty(weight=0.1, one_sided=True).target
        1.0
    """

    differentiates = ()
    per_sample = True
    weight = 10.0

    def __init__(self, weight: float = 10.0, target: float = 1.0, one_sided: bool = False, every: int = 1) -> None:
        super().__init__(weight, every)
        check_number("target", target)
        check_bool("one_sided", one_sided)
        self.target = target
        self.one_sided = one_sided

    @property
    def name(self) -> str:
        """``gradient_penalty``."""
        return "gradient_penalty"

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """(‖∇ₓD(x̂)‖ − target)² of each pair, (n,)."""
        points = penalties.interpolate(play.real, play.fake, _shares(module, play))
        return penalties.centered(points, module.discriminate(points, play.labels), self.target, self.one_sided)


@final
class DRAGANPenalty(Regularizer):
    """Adds weight · E(‖∇ₓD(x̂)‖ − target)² over points x̂ around the data to the discriminator's loss.

    x̂ = x + ½·α·std(x)·u with α ~ U[0, 1] for each sample and u ~ U[0, 1) for each value. "On Convergence and Stability
    of GANs", https://arxiv.org/abs/1705.07215, as in the authors' code. std(x) is of the batch of all processes,
    but of the micro-batch with ``accumulate``. Costs a forward pass of its own.

    Args:
        weight: λ, not negative.
        target: the gradient norm that costs nothing, not negative.
        every: due on every so many steps, and scaled by as much.

    Raises:
        ValueError: if ``weight``, ``target`` or ``every`` has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> DRAGANPenalty().weight
        10.0
    """

    differentiates = ()
    per_sample = True
    weight = 10.0

    def __init__(self, weight: float = 10.0, target: float = 1.0, every: int = 1) -> None:
        super().__init__(weight, every)
        check_number("target", target)
        self.target = target

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """(‖∇ₓD(x̂)‖ − target)² of each real sample, (n,)."""
        points = penalties.perturb(play.real, _shares(module, play), module.rand(*play.real.shape))
        return penalties.centered(points, module.discriminate(points, play.labels), self.target)


def _shares(module: GANModule, play: Play) -> Tensor:
    """α ~ U[0, 1) for each sample; a pack counts as one."""
    return module.rand(len(play.real))[:: module._pack].repeat_interleave(module._pack)


class _FiniteDifference(Regularizer):
    """What the approximate R1 and R2 share."""

    differentiates = ()
    per_sample = True
    second_order = False
    weight = 100.0

    def __init__(self, weight: float = 100.0, sigma: float = 0.01, every: int = 1) -> None:
        super().__init__(weight, every)
        check_number("sigma", sigma, positive=True)
        self.sigma = sigma

    def _values(self, module: GANModule, samples: Tensor, labels: Tensor | None) -> Tensor:
        moved = samples + self.sigma * module.randn(len(samples), *samples.shape[1:])
        # the same dropout masks, augmentation and spectral norm for both, or their difference would not be the points'
        with module._still():
            with module._rewound():
                logits = module.discriminate(samples, labels)
            return penalties.differences(logits, module.discriminate(moved, labels))


@final
class ApproximateR1Penalty(_FiniteDifference):
    """Adds weight · E(l(x) − l(x + σ n))² over real samples, n ~ N(0, I), to the discriminator's loss.

    R1 by finite differences, γ ≈ 2 · weight · σ² of :class:`R1Penalty`, exactly that in the mean for a linear critic.
    "Diffusion Adversarial Post-Training for One-Step Video Generation", https://arxiv.org/abs/2501.08316. Needs no
    second derivatives, so it works with compiled and sharded networks and with fused attention. The estimate is noisy
    (one direction per sample and step). Costs two forward passes of the discriminator.

    Args:
        weight: not negative.
        sigma: σ, positive, in units of the data. Much below 0.001 float32 cancels.
        every: due on every so many steps, and scaled by as much.

    Raises:
        ValueError: if ``weight``, ``sigma`` or ``every`` has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> ApproximateR1Penalty(weight=100.0, sigma=0.01).name
        'approximate_r1'
    """

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """(l(x) − l(x + σ n))² of each real sample, (n,)."""
        return self._values(module, play.real, play.labels)


@final
class ApproximateR2Penalty(_FiniteDifference):
    """Adds weight · E(l(x) − l(x + σ n))² over fake samples, n ~ N(0, I), to the discriminator's loss.

    R2 by finite differences; everything else as for :class:`ApproximateR1Penalty`.

    Args:
        weight: not negative.
        sigma: σ, positive, in units of the data.
        every: due on every so many steps, and scaled by as much.

    Raises:
        ValueError: if ``weight``, ``sigma`` or ``every`` has a bad value.
        MisconfigurationException: if the discriminator has BatchNorm in train mode.

    Example:
        >>> ApproximateR2Penalty(every=2).sigma
        0.01
    """

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """(l(x) − l(x + σ n))² of each fake sample, (n,)."""
        return self._values(module, play.fake, play.labels)
