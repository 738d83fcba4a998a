"""A custom penalty takes one method. Here the generator's samples should have the mean of the data."""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_gan_stability import MLP, GANModule, GANOutputs, GradientPenalty, Regularizer, Ring, Wasserstein


class MeanMatching(Regularizer):
    """weight · ‖mean G(z) − mean x‖² over a batch: feature matching, https://arxiv.org/abs/1606.03498, of the data."""

    player = "g"
    differentiates = ()  # the samples as they are: no gradient with respect to them

    def penalty(self, module: GANModule, outputs: GANOutputs) -> Tensor:
        return (outputs.fake.mean(0) - outputs.real.mean(0)).square().sum()


if __name__ == "__main__":
    for matching in ([], [MeanMatching(weight=1.0)]):
        gan = GANModule(MLP([16, 64, 64, 2]), MLP([2, 64, 64, 1]), latent_dim=16, loss=Wasserstein())
        trainer = Trainer(
            max_steps=200, callbacks=[GradientPenalty(0.1), *matching], logger=False, enable_checkpointing=False
        )
        trainer.fit(gan, Ring())
        with torch.no_grad():
            distance = gan.sample(2000).mean(0).norm()
        print(f"{'with' if matching else 'without'} matching: mean of the samples {distance:.3f} from the data's")
