"""A custom adversarial loss takes two methods. Here the discriminator fits ±1 with the Huber loss."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import huber_loss

from lightning_gan_stability import MLP, AdversarialLoss, GANModule, R1Penalty, Ring


class Huber(AdversarialLoss):
    """Least squares near its targets, linear far from them."""

    threshold = 0.0  # the logit between both targets, which `d/accuracy` counts by; without it, pairs are compared
    # direction = -1.0  # if a lower logit looked more real

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return self._to(real_logits, 1.0) + self._to(fake_logits, -1.0)

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return self._to(fake_logits, 1.0)

    @staticmethod
    def _to(logits: Tensor, target: float) -> Tensor:
        return huber_loss(logits, torch.full_like(logits, target), reduction="none")


if __name__ == "__main__":
    gan = GANModule(MLP([16, 64, 64, 2]), MLP([2, 64, 64, 1]), latent_dim=16, loss=Huber())
    trainer = Trainer(max_steps=200, callbacks=[R1Penalty(0.1)], logger=False, enable_checkpointing=False)
    trainer.fit(gan, Ring())
    print(f"mean distance from the origin: {gan.sample(1000).norm(dim=1).mean():.2f} (the ring's radius is 2)")
