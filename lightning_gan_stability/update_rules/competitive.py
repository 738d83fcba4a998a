"""Competitive gradient descent: the Nash equilibrium of a local game."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_gan_stability._checks import check_bool, check_integer, check_number, check_share
from lightning_gan_stability.callback import UpdateRule, as_gan
from lightning_gan_stability.distributed import mean_over_ranks
from lightning_gan_stability.outputs import Player
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.update_rules.consensus import gradients


class CompetitiveGradientDescent(UpdateRule):
    """Steps both players to the Nash equilibrium of a local approximation of the game.

    (I + η_g η_d D_θψ D_ψθ) dθ = ∇_θ L_G − η_d D_θψ ∇_ψ L_D, dψ = ∇_ψ L_D + η_g D_ψθ dθ, with the mixed second
    derivatives D of L_G; then θ ← θ − η_g dθ and ψ ← ψ − η_d dψ. "Competitive Gradient Descent",
    https://arxiv.org/abs/1905.12103. Conjugate gradients solve the system from matrix-vector products, so no matrix is
    formed. ``adaptive=True`` is ACGD, "Implicit competitive regularization in GANs", https://arxiv.org/abs/1910.05852:
    η becomes η / (√v̂ + ε) for each parameter, with Adam's v̂. Penalties contribute to the gradients ∇; the mixed
    derivatives D are those of the adversarial loss alone. On min max xy it is the proximal point method and converges
    for every η. Costs one forward pass for both players, their gradients, and two products (each about a backward pass)
    per iteration of conjugate gradients.

    Both optimizers must be plain ``torch.optim.SGD``: the rule takes their learning rates as η.

    Args:
        adaptive: scale the steps as ACGD does.
        beta: decay of the running mean of squared gradients, in [0, 1).
        eps: ε, positive.
        tolerance: conjugate gradients stop when the norm of the residual is at most this share of that of the
            right-hand side.
        max_iterations: largest number of iterations of conjugate gradients.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: with a loss that is not zero-sum (``loss.zero_sum``), another optimizer, a gradient
            scaler, ``accumulate``, SyncBatchNorm, sparse embeddings or ModelParallelStrategy, or if ``module.plan``
            does not contain both players exactly once.

    Example:
        >>> CompetitiveGradientDescent(adaptive=True).beta
        0.99
    """

    holds_gradients = True
    joint = True
    whole_batch = True

    scaled_steps: int
    squares: dict[Player, Tensor]

    def __init__(
        self,
        adaptive: bool = False,
        beta: float = 0.99,
        eps: float = 1e-5,
        tolerance: float = 1e-10,
        max_iterations: int = 100,
    ) -> None:
        self.adaptive = check_bool("adaptive", adaptive)
        self.beta = check_share("beta", beta, open_end=True)
        self.eps = check_number("eps", eps, positive=True)
        self.tolerance = check_number("tolerance", tolerance)
        self.max_iterations = check_integer("max_iterations", max_iterations)
        self.add_state("scaled_steps", 0)
        self.add_state("squares", {})  # the means of squared gradients of each player

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse losses that are not zero-sum, and other optimizers than plain SGD."""
        super().on_fit_start(trainer, pl_module)
        module = as_gan(pl_module)
        if not module.loss.zero_sum:
            raise MisconfigurationException(
                f"CompetitiveGradientDescent solves zero-sum games, and {type(module.loss).__name__} is not one: use "
                "Minimax, Wasserstein or FDivergence(saturating=True), or remove CompetitiveGradientDescent."
            )
        for optimizer in trainer.optimizers:
            unplain = ("momentum", "weight_decay", "maximize")
            plain = not any(group.get(name) for group in optimizer.param_groups for name in unplain)
            if type(optimizer) is not torch.optim.SGD or not plain:
                raise MisconfigurationException(
                    "CompetitiveGradientDescent takes its step sizes from plain SGD without momentum, weight decay "
                    f"and maximize, but found {type(optimizer).__name__}: set g_optimizer and d_optimizer to "
                    "torch.optim.SGD, or remove CompetitiveGradientDescent."
                )

    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Train the players on one batch."""
        moving = {player: module.trainable_parameters(player) for player in module.plan}
        with module.full_precision():
            losses, adversarial = module.joint_losses(batch)
            total = {p: _flat(gradients(losses[p], moving[p]), moving[p]).detach() for p in module.plan}
            total = {player: mean_over_ranks(g) for player, g in total.items()}
            cross = {p: _flat(gradients(adversarial["g"], moving[p]), moving[p]) for p in module.plan}
            scales = self._scales(total)
            rates = {player: scale * _rate(module, player) for player, scale in scales.items()}

            def product(player: Player, vector: Tensor) -> Tensor:
                """Multiply the mixed derivatives with a vector of the other player's parameters."""
                other = cross["g" if player == "d" else "d"]
                if not other.requires_grad:
                    return torch.zeros_like(total[player])
                row = torch.autograd.grad(other, moving[player], vector, retain_graph=True, allow_unused=True)
                return mean_over_ranks(_flat(row, moving[player]))

            d_g, d_d = self._solve(total, rates, product)
        module.set_gradients("g", _pieces(scales["g"] * d_g, moving["g"]))
        module.set_gradients("d", _pieces(scales["d"] * d_d, moving["d"]))
        for player in module.plan:
            module.apply_gradients(player)

    def _solve(
        self, v: dict[Player, Tensor], rate: dict[Player, Tensor], product: Callable[[Player, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        root = rate["g"].sqrt()

        def matrix(x: Tensor) -> Tensor:
            return x + root * product("g", rate["d"] * product("d", root * x))

        right = root * (v["g"] - product("g", rate["d"] * v["d"]))
        step = root * conjugate_gradients(matrix, right, self.tolerance, self.max_iterations)
        d_d = v["d"] + product("d", step)
        return v["g"] - product("g", rate["d"] * d_d), d_d

    def _scales(self, v: dict[Player, Tensor]) -> dict[Player, Tensor]:
        """The factor of each parameter's learning rate."""
        if not self.adaptive:
            return {player: torch.ones_like(g) for player, g in v.items()}
        self.scaled_steps += 1
        for player, g in v.items():
            square = self.squares.get(player, torch.zeros_like(g)).to(g.device)
            self.squares[player] = self.beta * square + (1 - self.beta) * g.square()
        bias = 1 - self.beta**self.scaled_steps
        return {player: 1 / ((square / bias).sqrt() + self.eps) for player, square in self.squares.items()}


def _rate(module: GANProtocol, player: Player) -> Tensor:
    """The learning rate of every parameter."""
    rates = {id(p): group["lr"] for group in module.optimizer(player).param_groups for p in group["params"]}
    return torch.cat([torch.full_like(p, rates[id(p)]).reshape(-1) for p in module.trainable_parameters(player)])


def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Solve A x = b for a symmetric positive definite A, given by its matrix-vector products.

    Args:
        matrix: x ↦ A x.
        right: b, (n,).
        tolerance: stop when ‖b − A x‖ ≤ tolerance · ‖b‖.
        max_iterations: largest number of products.

    Returns:
        x, (n,).

    Example:
        >>> conjugate_gradients(lambda x: 4 * x, torch.tensor([4.0, 8.0]), tolerance=1e-6, max_iterations=9)
        tensor([1., 2.])
    """
    x = torch.zeros_like(right)
    residual = direction = right
    size = square = residual.dot(residual)
    for _ in range(max_iterations):
        if square <= tolerance**2 * size:
            break
        image = matrix(direction)
        length = square / direction.dot(image)
        x = x + length * direction
        residual = residual - length * image
        before, square = square, residual.dot(residual)
        direction = residual + square / before * direction
    return x


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def _pieces(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = torch.split(vector, [p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
