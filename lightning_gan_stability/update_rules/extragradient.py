"""A look one step ahead, and the step along what was found there."""

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
    """Both players look one step ahead and then step, from where they were, along the gradient that they found there.

    w½ = w + u(v(w)), w ← w + u(v(w½)), where v is the joint gradient and u the step that the optimizer makes of it: any
    optimizer; Adam's moments see both gradients (ExtraAdam). "A Variational Inequality Perspective on Generative
    Adversarial Networks", https://arxiv.org/abs/1802.10551. Both gradients are of the same batch and latents, as
    "Revisiting Stochastic Extragradient", https://arxiv.org/abs/1905.11373, recommends; learning rate schedules step
    once. On min max xy it converges for η < 1, by √(1 − η² + η⁴) per step. Costs twice the forward and backward passes
    of a plain step and two copies of the parameters. Weight decay and what else an optimizer does with the parameters
    themselves is part of u, and at w½ the second time; weights are clipped after both steps.

    Raises:
        MisconfigurationException: with a gradient scaler (``precision="16-mixed"``), or if ``module.plan`` does not
            move both players once on every batch.

    Example:
        >>> Extragradient.joint
        True
    """

    holds_gradients = True
    joint = True

    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Move the players on one batch."""
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
            # a gradient that is not finite stops the run where it stood before the batch
            with torch.no_grad():
                for player, parameters in away.items():
                    for p, before in zip(moving[player], parameters, strict=True):
                        p.copy_(before)
            raise


@contextmanager
def _from(optimizer: Optimizer, parameters: list[nn.Parameter], start: list[Tensor]) -> Iterator[None]:
    """Let the step that an optimizer takes from where its parameters are lead on from where they were."""
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
