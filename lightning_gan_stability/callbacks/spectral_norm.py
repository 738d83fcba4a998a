"""Spectral normalization of a network's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_gan_stability._checks import check_integer, check_number
from lightning_gan_stability._compat import (
    computed_weights,
    has_old_spectral_norm,
    has_old_weight_norm,
    is_spectral_norm,
)
from lightning_gan_stability.callback import refuse_after_weight_averaging
from lightning_gan_stability.layers import SpectralScale, normalize_spectrum, rescale_spectrum


class SpectralNorm(Callback):
    """Divides every weight matrix of a network by its largest singular value, to bound each layer's Lipschitz constant.

    W̄ = factor · W / σ(W), with σ from one step of power iteration per forward pass in train mode. "Spectral
    Normalization for Generative Adversarial Networks", https://arxiv.org/abs/1802.05957. It applies torch's
    parametrization to every parameter of two or more dimensions whose name ends in ``weight``: in linear,
    convolutional, embedding and attention layers, and in layers of your own. A kernel is reshaped to the matrix (out,
    in · height · width). Its σ is not that of the convolution, which is up to √(height · width) times larger. Layers
    that are already normalized stay as they are, except for a ``factor`` or ``n_power_iterations`` given here.

    The checkpoint stores the normalization, so ``GANModule.load_from_checkpoint`` does not need this callback. For
    export, ``SpectralNorm.remove(module)`` replaces it with plain weights.

    Args:
        networks: names of the module's networks to normalize, or of layers in them (``"discriminator.layers.0"``).
        factor: value of σ(W̄), positive. With 1 and inputs scaled by 1/4 the slope of the logit is at most 1/4, which
            is too small to separate narrow modes.
        n_power_iterations: steps of power iteration per forward pass.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if there is no such network, if nothing in it has weights to normalize, or if it has
            layers that cannot be normalized: recurrent ones, lazy ones, embeddings with ``max_norm`` or ``sparse``,
            those that start at zero, and those with the older weight norm; or if a callback before it averages weights.

    Example:
        >>> SpectralNorm(networks=["generator", "discriminator"]).factor
        1.0
    """

    def __init__(
        self, networks: str | Sequence[str] = "discriminator", factor: float = 1.0, n_power_iterations: int = 1
    ) -> None:
        super().__init__()
        several = tuple(networks) if isinstance(networks, Sequence) else ()
        self.networks = (networks,) if isinstance(networks, str) else several
        if not self.networks or not all(isinstance(name, str) and name for name in self.networks):
            raise ValueError(f"`networks` must be the name of a network or several, got {networks!r}.")
        self.factor = check_number("factor", factor, positive=True)
        self.n_power_iterations = check_integer("n_power_iterations", n_power_iterations)

    @property
    def state_key(self) -> str:
        """The class and the networks, so that a run can have an instance for each network."""
        return f"{type(self).__qualname__}{self.networks}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Normalize before the checkpoint is loaded and the optimizers are created."""
        if stage != "fit":
            return
        refuse_after_weight_averaging(self, trainer)
        for network in self.networks:
            for part in (network, network.replace("generator", "generator_ema", 1)):
                if part == network or _has(pl_module, part):
                    self._normalize(pl_module, part)

    def _normalize(self, module: LightningModule, network: str) -> None:
        if not _has(module, network):
            names = ", ".join(name for name, child in module.named_children() if any(True for _ in child.parameters()))
            raise MisconfigurationException(f"SpectralNorm: the module has no `{network}`, but it has {names}.")
        found = False
        for name, layer in module.get_submodule(network).named_modules(prefix=network):
            _refuse_layer(name, layer)
            for weight in _weights(layer):
                found = True
                if _is_normalized(layer, weight):
                    self._adjust(name, layer, weight)
                else:
                    if not getattr(layer, weight).any():
                        _refuse(
                            name,
                            layer,
                            "has weights that are all zero, without a norm: initialize it differently",
                        )
                    normalize_spectrum(layer, weight, self.factor, self.n_power_iterations)
        if not found:
            raise MisconfigurationException(
                f"SpectralNorm: `{network}` has no weight of two or more dimensions: name another network, or remove "
                "SpectralNorm."
            )

    def _adjust(self, name: str, layer: nn.Module, weight: str) -> None:
        parts = _parts(layer, weight)
        given = (self.factor, self.n_power_iterations) != (1, 1)
        if parts and (given or any(isinstance(part, SpectralScale) for part in parts)):
            rescale_spectrum(layer, weight, self.factor, self.n_power_iterations)
        elif given:
            _refuse(name, layer, "has torch.nn.utils.spectral_norm: use torch.nn.utils.parametrizations.spectral_norm")

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Replace every spectrally normalized weight in a module by its value; outputs stay the same.

        Afterwards the module can be exported, and its weights are no longer normalized in training.

        Example:
            >>> import torch
            >>> from torch.nn.utils import parametrizations
            >>> layer = parametrizations.spectral_norm(nn.Linear(3, 3)).eval()
            >>> x = torch.ones(1, 3)
            >>> before = layer(x)
            >>> SpectralNorm.remove(layer)
            >>> torch.equal(layer(x), before), list(layer.state_dict())
            (True, ['bias', 'weight'])
        """
        training = [m for m in module.modules() if m.training]
        module.eval()  # in train mode every access to the weight runs a power iteration and changes it
        for layer in list(module.modules()):
            for name in [n for n in getattr(layer, "parametrizations", {}) if _is_normalized(layer, n)]:
                parametrize.remove_parametrizations(layer, name)
            if has_old_spectral_norm(layer):
                nn.utils.remove_spectral_norm(layer)
        for m in training:
            m.training = True


def _has(module: nn.Module, network: str) -> bool:
    try:
        return bool(network) and isinstance(module.get_submodule(network), nn.Module)
    except AttributeError:
        return False


def _weights(layer: nn.Module) -> list[str]:
    """Names of a layer's own matrices, parametrized ones and those of the older spectral norm included."""
    if isinstance(layer, parametrize.ParametrizationList):
        return []
    own: dict[str, Any] = dict(layer.named_parameters(recurse=False))
    for name, entry in getattr(layer, "parametrizations", {}).items():
        own[name] = getattr(entry, "original", getattr(entry, "original0", None))
    return [n for n, p in own.items() if n.removesuffix("_orig").endswith("weight") and p is not None and p.dim() > 1]


def _is_normalized(layer: nn.Module, name: str) -> bool:
    parts = _parts(layer, name)
    old = has_old_spectral_norm(layer) and name.removesuffix("_orig") in computed_weights(layer)
    return old or any(map(is_spectral_norm, parts))


def _parts(layer: nn.Module, name: str) -> Sequence[nn.Module]:
    lists = getattr(layer, "parametrizations", {})
    return list(lists[name]) if name in lists else []


def _refuse_layer(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        _refuse(name, layer, "is recurrent and names its weights differently: replace it")
    if has_old_weight_norm(layer):
        _refuse(name, layer, "has torch.nn.utils.weight_norm: use torch.nn.utils.parametrizations.weight_norm")
    if any(is_lazy(p) for p in layer.parameters(recurse=False)):
        _refuse(name, layer, "has no weights before its first forward pass: run one before training")
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and (layer.max_norm is not None or layer.sparse):
        _refuse(name, layer, "changes its weights in place (`max_norm`) or has sparse gradients: use it without")


def _refuse(name: str, layer: nn.Module, reason: str) -> None:
    raise MisconfigurationException(
        f"SpectralNorm cannot normalize the {type(layer).__name__} layer `{name}`, which {reason}, or name other "
        "networks."
    )
