"""Image to image: a GANModule that overrides its doors, here to colour digits in, with patch logits and an L1 term.

As in pix2pix, https://arxiv.org/abs/1611.07004: the source image takes the place of labels and latents.
"""

from itertools import pairwise

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gan_stability import Digits, GANModule, Play, R1Penalty, Regularizer


class Translate(GANModule):
    """A batch is (source, target); the generator maps sources to targets, the discriminator sees both."""

    def unpack(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        source, target = batch
        return target, source

    def sample(self, n: int, labels: Tensor | None = None, latents: Tensor | None = None) -> Tensor:
        return (self.generator if self.training else self.generator_ema or self.generator)(labels)  # or its average

    def discriminate(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        return self.discriminator(torch.cat([samples, labels], 1)).flatten(1)  # (n, patches)


class L1(Regularizer):
    """The distance of the translation from its target."""

    player = "g"
    differentiates = ()

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        return (play.fake - play.real).abs()


def convolutions(*channels: int) -> nn.Sequential:
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairwise(channels)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


if __name__ == "__main__":
    digits = Digits(batch_size=1400, holdout=300)
    grey, labels = next(iter(digits.train_dataloader()))
    hue = torch.eye(10)[labels][:, :3, None, None]  # the digits 0, 1 and 2 are red, green and blue
    coloured = (grey + 1) * (0.3 + 0.7 * hue) - 1
    pairs = DataLoader(TensorDataset(grey, coloured), batch_size=64, shuffle=True)
    gan = Translate(nn.Sequential(convolutions(1, 32, 32, 3), nn.Tanh()), convolutions(4, 32, 1), latent_dim=1)
    trainer = Trainer(
        max_epochs=5, callbacks=[L1(weight=10.0), R1Penalty(0.1)], logger=False, enable_checkpointing=False
    )
    trainer.fit(gan, pairs)
    with torch.no_grad():
        error = (gan.sample(len(grey), labels=grey) - coloured).abs().mean()
    print(f"mean absolute error {error:.3f} (black images: {(coloured + 1).abs().mean():.3f})")
