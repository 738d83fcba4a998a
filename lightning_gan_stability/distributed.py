"""Tensors that are spread over processes, or meant for all of them."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


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
