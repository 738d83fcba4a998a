"""What networks are built with and looked at by: packs of samples, weights as matrices, copies, spectral norm."""

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

# a parametrization's entry in a state dict that tells of spectral norm, or of its factor
_ENTRY = re.compile(
    r"(?P<list>((?P<layer>.+)\.)?parametrizations\.(?P<name>\w+))\.(?P<index>\d+)\.(?P<entry>_u|_extra_state)"
)


class Packed(nn.Module):
    """A discriminator that sees m samples at once, all real or all generated, and gives them one logit.

    l(x₁, ..., x_m) = D([x₁, ..., x_m]), concatenated along the first axis of a sample (features or channels), in the
    order of the batch; of a tree of tensors leaf by leaf, and of a condition as of the samples. A pack of samples of
    one mode gives a collapsed generator away. "PacGAN: The power of two samples in generative adversarial networks",
    https://arxiv.org/abs/1712.04086. Everything else stays as it is: a pack counts as one sample in losses and gradient
    penalties (norms are over all its values, interpolates have one α for it), and the samples of a batch or micro-batch
    that fill no pack are left out of the step. Costs what the discriminator costs on n / m samples with m times the
    inputs.

    Args:
        discriminator: takes m times the features or channels of a sample, and of a condition if there is one.
        m: samples in a pack.

    Raises:
        ValueError: if ``m`` is not a positive integer, ``discriminator`` no module, or if a batch has less than m
            samples.

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
        """Return one logit for each m samples, without the rest."""
        m, n = self.packing, batch_size(samples)
        if n < m:
            raise ValueError(f"a pack has {m} samples, but there are {n}.")
        inputs = [samples, condition] if self.needs or (self.takes and condition is not None) else [samples]
        return self.discriminator(*(tree_map(self._pack, tree) for tree in inputs))

    def _pack(self, leaf: Tensor) -> Tensor:
        n = len(leaf) // self.packing
        return leaf[: n * self.packing].reshape(n, -1, *leaf.shape[2:])


class MinibatchStdDev(nn.Module):
    """Shows a discriminator how much the samples of a batch differ, as further channels behind those of each sample.

    Groups are strided: of N samples in groups of G, sample i is with i + N / G, i + 2 N / G, ... Each of the further
    channels is one number for a group, the mean of σ = √(Var + 10⁻⁸) over the pixels and over its share of the C
    channels, with the variance over the group, divided by G. It stands in front of the last convolution. "Progressive
    Growing of GANs", https://arxiv.org/abs/1710.10196; groups and ε as in StyleGAN2, https://arxiv.org/abs/1912.04958.

    (N, C, height, width) to (N, C + channels, height, width). Fewer samples than G are one group. A larger batch that G
    does not divide is refused in train mode; in eval mode groups have the largest size up to G that divides it, down to
    1, of which σ is 10⁻⁴. Each process and each micro-batch compares its own samples.

    Args:
        group_size: G, 4 in StyleGAN2 (32 for CIFAR-10).
        channels: Number of further channels, a divisor of C.

    Raises:
        ValueError: If an argument is no positive integer, or does not divide what it must.

    Example:
        >>> MinibatchStdDev()(torch.ones(8, 16, 4, 4)).shape
        torch.Size([8, 17, 4, 4])
    """

    def __init__(self, group_size: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.group_size, self.channels = check_integer("group_size", group_size), check_integer("channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with the deviations behind its channels."""
        n, c, height, width = x.shape
        group = min(self.group_size, n)
        if n % group and self.training:
            raise ValueError(
                f"MinibatchStdDev compares {group} samples with each other, which does not divide a batch of {n}: "
                "choose `group_size` and the batch size so that it does, and drop_last=True in the loader."
            )
        while n % group:
            group -= 1
        if c % self.channels:
            raise ValueError(f"`channels` of MinibatchStdDev must divide the {c} of its input, got {self.channels}.")
        precise = x.to(torch.promote_types(x.dtype, torch.float32))  # 10⁻⁸ is nothing in half precision
        groups = precise.reshape(group, -1, self.channels, c // self.channels, height, width)
        variances = (groups - groups.mean(0)).square().mean(0)  # on CPUs a twentieth of the time of `var`
        deviations = (variances + 1e-8).sqrt().mean((2, 3, 4))
        deviations = deviations.to(x.dtype).repeat(group, 1)[..., None, None]
        return torch.cat([x, deviations.expand(-1, -1, height, width)], 1)


@contextmanager
def truncated(network: nn.Module, truncation: float) -> Iterator[None]:
    """Samples with the truncation ψ, of a generator with a part that has an attribute ``truncation``.

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
            f"`truncation` needs a generator with an attribute `truncation`, such as StyleGenerator, and "
            f"{type(network).__name__} has none: leave it at 1."
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
    """Whether a network makes something of a condition: it takes one, and was not made for ``num_classes=None``.

    Example:
        >>> from lightning_gan_stability.nets import MLP
        >>> hears_condition(nn.Bilinear(1, 1, 1)), hears_condition(MLP([4, 2]))
        (True, False)
    """
    takes, _ = condition_parameter(network)
    return takes and not any(getattr(part, "num_classes", 0) is None for part in network.modules())


def number_of_classes(network: nn.Module) -> int | None:
    """How many classes a network knows: the attribute ``num_classes`` of a part, or the length of an embedding.

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

    It takes one if its ``forward`` has a second positional parameter without a default, or with the default None, and
    needs it in the first case. A network that takes none can be trained on data that have labels.

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
    """A module, or what stands for one."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""


def parameter_dtype(module: HasParameters, default: torch.dtype) -> torch.dtype:
    """The type that a network computes in: that of its first trainable real parameter.

    While nothing in it trains, it is the one that was found when something did, or else the widest type of its real
    parameters; without any, the default. Frozen parts may be in half precision, and complex weights say nothing about
    inputs.

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
        return _DTYPES[module]  # the other player's turn freezes it
    return functools.reduce(torch.promote_types, found) if found else default


_DTYPES: WeakKeyDictionary[HasParameters, torch.dtype] = WeakKeyDictionary()


class _DetachNonLeaf(TorchFunctionMode):
    """Lets `deepcopy` copy tensors that are part of a graph, which torch refuses, without their graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def copy_network(network: M) -> M:
    """A copy of a network, none of whose parameters requires grad.

    Networks keep tensors that are part of a graph: ``torch.nn.utils.weight_norm`` the weight that it computes before
    each forward pass, others an activation of the last one. They are copied without it.

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
    """A copy with memory of its own: XLA lets a clone share it until a step in place deletes it for both.

    Example:
        >>> x = torch.ones(1)
        >>> clone(x).data_ptr() == x.data_ptr()
        False
    """
    tensor = tensor.detach()
    return tensor.cpu().to(tensor.device) if tensor.device.type == "xla" else tensor.clone()


@contextmanager
def evaluation(*modules: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule is in the mode that it was in.

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
    """Weights of two or more dimensions, outputs first, as they are before a normalization; none of embeddings.

    Raises:
        ValueError: if a layer has the older weight norm, which keeps no weight.

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
            # weight norm has no single weight before it, but length and direction
            before = getattr(layer.parametrizations.weight, "original", None)  # type: ignore[union-attr]
            weight = layer.weight if before is None else before  # type: ignore[assignment]
        if weight is None or weight.dim() < 2 or isinstance(layer, nn.Embedding | nn.EmbeddingBag) or weight in seen:
            continue
        if isinstance(weight, nn.Parameter):
            seen.add(weight)  # which two layers may share
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
    """Let every spectral norm in a module catch up with its weight, by its power iterations, whatever its mode.

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
    """What torch's spectral norm cannot keep: a factor for the normalized weight, and its own number of iterations.

    Both are in the state dict, as one tensor, so that a checkpoint holds all that the parametrization needs.

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
        """Factor and iterations; no buffer, which would be rounded when a module is cast."""
        return torch.tensor([self.factor, self.n_power_iterations], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Keep the own numbers: what made this parametrization took them from the state or from the user."""


def normalize_spectrum(layer: nn.Module, name: str, factor: float = 1.0, n_power_iterations: int = 1) -> None:
    """Register torch's spectral norm on one weight of a layer; the global random state stays as it is.

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
    """Register spectral norm wherever a state dict has it and the module does not.

    A callback may have added it before the training that made the state dict. Where both have it, the module's factor
    holds.

    Raises:
        ValueError: if the module has it and the state dict does not.

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
                f"The module has spectral norm on `{match['layer']}`, but the checkpoint was trained without: remove "
                "SpectralNorm, or start a new run."
            )
        state.setdefault(key, value)
    for key in [key for key in state.keys() - own.keys() if (m := _ENTRY.fullmatch(key)) and m["entry"] != "_u"]:
        del state[key]
