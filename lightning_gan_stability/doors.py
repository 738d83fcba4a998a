"""What passes through a network's door: batches, labels, noise and checkpoints, as functions of plain torch objects."""

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

M = TypeVar("M", bound=nn.Module)


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
    return draw(*shape, generator=generator(*key, device=source), device=source, dtype=dtype).to(device)


def generator(*key: object, device: torch.device | None = None) -> torch.Generator:
    """A random generator whose state is a function of a key alone.

    Example:
        >>> generator(0, "train", 1).initial_seed() == generator(0, "train", 1).initial_seed()
        True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def restore_parametrizations(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Register torch's spectral norm wherever a state dict has it and the module does not.

    A callback may have added it before the training that made the state dict.

    Example:
        >>> trained, fresh = parametrizations.spectral_norm(nn.Linear(2, 2)), nn.Linear(2, 2)
        >>> restore_parametrizations(fresh, trained.state_dict())
        >>> fresh.load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    present = module.state_dict().keys()
    for key in state.keys() - present:
        if match := re.fullmatch(r"(?:(.+)\.)?parametrizations\.(\w+)\.\d+\._u", key):
            parametrizations.spectral_norm(module.get_submodule(match[1] or ""), match[2])


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
