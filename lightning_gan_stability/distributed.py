"""Tensors that are spread over processes, or meant for all of them."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards, for which all processes must ask; the tensor itself if it has none.

    Example:
        >>> full_tensor(torch.ones(1))
        tensor([1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_distributed() -> bool:
    """Whether several processes train together.

    Example:
        >>> is_distributed()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """How many processes train together.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size() if is_distributed() else 1


def gather_rows(tensor: Tensor) -> list[Tensor]:
    """The tensor of every process, which may have different numbers of rows, in the order of ranks.

    Example:
        >>> gather_rows(torch.ones(2, 1))
        [tensor([[1.],
                [1.]])]
    """
    if not is_distributed():
        return [tensor]
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
    lengths = [int(size) for size in sizes]
    padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    return [rows[:n] for rows, n in zip(found, lengths, strict=True)]


def gather_objects(thing: T) -> list[T]:
    """What every process has, in the order of ranks; anything that can be pickled.

    Example:
        >>> gather_objects({"row": 3})
        [{'row': 3}]
    """
    if not is_distributed():
        return [thing]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, thing)
    return found


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag, true if any process has set it; the flags themselves if there is one process.

    Example:
        >>> any_rank([True, False], torch.device("cpu"))
        [True, False]
    """
    if not is_distributed():
        return flags
    tensor = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself if there is one process.

    Differentiable to any order, so that with gradients averaged by DDP many ranks are one on the whole batch.

    Example:
        >>> mean_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_distributed():
        return x
    mean = x.detach().clone()
    dist.all_reduce(mean)
    mean = mean / dist.get_world_size() + (x - x.detach())  # adds 0, and the gradient of x
    if mean.requires_grad:
        mean.register_hook(mean_over_ranks)  # type: ignore[no-untyped-call]  # a mean is its own adjoint
    return mean
