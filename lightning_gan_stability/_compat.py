"""Every use of a private name of torch or Lightning, one function each.

`tests/test_compat.py` says what each of them relies on, and fails when an upgrade takes it away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.utils._foreach_utils as foreach_utils
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as OldWeightNorm
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities import CombinedLoader
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.optim.swa_utils import AveragedModel


# ---------- torch: optimizers


def fused_devices() -> list[str]:
    """The types of devices on which optimizers may be fused."""
    return foreach_utils._get_fused_kernels_supported_devices()


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler leaves the gradients of an optimizer scaled, for it to unscale them in its step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


# ---------- torch: networks


def is_spectral_norm(module: nn.Module) -> bool:
    """Whether a module is torch's parametrization by spectral norm (not a layer that has one)."""
    return isinstance(module, parametrizations._SpectralNorm)


def has_old_spectral_norm(layer: nn.Module) -> bool:
    """Whether a layer has ``torch.nn.utils.spectral_norm``, which is a hook before its forward pass."""
    return any(isinstance(hook, OldSpectralNorm) for hook in layer._forward_pre_hooks.values())


def has_old_weight_norm(layer: nn.Module) -> bool:
    """Whether a layer has ``torch.nn.utils.weight_norm``, which is a hook before its forward pass."""
    return any(isinstance(hook, OldWeightNorm) for hook in layer._forward_pre_hooks.values())


def computed_weights(layer: nn.Module) -> list[str]:
    """The weights that hooks of the older weight norm and spectral norm compute before each forward pass."""
    hooks = layer._forward_pre_hooks.values()
    return [hook.name for hook in hooks if isinstance(hook, OldSpectralNorm | OldWeightNorm)]


def register_like(module: nn.Module, name: str, buffer: Tensor, original: nn.Module) -> None:
    """Register a buffer that is in the state dict if that of the same name in another module is."""
    module.register_buffer(name, buffer, name not in original._non_persistent_buffers_set)


def buffer_names(module: nn.Module) -> list[str]:
    """The names of a module's own buffers, of those too that are None yet."""
    return list(module._buffers)


class Float32Buffers(nn.Module):
    """A module whose buffers stay in float32 (or float64) when it is cast, with others around it, to fewer digits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def precise(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == torch.float64 else result.float()

        return super()._apply(precise, recurse)  # type: ignore[no-untyped-call]


def lerp_(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move tensors in place towards others, as one operation for all of them."""
    torch._foreach_lerp_(tensors, ends, weight)


def norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The L2 norm of each tensor, as one operation for all of them."""
    return torch._foreach_norm(tensors)


@contextmanager
def without_fsdp_hooks(module: nn.Module) -> Iterator[None]:
    """Let forward passes of sharded layers leave their parameters as they are: FSDP would put its own into place."""
    tables: list[dict[int, Any]] = []
    for m in module.modules():
        tables += [m._forward_pre_hooks, m._forward_hooks]
    changed = []
    for hooks in tables:
        ours = {key: hook for key, hook in hooks.items() if not _is_of_fsdp(hook)}
        if len(ours) < len(hooks):
            changed.append((hooks, dict(hooks)))
            _refill(hooks, ours)
    try:
        yield
    finally:
        for hooks, before in changed:
            _refill(hooks, before)


def _is_of_fsdp(hook: Any) -> bool:
    # methods of FSDP's state, or functions that wrap those of layers that are sharded together
    owner = type(hook.__self__) if hasattr(hook, "__self__") else hook
    return str(getattr(owner, "__module__", "")).startswith("torch.distributed.fsdp")


def _refill(hooks: dict[int, Any], entries: Mapping[int, Any]) -> None:
    hooks.clear()
    hooks.update(entries)  # in their order


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version


# ---------- torch: communication


class NoExchange(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which processes cannot talk: what would wait for the others raises instead.

    Collectives are operations like others, and pass through modes of the dispatcher, on autograd's threads as well.

    Raises:
        RuntimeError: from the collective.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional"):
            raise RuntimeError(f"{func} would wait for other processes.")
        return func(*args, **kwargs or {})


# ---------- torch: compilation


def is_compiled(network: nn.Module) -> bool:
    """Whether a module was compiled, in place by ``network.compile()`` or wrapped by ``torch.compile(network)``."""
    return network._compiled_call_impl is not None or "_orig_mod" in network._modules


def original_module(network: nn.Module) -> nn.Module:
    """The module that ``torch.compile(network)`` wraps; the module itself if it is not wrapped."""
    wrapped = network._modules.get("_orig_mod")
    return network if wrapped is None else wrapped


def mark_dynamic(tensor: Tensor) -> None:
    """Let one graph serve all batch sizes: Dynamo gives up after eight graphs of one class of network."""
    torch._dynamo.maybe_mark_dynamic(tensor, 0)


def grid_sample_transposed(gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of bilinear ``grid_sample`` by its input, whose own gradient torch does not have."""
    like = gradient.new_empty(()).expand(shape)
    return torch.ops.aten.grid_sampler_2d_backward(gradient, like, grid, 0, 0, False, [True, False])[0]  # type: ignore[no-any-return]


# ---------- torch: schedulers


def scheduler_parts(scheduler: LRScheduler) -> list[LRScheduler]:
    """The schedulers that a SequentialLR or a ChainedScheduler is made of."""
    return list(getattr(scheduler, "_schedulers", []))


# ---------- Lightning


def trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer that a module is attached to, if there is one; ``module.trainer`` would raise."""
    trainer: Trainer | None = module._trainer
    return trainer


def is_wrapped_by_compile(module: LightningModule) -> bool:
    """Whether the whole LightningModule went through ``torch.compile``."""
    return getattr(module, "_compiler_ctx", None) is not None


def given_hyperparameters() -> dict[str, Any] | None:
    """What LightningCLI lets `save_hyperparameters` keep: the config that it makes the module from."""
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

    given: dict[str, Any] | None = _given_hyperparameters.get()
    return given


def allow_unused_parameters(strategy: DDPStrategy) -> None:
    """Let DDP expect parameters without a gradient, unless the user has said something else."""
    strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def has_comm_hook(model: DistributedDataParallel) -> bool:
    """Whether DDP has a communication hook already; it takes no second one."""
    return bool(model._comm_hooks)


def exchanged_parameters(model: DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters whose gradients DDP exchanges, if nothing was frozen or unfrozen since it was made."""
    return [p for p in model._module_parameters if p.requires_grad]


def saves_by_time(callback: Callback) -> bool:
    """Whether a callback is a ModelCheckpoint with ``train_time_interval``."""
    return getattr(callback, "_train_time_interval", None) is not None


def mode_of(loader: CombinedLoader) -> Any:
    """How a CombinedLoader combines the batches of its loaders."""
    return loader._mode


def shares_data(trainer: Trainer) -> bool:
    """Whether Lightning gives each process its share of a loader's samples, where there are several processes."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def to_device(trainer: Trainer, batch: Any) -> Any:
    """A batch as a training step gets it: converted, moved, and through the hooks of module and data module."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


def save_triggers(checkpoint: ModelCheckpoint, trainer: Trainer) -> tuple[int, bool]:
    """When a ModelCheckpoint saves: its ``every_n_train_steps`` or 0, and whether otherwise with training epochs.

    If not with training epochs, it saves with validations.
    """
    return checkpoint._every_n_train_steps, checkpoint._should_save_on_train_epoch_end(trainer)


def check_on_train_epoch_end(stopping: EarlyStopping, setting: bool) -> bool:
    """Set whether an EarlyStopping checks when a training epoch ends, or a validation; return what it was set to."""
    before, stopping._check_on_train_epoch_end = bool(stopping._check_on_train_epoch_end), setting
    return before


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """The average that Lightning's callback keeps of a module during a fit, with its counter."""
    return callback._average_model


def loader_of(trainer: Trainer, split: Literal["train", "val", "validate", "test"]) -> Any:
    """The loader of a split of a fit, of ``trainer.validate`` or ``trainer.test``, as its owner gives it.

    Before the loop has asked for it; an empty list if there is none.
    """
    loops: dict[str, Any] = {
        "train": trainer.fit_loop,
        "val": trainer.fit_loop.epoch_loop.val_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
    }
    loop = loops[split]
    source = loop._data_source
    return source.dataloader() if source.instance is not None and source.is_defined() else []
