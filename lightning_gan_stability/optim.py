"""Drop-in optimizers for games, and differentiable steps of torch's optimizers."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_gan_stability._checks import check, check_integer, is_number
from lightning_gan_stability.distributed import full_tensor, mean_over_ranks

__all__ = ["NegativeMomentum", "OptimisticAdam", "OptimisticSGD", "lazy_correction"]

Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]


def lazy_correction(
    every: int, lr: float, betas: tuple[float, float] = (0.0, 0.99)
) -> dict[str, float | tuple[float, float]]:
    """Adam's settings for a player with a separate lazy penalty, which takes k + 1 optimizer steps instead of k.

    lr · c and betasᶜ with c = k / (k + 1), from "Analyzing and Improving the Image Quality of StyleGAN",
    https://arxiv.org/abs/1912.04958, appendix B. Use it for penalties with ``every=k, separate=True`` only. A lazy
    penalty within the player's step adds no step and needs no correction.

    Args:
        every: k, the interval of the penalty.
        lr: the learning rate without the penalty.
        betas: the betas without the penalty.

    Returns:
        ``lr`` and ``betas`` for the optimizer.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> {name: value for name, value in lazy_correction(4, lr=0.002).items() if name == "lr"}
        {'lr': 0.0016}
    """
    check_integer("every", every)
    _check("lr", lr, 0, math.inf, "a finite number that is not negative")
    for beta in betas:
        _check("betas", beta, 0, 1, "two numbers in [0, 1)")
    factor = every / (every + 1)
    return {"lr": lr * factor, "betas": (betas[0] ** factor, betas[1] ** factor)}


def _check(name: str, value: object, low: float, high: float, what: str) -> None:
    """Raise ``ValueError`` unless low ≤ value < high. Like torch, it accepts a tensor with one element."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    check(is_number(number) and low <= number < high, name, what, value)  # type: ignore[operator]


class _PerParameter(Optimizer):
    """Base of optimizers that define their update for a single parameter."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters and check its settings."""
        super().add_param_group(param_group)
        self._check(self.param_groups[-1])

    def _check(self, group: Group) -> None:
        for name in ("lr", "weight_decay"):
            _check(name, group[name], 0, math.inf, "a finite number that is not negative")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                    self._move(parameter, gradient, self.state[parameter], group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        raise NotImplementedError


class OptimisticSGD(_PerParameter):
    """Optimistic gradient descent (OGDA), which extrapolates the next gradient from the last two.

    w ← w − 2η gₜ + η gₜ₋₁, with g₋₁ = g₀, which makes the first step a plain one. "Training GANs with Optimism",
    https://arxiv.org/abs/1711.00141. On the game min max xy with simultaneous steps it converges for η < 1/√3. Costs
    the same forward and backward passes as SGD, and one copy of the gradient.

    Args:
        params: parameters or groups of them.
        lr: η, not negative.
        weight_decay: λ ≥ 0; λ w is added to the gradient.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = OptimisticSGD([w], lr=0.1)
        >>> for gradient in (1.0, 3.0):
        ...     w.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> w  # 1 − 0.1 · 1, then − 0.2 · 3 + 0.1 · 1
        Parameter containing:
        tensor([0.4000], requires_grad=True)
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _move(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        previous = state.get("previous", gradient)
        parameter.add_(previous - 2 * gradient, alpha=group["lr"])
        state["previous"] = gradient


class OptimisticAdam(_PerParameter):
    """Adam with the optimistic correction.

    w ← w − 2η uₜ + η uₜ₋₁ with Adam's direction uₜ = m̂ₜ / (√v̂ₜ + ε), and u₋₁ = u₀, which makes the first step a plain
    one. "Training GANs with Optimism", https://arxiv.org/abs/1711.00141. Costs the same forward and backward passes as
    Adam, and one copy of the parameters.

    Args:
        params: parameters or groups of them.
        lr: η, not negative.
        betas: decay of the running means of gradients and of squared gradients, each in [0, 1).
        eps: ε, not negative.
        weight_decay: λ ≥ 0; λ w is added to the gradient.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([1.0, -5.0])
        >>> OptimisticAdam([w], lr=0.1).step()
        >>> w
        Parameter containing:
        tensor([-0.1000,  0.1000], requires_grad=True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _check(self, group: Group) -> None:
        super()._check(group)
        _check("eps", group["eps"], 0, math.inf, "a finite number that is not negative")
        betas = group["betas"]
        two = isinstance(betas, Sequence) and len(betas) == 2
        check(two and all(is_number(b) and 0 <= b < 1 for b in betas), "betas", "two numbers in [0, 1)", betas)

    def _move(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        state.setdefault("exp_avg", torch.zeros_like(parameter))
        state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
        step = state["step"] = state.get("step", 0) + 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        direction = (state["exp_avg"] / (1 - beta1**step)).div_(root)
        parameter.add_(state.get("previous", direction) - 2 * direction, alpha=group["lr"])
        state["previous"] = direction


class NegativeMomentum(_PerParameter):
    """Gradient descent with negative momentum, which damps the rotation of the players around an equilibrium.

    Δₜ₊₁ = β Δₜ − η gₜ and w ← w + Δₜ₊₁. This is Polyak's heavy ball; torch's SGD does not accept β < 0. "Negative
    Momentum for Improved Game Dynamics", https://arxiv.org/abs/1807.04740. On min max xy, alternating steps with β = −½
    converge for η < 1; simultaneous ones diverge with any β. Costs the same forward and backward passes as SGD.

    Args:
        params: parameters or groups of them.
        lr: η, not negative.
        momentum: β in (−1, 1).
        weight_decay: λ ≥ 0; λ w is added to the gradient.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = NegativeMomentum([w], lr=0.1)
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([1.0])
        ...     optimizer.step()
        >>> w  # −0.1, then −0.1 + 0.5 · 0.1
        Parameter containing:
        tensor([-0.1500], requires_grad=True)
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, momentum: float = -0.5, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _check(self, group: Group) -> None:
        super()._check(group)
        _check("momentum", group["momentum"], math.nextafter(-1, 0), 1, "in (-1, 1)")

    def _move(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        move = -group["lr"] * gradient
        if "move" in state:
            move.add_(state["move"], alpha=group["momentum"])
        parameter.add_(move)
        state["move"] = move


# ---------- torch's optimizers, differentiable


def _root(x: Tensor) -> Tensor:
    """√x with slope 0 instead of infinity at 0, where a unit is dead and has no gradient."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _sgd(p: Tensor, g: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    if momentum := group["momentum"]:
        buffer = state.get("momentum_buffer")
        buffer = g if buffer is None else momentum * buffer + (1 - group["dampening"]) * g
        state = {"momentum_buffer": buffer}
        g = g + momentum * buffer if group["nesterov"] else buffer
    return p - group["lr"] * g, state


def _adam(p: Tensor, g: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    (beta1, beta2), step = group["betas"], state["step"] + 1
    if group["decoupled_weight_decay"]:
        p = p * (1 - group["lr"] * group["weight_decay"])
    elif group["weight_decay"]:
        g = g + group["weight_decay"] * p
    mean = torch.lerp(state["exp_avg"], g, 1 - beta1)
    square = torch.addcmul(beta2 * state["exp_avg_sq"], g, g, value=1 - beta2)
    state = state | {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    if group["amsgrad"]:
        square = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
    divisor = _root(square) / math.sqrt(1 - beta2**step) + group["eps"]
    return p - group["lr"] / (1 - beta1**step) * (mean / divisor), state


def _rmsprop(p: Tensor, g: Tensor, state: State, group: Group) -> tuple[Tensor, State]:
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    state = dict(state)
    spread = square = state["square_avg"] = torch.addcmul(
        group["alpha"] * state["square_avg"], g, g, value=1 - group["alpha"]
    )
    if group["centered"]:
        mean = state["grad_avg"] = torch.lerp(state["grad_avg"], g, 1 - group["alpha"])
        spread = torch.addcmul(square, mean, mean, value=-1)
    move = g / (_root(spread) + group["eps"])
    if group["momentum"]:
        move = state["momentum_buffer"] = group["momentum"] * state["momentum_buffer"] + move
    return p - group["lr"] * move, state


def _adam_state(group: Group) -> list[str]:
    return ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]


def _rmsprop_state(group: Group) -> list[str]:
    return ["square_avg", *["grad_avg"] * group["centered"], *["momentum_buffer"] * (group["momentum"] > 0)]


# each optimizer's rule, and the entries of its state that the rule needs, initially zero
_RULES: dict[type[Optimizer], tuple[Callable[..., tuple[Tensor, State]], Callable[[Group], list[str]]]] = {
    SGD: (_sgd, lambda group: []),
    Adam: (_adam, _adam_state),
    AdamW: (_adam, _adam_state),
    RMSprop: (_rmsprop, _rmsprop_state),
}


@dataclass
class Part:
    """Parameters that take the same step: their indices, their group, and their state, each entry as one vector."""

    rows: list[int]
    group: Group
    state: State

    def as_leaves(self) -> "Part":
        """The same state with tensors that are leaves and require gradients."""
        detached = {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in self.state.items()}
        return replace(self, state=detached)


class Differentiable:
    """Differentiable versions of the steps that an optimizer would take from its current state.

    Values are those of ``optimizer.step()``; the optimizer itself does not change. Parameters without a gradient do not
    change either. Gradients are averaged over ranks, so that N ranks take the same steps as one.

    Args:
        optimizer: SGD, Adam, AdamW or RMSprop of torch.
        parameters: those of its parameters to update, in any order.
        clip_norm: largest norm of the gradient of all parameters, or None.
        constrain: function to apply to the parameters after a step, such as clipping, or None.

    Raises:
        ValueError: if the optimizer is of another class.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> steps = Differentiable(SGD([w], lr=0.1), [w])
        >>> (v,), _ = steps([w], [3 * w], None)
        >>> v, torch.autograd.grad(v.sum(), w)
        (tensor([0.7000, 0.7000], grad_fn=<ViewBackward0>), (tensor([0.7000, 0.7000]),))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        clip_norm: float | None = None,
        constrain: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        if type(optimizer) not in _RULES:
            raise ValueError(f"{type(optimizer).__name__} is not SGD, Adam, AdamW or RMSprop of torch.")
        self.optimizer, self.parameters = optimizer, parameters
        self.clip_norm, self.constrain = clip_norm, constrain
        self.rule, self.needs = _RULES[type(optimizer)]

    def __call__(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], parts: list[Part] | None
    ) -> tuple[list[Tensor], list[Part]]:
        """Take one step.

        Args:
            parameters: the parameters before the step.
            gradients: gradients of the loss at these parameters.
            parts: the state that the last step returned; None: the optimizer's own state.

        Returns:
            The parameters after the step, and the state.
        """
        parts = self._parts(gradients) if parts is None else parts
        slopes = [_flat(gradients, part.rows) for part in parts]
        slopes = self._clip(
            [mean_over_ranks(-s if p.group["maximize"] else s) for s, p in zip(slopes, parts, strict=True)]
        )
        moved, after = list(parameters), []
        for part, slope in zip(parts, slopes, strict=True):
            flat, state = self.rule(_flat(parameters, part.rows), slope, part.state, part.group)
            pieces = torch.split(flat, [parameters[row].numel() for row in part.rows])
            for row, piece in zip(part.rows, pieces, strict=True):
                moved[row] = piece.view(parameters[row].shape)
            after.append(replace(part, state=state))
        return moved if self.constrain is None else self.constrain(moved), after

    def _clip(self, slopes: list[Tensor]) -> list[Tensor]:
        if self.clip_norm is None:
            return slopes
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(slope) for slope in slopes]))
        factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return [factor * slope for slope in slopes]

    def _parts(self, gradients: Sequence[Tensor | None]) -> list[Part]:
        """Group the parameters that have a gradient and take the same step, because few large operations are faster."""
        number = {id(p): row for row, p in enumerate(self.parameters)}
        rows: dict[tuple[Any, ...], list[int]] = {}
        for i, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                row = number.get(id(p))
                if row is not None and gradients[row] is not None:
                    state = self.optimizer.state.get(p, {})
                    key = (i, float(state.get("step", 0)), state.get("momentum_buffer") is None, p.dtype, p.device)
                    rows.setdefault(key, []).append(row)
        groups = self.optimizer.param_groups
        return [Part(row, groups[key[0]], self._start(row, groups[key[0]], key[1])) for key, row in rows.items()]

    def _start(self, rows: list[int], group: Group, step: float) -> State:
        states = [self.optimizer.state.get(self.parameters[row], {}) for row in rows]
        start: State = {"step": step}
        if states[0].get("momentum_buffer") is not None:
            start["momentum_buffer"] = _joined(state["momentum_buffer"] for state in states)
        for name in self.needs(group):
            zeros = [torch.zeros_like(self.parameters[row]) for row in rows]
            start[name] = _joined(s.get(name, z) for s, z in zip(states, zeros, strict=True))
        return start


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([full_tensor(tensor).reshape(-1) for tensor in tensors])


def _flat(tensors: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor:
    return torch.cat([tensors[row].reshape(-1) for row in rows])  # type: ignore[union-attr]
