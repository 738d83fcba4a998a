"""Weight clipping, as in the original Wasserstein GAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability._checks import check_choice
from lightning_gan_stability.callback import GANCallback
from lightning_gan_stability.outputs import NETWORKS, Player
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class WeightClipping(GANCallback):
    """Clamps all trainable parameters of a network to [−limit, limit] after each step of its optimizer.

    The constraint of "Wasserstein GAN", https://arxiv.org/abs/1701.07875, Algorithm 1. It includes biases and the
    parameters of normalization layers. Clipping follows the step directly, so the next player's step already uses the
    clipped critic. A spectrally normalized weight is clipped before normalization. Costs no forward pass.

    Args:
        limit: c, positive: 0.01 in the paper.
        network: ``"discriminator"`` or ``"generator"``.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> WeightClipping(0.05).network
        'discriminator'
    """

    def __init__(
        self, limit: Scheduled = 0.01, network: Literal["discriminator", "generator"] = "discriminator"
    ) -> None:
        super().__init__()
        self.limit = check_scheduled("limit", limit, positive=True)
        self.network = check_choice("network", network, NETWORKS.values())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse complex weights, which cannot be clamped."""
        for name, p in pl_module.get_submodule(self.network).named_parameters():
            if p.is_complex():
                raise MisconfigurationException(
                    f"WeightClipping clips real numbers, and `{self.network}.{name}` is complex: remove WeightClipping."
                )

    def constrain(self, module: GANProtocol, player: Player, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Clamp the parameters of the network's player."""
        if NETWORKS[player] != self.network:
            return parameters
        limit = value_at(self.limit, module.iteration)
        return [p.clamp(-limit, limit) for p in parameters]
