"""Penalties on the weights themselves."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability import penalties
from lightning_gan_stability._checks import check_bool, check_choice
from lightning_gan_stability.callback import Regularizer
from lightning_gan_stability.layers import matrices
from lightning_gan_stability.outputs import NETWORKS, PLAYERS, GANOutputs, Player
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled


class OrthogonalPenalty(Regularizer):
    """Adds weight · Σ ‖(W Wᵀ) ⊙ (1 − I)‖_F² over a network's weights to its loss, for orthogonal filters.

    W is a weight, reshaped to the matrix (out, in · height · width). The sum is over every parameter named ``weight``
    with two or more dimensions, except those of embeddings. In a normalized layer W is the weight before normalization.
    "Large Scale GAN Training for High Fidelity Natural Image Synthesis", https://arxiv.org/abs/1809.11096 (BigGAN),
    without the ½ of the authors' code. Costs no forward pass.

    Args:
        weight: β, not negative.
        off_diagonal: do not penalize the norms of filters, as in BigGAN; False: ‖W Wᵀ − I‖_F².
        player: which network: ``"g"`` (BigGAN) or ``"d"``.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> OrthogonalPenalty(weight=1e-4).player
        'g'
    """

    differentiates = ()
    second_order = False
    weight = 1e-4

    def __init__(
        self,
        weight: Scheduled = 1e-4,
        off_diagonal: bool = True,
        player: Player = "g",
        every: int = 1,
        separate: bool = False,
    ) -> None:
        super().__init__(weight, every, separate=separate)
        self.off_diagonal = check_bool("off_diagonal", off_diagonal)
        self.player = check_choice("player", player, PLAYERS)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a network without matrices."""
        super().on_fit_start(trainer, pl_module)
        name = NETWORKS[self.player]
        try:
            found = matrices(pl_module.get_submodule(name))
        except ValueError as error:
            raise MisconfigurationException(f"OrthogonalPenalty {error}") from None
        if not found:
            raise MisconfigurationException(
                f"OrthogonalPenalty: the {name} has no `weight` of two or more dimensions: remove OrthogonalPenalty."
            )

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The sum over the network's weights, a scalar."""
        weights = matrices(module.get_submodule(NETWORKS[self.player]))
        return torch.stack([penalties.orthogonality(w, self.off_diagonal) for w in weights]).sum()
