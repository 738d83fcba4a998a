"""Spectrograms of waveforms and distances between them, in plain torch with the filterbanks of torchaudio."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_gan_stability._checks import (
    check,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    is_integer,
    require,
)

Base = Literal["e", "10"]


class LogMelSpectrogram(nn.Module):
    """The logarithm of a mel spectrogram, the input of vocoders: log max(M |STFT(x)|, floor).

    The defaults are those of "HiFi-GAN", https://arxiv.org/abs/2010.05646: mirror padding by (n_fft − hop_length) / 2
    at both ends, magnitudes √(re² + im² + 10⁻⁹), Slaney's filters with equal areas, and the natural logarithm. With
    ``center`` frames are centred and magnitudes are plain, as in DAC. float64 inputs are computed in float64, others in
    float32, under autocast too.

    Args:
        sample_rate: sample rate of the waveforms, in Hz.
        n_fft: length of the Hann window, in samples; even.
        hop_length: samples from frame to frame; None: a quarter of ``n_fft``.
        n_mels: number of filters.
        f_min: lowest frequency, in Hz.
        f_max: highest frequency, in Hz; None: half the sample rate.
        base: base of the logarithm.
        floor: magnitudes below it count as silence.
        center: pad by n_fft / 2, which gives one more frame.

    Raises:
        ValueError: if an argument has a bad value, or a waveform is too short.
        ModuleNotFoundError: if torchaudio is not installed.

    Example:
        >>> LogMelSpectrogram(16000, n_fft=512, n_mels=40)(torch.zeros(2, 1, 4096)).shape
        torch.Size([2, 40, 32])
    """

    def __init__(
        self,
        sample_rate: int = 22050,
        n_fft: int = 1024,
        hop_length: int | None = None,
        n_mels: int = 80,
        f_min: float = 0.0,
        f_max: float | None = None,
        base: Base = "e",
        floor: float = 1e-5,
        center: bool = False,
    ) -> None:
        super().__init__()
        self.sample_rate = check_integer("sample_rate", sample_rate)
        even = is_integer(n_fft) and n_fft >= 4 and n_fft % 2 == 0  # the last frequency is that of Nyquist
        self.n_fft = check(even, "n_fft", "an even integer of at least 4", n_fft)
        self.hop_length = check_integer("hop_length", n_fft // 4 if hop_length is None else hop_length)
        check(self.hop_length <= n_fft, "hop_length", f"at most `n_fft` {n_fft}", hop_length)
        highest = sample_rate / 2 if f_max is None else check_number("f_max", f_max, positive=True)
        check(check_number("f_min", f_min) < highest <= sample_rate / 2, "f_max", "between f_min and Nyquist", f_max)
        self.base: Base = check_choice("base", base, get_args(Base))
        self.floor = check_number("floor", floor, positive=True)
        self.center = check_bool("center", center)
        with torch.inference_mode(False):  # a gradient may flow through them later
            self._window = torch.hann_window(n_fft, dtype=torch.float64)
            self._filters = _filters(sample_rate, n_fft, check_integer("n_mels", n_mels), f_min, highest)
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def constants(self, like: Tensor) -> tuple[Tensor, ...]:
        """Window and filters on the device and in the dtype of a tensor; buffers would be rounded in short types."""
        key = like.device, like.dtype
        if key not in self._constants:
            with torch.inference_mode(False):  # validation comes before training, which goes on with them
                self._constants[key] = tuple(x.to(like.device, like.dtype) for x in (self._window, self._filters))
        return self._constants[key]

    def forward(self, waveform: Tensor) -> Tensor:
        """The spectrograms (n, n_mels, frames) of waveforms (n, 1, t) or (n, t)."""
        flat = waveform.flatten(1) if waveform.dim() == 3 and waveform.shape[1] == 1 else waveform
        margin = self.n_fft // 2 if self.center else (self.n_fft - self.hop_length) // 2
        if flat.dim() != 2 or flat.shape[1] <= margin or flat.shape[1] + 2 * margin < self.n_fft:
            raise ValueError(
                f"A spectrogram is of waveforms (n, 1, t) or (n, t) with more than {margin} samples, got "
                f"{tuple(waveform.shape)}."
            )
        with torch.autocast(flat.device.type, enabled=False):
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            window, filters = self.constants(flat)
            padded = nn.functional.pad(flat[:, None], (margin, margin), "reflect")[:, 0]
            spectrum = torch.stft(padded, self.n_fft, self.hop_length, window=window, center=False, return_complex=True)
            mel = filters @ (spectrum.abs() if self.center else magnitude(spectrum))
            logarithm = mel.clamp(min=self.floor).log() if self.base == "e" else mel.clamp(min=self.floor).log10()
        return logarithm


class MelDistance(nn.Module):
    """The mean absolute difference of log-mel spectrograms, summed over windows.

    The defaults are those of the reconstruction loss of "High-Fidelity Audio Compression with Improved RVQGAN" (DAC),
    https://arxiv.org/abs/2306.06546, used with the weight 15. The loss of HiFi-GAN, https://arxiv.org/abs/2010.05646,
    used with the weight 45, is ``MelDistance(22050, [1024], 80, base="e", center=False)``. Filters that are too narrow
    to contain a frequency of the window are silent, as in the authors' code.

    Args:
        sample_rate: sample rate of the waveforms, in Hz.
        n_ffts: lengths of the windows, in samples; frames are a quarter of it apart.
        n_mels: number of filters for each window, or for all.
        f_min: lowest frequency, in Hz.
        f_max: highest frequency, in Hz; None: half the sample rate.
        base: base of the logarithm.
        floor: magnitudes below it count as silence.
        center: as for :class:`LogMelSpectrogram`.

    Raises:
        ValueError: if an argument has a bad value, if shapes differ, or if waveforms are too short.
        ModuleNotFoundError: if torchaudio is not installed.

    Example:
        >>> distance = MelDistance(16000, [256, 512], 20)
        >>> x = torch.randn(2, 1, 4096, generator=torch.Generator().manual_seed(0))
        >>> round(distance(2 * x, x).item(), 4)  # twice the decades of a factor of two
        0.6021
    """

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
    ) -> None:
        super().__init__()
        check(isinstance(n_ffts, Sequence), "n_ffts", "a list of lengths", n_ffts)
        counts = [n_mels] * len(n_ffts) if isinstance(n_mels, int) else n_mels
        fits = isinstance(counts, Sequence) and len(counts) == len(n_ffts) > 0
        check(fits, "n_mels", "a number, or one for each of `n_ffts`", n_mels)
        self.spectrograms = nn.ModuleList(
            LogMelSpectrogram(sample_rate, n_fft, None, count, f_min, f_max, base, floor, center)
            for n_fft, count in zip(n_ffts, counts, strict=True)
        )

    def forward(self, sample: Tensor, target: Tensor) -> Tensor:
        """The distance of waveforms (n, channels, t) or (n, t), a scalar; channels are compared one by one."""
        _check_shapes(sample, target)
        sample, target = (x.flatten(0, 1) if x.dim() == 3 else x for x in (sample, target))
        return torch.stack([(s(sample) - s(target)).abs().mean() for s in self.spectrograms]).sum()


class STFTDistance(nn.Module):
    """The mean over windows of the spectral convergence plus the distance of logarithmic magnitudes.

    ‖|Y| − |X|‖_F / ‖|Y|‖_F + E |log |Y| − log |X||, with the spectra X of the sample and Y of the target. "Parallel
    WaveGAN", https://arxiv.org/abs/1910.11480.

    Args:
        n_ffts: lengths of the Fourier transforms, in samples.
        hop_lengths: samples from frame to frame, for each of them.
        win_lengths: lengths of the Hann windows, for each of them.

    Raises:
        ValueError: if an argument has a bad value, if shapes differ, or if waveforms are too short.

    Example:
        >>> x = torch.randn(2, 1, 4096, generator=torch.Generator().manual_seed(0))
        >>> round(STFTDistance()(2 * x, x).item(), 4)  # 1 + log 2
        1.6931
    """

    def __init__(
        self,
        n_ffts: Sequence[int] = (1024, 2048, 512),
        hop_lengths: Sequence[int] = (120, 240, 50),
        win_lengths: Sequence[int] = (600, 1200, 240),
    ) -> None:
        super().__init__()
        lists = all(isinstance(x, Sequence) for x in (n_ffts, hop_lengths, win_lengths))
        same = lists and len(n_ffts) == len(hop_lengths) == len(win_lengths) > 0
        check(same, "hop_lengths", "as many as `n_ffts` and `win_lengths`, in lists", hop_lengths)
        self.settings = [*zip(n_ffts, hop_lengths, win_lengths, strict=True)]
        for n_fft, hop, window in self.settings:
            for name, value in (("n_ffts", n_fft), ("hop_lengths", hop), ("win_lengths", window)):
                check(is_integer(value), name, "integers", value)
            check(0 < hop <= window <= n_fft, "win_lengths", "from hop length to transform length", win_lengths)

    def forward(self, sample: Tensor, target: Tensor) -> Tensor:
        """The distance of waveforms (n, channels, t) or (n, t), a scalar."""
        _check_shapes(sample, target)
        least = max(n_fft for n_fft, *_ in self.settings) // 2
        if sample.shape[-1] <= least:
            raise ValueError(f"Waveforms must have more than {least} samples, got {sample.shape[-1]}.")
        total = []
        with torch.autocast(sample.device.type, enabled=False):
            for setting in self.settings:
                x, y = (self._magnitude(wave, *setting) for wave in (sample, target))
                convergence = torch.linalg.norm(y - x) / torch.linalg.norm(y).clamp_min(1e-9)
                total.append(convergence + (y.log() - x.log()).abs().mean())
        return torch.stack(total).mean()

    def _magnitude(self, waveform: Tensor, n_fft: int, hop: int, window: int) -> Tensor:
        flat = waveform.reshape(-1, waveform.shape[-1])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        taper = torch.hann_window(window, dtype=flat.dtype, device=flat.device)
        return magnitude(torch.stft(flat, n_fft, hop, window, taper, return_complex=True), 1e-7)


def magnitude(spectrum: Tensor, floor: float = 1e-9) -> Tensor:
    """√(re² + im² + floor), which has a gradient at silence.

    Example:
        >>> magnitude(torch.tensor([3 + 4j]))
        tensor([5.])
    """
    return (spectrum.real.square() + spectrum.imag.square() + floor).sqrt()


def _filters(sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float) -> Tensor:
    """Slaney's filterbank, (n_mels, n_fft / 2 + 1)."""
    functional = require("torchaudio", "audio").functional
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filterbank has all zero values")
        filters = functional.melscale_fbanks(
            n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate, norm="slaney", mel_scale="slaney"
        )
    return torch.as_tensor(filters.T).contiguous()


def _check_shapes(sample: Tensor, target: Tensor) -> None:
    if sample.shape != target.shape:
        raise ValueError(
            f"Waveforms of one shape can be compared, got {tuple(sample.shape)} and {tuple(target.shape)}."
        )
    if sample.shape[:1] == (0,):
        raise ValueError(f"There are no waveforms to compare, got {tuple(sample.shape)}.")
