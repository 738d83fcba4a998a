"""Photograph patches from their edges: pix2pix's step with narrow networks.

    python -m examples.recipes.paired_translation

Draws ``paired_translation.png``: edges, what is made of them with the L1 term alone (blurred) and with a discriminator,
and the patches that the edges are of.
"""

import torch
from torch import Tensor, nn

from examples.recipes.shared import fit, held_out, options, rows_of_images, with_detail, without_discriminator


class UNet(nn.Module):
    """Images to images of one size, with a connection across at each size."""

    def __init__(self, inputs: int = 1, outputs: int = 3, width: int = 32) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.InstanceNorm2d(b, affine=True), nn.LeakyReLU(0.2))
            for a, b in ((inputs, width), (width, 2 * width), (2 * width, 4 * width))
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1), nn.InstanceNorm2d(b, affine=True), nn.ReLU())
            for a, b in ((4 * width, 2 * width), (4 * width, width), (2 * width, width))
        )
        self.out = nn.Conv2d(width + inputs, outputs, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        levels = [image]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        x = levels.pop()
        for layer in self.up:
            x = torch.cat([layer(x), levels.pop()], 1)
        return self.out(x).tanh()


def main() -> None:
    chosen = options(__doc__, 1500)
    rows = {}
    for name, changes in {"L1 alone": {"before": without_discriminator}, "with a discriminator": {}}.items():
        cli = fit("paired_translation", steps=chosen.steps, seed=chosen.seed, **changes)
        target, source = held_out(cli, 64)
        shown = with_detail(target, 16)
        with torch.no_grad():
            made = cli.model(source)
        rows |= {"source": source[shown], name: made[shown]}
        print(f"{name}: L1 {(made - target).abs().mean():.3f}")
    rows_of_images(rows | {"target": target[shown]}, "paired_translation.png")


if __name__ == "__main__":
    main()
