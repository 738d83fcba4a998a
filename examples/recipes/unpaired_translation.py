"""Digits of scikit-learn to digits of MNIST and back, without pairs: CycleGAN's step with narrow networks.

    python -m examples.recipes.unpaired_translation

Draws ``unpaired_translation.png``: digits of both kinds, their translations, and what comes back; and prints what a
classifier reads in translations.
"""

import torch
from torch import Tensor, nn

from examples.recipes.shared import fit, options, rows_of_images


class ResNet(nn.Module):
    """Images to images of one size: half the size in the middle, and residual blocks there."""

    def __init__(self, channels: int = 1, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1), nn.InstanceNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.InstanceNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.InstanceNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.out = nn.Sequential(nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())

    def forward(self, image: Tensor) -> Tensor:
        x = self.into(image)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def main() -> None:
    chosen = options(__doc__, 2000)
    rows = {}
    for name, without in {"with cycles": [], "without": ["Reconstruction"]}.items():
        cli = fit("unpaired_translation", without=without, steps=chosen.steps, seed=chosen.seed)
        batch = next(iter(cli.datamodule.val_dataloader()))
        a, b = batch["a"][0][:16], batch["b"][0][:16]
        with torch.no_grad():
            to_b, to_a = cli.model.translate(a, "b"), cli.model.translate(b, "a")
            back_a, back_b = cli.model.translate(to_b, "a"), cli.model.translate(to_a, "b")
        rows |= {"scikit-learn's digits": a, f"{name}: as MNIST": to_b, f"{name}: and back": back_a}
        rows |= {"digits of MNIST": b, f"{name}: as scikit-learn": to_a, f"{name}: and back again": back_b}
        print(f"{name}: L1 there and back {(back_a - a).abs().mean():.3f} and {(back_b - b).abs().mean():.3f}")
    rows_of_images(rows, "unpaired_translation.png")


if __name__ == "__main__":
    main()
