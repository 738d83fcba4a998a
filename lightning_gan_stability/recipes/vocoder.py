"""Vocoder: generates waveforms from spectrograms, with several discriminators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gan_stability._checks import check, describe
from lightning_gan_stability.losses import AdversarialLoss, LeastSquares
from lightning_gan_stability.outputs import Condition, Sample
from lightning_gan_stability.recipes.base import Recipe, lone_target, source_and_target


class Vocoder(Recipe):
    """HiFi-GAN: the generator makes waveforms from spectrograms.

    L_D = Σ_d (E (1 − D_d(x))² + E D_d(x̂)²), L_G = Σ_d E (1 − D_d(x̂))², x̂ = G(mel(x)).
    Use it with ``Reconstruction(45.0, MelDistance(sample_rate, [1024], 80, base="e", center=False))``,
    ``FeatureMatching(2.0)`` and ``Alternating(share_fake=True)``.

    "HiFi-GAN: Generative Adversarial Networks for Efficient and High Fidelity Speech Synthesis",
    https://arxiv.org/abs/2010.05646.

    With ``spectrogram``, a batch is waveforms (n, 1, t) in [-1, 1]. Otherwise it is (spectrograms, waveforms) or
    ``{"source": spectrograms, "target": waveforms}``, as for fine-tuning on the spectrograms of a text-to-speech model.

    ``trainer.predict`` accepts the same batches, or spectrograms alone.

    Args:
        generator: maps spectrograms (n, mels, frames) to waveforms (n, 1, t).
        discriminator: maps waveforms to logits (n, ...) or ``(logits, feature maps)``; or a ``ModuleDict`` of several.
        spectrogram: maps waveforms to spectrograms, such as
            :class:`~lightning_gan_stability.audio.LogMelSpectrogram`; no gradient flows through it.
        loss: None: :class:`~lightning_gan_stability.LeastSquares`.
        d_weight: factor of the discriminator's loss; 2, since ``LeastSquares`` has a factor ½ that HiFi-GAN lacks.
        g_weight: the same for the generator.
        losses: names of losses that the generator returns besides waveforms, with their weights; None: none.
        **kwargs: further arguments of :class:`~lightning_gan_stability.GANModule`.

    Raises:
        ValueError: if an argument has a bad value, or if a batch has another form.

    Example:
        >>> generator = nn.Sequential(nn.Flatten(), nn.Linear(80, 256), nn.Unflatten(1, (1, 256)))
        >>> Vocoder(generator, nn.Conv1d(1, 1, 8, 4))(torch.zeros(2, 80, 1)).shape
        torch.Size([2, 1, 256])
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        spectrogram: nn.Module | None = None,
        loss: AdversarialLoss | None = None,
        d_weight: float = 2.0,
        g_weight: float = 2.0,
        losses: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, discriminator, loss or LeastSquares(), d_weight, g_weight, losses, **kwargs)
        known = spectrogram is None or isinstance(spectrogram, nn.Module)
        self.spectrogram = check(known, "spectrogram", "a module that maps waveforms to spectrograms", spectrogram)

    def unpack(self, batch: Any) -> tuple[Sample, Condition]:
        """Waveforms as samples, and their spectrograms as condition."""
        if self.spectrogram is None or (target := lone_target(batch)) is None:
            source, target = source_and_target(batch, "Vocoder", "`spectrogram`" if self.spectrogram is None else "")
            check_waveform(target)
            return target, source
        check_waveform(target)
        with torch.no_grad():
            return target, self.spectrogram(target)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Sample:
        """Waveforms from spectrograms, or with ``spectrogram`` from those of waveforms (n, 1, t)."""
        target = lone_target(batch)
        if self.spectrogram is not None and target is not None and target.dim() == 3 and target.shape[1] == 1:
            batch = self.unpack(target)[1]
        return super().predict_step(batch, batch_idx, dataloader_idx)


def check_waveform(waveform: Any) -> None:
    """Refuse anything but a batch of waveforms.

    Raises:
        ValueError: if it is not a floating tensor (n, channels, t).

    Example:
        >>> check_waveform(torch.zeros(2, 1, 64))
    """
    if not isinstance(waveform, Tensor) or waveform.dim() != 3 or not waveform.is_floating_point():
        raise ValueError(
            f"Waveforms must be a floating tensor (n, channels, t) in [-1, 1], got {describe(waveform)}: for (n, t) "
            "let the loader `unsqueeze(1)`, and divide integer samples by their largest value."
        )
