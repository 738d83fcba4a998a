"""Simultaneous updates: both gradients at the same point, then both steps."""

from __future__ import annotations

from typing import Any

from lightning_gan_stability.callback import UpdateRule, check_once
from lightning_gan_stability.protocols import GANProtocol


class Simultaneous(UpdateRule):
    """Computes both players' gradients at the same point before either player steps.

    "The Numerics of GANs", https://arxiv.org/abs/1705.10461. Costs as much as
    :class:`~lightning_gan_stability.callback.Alternating`. On the game min max xy with step η the players spiral
    outward by √(1 + η²) per step.

    Raises:
        MisconfigurationException: with a gradient scaler (``precision="16-mixed"``), or if ``module.plan`` contains a
            player twice.

    Example:
        >>> Simultaneous.holds_gradients
        True
    """

    holds_gradients = True

    def check_plan(self, module: GANProtocol) -> None:
        """Refuse a plan that contains a player twice."""
        check_once(self, module)

    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Train the players on one batch."""
        for player in module.plan:
            module.compute_gradients(player, batch)
        for player in module.plan:
            module.apply_gradients(player)
