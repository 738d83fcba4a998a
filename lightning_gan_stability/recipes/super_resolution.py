"""Super-resolution: large images from small ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.losses import AdversarialLoss
from lightning_gan_stability.outputs import Condition, Player, Sample
from lightning_gan_stability.recipes.base import Recipe, lone_target, source_and_target


class SuperResolution(Recipe):
    """Real-ESRGAN: the generator enlarges images; it steps before the discriminator.

    L_G = 0.1 · E sp(−D(x̂)), L_D = E sp(−D(x)) + E sp(D(x̂)), x̂ = G(low), sp(t) = log(1 + eᵗ).
    To it belong ``Reconstruction(1.0)``, one more with a perceptual distance, ``Alternating(share_fake=True)``, and
    ``GeneratorEMA(decay=0.999)``. ESRGAN is the same with ``RelativisticAverage`` and other weights.

    "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data",
    https://arxiv.org/abs/2107.10833.

    A batch is (small, large) images or ``{"source": small, "target": large}``; or large images alone, when ``scale`` is
    given: then :meth:`degrade` makes the small ones.

    ``trainer.predict`` takes the same batches; small images are ``{"source": small}``, or alone without ``scale``.

    Args:
        generator: maps images (n, c, h, w) to images (n, c, scale · h, scale · w).
        discriminator: maps large images to logits (n, ...), one for each pixel in the paper.
        scale: how much larger the generator's images are, where batches are large images alone.
        loss: None: :class:`~lightning_gan_stability.NonSaturating`.
        d_weight: factor of the discriminator's loss.
        g_weight: factor of the generator's adversarial loss.
        losses: names of what the generator returns beside images and their weights; None: none.
        plan: the order of the players' steps; the generator is first in the authors' code.
        **kwargs: further arguments of :class:`~lightning_gan_stability.GANModule`.

    Raises:
        ValueError: if an argument has a bad value, or if a batch has another form.

    Example:
        >>> import torch
        >>> model = SuperResolution(nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3), scale=2)
        >>> model.unpack(torch.zeros(5, 3, 8, 8))[1].shape
        torch.Size([5, 3, 4, 4])
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        scale: int | None = None,
        loss: AdversarialLoss | None = None,
        d_weight: float = 1.0,
        g_weight: float = 0.1,
        losses: Mapping[str, float] | None = None,
        plan: Sequence[Player] = ("g", "d"),
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, discriminator, loss, d_weight, g_weight, losses, plan=plan, **kwargs)
        self.scale = None if scale is None else check_integer("scale", scale)

    def unpack(self, batch: Any) -> tuple[Sample, Condition]:
        """Large images, and the small ones that they are to be made from."""
        if self.scale is None or (target := lone_target(batch)) is None:
            source, target = source_and_target(batch, "SuperResolution", "`scale`" if self.scale is None else "")
            return target, source
        return target, self.degrade(target)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Sample:
        """Large images from small ones, or from large ones made small when ``scale`` is given."""
        if self.scale is not None and (target := lone_target(batch)) is not None:
            batch = self.unpack(target)[1]
        return super().predict_step(batch, batch_idx, dataloader_idx)

    def degrade(self, images: Tensor) -> Tensor:
        """Small images (n, c, h / scale, w / scale) from large ones, by bicubic interpolation with antialiasing.

        Override it for blur, noise and compression; what it draws from torch's generators is seeded for the step.

        Raises:
            ValueError: if height or width is no multiple of ``scale``.
        """
        assert self.scale is not None
        if images.dim() != 4 or any(size % self.scale for size in images.shape[2:]):
            raise ValueError(
                f"Images must be (n, c, h, w), with h and w multiples of `scale` {self.scale}, got "
                f"{tuple(images.shape)}: crop them in the loader."
            )
        return nn.functional.interpolate(
            images, scale_factor=1 / self.scale, mode="bicubic", antialias=True, recompute_scale_factor=True
        )
