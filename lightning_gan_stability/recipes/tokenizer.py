"""Tokenizer: an image autoencoder with a codebook, and a discriminator for its reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_gan_stability.losses import AdversarialLoss, Hinge
from lightning_gan_stability.outputs import Condition, Sample
from lightning_gan_stability.recipes.base import Recipe


class Tokenizer(Recipe):
    """VQGAN: the generator is an autoencoder that returns its reconstruction and a codebook loss.

    L_D = ½ (E max(0, 1 − D(x)) + E max(0, 1 + D(x̂))), L_G = d(x̂, x) + λ · (−E D(x̂)) + codebook, x̂ = G(x).
    The distance d is a :class:`~lightning_gan_stability.Reconstruction`, λ an
    :class:`~lightning_gan_stability.AdaptiveAdversarialWeight`, and the start of both adversarial terms an
    :class:`~lightning_gan_stability.AdversarialStart`.

    "Taming Transformers for High-Resolution Image Synthesis", https://arxiv.org/abs/2012.09841. A KL autoencoder, as of
    latent diffusion, uses ``losses={"kl": 1e-6}``, and a ``Reconstruction`` whose weight is the number of values of an
    image, since latent diffusion sums the distance. An autoencoder without losses of its own uses ``losses={}``.

    A batch is images (n, c, h, w), or a tuple or dict as in :meth:`GANModule.unpack`, whose labels are ignored.

    Args:
        generator: maps images to ``(reconstruction, {"codebook": loss})``, with a scalar loss. Further entries are for
            monitors, such as ``"codes"``: indices (n, ...) for
            :class:`~lightning_gan_stability.metrics.CodebookPerplexity`.
        discriminator: maps images to logits (n, patches...).
        loss: None: :class:`~lightning_gan_stability.Hinge`.
        d_weight: factor of the discriminator's loss; the paper's ½.
        g_weight: λ if no callback sets it.
        losses: names of losses that the generator returns, with their weights; None: ``{"codebook": 1.0}``.
        **kwargs: further arguments of :class:`~lightning_gan_stability.GANModule`.

    Raises:
        ValueError: if an argument has a bad value, or if the generator does not return one of the losses.

    Example:
        >>> import torch
        >>> from lightning_gan_stability import AutoEncoder, DCGANDiscriminator
        >>> networks = AutoEncoder(channels=1, size=8, width=4), DCGANDiscriminator(channels=1, size=8, width=4)
        >>> Tokenizer(*networks, losses={})(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: AdversarialLoss | None = None,
        d_weight: float = 0.5,
        g_weight: float = 1.0,
        losses: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        losses = {"codebook": 1.0} if losses is None else losses
        super().__init__(generator, discriminator, loss or Hinge(), d_weight, g_weight, losses, **kwargs)

    def unpack(self, batch: Any) -> tuple[Sample, Condition]:
        """The data are both the input and the target of the generator."""
        real, _ = super().unpack(batch)
        return real, real
