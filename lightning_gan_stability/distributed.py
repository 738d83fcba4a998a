"""Tensors that are spread over processes, or meant for all of them."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")

GradBucket: TypeAlias = dist.GradBucket  # type: ignore[attr-defined,name-defined]  # as torch's own hooks have it
#: Of DDP: from its state and a bucket of gradients to a future of their averages.
CommHook: TypeAlias = Callable[[Any, GradBucket], torch.futures.Future[torch.Tensor]]


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

    Raises:
        ValueError: on all processes, if their rows have different numbers of values.

    Example:
        >>> gather_rows(torch.ones(2, 1))
        [tensor([[1.],
                [1.]])]
    """
    if not is_distributed():
        return [tensor]
    sizes = [torch.zeros(2, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensor), math.prod(tensor.shape[1:])], device=tensor.device))
    lengths, widths = zip(*(size.tolist() for size in sizes), strict=True)
    if min(widths) < max(widths):
        raise ValueError(
            f"Processes put their rows together, but one process has rows of {max(widths)} values, and another of "
            f"{min(widths)}: give all the same number, for example by padding samples and conditions to one size."
        )
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


def own_gradients(hook: CommHook | None = None, group: dist.ProcessGroup | None = None) -> CommHook:
    """A communication hook for DDP that sends only the gradients of the player whose turn it is.

    DDP sends zeros for parameters without a gradient: the generator's turn would send as many bytes for the resting
    discriminator as it has parameters. Parameters of a player that rests do not require a gradient.

    Args:
        hook: for buckets of which something is to be sent; None: average that.
        group: the processes that train together; None: all.

    Example:
        >>> from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
        >>> own_gradients(fp16_compress_hook).__name__
        'fp16_compress_hook'
    """

    def average(state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer, parts = bucket.buffer(), _required(bucket)
        sent = parts[0] if len(parts) == 1 else torch.cat(parts)
        sent.mul_(1 / dist.get_world_size(group))  # as DDP does it without a hook

        def received(_: Any) -> Any:
            if len(parts) > 1:  # or else what was sent is the buffer's own
                for part, mean in zip(parts, torch.split(sent, [len(part) for part in parts]), strict=True):
                    part.copy_(mean)
            return buffer

        future = dist.all_reduce(sent, group=group, async_op=True).get_future()
        done: torch.futures.Future[torch.Tensor] = future.then(received)
        return done

    inner = average if hook is None else hook

    @functools.wraps(inner)
    def send(state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if any(p.requires_grad for p in bucket.parameters()):
            return inner(state, bucket)
        nothing: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        nothing.set_result(bucket.buffer())
        return nothing

    return send


def _required(bucket: GradBucket) -> list[Tensor]:
    """The stretches of a bucket's buffer whose gradients are required."""
    buffer, parameters = bucket.buffer(), bucket.parameters()
    if all(p.requires_grad for p in parameters):  # of sparse gradients each has a bucket of its own
        return [buffer]
    stretches: list[list[int]] = []
    for p, gradient in zip(parameters, bucket.gradients(), strict=True):
        start = gradient.storage_offset() - buffer.storage_offset()
        stop = start + gradient.numel()
        if not p.requires_grad:
            continue
        if stretches and stretches[-1][1] == start:
            stretches[-1][1] = stop
        else:
            stretches.append([start, stop])
    return [buffer[start:stop] for start, stop in stretches]
