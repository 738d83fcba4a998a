"""The extragradient method: a step along the gradient found one step ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gan_stability.callback import UpdateRule
from lightning_gan_stability.protocols import GANProtocol


class Extragradient(UpdateRule):
    """Computes the gradients one step ahead, then steps both players from where they started along these gradients.

    w½ = w + u(v(w)), w ← w + u(v(w½)), where v is the joint gradient and u the update that the optimizer computes from
    it. Any optimizer works; Adam's moment estimates are updated with both gradients (ExtraAdam). "A Variational
    Inequality Perspective on Generative Adversarial Networks", https://arxiv.org/abs/1802.10551. Both gradients are of
    the same batch and latents, as "Revisiting Stochastic Extragradient", https://arxiv.org/abs/1905.11373, recommends.
    Learning rate schedules step once per batch. On min max xy it converges for η < 1, by √(1 − η² + η⁴) per step. Costs
    twice the forward and backward passes of a plain step and two copies of the parameters. Weight decay, and whatever
    else an optimizer computes from the parameters, is part of u and is taken at w½ in the second step. Weights are
    clipped after both steps.

    Raises:
        MisconfigurationException: with a gradient scaler (``precision="16-mixed"``), or if ``module.plan`` does not
            contain both players exactly once.

    Example:
        >>> Extragradient.joint
        True
    """

    holds_gradients = True
    joint = True

    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Train the players on one batch."""
        moving = {player: module.trainable_parameters(player) for player in module.plan}
        away = {player: [p.detach().clone() for p in parameters] for player, parameters in moving.items()}
        start = module.noise.randomness()
        try:
            for player in module.plan:
                module.compute_gradients(player, batch)
            for player in module.plan:
                module.step(player, schedule=False)
            module.noise.restore(start)
            for player in module.plan:
                module.compute_gradients(player, batch)
            for player in module.plan:
                with _from(module.optimizer(player).optimizer, moving[player], away[player]):
                    module.apply_gradients(player)
                del away[player]
        except BaseException:
            # if a gradient is not finite, the run stops with the parameters as they were before the batch
            with torch.no_grad():
                for player, parameters in away.items():
                    for p, before in zip(moving[player], parameters, strict=True):
                        p.copy_(before)
            raise


@contextmanager
def _from(optimizer: Optimizer, parameters: list[nn.Parameter], start: list[Tensor]) -> Iterator[None]:
    """Apply the optimizer's next step, which it computes at the present parameters, to ``start`` instead."""
    with torch.no_grad():
        shifts = [before - p for before, p in zip(start, parameters, strict=True)]

    @torch.no_grad()
    def shift(*_: Any) -> None:
        for p, difference in zip(parameters, shifts, strict=True):
            p.add_(difference)

    handle = optimizer.register_step_post_hook(shift)
    try:
        yield
    finally:
        handle.remove()
