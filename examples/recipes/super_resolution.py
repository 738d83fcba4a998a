"""Super-resolution of photograph patches, four times as high and wide: Real-ESRGAN's step with narrow networks.

    python -m examples.recipes.super_resolution

Draws ``super_resolution.png``: small images, what is made of them without a discriminator (smooth) and with one
(sharp), and the large images.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from examples.recipes.shared import fit, held_out, options, rows_of_images, with_detail, without_discriminator


class DenseBlock(nn.Module):
    """Convolutions that see all before them, scaled by 0.2 beside the identity, as in ESRGAN."""

    def __init__(self, channels: int, growth: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(3))
        self.last = nn.Conv2d(channels + 3 * growth, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for layer in self.layers:
            seen = torch.cat([seen, nn.functional.leaky_relu(layer(seen), 0.2)], 1)
        return x + 0.2 * self.last(seen)


class Enlarger(nn.Module):
    """Images (n, 3, h, w) to (n, 3, scale · h, scale · w): what is added to a bilinear enlargement."""

    def __init__(self, width: int = 32, blocks: int = 2, scale: int = 4) -> None:
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), *[DenseBlock(width) for _ in range(blocks)],
            nn.Conv2d(width, 16 * scale**2, 3, padding=1), nn.PixelShuffle(scale), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, small: Tensor) -> Tensor:
        return self.layers(small) + nn.functional.interpolate(small, scale_factor=self.scale, mode="bilinear")


class UNetDiscriminator(nn.Module):
    """A logit for each pixel; spectral norm on all layers but the first and the last, as in Real-ESRGAN."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(spectral_norm(nn.Conv2d(a, 2 * a, 4, 2, 1, bias=False)) for a in (width, 2 * width))
        self.up = nn.ModuleList(
            spectral_norm(nn.Conv2d(2 * a, a, 3, padding=1, bias=False)) for a in (2 * width, width)
        )
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        levels = [nn.functional.leaky_relu(self.first(image), 0.2)]
        for layer in self.down:
            levels.append(nn.functional.leaky_relu(layer(levels[-1]), 0.2))
        x = levels.pop()
        for layer in self.up:
            x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
            x = nn.functional.leaky_relu(layer(x), 0.2) + levels.pop()
        return self.last(x)


def main() -> None:
    chosen = options(__doc__, 2000)
    runs = {
        "without a discriminator": {"without": ["AdversarialStart"], "before": without_discriminator},
        "with one": {},
    }
    rows = {}
    for name, changes in runs.items():
        cli = fit("super_resolution", steps=chosen.steps, seed=chosen.seed, **changes)
        large, small = held_out(cli, 64)
        shown = with_detail(large, 16)
        with torch.no_grad():
            made = cli.model(small)
        rows |= {"small": small[shown], name: made[shown]}
        print(
            f"{name}: L1 {(made - large).abs().mean():.3f}, of neighbouring pixels {detail(made) / detail(large):.2f}"
        )
    rows_of_images(rows | {"large": large[shown]}, "super_resolution.png")


def detail(images: Tensor) -> float:
    """The mean difference of neighbouring pixels, which a blurred image lacks."""
    return images.diff(dim=-1).abs().mean().item()


if __name__ == "__main__":
    main()
