"""Spectrograms and their distances: against independent implementations, closed forms, and what they refuse."""

import math
import sys

import numpy as np
import pytest
import torch
from recipe_references_applied import dac_mel_distance, hifi_mel
from torch import nn
from toys import fit

from lightning_gan_stability import GANModule, Reconstruction
from lightning_gan_stability.audio import LogMelSpectrogram, MelDistance, STFTDistance, magnitude

CLOSE = {"rtol": 0, "atol": 2e-5}  # torchaudio's filters are in float32
HIFI = {"n_ffts": [1024], "n_mels": 80, "base": "e", "center": False}


def noise(n=2, t=4096, seed=0, dtype=torch.float64):
    return 0.3 * torch.randn(n, 1, t, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stft_magnitudes(waveform, n_fft, hop, window):
    """Magnitudes (n, frames, frequencies) of centred frames in NumPy; Hann's window lies in the middle of a frame."""
    flat = np.pad(waveform.reshape(-1, waveform.shape[-1]), [(0, 0), (n_fft // 2, n_fft // 2)], "reflect")
    taper, left = np.zeros(n_fft), (n_fft - window) // 2
    taper[left : left + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, flat.shape[1] - n_fft + 1, hop)
    spectra = np.stack([np.fft.rfft(taper * flat[:, start : start + n_fft]) for start in starts], 1)
    return np.sqrt(np.abs(spectra) ** 2 + 1e-7)


# ---------- values


@pytest.mark.parametrize(
    ("sample_rate", "n_fft", "hop", "n_mels", "f_min", "f_max"),
    [
        (22050, 1024, 256, 80, 0.0, None),
        (22050, 1024, 256, 80, 0.0, 8000.0),
        (16000, 512, 100, 40, 60.0, 7600.0),
        (16000, 512, 512, 13, 0.0, 1000),
        (44100, 2048, 512, 128, 20.0, None),
    ],
)
def test_the_spectrogram_is_that_of_hifi_gan(sample_rate, n_fft, hop, n_mels, f_min, f_max):
    wave = noise(t=5000)
    expected = hifi_mel(wave, sample_rate, n_fft, hop, n_mels, f_max, f_min)
    spectrogram = LogMelSpectrogram(sample_rate, n_fft, hop, n_mels, f_min, f_max)
    torch.testing.assert_close(spectrogram(wave), expected, **CLOSE)
    torch.testing.assert_close(spectrogram(wave[:, 0]), expected, **CLOSE)
    torch.testing.assert_close(spectrogram(wave.float()), expected.float(), rtol=0, atol=1e-4)


def test_frames_are_a_quarter_of_the_window_apart_unless_told_otherwise():
    wave = noise()
    assert LogMelSpectrogram(16000, 512, n_mels=40)(wave).shape == (2, 40, 32)
    assert LogMelSpectrogram(16000, 512, n_mels=40, center=True)(wave).shape == (2, 40, 33)


def test_base_and_floor():
    wave = noise() * torch.logspace(-8, 0, 4096)  # from silence to noise
    natural = LogMelSpectrogram(16000, 512, n_mels=20, floor=1e-3)(wave)
    decades = LogMelSpectrogram(16000, 512, n_mels=20, floor=1e-3, base="10")(wave)
    torch.testing.assert_close(decades * math.log(10), natural)
    assert natural.min() == pytest.approx(math.log(1e-3))
    whole = LogMelSpectrogram(16000, 512, n_mels=20)(wave)
    torch.testing.assert_close(natural, whole.clamp(min=math.log(1e-3)))
    assert whole.min() < natural.min()


def test_the_mel_distance_is_that_of_dac():
    x, y = noise(seed=1), noise(seed=2) + 0.1 * torch.sin(torch.arange(4096) / 10)
    torch.testing.assert_close(MelDistance(44100)(x, y), dac_mel_distance(x, y, 44100), **CLOSE)
    few = {"windows": (128, 512), "mels": (8, 30)}
    torch.testing.assert_close(MelDistance(16000, *few.values())(x, y), dac_mel_distance(x, y, 16000, **few), **CLOSE)


def test_the_mel_distance_is_that_of_hifi_gan():
    x, y = noise(seed=1, t=8192), 0.5 * noise(seed=2, t=8192)
    expected = (hifi_mel(x, 22050, 1024, 256, 80) - hifi_mel(y, 22050, 1024, 256, 80)).abs().mean()
    torch.testing.assert_close(MelDistance(22050, **HIFI)(x, y), expected, **CLOSE)


def test_the_mel_distance_passes_frequencies_on():
    x, y = noise(seed=1), noise(seed=2)
    expected = (hifi_mel(x, 16000, 512, 128, 20, 4000, 50.0) - hifi_mel(y, 16000, 512, 128, 20, 4000, 50.0)).abs()
    distance = MelDistance(16000, [512], [20], 50.0, 4000, "e", center=False)
    torch.testing.assert_close(distance(x, y), expected.mean(), **CLOSE)


@pytest.mark.parametrize(
    ("distance", "value"),
    [
        (MelDistance(16000, [256, 512, 1024], [8, 16, 32]), 3 * math.log10(3)),
        (MelDistance(16000, [256, 512], 10, base="e"), 2 * math.log(3)),
        (MelDistance(22050, **HIFI), math.log(3)),
        (STFTDistance(), 2 + math.log(3)),  # ‖3 |y| − |y|‖ / ‖|y|‖ = 2
    ],
)
def test_a_scaled_signal_is_as_far_as_the_logarithm_of_the_factor(distance, value):
    x = 3 * noise(t=8192)
    assert distance(x, x) == 0
    assert distance(3 * x, x).item() == pytest.approx(value, abs=2e-4)


def test_the_doubled_signal_is_one_and_log_two_away():
    x = 10 * noise(t=8192)
    assert STFTDistance()(2 * x, x).item() == pytest.approx(1 + math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [((1024, 2048, 512), (120, 240, 50), (600, 1200, 240)), ((64,), (16,), (64,)), ((128, 64), (30, 7), (65, 33))],
)
def test_the_stft_distance_is_that_of_numpy(settings):
    x, y = noise(seed=1), noise(seed=2) + 0.2
    total = []
    for setting in zip(*settings, strict=True):
        a, b = (stft_magnitudes(wave.numpy(), *setting) for wave in (x, y))
        total.append(np.sqrt(((b - a) ** 2).sum() / (b**2).sum()) + np.abs(np.log(b) - np.log(a)).mean())
    assert STFTDistance(*settings)(x, y).item() == pytest.approx(np.mean(total), rel=1e-9)
    assert STFTDistance(*settings)(x[:, 0], y[:, 0]).item() == pytest.approx(np.mean(total), rel=1e-9)
    if settings == ((1024, 2048, 512), (120, 240, 50), (600, 1200, 240)):
        assert STFTDistance()(x, y).item() == pytest.approx(np.mean(total), rel=1e-9)


def test_magnitude():
    assert magnitude(torch.tensor(0j)).item() == pytest.approx(math.sqrt(1e-9))
    assert magnitude(torch.tensor(0j), 4.0) == 2
    z = torch.complex(noise(1, 8), noise(1, 8, 1))
    torch.testing.assert_close(magnitude(z, 0.0), z.abs())


# ---------- gradients

DISTANCES = [MelDistance(16000, [64, 512], 10), MelDistance(22050, **HIFI), STFTDistance([512], [100], [400])]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_gradients_are_finite_at_silence_and_at_a_constant(distance, level):
    for target in (torch.full((2, 1, 4096), level), noise(dtype=torch.float32)):
        x = torch.full((2, 1, 4096), level, requires_grad=True)
        value = distance(x, target)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_gradient_is_a_finite_difference(distance):
    x, y, direction, step = noise(seed=1), noise(seed=2), noise(seed=3), 1e-7
    target = y.clone().requires_grad_()
    sample = x.clone().requires_grad_()
    distance(sample, target).backward()
    with torch.no_grad():
        change = (distance(x + step * direction, y) - distance(x - step * direction, y)) / (2 * step)
    assert (sample.grad * direction).sum().item() == pytest.approx(change.item(), rel=1e-4)
    assert sample.grad.norm() > 0
    assert target.grad.norm() > 0


# ---------- precision


@pytest.mark.parametrize("distance", DISTANCES)
def test_types(distance):
    x, y = noise(seed=1), noise(seed=2)
    exact = distance(x, y)
    assert exact.dtype == torch.float64
    single = distance(x.float(), y.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(exact.item(), rel=1e-5)
    assert single.item() != exact.item()
    short = distance(x.bfloat16(), y.bfloat16())
    assert short.dtype == torch.float32
    assert short == distance(x.bfloat16().float(), y.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(x.float(), y.float()) == single
        assert distance(x.bfloat16(), y.bfloat16()) == short


def test_the_spectrogram_keeps_its_filters_in_float32():
    """A module in bfloat16, as in the precision "bf16-true", has spectrograms within."""
    wave = noise().bfloat16()
    expected = LogMelSpectrogram(16000, 512, n_mels=20)(wave.float())
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        spectrogram = nn.Sequential(LogMelSpectrogram(16000, 512, n_mels=20)).to(kind)
        torch.testing.assert_close(spectrogram(wave), expected, rtol=0, atol=0)


# ---------- modules


def test_checkpoints_have_no_filters():
    assert not LogMelSpectrogram(16000, 512, n_mels=20).state_dict()
    assert not MelDistance(16000, [256, 512], 20).state_dict()
    assert not [*MelDistance(16000, [256, 512], 20).parameters()]


class Recorded(MelDistance):
    """Keeps what it compared."""

    def forward(self, sample, target):
        value = super().forward(sample, target)
        self.seen = (sample.detach(), target, value.detach())
        return value


class Auto(GANModule):
    """An autoencoder of waveforms."""

    def unpack(self, batch):
        return batch, batch


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_is_the_distance_of_a_reconstruction(precision):
    torch.manual_seed(0)
    distance = Recorded(16000, [128, 512], 20)
    module = Auto(nn.Conv1d(1, 1, 9, padding=4), nn.Conv1d(1, 1, 16, 8), None)
    before = module.generator.weight.detach().clone()
    module.adversarial = False
    module.plan = ("g",)
    batches = [noise(seed=seed, dtype=torch.float32) for seed in range(3)]
    term = Reconstruction(15.0, distance, name="mel")
    fit(module, batches, callbacks=[term], precision=precision, log_every_n_steps=1)
    sample, target, value = distance.seen
    kinds = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert sample.dtype == kinds[precision]
    expected = dac_mel_distance(sample.double(), target.double(), 16000, (128, 512), (20, 20)).item()
    assert value.item() == pytest.approx(expected, abs=5e-5)
    assert module.last_step.values["g/mel"].item() == pytest.approx(15 * value.item())
    assert not torch.equal(module.generator.weight.float(), before)


# ---------- what it refuses


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LogMelSpectrogram(0), "`sample_rate` must be a positive integer, got 0"),
        (lambda: LogMelSpectrogram(16000.0), "`sample_rate` must"),
        (lambda: LogMelSpectrogram(n_fft=2), "`n_fft` must be an even integer of at least 4, got 2"),
        (lambda: LogMelSpectrogram(n_fft=1023), "`n_fft` must be an even integer of at least 4, got 1023"),
        (lambda: LogMelSpectrogram(n_fft=None), "`n_fft` must be an even integer of at least 4, got None"),
        (lambda: LogMelSpectrogram(hop_length=0), "`hop_length` must be a positive integer, got 0"),
        (lambda: LogMelSpectrogram(hop_length=1025), "`hop_length` must be at most `n_fft` 1024, got 1025"),
        (lambda: LogMelSpectrogram(n_mels=0), "`n_mels` must be a positive integer, got 0"),
        (lambda: LogMelSpectrogram(f_min=-1.0), "`f_min` must"),
        (lambda: LogMelSpectrogram(f_max=0), "`f_max` must be a positive finite number"),
        (lambda: LogMelSpectrogram(f_max=11026), "`f_max` must be between f_min and Nyquist, got 11026"),
        (lambda: LogMelSpectrogram(f_min=8000, f_max=8000), "`f_max` must be between f_min and Nyquist, got 8000"),
        (lambda: LogMelSpectrogram(base="2"), "`base` must be one of 'e', '10', got '2'"),
        (lambda: LogMelSpectrogram(floor=0), "`floor` must"),
        (lambda: LogMelSpectrogram(center=1), "`center` must be True or False, got 1"),
        (lambda: MelDistance(n_ffts=[]), "`n_mels` must be a number, or one for each of `n_ffts`"),
        (lambda: MelDistance(n_ffts=[256, 512], n_mels=[10]), "`n_mels` must be a number, or one for each of `n_ffts`"),
        (lambda: MelDistance(n_ffts=[256], n_mels=0), "`n_mels` must be a positive integer, got 0"),
        (lambda: MelDistance(n_ffts=1024, n_mels=80), "`n_ffts` must be a list of lengths, got 1024"),
        (lambda: MelDistance(n_ffts=[256], n_mels=1.5), "`n_mels` must be a number, or one for each of `n_ffts`"),
        (lambda: STFTDistance([512], [100], []), "`hop_lengths` must be as many as `n_ffts` and `win_lengths`"),
        (lambda: STFTDistance([], [], []), "`hop_lengths` must be as many as"),
        (lambda: STFTDistance([512], [100], [513]), "`win_lengths` must be from hop length to transform length"),
        (lambda: STFTDistance([512], [300], [200]), "`win_lengths` must be from hop length to transform length"),
        (lambda: STFTDistance([512], [0], [200]), "`win_lengths` must be from hop length to transform length"),
        (lambda: STFTDistance(512, 100, 400), "`hop_lengths` must be as many as"),
        (lambda: STFTDistance([512.0], [100], [400]), "`n_ffts` must be integers, got 512.0"),
    ],
)
def test_bad_arguments(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("shape", [(4096,), (2, 2, 4096), (2, 1, 1, 4096), (2, 1, 384), (2, 0)])
def test_what_is_no_waveform_or_too_short(shape):
    sentence = r"of waveforms \(n, 1, t\) or \(n, t\) with more than 384 samples, got \("
    with pytest.raises(ValueError, match=sentence):
        LogMelSpectrogram(22050)(torch.zeros(shape))
    if shape != (2, 2, 4096):
        with pytest.raises(ValueError, match=sentence):
            MelDistance(22050, **HIFI)(torch.zeros(shape), torch.zeros(shape))


def test_the_shortest_waveforms():
    assert LogMelSpectrogram(22050)(torch.zeros(2, 1, 385)).shape == (2, 80, 1)
    assert LogMelSpectrogram(22050, center=True)(torch.zeros(2, 1, 513)).shape == (2, 80, 3)
    with pytest.raises(ValueError, match="with more than 512 samples"):
        LogMelSpectrogram(22050, center=True)(torch.zeros(2, 1, 512))
    assert LogMelSpectrogram(22050, hop_length=1024)(torch.zeros(2, 1024)).shape == (2, 80, 1)
    with pytest.raises(ValueError, match=r"got \(2, 1023\)"):
        LogMelSpectrogram(22050, hop_length=1024)(torch.zeros(2, 1023))
    assert STFTDistance([512], [100], [400])(torch.zeros(2, 257), torch.zeros(2, 257)) == 0
    with pytest.raises(ValueError, match="Waveforms must have more than 256 samples, got 256"):
        STFTDistance([512], [100], [400])(torch.zeros(2, 256), torch.zeros(2, 256))


@pytest.mark.parametrize("distance", DISTANCES)
def test_shapes_that_differ(distance):
    with pytest.raises(ValueError, match=r"got \(2, 1, 4096\) and \(2, 1, 4000\)"):
        distance(torch.zeros(2, 1, 4096), torch.zeros(2, 1, 4000))


@pytest.mark.parametrize("distance", DISTANCES)
def test_channels_are_compared_one_by_one(distance):
    x, y = noise(4).float(), noise(4, seed=1).float()
    stereo = distance(x.reshape(2, 2, -1), y.reshape(2, 2, -1))
    torch.testing.assert_close(stereo, distance(x.reshape(4, 1, -1), y.reshape(4, 1, -1)))


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_waveforms(distance):
    with pytest.raises(ValueError, match=r"There are no waveforms to compare, got \(0, 1, 4096\)"):
        distance(torch.zeros(0, 1, 4096), torch.zeros(0, 1, 4096))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("make", [LogMelSpectrogram, MelDistance, STFTDistance])
def test_training_goes_on_after_inference(make, inside):
    """Validation and sanity checks run in inference mode, before the first training step."""
    x, y = noise(2, 8192).float(), noise(2, 8192, seed=1).float()
    with torch.inference_mode(inside):
        module = make()
    inputs = (x,) if make is LogMelSpectrogram else (x, y)
    with torch.inference_mode():
        module(*inputs)
    gradients = []
    for each in module, make():
        z = x.clone().requires_grad_()
        each(z, *inputs[1:]).mean().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert gradients[0].abs().sum() > 0


def test_torchaudio_is_asked_for(monkeypatch):
    for name in ("torchaudio", "torchaudio.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    for make in (LogMelSpectrogram, MelDistance):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-gan-stability\[audio\]'"):
            make()
    assert STFTDistance()(torch.zeros(2, 4096), torch.zeros(2, 4096)) == 0
