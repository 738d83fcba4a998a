"""Image to image: a GANModule without latents that colours digits, with patch logits and an L1 term.

As in pix2pix, https://arxiv.org/abs/1611.07004: the source image is the condition that the generator translates.
"""

from itertools import pairwise

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gan_stability import Alternating, Digits, GANModule, GANOutputs, R1Penalty
from lightning_gan_stability.outputs import Player


class Translate(GANModule):
    """A batch is (source, target); the generator maps sources to targets, the discriminator sees both."""

    def unpack(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        source, target = batch
        return target, source

    def discriminate(self, network: nn.Module, sample: Tensor, condition: Tensor) -> Tensor:
        return network(torch.cat([sample, condition], 1))  # (n, 1, height, width): a logit for each patch

    def auxiliary_losses(self, player: Player, outputs: GANOutputs) -> dict[str, Tensor]:
        return {"l1": 10.0 * (outputs.fake - outputs.real).abs().mean()} if player == "g" else {}


def convolutions(*channels: int) -> nn.Sequential:
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairwise(channels)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


if __name__ == "__main__":
    digits = Digits(batch_size=1400, holdout=300)
    grey, labels = next(iter(digits.train_dataloader()))
    hue = torch.eye(10)[labels][:, :3, None, None]  # the digits 0, 1 and 2 are red, green and blue
    coloured = (grey + 1) * (0.3 + 0.7 * hue) - 1
    pairs = DataLoader(TensorDataset(grey, coloured), batch_size=64, shuffle=True)
    gan = Translate(nn.Sequential(convolutions(1, 32, 32, 3), nn.Tanh()), convolutions(4, 32, 1))
    callbacks = [Alternating(share_fake=True), R1Penalty(0.1)]
    trainer = Trainer(max_epochs=5, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(gan, pairs)
    with torch.no_grad():
        error = (gan(grey) - coloured).abs().mean()
    print(f"mean absolute error {error:.3f} (black images: {(coloured + 1).abs().mean():.3f})")
