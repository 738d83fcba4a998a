"""A custom update rule takes one method. Here it is WGAN's: five discriminator steps, then one generator step."""

from typing import Any

from lightning.pytorch import Trainer

from lightning_gan_stability import MLP, GANModule, GradientPenalty, Ring, UpdateRule, Wasserstein


class CriticFirst(UpdateRule):
    """Steps the discriminator ``steps`` times on a batch, with fresh latents each time, then the generator once."""

    def __init__(self, steps: int = 5) -> None:
        self.steps = steps

    def __call__(self, module: GANModule, batch: Any) -> None:
        for player in ("d",) * self.steps + ("g",):
            module.compute_gradients(player, batch)
            module.apply_gradients(player)


if __name__ == "__main__":
    gan = GANModule(MLP([16, 64, 64, 2]), MLP([2, 64, 64, 1]), latent_dim=16, loss=Wasserstein())
    trainer = Trainer(
        max_steps=100, callbacks=[CriticFirst(5), GradientPenalty(0.1)], logger=False, enable_checkpointing=False
    )
    trainer.fit(gan, Ring())
    print(f"{trainer.global_step} batches, {gan.iteration} GAN steps, six optimizer steps in each")
