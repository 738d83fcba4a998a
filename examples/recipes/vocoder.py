"""A vocoder of synthesized speech: HiFi-GAN's step with narrow networks.

    python -m examples.recipes.vocoder

Writes ``vocoder.png``, spectrograms of a held-out sentence and of what is made of its mel spectrogram with and without
discriminators, and the sound of each as ``vocoder_*.wav``.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from examples.recipes.shared import fit, held_out, options, save_sounds, without_discriminator
from lightning_gan_stability import MelDistance


class ResidualStack(nn.Module):
    """Dilated convolutions beside the identity."""

    def __init__(self, channels: int, dilations: Sequence[int] = (1, 3, 5)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, 3, padding=d, dilation=d)) for d in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.leaky_relu(x, 0.1))
        return x


class Generator(nn.Sequential):
    """Spectrograms (n, mels, frames) to waveforms (n, 1, frames · Π strides)."""

    def __init__(self, mels: int = 40, width: int = 64, strides: Sequence[int] = (8, 4, 4)) -> None:
        layers: list[nn.Module] = [weight_norm(nn.Conv1d(mels, width, 7, padding=3))]
        for stride in strides:
            up = nn.ConvTranspose1d(width, width // 2, 2 * stride, stride, stride // 2)
            width //= 2
            layers += [nn.LeakyReLU(0.1), weight_norm(up), ResidualStack(width)]
        super().__init__(*layers, nn.LeakyReLU(0.1), weight_norm(nn.Conv1d(width, 1, 7, padding=3)), nn.Tanh())


class PeriodDiscriminator(nn.Module):
    """Judges every ``period``-th sample of a waveform; returns logits and the maps of all layers."""

    def __init__(self, period: int, width: int = 16) -> None:
        super().__init__()
        self.period = period
        sizes = [1, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in itertools.pairwise(sizes)
        )
        self.layers.append(weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), 1, (1, 0))))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = nn.functional.pad(x, (0, -x.shape[-1] % self.period), "reflect")
        return _judged(x.unflatten(-1, (-1, self.period)), self.layers)


class ScaleDiscriminator(nn.Module):
    """Judges a waveform after averaging every ``pool`` samples; returns logits and the maps of all layers."""

    def __init__(self, pool: int = 1, width: int = 16) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(2 * pool, pool, pool // 2) if pool > 1 else nn.Identity()
        sizes = [1, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv1d(a, b, 15, 4, 7, groups=min(a, 4))) for a, b in itertools.pairwise(sizes)
        )
        self.layers.append(weight_norm(nn.Conv1d(sizes[-1], 1, 3, padding=1)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return _judged(self.pool(x), self.layers)


def _judged(x: Tensor, layers: nn.ModuleList) -> tuple[Tensor, list[Tensor]]:
    maps = []
    for layer in layers:
        x = layer(x)
        maps.append(x)
        x = nn.functional.leaky_relu(x, 0.1)
    return maps[-1].flatten(1), maps


class Discriminators(nn.ModuleDict):
    """Several discriminators, whose losses are summed."""

    def __init__(self, periods: Sequence[int] = (2, 3, 5), pools: Sequence[int] = (1, 2), width: int = 16) -> None:
        super().__init__({f"period{p}": PeriodDiscriminator(p, width) for p in periods})
        self.update({f"scale{p}": ScaleDiscriminator(p, width) for p in pools})


def main() -> None:
    compare("vocoder", {"mel distance alone": ["FeatureMatching"], "with discriminators": []}, options(__doc__, 1500))


def compare(recipe: str, runs: Mapping[str, Sequence[str]], chosen: argparse.Namespace) -> None:
    """Train with and without callbacks, and keep the sound and the spectrogram of a held-out waveform."""
    sounds = {}
    for name, without in runs.items():
        before = without_discriminator if "alone" in name else None
        cli = fit(recipe, without, steps=chosen.steps, seed=chosen.seed, before=before)
        real, condition = held_out(cli, 4)
        with torch.no_grad():
            made = cli.model(condition)
        sounds |= {"held-out speech": real.flatten(), name: made.flatten()}
        print(f"{name}: mel distance {MelDistance(16000)(made, real):.3f}")
    save_sounds(sounds, recipe, 16000)


if __name__ == "__main__":
    main()
