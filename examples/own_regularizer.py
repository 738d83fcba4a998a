"""A penalty of your own: one method. Here PGGAN's drift term, which keeps the logits of real samples near 0."""

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_gan_stability import MLP, GANModule, GradientPenalty, Play, Regularizer, Ring, Wasserstein


class LogitDrift(Regularizer):
    """weight · E l(x)² over real samples, https://arxiv.org/abs/1710.10196."""

    differentiates = ()  # the logits as they are: no gradient with respect to samples

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        assert play.real_logits is not None
        return play.real_logits.square()


if __name__ == "__main__":
    for drift in ([], [LogitDrift(weight=0.1)]):
        gan = GANModule(MLP([16, 64, 64, 2]), MLP([2, 64, 64, 1]), latent_dim=16, loss=Wasserstein())
        trainer = Trainer(
            max_steps=200, callbacks=[GradientPenalty(0.1), *drift], logger=False, enable_checkpointing=False
        )
        trainer.fit(gan, Ring())
        print(f"{'with' if drift else 'without'} drift: real logits {trainer.callback_metrics['d/real_logit']:.3f}")
