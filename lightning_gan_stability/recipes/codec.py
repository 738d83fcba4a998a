"""Codec: a neural audio codec, with residual codebooks and several discriminators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_gan_stability._checks import check_bool
from lightning_gan_stability.losses import AdversarialLoss, LeastSquares
from lightning_gan_stability.outputs import Condition, Features, Logits, Sample
from lightning_gan_stability.recipes.tokenizer import Tokenizer
from lightning_gan_stability.recipes.vocoder import check_waveform


class Codec(Tokenizer):
    """DAC: an audio codec whose discriminators see waveforms without their mean, at a peak of 0.8.

    L_D = Σ_d (E (1 − D_d(x))² + E D_d(x̂)²),
    L_G = Σ_d E (1 − D_d(x̂))² + 0.25 · commitment + codebook, x̂ = G(x).
    Use it with ``Reconstruction(15.0, MelDistance(sample_rate))``, ``FeatureMatching(2.0)`` and
    ``Alternating(share_fake=True)``. A :class:`~lightning_gan_stability.LossBalancer` can replace these weights
    (EnCodec).

    "High-Fidelity Audio Compression with Improved RVQGAN", https://arxiv.org/abs/2306.06546. The paper clips gradients
    at ``clip_norm={"d": 10.0, "g": 1000.0}``.

    A batch is waveforms (n, channels, t) in [-1, 1].

    Args:
        generator: maps waveforms to ``(reconstruction, {"commitment": loss, "codebook": loss})``, with scalar losses.
            Further entries are for monitors, such as ``"codes"`` (n, books, frames).
        discriminator: maps waveforms to logits (n, ...) or ``(logits, feature maps)``; or a ``ModuleDict`` of several.
        loss: None: :class:`~lightning_gan_stability.LeastSquares`.
        d_weight: factor of the discriminator's loss; 2, since ``LeastSquares`` has a factor ½ that DAC does not have.
        g_weight: the same for the generator.
        losses: names of losses that the generator returns, with their weights; None:
            ``{"commitment": 0.25, "codebook": 1.0}``.
        normalize: remove the mean of waveforms and scale them to a peak of 0.8 before the discriminators.
        **kwargs: further arguments of :class:`~lightning_gan_stability.GANModule`.

    Raises:
        ValueError: if an argument has a bad value, if a batch is not waveforms, or if the generator does not return
            one of the losses.

    Example:
        >>> import torch
        >>> codec = Codec(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 8, 4), losses={})
        >>> codec(torch.zeros(2, 1, 64)).shape
        torch.Size([2, 1, 64])
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: AdversarialLoss | None = None,
        d_weight: float = 2.0,
        g_weight: float = 2.0,
        losses: Mapping[str, float] | None = None,
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        losses = {"commitment": 0.25, "codebook": 1.0} if losses is None else losses
        super().__init__(generator, discriminator, loss or LeastSquares(), d_weight, g_weight, losses, **kwargs)
        self.normalize = check_bool("normalize", normalize)

    def unpack(self, batch: Any) -> tuple[Sample, Condition]:
        """The data are both the input and the target of the generator."""
        real, condition = super().unpack(batch)
        check_waveform(real)
        return real, condition

    def discriminate(
        self, network: nn.Module, sample: Sample, condition: Condition
    ) -> Logits | tuple[Logits, Features]:
        """Discriminate normalized waveforms."""
        return super().discriminate(network, normalized(sample) if self.normalize else sample, condition)


def normalized(waveform: Tensor, peak: float = 0.8) -> Tensor:
    """Waveforms without their mean over time, each channel at the same peak.

    Args:
        waveform: (n, channels, t).
        peak: the largest magnitude of each waveform.

    Example:
        >>> import torch
        >>> normalized(torch.tensor([[[0.0, 1.0, 2.0]]]))
        tensor([[[-0.8000,  0.0000,  0.8000]]])
    """
    centered = waveform - waveform.mean(-1, keepdim=True)
    return peak * centered / (centered.abs().amax(-1, keepdim=True) + 1e-9)
