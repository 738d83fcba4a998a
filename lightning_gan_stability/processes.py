"""What several processes need of the module: networks in shards, one count of batches, the strategies that can work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gan_stability.callbacks.base import NETWORKS

#: Hooks in which a LightningModule does nothing, so that nobody calls `super()` in them, and a GANModule does something
HOOKS = (
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_fit_end",
    "on_before_optimizer_step",
    "on_save_checkpoint",
    "on_load_checkpoint",
)


def note_hooks(base: type) -> None:
    """Let the hooks of a class note that they have run."""

    def noted(hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            self._missed.discard(hook.__name__)
            return hook(self, *args, **kwargs)

        return run

    for name in HOOKS:
        setattr(base, name, noted(getattr(base, name)))


def complete_hooks(cls: type, base: type) -> None:
    """Let the hooks of a subclass be followed by those of its base, unless they have called them themselves."""

    def completed(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            self._missed.add(name)
            result = own(self, *args, **kwargs)
            if name in self._missed:
                getattr(base, name)(self, *args, **kwargs)
            return result

        run.completed = True  # type: ignore[attr-defined]
        return run

    for name in HOOKS:
        own = getattr(cls, name)
        if own is not getattr(base, name) and not hasattr(own, "completed"):
            setattr(cls, name, completed(name, own))


class Processes(LightningModule):
    """The base of :class:`~lightning_gan_stability.clock.Clockwork`."""

    _missed: set[str]  # hooks of the base that are due
    _shards: dict[str, nn.Parameter]

    def _check_strategy(self) -> None:
        """Refuse strategies that cannot work; let plain ``strategy: ddp`` work."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
            raise MisconfigurationException(
                f"{type(strategy).__name__} cannot train two optimizers by manual optimization: use strategy='ddp', or "
                "ModelParallelStrategy to shard the networks."
            )
        if isinstance(strategy, DDPStrategy):
            # each player's backward leaves the other's parameters unused
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def _check_optimizers(self) -> None:
        """Refuse what an overridden `configure_optimizers` may return, and steps that need the loss anew."""
        optimizers = self.trainer.optimizers
        if len(optimizers) < len(NETWORKS):
            raise MisconfigurationException(
                f"`configure_optimizers` must return two optimizers, the discriminator's first, got {len(optimizers)}."
            )
        parts = [{id(p) for p in self.get_submodule(network).parameters()} for network in NETWORKS.values()]
        for optimizer, player, own, other in zip(optimizers, NETWORKS, parts, reversed(parts), strict=False):
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if stepped & other and not stepped & own:
                raise MisconfigurationException(
                    f"The {NETWORKS[player]}'s optimizer has the other network's parameters: `configure_optimizers` "
                    "must return the discriminator's optimizer first."
                )
            if isinstance(optimizer, torch.optim.LBFGS):
                raise MisconfigurationException(
                    f"The {NETWORKS[player]}'s optimizer is LBFGS, which takes the loss anew within a step, as no "
                    "update rule here does: use another optimizer."
                )
            for config in self.trainer.lr_scheduler_configs:
                waits = isinstance(config.scheduler, ReduceLROnPlateau) or config.monitor is not None
                if config.scheduler.optimizer is optimizer and (waits or config.frequency != 1):
                    raise MisconfigurationException(
                        f"`{player}_scheduler` is {type(config.scheduler).__name__} with monitor={config.monitor!r} "
                        f"and frequency={config.frequency}, but schedulers step after every optimizer step here, and "
                        "wait for no metric: use a scheduler that counts steps."
                    )

    def configure_model(self) -> None:
        """Shard both networks over the processes of a ModelParallelStrategy.

        To shard single layers too, override it: ``fully_shard`` them if there is a ``device_mesh``, then call this one.
        """
        mesh = self.device_mesh
        if mesh is None:
            return
        if mesh["tensor_parallel"].size() > 1:
            raise MisconfigurationException(
                "GANModule shards its networks over data-parallel processes, but ModelParallelStrategy has "
                f"tensor_parallel_size={mesh['tensor_parallel'].size()}: set tensor_parallel_size=1 and "
                "data_parallel_size to the number of processes."
            )
        for network in self._networks():
            if not isinstance(network, FSDPModule):  # from the run before
                fully_shard(network, mesh=mesh["data_parallel"])
            # second derivatives need weights that the first ones' backward pass would have freed
            network.set_reshard_after_backward(False)  # type: ignore[operator]

    def _networks(self) -> list[nn.Module]:
        names = (*NETWORKS.values(), "generator_ema")
        return [network for name in names if (network := getattr(self, name)) is not None]

    def _sharded(self) -> list[FSDPModule]:
        """The networks and layers that are sharded; none, without a look at all layers, but on a mesh."""
        if self.device_mesh is None:
            return []
        return [m for network in self._networks() for m in network.modules() if isinstance(m, FSDPModule)]

    def on_train_epoch_start(self) -> None:
        """Refuse processes with different numbers of batches: those with more would wait for the others for ever."""
        mine = self.trainer.num_training_batches
        if self.trainer.world_size > 1 and math.isfinite(mine):
            count = torch.tensor(float(mine), device=self.device)
            most, least = (self.trainer.strategy.reduce(c, reduce_op="max").item() for c in (count.clone(), -count))
            if most != -least:
                raise MisconfigurationException(
                    f"The processes have between {-least:.0f} and {most:.0f} batches in an epoch, this one {mine}: "
                    "give all the same number, by drop_last=True, a DistributedSampler or limit_train_batches."
                )

    @contextmanager
    def _toggled(self, optimizer: LightningOptimizer) -> Iterator[None]:
        """Without gradients for the other player, whose own ones stay."""
        if not self._sharded():
            with self.toggled_optimizer(optimizer):
                yield
            return
        # `requires_grad` of sharded parameters does not reach the whole ones, which get gradients in vain
        groups = [
            group
            for other in self.trainer.optimizers
            if other is not optimizer.optimizer
            for group in other.param_groups
        ]
        others = [p for group in groups for p in group["params"]]
        kept = [p.grad for p in others]
        for p in others:
            p.grad = None
        try:
            yield
            self._settle({id(p) for group in optimizer.param_groups for p in group["params"]})
        finally:
            for p, gradient in zip(others, kept, strict=True):
                p.grad = gradient

    def _reshard(self) -> None:
        """Let shards take the place of whole weights: who steps those would not move these."""
        for layer in self._sharded():
            layer.reshard()

    def _name_shards(self) -> None:
        """Note which shard belongs to which whole weight, as long as no weight is whole."""
        self._reshard()
        self._shards = dict(self.named_parameters()) if self.device_mesh is not None else {}

    def _settle(self, moving: set[int]) -> None:
        """Give shards what FSDP has left of a backward pass in the ``grad`` of whole weights.

        FSDP averages gradients over processes once that of a network's input is there. Those of a penalty's second
        derivatives can come later: autograd runs newer nodes first and numbers them by thread, so that on GPUs, where
        a thread of its own makes them, they count as old.
        """
        for name, whole in self.named_parameters():
            shard, gradient = self._shards.get(name), whole.grad
            if not isinstance(shard, DTensor) or whole is shard or gradient is None:
                continue
            whole.grad = None
            if id(shard) in moving:
                mesh = shard.device_mesh
                rest = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()]).redistribute(
                    mesh, shard.placements
                )
                shard.grad = rest if shard.grad is None else shard.grad + rest


def name_what_cannot_be_read(checkpoint_io: CheckpointIO) -> None:
    """Let errors of files that are torn or foreign say which file; torch's are as bare as "Invalid argument"."""
    load = checkpoint_io.load_checkpoint
    if hasattr(load, "__wrapped__"):
        return

    @wraps(load)
    def named(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # unpickling what is no checkpoint raises anything
            cause = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RuntimeError(
                f"The checkpoint {path} cannot be read ({cause}): if it is torn, resume from the one before."
            ) from error

    checkpoint_io.load_checkpoint = named  # type: ignore[method-assign]
