"""What networks are built with: packs of samples, weights as matrices, spectral norm that checkpoints keep."""

import re
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as OldSpectralNorm

# a parametrization's entry in a state dict that tells of spectral norm, or of its factor
_ENTRY = re.compile(
    r"(?P<list>((?P<layer>.+)\.)?parametrizations\.(?P<name>\w+))\.(?P<index>\d+)\.(?P<entry>_u|_extra_state)"
)


class Packed(nn.Module):
    """A discriminator that sees m samples at once, all real or all generated, and gives them one logit.

    l(x₁, ..., x_m) = D([x₁, ..., x_m]), joined along the first axis of a sample (features or channels), in the order of
    the batch. A pack of samples of one mode gives a collapsed generator away. "PacGAN: The power of two samples in
    generative adversarial networks", https://arxiv.org/abs/1712.04086. Everything else stays as it is: a pack counts as
    one sample in losses and gradient penalties (norms are over all its values, interpolates have one α for it), and the
    samples of a batch or micro-batch that fill no pack are left out of the step. Costs what the discriminator costs on
    n / m samples with m times the inputs.

    Args:
        discriminator: takes m times the features or channels of a sample; without labels.
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
        if not isinstance(discriminator, nn.Module):
            raise ValueError(f"`discriminator` must be a module, got {discriminator!r}.")
        if not isinstance(m, int) or isinstance(m, bool) or m < 1:
            raise ValueError(f"`m` must be a positive integer, got {m!r}.")
        self.discriminator = discriminator
        self.packing = m  # the name under which GANModule looks for it

    def forward(self, samples: Tensor) -> Tensor:
        """Return one logit for each m samples, without the rest."""
        m, n = self.packing, len(samples) // self.packing
        if n == 0:
            raise ValueError(f"a pack has {m} samples, but there are {len(samples)}.")
        logits: Tensor = self.discriminator(samples[: n * m].reshape(n, -1, *samples.shape[2:]))
        return logits


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
        weight = layer._parameters.get("weight", layer._parameters.get("weight_orig"))
        if "weight_v" in layer._parameters:
            raise ValueError(
                f"cannot see the weight of a {type(layer).__name__} layer with torch.nn.utils.weight_norm: use "
                "torch.nn.utils.parametrizations.weight_norm."
            )
        if "weight" in getattr(layer, "parametrizations", {}):
            # weight norm has no single weight before it, but length and direction
            weight = getattr(layer.parametrizations.weight, "original", None)  # type: ignore[union-attr]
            weight = layer.weight if weight is None else weight  # type: ignore[assignment]
        if weight is None or weight.dim() < 2 or isinstance(layer, nn.Embedding | nn.EmbeddingBag) or weight in seen:
            continue
        if isinstance(weight, nn.Parameter):
            seen.add(weight)  # which two layers may share
        if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...)
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
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, parametrizations._SpectralNorm) or any(
        isinstance(hook, OldSpectralNorm) for hook in hooks
    )


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
        spectral = [m for m in parts if isinstance(m, parametrizations._SpectralNorm)]
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
    for m in (m for m in parts if isinstance(m, parametrizations._SpectralNorm)):
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
