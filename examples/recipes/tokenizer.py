"""A tokenizer of image patches: VQGAN's step, with the adversarial loss from where the reconstruction stops improving.

    python -m examples.recipes.tokenizer

Draws ``tokenizer.png``: held-out patches, and what the tokenizer makes of them without a discriminator, with one from
the first step on, and with one from the plateau on at an adaptive weight.
"""

import itertools

import torch
from torch import Tensor, nn

from examples.recipes.shared import fit, held_out, options, rows_of_images, with_detail, without_discriminator


class ResidualBlock(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Codebook(nn.Module):
    """The nearest of some vectors by angle (https://arxiv.org/abs/2110.04627), with a straight-through gradient."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(codes, dim))

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = nn.functional.normalize(z, dim=1)
        vectors = nn.functional.normalize(self.vectors, dim=1)
        indices = torch.einsum("nd...,kd->n...k", z, vectors).argmax(-1)
        code = vectors[indices].movedim(-1, 1)
        loss = (code.detach() - z).square().mean() * 0.25 + (code - z.detach()).square().mean()
        return z + (code - z).detach(), {"codebook": z.shape[1] * loss, "codes": indices}


class VQAutoencoder(nn.Module):
    """Images (n, channels, 4 h, 4 w) to codes (n, h, w) and back."""

    def __init__(self, channels: int = 3, width: int = 32, codes: int = 256, dim: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 4, 2, 1),
            ResidualBlock(2 * width), nn.Conv2d(2 * width, dim, 1),
        )  # fmt: skip
        self.codebook = Codebook(codes, dim)
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, 2 * width, 3, padding=1), ResidualBlock(2 * width),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 3, padding=1), ResidualBlock(width),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.out = nn.Conv2d(width, channels, 3, padding=1)  # AdaptiveAdversarialWeight takes gradients by its weight

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        code, extras = self.codebook(self.encoder(image))
        return self.out(self.decoder(code)), extras


class PatchDiscriminator(nn.Sequential):
    """Logits for overlapping patches, as in pix2pix; GroupNorm in BatchNorm's place, which R1 can differentiate."""

    def __init__(self, channels: int = 3, width: int = 32, layers: int = 2) -> None:
        sizes = [width * 2**i for i in range(layers)]
        stages = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for small, large in itertools.pairwise(sizes):
            stages += [nn.Conv2d(small, large, 4, 2, 1), nn.GroupNorm(8, large), nn.LeakyReLU(0.2)]
        super().__init__(*stages, nn.Conv2d(sizes[-1], 1, 3, padding=1))


def main() -> None:
    chosen = options(__doc__, 1500)
    alone = ["AdversarialStart", "AdaptiveAdversarialWeight", "R1Penalty"]
    runs = {
        "without a discriminator": {"without": alone, "before": without_discriminator},
        "with one from the first step, fixed weight": {
            "without": alone, "settings": {"model.init_args.g_weight": 0.1},
        },
        "from the plateau, adaptive weight, R1": {},
    }  # fmt: skip
    rows = {}
    for name, changes in runs.items():
        cli = fit("tokenizer", steps=chosen.steps, seed=chosen.seed, **changes)
        real, _ = held_out(cli, 64)
        with torch.no_grad():
            average, last = (network(real)[0] for network in (cli.model.current_generator, cli.model.generator))
        shown = with_detail(real, 16)
        rows["held-out patches, those with the most detail"] = real[shown]
        rows |= {f"{name}: average": average[shown], f"{name}: last weights": last[shown]}
        print(f"{name}: L1 {(average - real).abs().mean():.3f}, of the last weights {(last - real).abs().mean():.3f}")
    rows_of_images(rows, "tokenizer.png")


if __name__ == "__main__":
    main()
