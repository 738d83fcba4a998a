"""Update rules: how the players move on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gan_stability.callbacks.base import (
    Alternating,
    Player,
    Remembering,
    UpdateRule,
    check_bool,
    check_number,
    check_once,
    check_positive_int,
)
from lightning_gan_stability.doors import assign, mean_over_ranks

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule

__all__ = ["Alternating", "CompetitiveGradientDescent", "ConsensusOptimization", "Extragradient", "Simultaneous"]


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

    def check_plan(self, module: GANModule) -> None:
        """Refuse a plan in which a player stands twice."""
        check_once(self, module)

    def __call__(self, module: GANModule, batch: Any) -> None:
        """Move the players on one batch."""
        for player in module.plan:
            module.compute_gradients(player, batch)
        for player in module.plan:
            module.apply_gradients(player)


@final
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

    def __call__(self, module: GANModule, batch: Any) -> None:
        """Move the players on one batch."""
        moving = {player: module._moving(player) for player in module.plan}
        away = {player: [p.detach().clone() for p in parameters] for player, parameters in moving.items()}
        draw = module._now.draw
        try:
            for player in module.plan:
                module.compute_gradients(player, batch)
            for player in module.plan:
                module._step(player, schedule=False)
            module._now.draw = draw
            for player in module.plan:
                module.compute_gradients(player, batch)
            for player in module.plan:
                with _from(module._optimizer(player).optimizer, moving[player], away[player]):
                    module.apply_gradients(player)
                del away[player]
        except BaseException:
            # a gradient that is not finite stops the run where it stood before the batch
            with torch.no_grad():
                for player, start in away.items():
                    assign(moving[player], start)
            raise


@contextmanager
def _from(optimizer: Optimizer, parameters: list[nn.Parameter], start: list[Tensor]) -> Iterator[None]:
    """Let the step that an optimizer takes from where its parameters are lead on from where they were."""
    with torch.no_grad():
        shift = torch._foreach_sub(start, parameters)  # type: ignore[arg-type]

    @torch.no_grad()
    def back(*_: Any) -> None:
        torch._foreach_add_(parameters, shift)  # type: ignore[arg-type]

    handle = optimizer.register_step_post_hook(back)
    hooks = optimizer._optimizer_step_post_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)  # weights are clipped after that
    try:
        yield
    finally:
        handle.remove()


@final
class ConsensusOptimization(UpdateRule):
    """Adds to both players' gradients that of γ/2 · ‖v‖², which pulls them towards points where neither wants to move.

    w = v + γ Jᵥᵀv, with the joint gradient v = (∇_ψ L_D, ∇_θ L_G) and its Jacobian Jᵥ; then both optimizers step on w
    at the same time. "The Numerics of GANs", https://arxiv.org/abs/1705.10461, with its ½. Penalties are part of the
    losses. It attracts to every stationary point, bad ones included, and noise of small batches biases ‖v‖². On min
    max xy it converges for η < 2γ / (1 + γ²). Costs one forward pass for both players, their gradients and one
    differentiation of them: about twice the time and memory of a plain step.

    Args:
        gamma: γ, not negative: 10 in most of the paper's experiments, 0.1 in some.

    Raises:
        ValueError: if ``gamma`` has a bad value.
        MisconfigurationException: with a gradient scaler (``precision="16-mixed"``), ``accumulate``, SyncBatchNorm,
            sparse embeddings or ModelParallelStrategy, or if ``module.plan`` does not move both players once on every
            batch.

    Example:
        >>> ConsensusOptimization(gamma=0.1).gamma
        0.1
    """

    holds_gradients = True
    joint = True
    whole_batch = True

    def __init__(self, gamma: float = 10.0) -> None:
        check_number("gamma", gamma)
        self.gamma = gamma

    def __call__(self, module: GANModule, batch: Any) -> None:
        """Move the players on one batch."""
        moving = {player: module._moving(player) for player in module.plan}
        everything = [p for parameters in moving.values() for p in parameters]
        with module._precise():
            losses, _ = module._meet(batch)
            v = [g for player, parameters in moving.items() for g in _gradients(losses[player], parameters)]
            # over ranks, v is a mean: the gradient of ½‖v̄‖² is the mean of Jᵀv̄
            pull = torch.stack([(g * mean_over_ranks(g.detach())).sum() for g in v if g is not None]).sum()
            pulls = _gradients(pull, everything, create_graph=False) if pull.requires_grad else [None] * len(v)
        w = iter([_add(g, h, self.gamma) for g, h in zip(v, pulls, strict=True)])
        for player, parameters in moving.items():
            module._deposit(player, [next(w) for _ in parameters])
        for player in module.plan:
            module.apply_gradients(player)


def _gradients(loss: Tensor, parameters: Sequence[Tensor], create_graph: bool = True) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)


def _add(g: Tensor | None, h: Tensor | None, factor: float) -> Tensor | None:
    if h is None:
        return g
    return factor * h if g is None else g + factor * h


@final
class CompetitiveGradientDescent(UpdateRule, Remembering):
    """Each player's step is the Nash equilibrium of a local game in which the other one moves too.

    (I + η_g η_d D_θψ D_ψθ) dθ = ∇_θ L_G − η_d D_θψ ∇_ψ L_D, dψ = ∇_ψ L_D + η_g D_ψθ dθ, with the mixed second
    derivatives D of L_G; then θ ← θ − η_g dθ and ψ ← ψ − η_d dψ. "Competitive Gradient Descent",
    https://arxiv.org/abs/1905.12103. Solved by conjugate gradients from products alone; no matrix is made. ``adaptive``
    is ACGD, "Implicit competitive regularization in GANs", https://arxiv.org/abs/1910.05852: η becomes η / (√v̂ + ε) for
    each parameter, with Adam's v̂. Penalties join the gradients; mixed derivatives are of the adversarial loss. On min
    max xy it is the proximal point method and converges for every η. Costs one forward pass for both players, their
    gradients, and two products (each about a backward pass) per iteration of conjugate gradients.

    Both optimizers must be plain ``torch.optim.SGD``: the rule takes their learning rates as η.

    Args:
        adaptive: scale the steps as ACGD does.
        beta: memory of the mean of squared gradients, in [0, 1).
        eps: ε, positive.
        tolerance: conjugate gradients stop when the residual is this share of the right-hand side.
        max_iterations: or after so many iterations.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: with a loss that is not zero-sum (``loss.zero_sum``), another optimizer, a gradient
            scaler, ``accumulate``, SyncBatchNorm, sparse embeddings or ModelParallelStrategy, or if ``module.plan``
            does not move both players once on every batch.

    Example:
        >>> CompetitiveGradientDescent(adaptive=True).beta
        0.99
    """

    holds_gradients = True
    joint = True
    whole_batch = True

    def __init__(
        self,
        adaptive: bool = False,
        beta: float = 0.99,
        eps: float = 1e-5,
        tolerance: float = 1e-10,
        max_iterations: int = 100,
    ) -> None:
        check_bool("adaptive", adaptive)
        check_number("beta", beta)
        check_number("eps", eps, positive=True)
        check_number("tolerance", tolerance)
        check_positive_int("max_iterations", max_iterations)
        if beta >= 1:
            raise ValueError(f"`beta` must be in [0, 1), got {beta!r}.")
        self.adaptive, self.beta, self.eps = adaptive, beta, eps
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self._steps = 0
        self._squares: dict[Player, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The means of squared gradients, and the module's iteration that they belong to."""
        return super().state_dict() | {"steps": self._steps, "squares": self._squares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._steps = state_dict["steps"]
        self._squares = dict(state_dict["squares"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be solved."""
        super().on_fit_start(trainer, pl_module)
        module: GANModule = pl_module  # type: ignore[assignment]
        if not module.loss.zero_sum:
            raise MisconfigurationException(
                f"CompetitiveGradientDescent solves zero-sum games, and {type(module.loss).__name__} is none: use "
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

    def __call__(self, module: GANModule, batch: Any) -> None:
        """Move the players on one batch."""
        moving = {player: module._moving(player) for player in module.plan}
        with module._precise():
            losses, adversarial = module._meet(batch)
            total = {p: _flat(_gradients(losses[p], moving[p]), moving[p]).detach() for p in module.plan}
            total = {player: mean_over_ranks(g) for player, g in total.items()}
            cross = {p: _flat(_gradients(adversarial["g"], moving[p]), moving[p]) for p in module.plan}
            scales = self._scales(total)
            rates = {player: scale * _rate(module, player) for player, scale in scales.items()}

            def product(player: Player, vector: Tensor) -> Tensor:
                """The mixed derivatives, from the other player's space into this one's."""
                other = cross["g" if player == "d" else "d"]
                if not other.requires_grad:
                    return torch.zeros_like(total[player])
                row = torch.autograd.grad(other, moving[player], vector, retain_graph=True, allow_unused=True)
                return mean_over_ranks(_flat(row, moving[player]))

            d_g, d_d = self._solve(total, rates, product)
        module._deposit("g", _pieces(scales["g"] * d_g, moving["g"]))
        module._deposit("d", _pieces(scales["d"] * d_d, moving["d"]))
        for player in module.plan:
            module.apply_gradients(player)
        self._iteration = module.iteration + 1

    def _forget(self, module: GANModule) -> None:
        self._steps, self._squares = 0, {}

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
        """What each parameter's learning rate is multiplied by."""
        if not self.adaptive:
            return {player: torch.ones_like(g) for player, g in v.items()}
        self._steps += 1
        for player, g in v.items():
            square = self._squares.get(player, torch.zeros_like(g)).to(g.device)
            self._squares[player] = self.beta * square + (1 - self.beta) * g.square()
        bias = 1 - self.beta**self._steps
        return {player: 1 / ((square / bias).sqrt() + self.eps) for player, square in self._squares.items()}


def _rate(module: GANModule, player: Player) -> Tensor:
    """The learning rate of every parameter."""
    rates = {id(p): group["lr"] for group in module._optimizer(player).param_groups for p in group["params"]}
    return torch.cat([torch.full_like(p, rates[id(p)]).reshape(-1) for p in module._moving(player)])


def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Solve A x = b for a symmetric positive definite A that is known by its products.

    Args:
        matrix: x ↦ A x.
        right: b, (n,).
        tolerance: stop when ‖b − A x‖ ≤ tolerance · ‖b‖.
        max_iterations: or after so many products.

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
