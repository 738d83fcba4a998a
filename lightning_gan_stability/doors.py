"""What passes through a network's door: batches, labels, noise, stand-ins for weights, and checkpoints; plain torch."""

import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_gan_stability.layers import has_spectral_norm

M = TypeVar("M", bound=nn.Module)


class Play(NamedTuple):
    """What one player saw on one (micro-)batch.

    Attributes:
        real: (n, ...) real samples.
        fake: (n, ...) generated samples.
        real_logits: (n,) or (n, patches), (n / m,) of packs of m; None for a generator whose loss does not need them.
        fake_logits: as ``real_logits``.
        latents: (n, latent_dim).
        labels: what the batch gave as labels, of real and of fake samples, or None.
    """

    real: Tensor
    fake: Tensor
    real_logits: Tensor | None
    fake_logits: Tensor
    latents: Tensor
    labels: Tensor | None

    @property
    def both_logits(self) -> tuple[Tensor, Tensor]:
        """Real and fake logits, of a play that has both."""
        assert self.real_logits is not None
        return self.real_logits, self.fake_logits


def join(plays: Sequence[Play]) -> Play:
    """One play of the whole batch, without graphs.

    Example:
        >>> part = Play(*[torch.zeros(2)] * 5, None)
        >>> join([part, part]).real
        tensor([0., 0., 0., 0.])
    """
    if len(plays) == 1:
        return Play(*(None if t is None else t.detach() for t in plays[0]))  # type: ignore[arg-type]
    columns = zip(*plays, strict=True)
    return Play(*(None if c[0] is None else torch.cat([t.detach() for t in c]) for c in columns))  # type: ignore[arg-type]


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Take a batch apart into real samples and labels.

    Args:
        batch: a tensor, ``(x,)``, ``(x, labels)``, or ``{"image": x, "label": labels}`` (label optional).

    Returns:
        Real samples (n, ...), and labels or None.

    Raises:
        ValueError: if the batch has another form, or samples that are not floating point.

    Example:
        >>> unpack({"image": torch.zeros(2, 1)})
        (tensor([[0.],
                [0.]]), None)
    """
    real, labels = batch, None
    if isinstance(batch, Sequence) and len(batch) in (1, 2):
        real, labels = batch[0], batch[1] if len(batch) == 2 else None
    elif isinstance(batch, Mapping):
        real, labels = batch.get("image"), batch.get("label")
    if not isinstance(real, Tensor) or not isinstance(labels, Tensor | None):
        raise ValueError(
            "A batch must be a tensor, (x,), (x, labels) or {'image': x, 'label': labels}, got "
            f"{describe(batch)}: override `GANModule.unpack` for another form."
        )
    if not real.is_floating_point() or real.dim() == 0 or len(real) == 0:
        raise ValueError(
            f"Real samples must be floating point (images in [-1, 1]), and at least one, got {describe(real)}."
        )
    return real, labels


def describe(value: object) -> str:
    """What a value is, in words for an error message.

    Example:
        >>> describe([torch.zeros(2, dtype=torch.uint8), "a"])
        'a list of a torch.uint8 tensor of shape (2,), a str'
    """
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, list | tuple):
        items = [*map(describe, value[:3]), *["..."] * (len(value) > 3)]
        return f"a {type(value).__name__} of " + (", ".join(items) or "nothing")
    return f"a {type(value).__name__}"


def call(network: nn.Module, inputs: Tensor, labels: Tensor | None) -> Tensor:
    """Run a network on inputs, and on labels if its ``forward`` takes them.

    It takes labels if its second positional parameter has no default or the default None; one that does not can be
    trained on data that have labels.

    Args:
        network: a generator or a discriminator.
        inputs: (n, ...).
        labels: (n, ...) or None.

    Raises:
        ValueError: if a network that must have labels gets none, if there are not n labels, or if the network returns
            no tensor.

    Example:
        >>> call(nn.Identity(), torch.ones(1), labels=torch.tensor([3]))
        tensor([1.])
    """
    inner: nn.Module = getattr(network, "_orig_mod", network)
    takes, needs = _label_parameter(type(inner))  # type: ignore[arg-type]
    if needs and labels is None:
        raise ValueError("it takes labels, but none were given.")
    if labels is not None and len(labels) != len(inputs):
        raise ValueError(f"`labels` must have {len(inputs)} entries, one for each sample, got {len(labels)}.")
    output = network(inputs, labels) if takes and labels is not None else network(inputs)
    if not isinstance(output, Tensor):
        raise ValueError(f"it must return a tensor, got {describe(output)}.")
    return output


@functools.cache
def _label_parameter(network: type[nn.Module]) -> tuple[bool, bool]:
    """Whether the network takes labels, and whether it needs them."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(network.forward).parameters.values() if p.kind in positional]
    default = parameters[2].default if len(parameters) > 2 else False  # 0 is self, 1 the inputs
    return default is inspect.Parameter.empty or default is None, default is inspect.Parameter.empty


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The type of a module's first parameter, or the default if it has none.

    Example:
        >>> dtype_of(nn.Linear(1, 1).double(), torch.float32), dtype_of(nn.Identity(), torch.float32)
        (torch.float64, torch.float32)
    """
    return next((p.dtype for p in module.parameters()), default)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts if they are spread over processes; all processes must ask.

    Example:
        >>> whole(torch.ones(1))
        tensor([1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assign(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors, one by one: there is no joint copy of sharded ones.

    Example:
        >>> x = torch.zeros(1)
        >>> assign([x], [torch.ones(1)])
        >>> x
        tensor([1.])
    """
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def copied(tensor: Tensor) -> Tensor:
    """A copy with memory of its own: XLA lets a clone share it until a step in place deletes it for both.

    Example:
        >>> x = torch.ones(1)
        >>> copied(x).data_ptr() == x.data_ptr()
        False
    """
    tensor = tensor.detach()
    return tensor.cpu().to(tensor.device) if tensor.device.type == "xla" else tensor.clone()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself if there is one.

    Differentiable to any order, so that with gradients averaged by DDP many ranks are one on the whole batch.

    Example:
        >>> mean_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    mean = x.detach().clone()
    dist.all_reduce(mean)
    mean = mean / dist.get_world_size() + (x - x.detach())  # adds 0, and the gradient of x
    if mean.requires_grad:
        mean.register_hook(mean_over_ranks)  # type: ignore[no-untyped-call]  # a mean is its own adjoint
    return mean


def noise(
    draw: Callable[..., Tensor], key: tuple[object, ...], shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Random values that are a function of a key alone.

    Args:
        draw: ``torch.randn`` or ``torch.rand``.
        key: numbers that say which draw of which step this is.
        shape: shape of the result.
        device: where the result lies, and where it is drawn if that is a CPU or a CUDA device.
        dtype: type of the result.

    Example:
        >>> a, b = (noise(torch.rand, (0, 1), (2,), torch.device("cpu"), torch.float32) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    # not every version of XLA and MPS has generators of its own
    source = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    # normal values are the same in every precision, which not every version of torch sees to; uniform ones, rounded
    # from float32, could be 1
    wide = torch.promote_types(dtype, torch.float32) if draw is torch.randn else dtype
    return draw(*shape, generator=generator(*key, device=source), device=source, dtype=wide).to(device, dtype)


def generator(*key: object, device: torch.device | None = None) -> torch.Generator:
    """A random generator whose state is a function of a key alone.

    Example:
        >>> generator(0, "train", 1).initial_seed() == generator(0, "train", 1).initial_seed()
        True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


class Substitution:
    """Lets other tensors take the place of a module's parameters for a while, in which its buffers stay as they are.

    BatchNorm in train mode goes on using the statistics of its batch, and forgets them; spectral norm's vectors are
    constants. Made once, used many times.

    Args:
        module: where the parameters are, in it or below.
        parameters: those that are replaced.
        still: the part of it whose buffers must not move; None: all of it.

    Raises:
        ValueError: if parameters of recurrent layers, which keep their own list of weights, are to be replaced.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with Substitution(layer, [layer.weight])([torch.tensor([[3.0]])]):
        ...     layer(torch.ones(1))
        tensor([3.])
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], still: nn.Module | None = None) -> None:
        still = module if still is None else still
        number = {id(p): row for row, p in enumerate(parameters)}
        self.owners: list[tuple[dict[str, Any], str, int]] = [
            (m._parameters, name, number[id(p)])
            for m in module.modules()
            for name, p in m._parameters.items()
            if id(p) in number
        ]
        self.buffers: list[tuple[dict[str, Any], str]] = [
            (m._buffers, name) for m in still.modules() for name, b in m._buffers.items() if b is not None
        ]
        self.spectral = [m for m in still.modules() if has_spectral_norm(m)]
        # a sharded module's own hooks would put its own weights into place
        self.hooks: list[tuple[dict[int, Any], int]] = [
            (hooks, key)
            for m in module.modules()
            for hooks in (m._forward_pre_hooks, m._forward_hooks)
            for key, hook in hooks.items()
            if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")
            if any(id(p) in number for p in m.parameters())
        ]
        layers = (m for m in module.modules() if isinstance(m, nn.RNNBase))
        recurrent = next((m for m in layers if any(id(p) in number for p in m.parameters())), None)
        if recurrent is not None:
            raise ValueError(f"{type(recurrent).__name__} keeps its own list of weights, which cannot be replaced.")

    @contextmanager
    def __call__(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Replace the parameters within the context."""
        kept = [(owner, name, owner[name]) for owner, name, _ in self.owners]
        still = [(owner, name, owner[name]) for owner, name in self.buffers]
        training = [(m, m.training) for m in self.spectral]
        for owner, name, row in self.owners:
            owner[name] = tensors[row]  # as torch.func.functional_call does
        for owner, name, buffer in still:
            owner[name] = buffer.clone()
        for m in self.spectral:
            m.training = False
        hooks = [(every, every.copy()) for every, _ in self.hooks]  # all of them, for their order
        for every, key in self.hooks:
            del every[key]
        try:
            yield
        finally:
            for every, before in hooks:
                every.clear()
                every.update(before)
            for owner, name, tensor in (*kept, *still):
                owner[name] = tensor
            for m, mode in training:
                m.training = mode


def recipe(module: nn.Module) -> dict[str, Any]:
    """The class and the arguments of a module that keeps its arguments as attributes, as plain data for a checkpoint.

    Arguments are None if the module does not keep all of them: then it cannot be made again.

    Example:
        >>> recipe(nn.Softplus(beta=2.0))
        {'name': 'Softplus', 'arguments': {'beta': 2.0, 'threshold': 20.0}}
    """
    parameters = inspect.signature(type(module)).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments = {name: getattr(module, name, module) for name in named}
    return {"name": type(module).__qualname__, "arguments": arguments if is_plain(arguments) else None}


def cook(kind: type[M], recipe: Mapping[str, Any]) -> M:
    """Make the module of a recipe again, from the imported subclasses of a kind.

    Raises:
        ValueError: if no such class has been imported, or the arguments do not suffice.

    Example:
        >>> cook(nn.Module, {"name": "Softplus", "arguments": {"beta": 2.0}})
        Softplus(beta=2.0, threshold=20.0)
    """
    try:
        return next(c for c in _subclasses(kind) if c.__qualname__ == recipe["name"])(**recipe["arguments"])
    except (StopIteration, TypeError) as error:
        raise ValueError(
            f"The checkpoint was made with {recipe['name']}, which cannot be made again from the arguments "
            f"{recipe['arguments']}: import the class, or pass an instance."
        ) from error


def _subclasses(kind: type[M]) -> Iterator[type[M]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def save(state: object, file: Path) -> None:
    """Write tensors and plain data, all of it or nothing: a reader never sees half a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"a": torch.ones(1)}, Path(folder, "new", "state.pt"))
        ...     torch.load(Path(folder, "new", "state.pt"), weights_only=True)
        {'a': tensor([1.])}
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, temporary := file.with_suffix(f".{os.getpid()}"))
    os.replace(temporary, file)


def is_plain(value: object) -> bool:
    """Whether a value is numbers, strings, lists and dicts all the way down.

    Example:
        >>> is_plain({"betas": [0.5, 0.999]}), is_plain(nn.Identity())
        (True, False)
    """
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
