"""Consensus optimization: a pull towards stationary points of the game."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gan_stability.callback import UpdateRule
from lightning_gan_stability.distributed import mean_over_ranks
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class ConsensusOptimization(UpdateRule):
    """Adds the gradient of γ/2 · ‖v‖² to those of both players, which pulls them towards stationary points of the game.

    w = v + γ Jᵥᵀv, with the joint gradient v = (∇_ψ L_D, ∇_θ L_G) and its Jacobian Jᵥ; then both optimizers step on w
    at the same time. "The Numerics of GANs", https://arxiv.org/abs/1705.10461, with its ½. Penalties are part of the
    losses. Every stationary point attracts, bad ones included, and the noise of small batches biases ‖v‖². On min max
    xy it converges for η < 2γ / (1 + γ²). Costs one forward pass for both players, their gradients and one
    differentiation of them: about twice the time and memory of a plain step.

    Args:
        gamma: γ, not negative: 10 in most of the paper's experiments, 0.1 in some.

    Raises:
        ValueError: if ``gamma`` has a bad value.
        MisconfigurationException: with a gradient scaler (``precision="16-mixed"``), ``accumulate``, SyncBatchNorm,
            sparse embeddings or ModelParallelStrategy, or if ``module.plan`` does not contain both players exactly
            once.

    Example:
        >>> ConsensusOptimization(gamma=0.1).gamma
        0.1
    """

    holds_gradients = True
    joint = True
    whole_batch = True

    def __init__(self, gamma: Scheduled = 10.0) -> None:
        self.gamma = check_scheduled("gamma", gamma)

    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Train the players on one batch."""
        moving = {player: module.trainable_parameters(player) for player in module.plan}
        everything = [p for parameters in moving.values() for p in parameters]
        with module.full_precision():
            losses, _ = module.joint_losses(batch)
            v = [g for player, parameters in moving.items() for g in gradients(losses[player], parameters)]
            # over ranks, v is a mean: the gradient of ½‖v̄‖² is the mean of Jᵀv̄
            pull = torch.stack([(g * mean_over_ranks(g.detach())).sum() for g in v if g is not None]).sum()
            pulls = gradients(pull, everything, create_graph=False) if pull.requires_grad else [None] * len(v)
        gamma = value_at(self.gamma, module.iteration)
        w = iter([_add(g, h, gamma) for g, h in zip(v, pulls, strict=True)])
        for player, parameters in moving.items():
            module.set_gradients(player, [next(w) for _ in parameters])
        for player in module.plan:
            module.apply_gradients(player)


def gradients(loss: Tensor, parameters: Sequence[Tensor], create_graph: bool = True) -> tuple[Tensor | None, ...]:
    """The gradient of a loss, differentiable by default; None where the loss does not depend on a parameter."""
    return torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)


def _add(g: Tensor | None, h: Tensor | None, factor: float) -> Tensor | None:
    if h is None:
        return g
    return factor * h if g is None else g + factor * h
