"""Temporarily substitutes tensors for a network's parameters, and freezes buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule

from lightning_gan_stability._compat import buffer_names, computed_weights, without_fsdp_hooks
from lightning_gan_stability.layers import has_spectral_norm

T = TypeVar("T")


class FrozenBuffers:
    """A context in which forward passes do not change a module's buffers.

    BatchNorm in train mode still uses the statistics of its batch, but does not record them; the singular vectors of
    spectral norm are constants. Forward passes get copies of buffers. Make it once and use it many times.

    Args:
        module: the module, whose buffers and those of all its layers are frozen.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> frozen = FrozenBuffers(norm)
        >>> with frozen():
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean
        tensor([0.])
    """

    def __init__(self, module: nn.Module) -> None:
        layers = list(module.modules())
        self.buffers = [(m, name) for m in layers for name in buffer_names(m)]
        self.spectral = [m for m in layers if has_spectral_norm(m)]
        # the older normalizations leave what they have computed as a plain attribute
        self.computed = [(m, name) for m in layers for name in computed_weights(m)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Freeze the buffers within the context."""
        before = [(m, name, getattr(m, name)) for m, name in (*self.buffers, *self.computed)]
        training = [(m, m.training) for m in self.spectral]
        for m, name in self.buffers:
            buffer = getattr(m, name)
            setattr(m, name, None if buffer is None else buffer.clone())
        for m in self.spectral:
            m.training = False
        try:
            yield
        finally:
            for m, name, tensor in before:
                setattr(m, name, tensor)
            for m, mode in training:
                m.training = mode


class Substitution:
    """Runs functions with tensors substituted for a module's parameters, and with fixed buffers.

    Values and gradients are those of the module with these parameters. Make it once and use it many times.

    Args:
        module: the module that contains the parameters.
        parameters: the parameters to replace.
        frozen: the part of the module whose buffers must not change; None: the whole module.

    Raises:
        ValueError: if parameters of recurrent layers are to be replaced, because these keep their own list of weights.
        RuntimeError: from a run in which a layer uses ``torch.utils.checkpoint``, which would run again with other
            parameters when gradients are computed.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> Substitution(layer, [layer.weight])([torch.tensor([[3.0]])], lambda: layer(torch.ones(1)))
        tensor([3.])
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], frozen: nn.Module | None = None) -> None:
        self.runner = _Runner(module)
        rows = {id(p): row for row, p in enumerate(parameters)}
        every = self.runner.named_parameters(remove_duplicate=False)  # shared ones have several names
        self.rows = {name: rows[id(p)] for name, p in every if id(p) in rows}
        self.frozen = FrozenBuffers(module if frozen is None else frozen)
        touched = [m for m in module.modules() if any(id(p) in rows for p in m.parameters())]
        sharded = any(isinstance(m, FSDPModule) for m in touched)
        self.roots = [m for m in module.children() if m in touched] if sharded else []
        recurrent = next((m for m in touched if isinstance(m, nn.RNNBase)), None)
        if recurrent is not None:
            raise ValueError(f"{type(recurrent).__name__} keeps its own list of weights, which cannot be replaced.")

    def __call__(self, tensors: Sequence[Tensor], function: Callable[..., T], *arguments: Any) -> T:
        """Run a function with the tensors as the module's parameters."""
        with ExitStack() as stack:
            stack.enter_context(self.frozen())
            for root in self.roots:
                stack.enter_context(without_fsdp_hooks(root))
            with suppress(RuntimeError):  # somebody else's hooks are in place, under which nobody can tell
                stack.enter_context(disable_saved_tensors_hooks(_CHECKPOINTS))
            stack.enter_context(_without_reentrant_checkpoints())
            weights = {name: tensors[row] for name, row in self.rows.items()}
            return torch.func.functional_call(  # type: ignore[no-any-return]
                self.runner, weights, (function, *arguments), tie_weights=False
            )


_CHECKPOINTS = (
    "Activation checkpoints (torch.utils.checkpoint) run a layer again when gradients are taken, and other weights are "
    "in place by then: remove them, or the update rule that looks ahead (Unrolling)."
)


class _Refused:
    """In the place of what runs reentrant checkpoints, which use no hooks and would go wrong without a word."""

    @staticmethod
    def apply(*_: Any) -> NoReturn:
        raise RuntimeError(_CHECKPOINTS)


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    original = checkpointing.CheckpointFunction
    checkpointing.CheckpointFunction = _Refused  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        checkpointing.CheckpointFunction = original  # type: ignore[misc]


class _Runner(nn.Module):
    """Has a module whose parameters are replaced while it runs any function."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)
