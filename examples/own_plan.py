"""A plain Callback that sets the plan: the generator pauses while the discriminator is behind.

``module.plan`` sets who steps on the next batch, ``module.augment`` what happens to samples before they are judged.
The decision depends on a value reduced over ranks, so that all ranks decide alike.
"""

from typing import Any

from lightning.pytorch import Callback, Trainer

from lightning_gan_stability import MLP, GANModule, R1Penalty, Ring


class WaitForDiscriminator(Callback):
    """Train the discriminator alone as long as it judges less than ``accuracy`` of its logits right."""

    def __init__(self, accuracy: float = 0.6) -> None:
        self.accuracy = accuracy
        self.waited = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: GANModule, outputs: Any, batch: Any, i: int) -> None:
        accuracy = trainer.callback_metrics.get("d/accuracy")  # logged with sync_dist
        behind = accuracy is not None and bool(accuracy < self.accuracy)
        pl_module.plan = ("d",) if behind else ("d", "g")
        self.waited += behind

    def state_dict(self) -> dict[str, int]:
        return {"waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.waited = state_dict["waited"]


if __name__ == "__main__":
    gan = GANModule(MLP([16, 64, 64, 2]), MLP([2, 64, 64, 1]), latent_dim=16)
    waiting = WaitForDiscriminator()
    trainer = Trainer(
        max_steps=200,
        log_every_n_steps=1,
        callbacks=[waiting, R1Penalty(0.1)],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(gan, Ring())
    print(f"the generator rested on {waiting.waited} of {trainer.global_step} batches")
