"""Metrics of reconstructions beyond torchmetrics: distances of spectrograms, and the use of codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_gan_stability._checks import check_integer, describe
from lightning_gan_stability.audio import Base, MelDistance


class LogMelDistance(Metric):
    """The mean over samples of :class:`~lightning_gan_stability.audio.MelDistance`; smaller is better.

    Args:
        sample_rate: sample rate of the waveforms, in Hz.
        n_ffts: as for :class:`~lightning_gan_stability.audio.MelDistance`, like the following arguments.
        n_mels: number of filters for each window, or for all.
        f_min: lowest frequency, in Hz.
        f_max: highest frequency, in Hz; None: half the sample rate.
        base: base of the logarithm.
        floor: magnitudes below it count as silence.
        center: whether frames are centred.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an argument has a bad value, if shapes differ, or if waveforms are too short.
        ModuleNotFoundError: if torchaudio is not installed.

    Example:
        >>> metric = LogMelDistance(16000, [256], 20)
        >>> metric.update(torch.zeros(2, 1, 4096), torch.zeros(2, 1, 4096))
        >>> metric.compute()
        tensor(0.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(
        self,
        sample_rate: int = 22050,
        n_ffts: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
        n_mels: Sequence[int] | int = (5, 10, 20, 40, 80, 160, 320),
        f_min: float = 0.0,
        f_max: float | None = None,
        base: Base = "10",
        floor: float = 1e-5,
        center: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.distance = MelDistance(sample_rate, n_ffts, n_mels, f_min, f_max, base, floor, center)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, sample: Tensor, target: Tensor) -> None:
        """Add a batch of waveforms (n, channels, t) or (n, t); n may be 0."""
        for name, waveform in (("sample", sample), ("target", target)):
            if not isinstance(waveform, Tensor) or not waveform.is_floating_point():
                raise ValueError(f"`{name}` must be waveforms as a floating-point tensor, got {describe(waveform)}.")
            if not bool(waveform.isfinite().all()):
                raise ValueError(f"`{name}` has values that are not finite (NaN or infinite).")
        if sample.shape == target.shape and not len(sample):
            return
        with torch.no_grad():
            self.total += len(sample) * self.distance(sample, target)
        self.samples += len(sample)

    def compute(self) -> Tensor:
        """The mean distance, a scalar of at least 0."""
        if not self.samples:
            raise ValueError("LogMelDistance has no samples: update it first.")
        return (self.total / self.samples).float()


class _Codes(Metric):
    """Counts how often the codes of codebooks are used."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, codes: int, books: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.codes, self.books = check_integer("codes", codes), check_integer("books", books)
        self.add_state("counts", torch.zeros(books, codes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Add the indices (n, ...) of a batch; with several books (n, books, ...)."""
        if not isinstance(indices, Tensor):
            raise ValueError(f"Codes must be a tensor of integers, got {describe(indices)}.")
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"Codes must be integers, got {indices.dtype}.")
        if self.books > 1 and (indices.dim() < 2 or indices.shape[1] != self.books):
            raise ValueError(f"Codes of {self.books} books must be (n, {self.books}, ...), got {tuple(indices.shape)}.")
        rows = indices.movedim(1, 0).flatten(1) if self.books > 1 else indices.reshape(1, -1)
        if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < self.codes):
            raise ValueError(f"Codes must lie in 0 ... {self.codes - 1}, got {int(rows.min())} ... {int(rows.max())}.")
        self.counts += torch.stack([torch.bincount(row.long(), minlength=self.codes) for row in rows])

    def check_counts(self) -> None:
        """Refuse to compute a value without codes."""
        if not self.counts.any():
            raise ValueError(f"{type(self).__name__} has no codes: update it first.")


class CodebookUsage(_Codes):
    """The share of codes that were used at least once, averaged over codebooks; in [0, 1].

    Args:
        codes: number of codes of each codebook.
        books: number of codebooks, the second dimension of the indices if there are several.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an argument has a bad value, or if indices are not integers in 0 ... ``codes`` − 1.

    Example:
        >>> metric = CodebookUsage(codes=4)
        >>> metric.update(torch.tensor([[0, 1], [1, 1]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def compute(self) -> Tensor:
        """The mean share of used codes, a scalar."""
        self.check_counts()
        return (self.counts > 0).float().mean()


class CodebookPerplexity(_Codes):
    """exp(−Σ p log p) of the shares p of the codes, averaged over codebooks; in [1, ``codes``].

    A codebook whose codes are used equally often has the perplexity ``codes``; one that has collapsed to one code has
    1. "Neural Discrete Representation Learning", https://arxiv.org/abs/1711.00937.

    Args:
        codes: number of codes of each codebook.
        books: number of codebooks, the second dimension of the indices if there are several.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: if an argument has a bad value, or if indices are not integers in 0 ... ``codes`` − 1.

    Example:
        >>> metric = CodebookPerplexity(codes=4)
        >>> metric.update(torch.tensor([[0, 1], [1, 0]]))
        >>> metric.compute()
        tensor(2.)
    """

    def compute(self) -> Tensor:
        """The mean perplexity, a scalar."""
        self.check_counts()
        shares = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        entropy: Tensor = torch.special.entr(shares).sum(1)
        return entropy.exp().mean().float()
