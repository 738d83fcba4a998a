"""Support for strategies with several processes: DDP, and the shards of ModelParallelStrategy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parallel import DistributedDataParallel

from lightning_gan_stability._compat import allow_unused_parameters, exchanged_parameters, has_comm_hook, norms
from lightning_gan_stability.distributed import full_tensor, own_gradients

if TYPE_CHECKING:
    from lightning_gan_stability.protocols import GANProtocol


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that cannot work; make plain ``strategy: ddp`` work."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise MisconfigurationException(
            f"{type(strategy).__name__} cannot train two optimizers by manual optimization: use strategy='ddp', or "
            "ModelParallelStrategy to shard the networks."
        )
    if isinstance(strategy, DDPStrategy):
        allow_unused_parameters(strategy)  # each player's backward leaves the other's parameters unused


def exchange_own_gradients(trainer: Trainer) -> None:
    """Let DDP send only the gradients of the player that steps, unless the user has a communication hook."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and not has_comm_hook(model):
        model.register_comm_hook(None, own_gradients(group=model.process_group))


def check_equal_batches(trainer: Trainer, device: torch.device) -> None:
    """Refuse processes with different numbers of batches: those with more would wait for the others forever."""
    mine = trainer.num_training_batches
    if trainer.world_size > 1 and math.isfinite(mine):
        count = torch.tensor(float(mine), device=device)
        most, least = (trainer.strategy.reduce(c, reduce_op="max").item() for c in (count.clone(), -count))
        if most != -least:
            raise MisconfigurationException(
                f"The processes have between {-least:.0f} and {most:.0f} batches in an epoch, this one {mine}: "
                "give all the same number, by drop_last=True, a DistributedSampler or limit_train_batches."
            )


def without_exchange(trainer: Trainer) -> AbstractContextManager[None]:
    """Backward passes without gradient exchange, for all micro-batches but the last."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of gradients, including all of their shards."""
    if len({g.device for g in gradients}) == 1 and not any(isinstance(g, DTensor) for g in gradients):
        stacked = torch.stack(norms(gradients))  # what torch does too, at a fraction of the cost
        whole: Tensor = torch.linalg.vector_norm(stacked)
        return whole
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # of torch 2.9 each process's part, and clipping would add its ε to each
        norm = norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
    return full_tensor(norm)


class Sharding:
    """The shards of both networks under ModelParallelStrategy; without a device mesh there are none.

    Args:
        module: the GAN.
    """

    def __init__(self, module: GANProtocol) -> None:
        self.module = module
        self._shards: dict[str, nn.Parameter] = {}  # by the names of full weights
        self._exchanged: set[int] | None = None  # parameters whose gradients DDP exchanges; None: there is no DDP

    @property
    def networks(self) -> list[nn.Module]:
        """The networks, with the average if there is one; a ModuleDict or ModuleList counts as its values."""
        module = self.module
        found = [
            module.discriminator,
            module.generator,
            *([] if module.generator_ema is None else [module.generator_ema]),
        ]
        return [
            part
            for network in found
            for part in (network.children() if isinstance(network, nn.ModuleDict | nn.ModuleList) else [network])
        ]

    def shard(self) -> None:
        """Shard the networks over the data-parallel processes of the device mesh."""
        mesh = self.module.device_mesh
        if mesh is None:
            return
        if mesh["tensor_parallel"].size() > 1:
            raise MisconfigurationException(
                "GANModule shards its networks over data-parallel processes, but ModelParallelStrategy has "
                f"tensor_parallel_size={mesh['tensor_parallel'].size()}: set tensor_parallel_size=1 and "
                "data_parallel_size to the number of processes."
            )
        for network in self.networks:
            if not isinstance(network, FSDPModule):  # from the run before
                fully_shard(network, mesh=mesh["data_parallel"])

    def prepare(self) -> None:
        """Allow second derivatives; refuse networks that an overridden ``configure_model`` has not sharded."""
        if self.module.device_mesh is None:
            return
        if not all(isinstance(network, FSDPModule) for network in self.networks):
            raise MisconfigurationException(
                "ModelParallelStrategy trains networks that are sharded, and `configure_model` has left one of them as "
                "it is: call `super().configure_model()` at its end, or `fully_shard` both networks."
            )
        for network in self.networks:
            # second derivatives need weights that the first ones' backward pass would have freed
            network.set_reshard_after_backward(False)  # type: ignore[operator]

    def layers(self) -> list[FSDPModule]:
        """The sharded networks and layers; empty without a device mesh."""
        if self.module.device_mesh is None:
            return []
        return [m for network in self.networks for m in network.modules() if isinstance(m, FSDPModule)]

    def reshard(self) -> None:
        """Replace full weights by shards, because optimizers step shards."""
        for layer in self.layers():
            layer.reshard()

    def note_shards(self) -> None:
        """Record which shard belongs to which full weight, while all weights are sharded."""
        self.reshard()
        on_mesh = self.module.device_mesh is not None
        self._shards = dict(self.module.named_parameters()) if on_mesh else {}

    def note_exchanged(self) -> None:
        """Record the parameters whose gradients DDP exchanges, at the start of a run."""
        model = self.module.trainer.strategy.model
        self._exchanged = None
        if isinstance(model, DistributedDataParallel):
            self._exchanged = {id(p) for p in exchanged_parameters(model)}

    def check_exchanged(self, parameters: Sequence[Tensor]) -> None:
        """Refuse a step of parameters whose gradients DDP has not exchanged: each process would go its own way.

        Raises:
            MisconfigurationException: with the parameter's name.
        """
        exchanged = self._exchanged
        if exchanged is None or all(id(p) in exchanged for p in parameters):
            return
        left = next(p for p in parameters if id(p) not in exchanged)
        name = next((name for name, p in self.module.named_parameters() if p is left), None)
        if name is None:
            raise MisconfigurationException(
                f"An optimizer has a parameter of shape {tuple(left.shape)} that the module does not list among its "
                "parameters, and DDP exchanges no gradients of it: register its network as an attribute of the "
                "module, not in a plain list, dict or function."
            )
        raise MisconfigurationException(
            f"An optimizer steps `{name}`, and DDP exchanges no gradients of it, because it was frozen when the run "
            "began or stands in `_ddp_params_and_buffers_to_ignore`: let it require a gradient from the beginning, "
            "and set its learning rate to 0 for as long as it should rest, or train on one process."
        )

    @contextmanager
    def gradients_of(self, own: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
        """Run a backward pass that leaves the gradients of other parameters unchanged.

        ``requires_grad`` of shards does not reach full weights, so the other player's weights get gradients needlessly.
        """
        kept = [p.grad for p in others]
        for p in others:
            p.grad = None
        try:
            yield
            self._collect({id(p) for p in own})
        finally:
            for p, gradient in zip(others, kept, strict=True):
                p.grad = gradient

    def _collect(self, moving: set[int]) -> None:
        """Give shards what FSDP has left of a backward pass in the ``grad`` of full weights.

        FSDP averages gradients over processes once that of a network's input is there. Those of a penalty's second
        derivatives can come later: autograd runs newer nodes first and numbers them by thread, so that on GPUs, where
        a thread of its own makes them, they count as old.
        """
        for name, full in self.module.named_parameters():
            shard, gradient = self._shards.get(name), full.grad
            if not isinstance(shard, DTensor) or full is shard or gradient is None:
                continue
            full.grad = None
            if id(shard) in moving:
                mesh = shard.device_mesh
                rest = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()]).redistribute(
                    mesh, shard.placements
                )
                shard.grad = rest if shard.grad is None else shard.grad + rest
