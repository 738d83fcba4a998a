"""Update rules: how the players move on one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_gan_stability.callbacks.base import Alternating, UpdateRule

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule

__all__ = ["Alternating", "Simultaneous"]


@final
class Simultaneous(UpdateRule):
    """Takes every player's gradient at the same point before any of them steps.

    "The Numerics of GANs", https://arxiv.org/abs/1705.10461. Costs as much as
    :class:`~lightning_gan_stability.callbacks.base.Alternating`. On the game min max xy with step η the players spiral
    outward by √(1 + η²) per step.

    Raises:
        MisconfigurationException: with a gradient scaler (``precision="16-mixed"``), or if a player stands twice in
            ``module.plan``.

    Example:
        >>> Simultaneous.holds_gradients
        True
    """

    holds_gradients = True

    def __call__(self, module: GANModule, batch: Any) -> None:
        """Move the players on one batch."""
        if len(set(module.plan)) < len(module.plan):
            raise MisconfigurationException(
                f"Simultaneous moves every player once, but the plan is {module.plan}: remove Simultaneous or the "
                "callback that sets the plan."
            )
        for player in module.plan:
            module.compute_gradients(player, batch)
        for player in module.plan:
            module.apply_gradients(player)
