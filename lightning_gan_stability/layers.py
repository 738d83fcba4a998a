"""Layers for discriminators, and tools for networks: copies, modes, weights as matrices, spectral norm."""

import functools
import inspect
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

from lightning_gan_stability._checks import check_integer, check_type
from lightning_gan_stability._compat import (
    has_old_spectral_norm,
    has_old_weight_norm,
    is_spectral_norm,
    original_module,
)
from lightning_gan_stability.outputs import Condition, Logits, Sample, batch_size, tree_map

M = TypeVar("M", bound=nn.Module)

# the entries of a state dict that belong to spectral norm, or to its factor
_ENTRY = re.compile(
    r"(?P<list>((?P<layer>.+)\.)?parametrizations\.(?P<name>\w+))\.(?P<index>\d+)\.(?P<entry>_u|_extra_state)"
)


class Packed(nn.Module):
    """Wraps a discriminator so that it sees m samples at once, all real or all fake, and returns one logit for them.

    l(x₁, ..., x_m) = D([x₁, ..., x_m]), concatenated along the first axis of a sample (features or channels), in the
    order of the batch. Trees of tensors are packed leaf by leaf, and conditions like samples. A collapsed generator is
    easy to detect, because its packs contain samples of one mode only. "PacGAN: The power of two samples in generative
    adversarial networks", https://arxiv.org/abs/1712.04086. A pack counts as one sample in losses and gradient
    penalties: norms are over all its values, and interpolates use one α for it. Samples at the end of a batch or
    micro-batch that do not fill a pack are left out of the step. Costs as much as the discriminator on n / m samples
    with m times the inputs.

    Args:
        discriminator: a network for m times the features or channels of a sample, and of a condition if there is one.
        m: number of samples in a pack.

    Raises:
        ValueError: if ``m`` is not a positive integer, if ``discriminator`` is not a module, or if a batch has fewer
            than m samples.

    Example:
        >>> packed = Packed(nn.Linear(2 * 3, 1), m=2)
        >>> packed(torch.zeros(8, 3)).shape, packed(torch.zeros(9, 3)).shape
        (torch.Size([4, 1]), torch.Size([4, 1]))
    """

    def __init__(self, discriminator: nn.Module, m: int = 2) -> None:
        super().__init__()
        self.discriminator = check_type("discriminator", discriminator, nn.Module)
        self.packing = check_integer("m", m)
        self.takes, self.needs = condition_parameter(discriminator)

    def forward(self, samples: Sample, condition: Condition = None) -> Logits:
        """Return one logit for each pack of m samples."""
        m, n = self.packing, batch_size(samples)
        if n < m:
            raise ValueError(f"a pack has {m} samples, but there are {n}.")
        inputs = [samples, condition] if self.needs or (self.takes and condition is not None) else [samples]
        return self.discriminator(*(tree_map(self._pack, tree) for tree in inputs))

    def _pack(self, leaf: Tensor) -> Tensor:
        n = len(leaf) // self.packing
        return leaf[: n * self.packing].reshape(n, -1, *leaf.shape[2:])


class MinibatchStdDev(nn.Module):
    """Appends channels with the standard deviation over a group of samples, which lets a discriminator detect collapse.

    Groups are strided: of N samples in groups of G, sample i is grouped with i + N / G, i + 2 N / G, ... Each added
    channel is constant: the mean of σ = √(Var + 10⁻⁸) over the pixels and over its share of the C channels. The
    variance is over the group and divides by G. Place the layer before the last convolution. "Progressive Growing of
    GANs", https://arxiv.org/abs/1710.10196; groups and ε as in StyleGAN2, https://arxiv.org/abs/1912.04958.

    The shape (N, C, height, width) becomes (N, C + channels, height, width). Fewer samples than G form one group. In
    train mode, a larger batch that G does not divide raises an error. In eval mode the group size is then the largest
    divisor of N up to G; with 1, σ is 10⁻⁴. Each process and each micro-batch uses its own samples.

    Args:
        group_size: G, 4 in StyleGAN2 (32 for CIFAR-10).
        channels: Number of added channels, a divisor of C.

    Raises:
        ValueError: If an argument is not a positive integer, or does not divide the batch or the channels.

    Example:
        >>> MinibatchStdDev()(torch.ones(8, 16, 4, 4)).shape
        torch.Size([8, 17, 4, 4])
    """

    def __init__(self, group_size: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.group_size, self.channels = check_integer("group_size", group_size), check_integer("channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with the deviations appended to its channels."""
        n, c, height, width = x.shape
        group = min(self.group_size, n)
        if n % group and self.training:
            raise ValueError(
                f"MinibatchStdDev has groups of {group} samples, which does not divide a batch of {n}: choose "
                "`group_size` and the batch size so that it does, and set drop_last=True in the loader."
            )
        while n % group:
            group -= 1
        if c % self.channels:
            raise ValueError(f"`channels` of MinibatchStdDev must divide the {c} of its input, got {self.channels}.")
        precise = x.to(torch.promote_types(x.dtype, torch.float32))  # 10⁻⁸ is lost in half precision
        groups = precise.reshape(group, -1, self.channels, c // self.channels, height, width)
        variances = (groups - groups.mean(0)).square().mean(0)  # 20 times as fast as `var` on CPUs
        deviations = (variances + 1e-8).sqrt().mean((2, 3, 4))
        deviations = deviations.to(x.dtype).repeat(group, 1)[..., None, None]
        return torch.cat([x, deviations.expand(-1, -1, height, width)], 1)


@contextmanager
def truncated(network: nn.Module, truncation: float) -> Iterator[None]:
    """Set the truncation ψ inside the context, in every part of a generator with an attribute ``truncation``.

    Raises:
        ValueError: If there is no such part.

    Example:
        >>> from lightning_gan_stability.nets import MLP, StyleGenerator
        >>> generator = StyleGenerator(MLP([4, 8]), nn.Flatten(), w_dim=8, num_layers=1)
        >>> with truncated(generator, 0.5):
        ...     generator.truncation
        0.5
    """
    parts: list[Any] = [part for part in network.modules() if hasattr(part, "truncation")]
    if not parts:
        raise ValueError(
            f"`truncation` needs a generator with an attribute `truncation`, such as StyleGenerator, but "
            f"{type(network).__name__} has none: keep `truncation` at 1."
        )
    before = [part.truncation for part in parts]
    for part in parts:
        part.truncation = truncation
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.truncation = value


def hears_condition(network: nn.Module) -> bool:
    """Whether a network uses a condition: it takes one, and was not built with ``num_classes=None``.

    Example:
        >>> from lightning_gan_stability.nets import MLP
        >>> hears_condition(nn.Bilinear(1, 1, 1)), hears_condition(MLP([4, 2]))
        (True, False)
    """
    takes, _ = condition_parameter(network)
    return takes and not any(getattr(part, "num_classes", 0) is None for part in network.modules())


def number_of_classes(network: nn.Module) -> int | None:
    """The number of classes of a network: the attribute ``num_classes`` of a part, or the length of an embedding.

    Example:
        >>> from lightning_gan_stability.nets import MLP
        >>> number_of_classes(MLP([4, 2], num_classes=10)), number_of_classes(nn.Linear(4, 2))
        (10, None)
    """
    parts = [*network.modules()]
    said = [part.num_classes for part in parts if isinstance(getattr(part, "num_classes", None), int)]
    embedded = [part.num_embeddings for part in parts if isinstance(part, nn.Embedding)]
    return next((int(n) for n in (*said, *embedded)), None)  # type: ignore[arg-type]


def condition_parameter(network: nn.Module) -> tuple[bool, bool]:
    """Whether a network takes a condition, and whether it needs one.

    It takes one if its ``forward`` has a second positional parameter without a default or with the default None. It
    needs one if there is no default. A network that takes none can be trained on data with labels.

    Example:
        >>> condition_parameter(nn.Linear(1, 1)), condition_parameter(nn.Bilinear(1, 1, 1))
        ((False, False), (True, True))
    """
    return _condition_parameter(type(original_module(network)))  # type: ignore[arg-type]


@functools.cache
def _condition_parameter(network: type[nn.Module]) -> tuple[bool, bool]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(network.forward).parameters.values() if p.kind in positional]
    default = parameters[2].default if len(parameters) > 2 else False  # 0 is self, 1 the inputs
    return default is inspect.Parameter.empty or default is None, default is inspect.Parameter.empty


class HasParameters(Protocol):
    """A module, or an object with the parameters of one."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""


def parameter_dtype(module: HasParameters, default: torch.dtype) -> torch.dtype:
    """The dtype that a network computes in: that of its first trainable real parameter.

    While all parameters are frozen, it is the dtype found when one was trainable, or else the widest dtype of the real
    parameters. Without any it is the default. Frozen parts may be in half precision, and the dtype of inputs does not
    follow from complex weights.

    Example:
        >>> frozen = nn.Linear(1, 1).half().requires_grad_(False)
        >>> parameter_dtype(nn.Sequential(frozen, nn.Linear(1, 1)), torch.float64)
        torch.float32
    """
    found = set()
    for p in module.parameters():
        if p.is_floating_point():
            if p.requires_grad:
                _DTYPES[module] = p.dtype
                return p.dtype
            found.add(p.dtype)
    if _DTYPES.get(module) in found:
        return _DTYPES[module]  # it is frozen during the other player's step
    return functools.reduce(torch.promote_types, found) if found else default


_DTYPES: WeakKeyDictionary[HasParameters, torch.dtype] = WeakKeyDictionary()


class _DetachNonLeaf(TorchFunctionMode):
    """Makes `deepcopy` copy tensors that are part of a graph without their graph; torch refuses to copy them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def copy_network(network: M) -> M:
    """A copy of a network, none of whose parameters requires grad.

    Some networks store tensors that are part of a graph. ``torch.nn.utils.weight_norm`` stores the weight that it
    computes before each forward pass, others an activation of the last one. These are copied without the graph.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     layer = nn.utils.weight_norm(nn.Linear(2, 2))
        >>> torch.equal(copy_network(layer)(torch.ones(1, 2)), layer(torch.ones(1, 2)))
        True
    """
    with _DetachNonLeaf():
        return deepcopy(network).requires_grad_(False)


def clone(tensor: Tensor) -> Tensor:
    """A copy with its own memory; on XLA a plain clone shares memory until an in-place step deletes it for both.

    Example:
        >>> x = torch.ones(1)
        >>> clone(x).data_ptr() == x.data_ptr()
        False
    """
    tensor = tensor.detach()
    return tensor.cpu().to(tensor.device) if tensor.device.type == "xla" else tensor.clone()


@contextmanager
def evaluation(*modules: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; afterwards every submodule has its previous mode.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluation(net):
        ...     net.training
        False
        >>> net[0].training, net[1].training
        (True, False)
    """
    training = [m for module in modules for m in module.modules() if m.training]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


def has_batch_norm(layer: nn.Module) -> bool:
    """Whether a layer is a BatchNorm in train mode, which mixes the samples of a batch.

    Example:
        >>> has_batch_norm(nn.BatchNorm1d(1)), has_batch_norm(nn.BatchNorm1d(1).eval())
        (True, False)
    """
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
    return isinstance(layer, kinds) and layer.training


def matrices(network: nn.Module) -> list[Tensor]:
    """Weights of two or more dimensions, outputs first, before normalization, except those of embeddings.

    Raises:
        ValueError: if a layer has the older weight norm, which does not store a weight.

    Example:
        >>> [tuple(weight.shape) for weight in matrices(nn.Sequential(nn.Linear(3, 5), nn.ConvTranspose2d(2, 4, 1)))]
        [(5, 3), (4, 2, 1, 1)]
    """
    found: list[Tensor] = []
    seen: set[nn.Parameter] = set()
    for layer in network.modules():
        own = dict(layer.named_parameters(recurse=False))
        weight = own.get("weight", own.get("weight_orig"))
        if has_old_weight_norm(layer):
            raise ValueError(
                f"cannot see the weight of a {type(layer).__name__} layer with torch.nn.utils.weight_norm: use "
                "torch.nn.utils.parametrizations.weight_norm."
            )
        if "weight" in getattr(layer, "parametrizations", {}):
            # weight norm stores length and direction instead of a weight
            before = getattr(layer.parametrizations.weight, "original", None)  # type: ignore[union-attr]
            weight = layer.weight if before is None else before  # type: ignore[assignment]
        if weight is None or weight.dim() < 2 or isinstance(layer, nn.Embedding | nn.EmbeddingBag) or weight in seen:
            continue
        if isinstance(weight, nn.Parameter):
            seen.add(weight)  # two layers may share a weight
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):  # (in, out / groups, ...)
            found.append(torch.cat([part.transpose(0, 1) for part in weight.chunk(layer.groups)]))
        else:
            found.append(weight)
    return found


def has_spectral_norm(module: nn.Module) -> bool:
    """Whether a module is torch's spectral norm, or a layer that has the older one.

    Example:
        >>> has_spectral_norm(nn.utils.spectral_norm(nn.Linear(2, 2)))
        True
    """
    return is_spectral_norm(module) or has_old_spectral_norm(module)


@torch.no_grad()
def follow_spectrum(module: nn.Module) -> None:
    """Run the power iterations of every spectral norm in a module once, whatever its mode.

    Example:
        >>> layer = parametrizations.spectral_norm(nn.Linear(2, 2), n_power_iterations=50).eval()
        >>> _ = layer.parametrizations.weight.original.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> follow_spectrum(layer)
        >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 3)
        1.0
    """
    for parts in [m for m in module.modules() if isinstance(m, parametrize.ParametrizationList)]:
        spectral = [m for m in parts if is_spectral_norm(m)]
        training = [m.training for m in spectral]
        for m in spectral:
            m.training = True
        if spectral:
            parts()
        for m, mode in zip(spectral, training, strict=True):
            m.training = mode


class SpectralScale(nn.Module):
    """A factor for a spectrally normalized weight, which torch's spectral norm does not have.

    The state dict stores it together with the number of power iterations, which torch does not save either.

    Example:
        >>> SpectralScale(0.5, 1)(torch.ones(2)), SpectralScale(0.5, 1).get_extra_state()
        (tensor([0.5000, 0.5000]), tensor([0.5000, 1.0000], dtype=torch.float64))
    """

    def __init__(self, factor: float, n_power_iterations: int) -> None:
        super().__init__()
        self.factor, self.n_power_iterations = factor, n_power_iterations

    def forward(self, weight: Tensor) -> Tensor:
        """The weight times the factor."""
        return weight * self.factor

    def get_extra_state(self) -> Tensor:
        """Factor and iterations, not in a buffer, which would be rounded when the module is cast."""
        return torch.tensor([self.factor, self.n_power_iterations], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Ignore the state: the numbers were set when this parametrization was created."""


def normalize_spectrum(layer: nn.Module, name: str, factor: float = 1.0, n_power_iterations: int = 1) -> None:
    """Register torch's spectral norm on one weight of a layer, without changing the global random state.

    Example:
        >>> layer = nn.Linear(1, 8)
        >>> normalize_spectrum(layer, "weight", factor=2.0)
        >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 3)
        2.0
    """
    device = getattr(layer, name).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        parametrizations.spectral_norm(layer, name, n_power_iterations)
    rescale_spectrum(layer, name, factor, n_power_iterations)


def rescale_spectrum(layer: nn.Module, name: str, factor: float, n_power_iterations: int) -> None:
    """Set the factor and the iterations of a weight that has spectral norm.

    Example:
        >>> layer = nn.Linear(1, 8)
        >>> normalize_spectrum(layer, "weight")
        >>> rescale_spectrum(layer, "weight", 3.0, 2)
        >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 3)
        3.0
    """
    parts = layer.parametrizations[name]  # type: ignore[index]
    for m in (m for m in parts if is_spectral_norm(m)):
        m.n_power_iterations = n_power_iterations
    scale = next((m for m in parts if isinstance(m, SpectralScale)), None)
    if scale is not None:
        scale.factor, scale.n_power_iterations = factor, n_power_iterations
    elif (factor, n_power_iterations) != (1, 1):
        parametrize.register_parametrization(layer, name, SpectralScale(factor, n_power_iterations))


def restore_parametrizations(module: nn.Module, state: MutableMapping[str, Any]) -> None:
    """Register spectral norm on each weight that has it in a state dict but not in the module.

    A callback may have added it in the run that saved the state dict. Where both have it, the module's factor is kept.

    Raises:
        ValueError: if a weight has it in the module but not in the state dict.

    Example:
        >>> trained, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> normalize_spectrum(trained, "weight", factor=2.0)
        >>> restore_parametrizations(fresh, trained.state_dict())
        >>> fresh.load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    for key in state.keys() - module.state_dict().keys():
        if (match := _ENTRY.fullmatch(key)) and match["entry"] == "_u":
            scale = f"{match['list']}.{int(match['index']) + 1}._extra_state"
            factor, iterations = state.get(scale, torch.ones(2)).tolist()
            normalize_spectrum(module.get_submodule(match["layer"] or ""), match["name"], factor, int(iterations))
    for key in state.keys() - module.state_dict().keys():
        match = _ENTRY.fullmatch(key)
        if match and match["entry"] == "_extra_state":  # the module has spectral norm, but no factor
            layer = module.get_submodule(match["layer"] or "")
            lists = getattr(layer, "parametrizations", {})
            if match["name"] in lists and any(map(is_spectral_norm, lists[match["name"]])):
                factor, iterations = state[key].tolist()
                rescale_spectrum(layer, match["name"], factor, int(iterations))
    own = {key: value for key, value in module.state_dict().items() if _ENTRY.fullmatch(key)}
    for key, value in own.items():
        match = _ENTRY.fullmatch(key)
        if match and match["entry"] == "_u" and key not in state:
            raise ValueError(
                f"The module has spectral norm on `{match['layer']}`, but the checkpoint was trained without it: "
                "remove SpectralNorm, or start a new run."
            )
        state.setdefault(key, value)
    for key in [key for key in state.keys() - own.keys() if (m := _ENTRY.fullmatch(key)) and m["entry"] != "_u"]:
        del state[key]
