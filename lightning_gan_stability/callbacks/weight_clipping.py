"""A box for a network's weights."""

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
    """Clamps every parameter of a network that is not frozen to [−limit, limit] after each step of its optimizer.

    The constraint of "Wasserstein GAN", https://arxiv.org/abs/1701.07875, Algorithm 1: biases and the parameters of
    normalization layers included, after the step, so that the next player sees a clipped critic. Of a spectrally
    normalized weight it clips the one before normalization. Costs no pass.

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
        """Refuse weights that have no order."""
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
