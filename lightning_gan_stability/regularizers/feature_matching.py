"""Feature matching: the generator matches the discriminator's features of real samples, layer by layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability._checks import check, check_number, describe
from lightning_gan_stability.callback import Regularizer, as_gan
from lightning_gan_stability.outputs import GANOutputs, entries, tree_leaves
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled

Weights: TypeAlias = list[float] | dict[str, float]


class FeatureMatching(Regularizer):
    """Adds weight · Σ_d Σ_l mean |F_dl(x) − F_dl(G(z))| to the generator's loss, over discriminators d and layers l.

    F are the features that :meth:`GANModule.discriminate` returns beside the logits. With ``layers`` they are the
    outputs of these layers, and the discriminator needs no change. Features of real samples carry no gradient.
    "Autoencoding beyond pixels using a learned similarity metric", https://arxiv.org/abs/1512.09300, in the form of
    "High-Resolution Image Synthesis and Semantic Manipulation with Conditional GANs", https://arxiv.org/abs/1711.11585,
    and "HiFi-GAN", https://arxiv.org/abs/2010.05646. Augmentations draw the same random numbers for real and for
    generated samples. Costs a forward pass of the discriminator over real samples in the generator's step.

    Published models weight the sum differently: HiFi-GAN uses ``weight=2`` with the last layer, DAC the same without it
    (``layer_weights=[1, 1, 1, 1, 1, 0]``), and pix2pixHD and MelGAN use ``weight=10 * 4 / (n_layers + 1) /
    n_discriminators``.

    Args:
        weight: not negative.
        layers: names of the discriminator's layers, as in ``discriminator.named_modules()``, or patterns such as
            ``"convs.*"``. None: the features that ``discriminate`` returns. These are a list, dict or other tree of
            tensors; with several discriminators, a dict or list of such trees with the same entries as the logits.
        layer_weights: a list with a factor for each feature of a discriminator, in order, or a dict with factors for
            some of them by the name of the layer, or by the key where features are a dict. None: 1.
        discriminator_weights: a list with a factor for each discriminator, in the order of the logits, or a dict with
            factors for some of them by name. None: 1.
        every: n: compute the penalty on every n-th step only, and multiply it by n.

    Raises:
        ValueError: if an argument has a bad value, if there are no features, or if those of real and generated samples
            differ in number or shape.
        MisconfigurationException: if the discriminator has no such layer.

    Example:
        >>> FeatureMatching(weight=2.0, layers=["convs.*"]).name
        'feature_matching'
    """

    player = "g"
    differentiates = ()
    second_order = False
    needs_real = True
    same_augmentation = True
    validated = True

    def __init__(
        self,
        weight: Scheduled = 1.0,
        layers: list[str] | None = None,
        layer_weights: Weights | None = None,
        discriminator_weights: Weights | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(weight, every)
        named = layers is None or (isinstance(layers, list | tuple) and len(layers) > 0)
        check(named and all(isinstance(name, str) for name in layers or ()), "layers", "a list of names", layers)
        self.layers = None if layers is None else [*layers]
        self.layer_weights = _checked_weights("layer_weights", layer_weights)
        self.discriminator_weights = _checked_weights("discriminator_weights", discriminator_weights)
        self._stop: Callable[[], None] | None = None
        self._names: dict[str, list[str]] | None = None  # of the features on the first call, by discriminator

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register hooks on the layers before they are compiled."""
        super().setup(trainer, pl_module, stage)
        self._names = None
        self._leave_alone()
        if self.layers is not None:
            self._stop = as_gan(pl_module).watch_layers(self.layers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks from the layers."""
        self._leave_alone()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks from the layers; Lightning does not call ``teardown`` after an error."""
        self._leave_alone()

    def _leave_alone(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The weighted sum of mean absolute differences, a scalar."""
        real, fake = (self._features(outputs, side) for side in ("real", "fake"))
        of_real, of_fake = ({name: [*features] for name, features in side.items()} for side in (real, fake))
        if self._names is None:
            self._names = of_fake
        if not of_real == of_fake == self._names:
            raise ValueError(
                "FeatureMatching: `discriminate` returned other features for real samples than for generated ones, or "
                "than on an earlier batch: it must return the same features on every call."
            )
        if not any(fake.values()):
            raise ValueError("FeatureMatching compares features, but `discriminate` returns an empty set of them.")
        of_discriminators = _factors("discriminator_weights", self.discriminator_weights, [*fake])
        total: Any = 0.0
        for (discriminator, features), factor in zip(fake.items(), of_discriminators, strict=True):
            factors = _factors("layer_weights", self.layer_weights, [*features])
            for (name, feature), weight in zip(features.items(), factors, strict=True):
                target = real[discriminator][name]
                if target.shape != feature.shape:
                    raise ValueError(
                        f"FeatureMatching compares feature {name!r} of real samples, of shape {tuple(target.shape)}, "
                        f"with that of generated ones, of shape {tuple(feature.shape)}: the shapes must be equal."
                    )
                total = total + factor * weight * (feature - target.detach()).abs().mean()
        return total  # type: ignore[no-any-return]

    def _features(self, outputs: GANOutputs, side: str) -> dict[str, dict[str, Tensor]]:
        """The features of one side by discriminator and name."""
        if self.layers is not None:
            activations: dict[str, Any] = getattr(outputs, f"{side}_activations")
            logits = entries(outputs.fake_logits)
            found: dict[str, dict[str, Any]] = {}
            for name, value in activations.items():
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers):
                    continue  # another callback watches it
                first = name.partition(".")[0]
                found.setdefault(first if first in logits else "", {}).update(_by_name(name, value))
            if "" in found and len(logits) > 1 and self.discriminator_weights is not None:
                raise ValueError(
                    f"FeatureMatching: `discriminator_weights` belong to discriminators {', '.join(logits)}, but layer "
                    f"{next(iter(found['']))!r} is in none of them: return logits in a dict by the names of the "
                    "discriminators in the network, or use `layer_weights`."
                )
            return found
        features = getattr(outputs, f"{side}_features")
        if features is None:
            raise ValueError(
                "FeatureMatching compares features, but `discriminate` returns none: return (logits, features), or "
                "name layers of the discriminator in `layers`."
            )
        names = [*entries(outputs.fake_logits)]
        if names == [""]:
            return {"": _by_name("", features)}
        if isinstance(features, Mapping):
            parts = {str(name): part for name, part in features.items()}
            got = f"features of {', '.join(parts)}"
        else:
            listed = features if isinstance(features, list | tuple) else []
            parts = dict(zip(names, listed, strict=True)) if len(listed) == len(names) else {}
            got = f"features are {describe(features)}" + (f", {len(listed)} in all" if listed else "")
        if {*parts} != {*names}:
            raise ValueError(
                f"FeatureMatching: there are logits of discriminators {', '.join(names)}, and {got}: `discriminate` "
                "must return a dict or list with features for each of them."
            )
        return {name: _by_name("", parts[name]) for name in names}


def _by_name(name: str, value: Any) -> dict[str, Tensor]:
    """The tensors of a tree by their names or numbers, prefixed with the name of the tree."""
    if isinstance(value, Tensor):
        return {name or "0": value}
    keyed = isinstance(value, Mapping) and all(isinstance(part, Tensor) for part in value.values())
    parts = value if keyed else dict(enumerate(tree_leaves(value)))
    for part in parts.values():
        if not isinstance(part, Tensor):
            raise ValueError(f"FeatureMatching: features must be tensors, got {describe(part)}.")
    return {".".join(filter(None, (name, str(key)))): part for key, part in parts.items()}


def _checked_weights(name: str, weights: Any) -> Weights | None:
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        return {str(key): check_number(f"{name}[{key!r}]", value) for key, value in weights.items()}
    check(isinstance(weights, list | tuple), name, "a list of numbers, or a dict of them", weights)
    return [check_number(f"{name}[{i}]", value) for i, value in enumerate(weights)]


def _factors(argument: str, weights: Weights | None, names: list[str]) -> list[float]:
    """The factor of each name."""
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, dict):
        unknown = [name for name in weights if name not in names]
        if unknown:
            raise ValueError(
                f"FeatureMatching: `{argument}` has a weight for {unknown[0]!r}, but there are {', '.join(names)}."
            )
        return [weights.get(name, 1.0) for name in names]
    if len(weights) != len(names):
        raise ValueError(
            f"FeatureMatching: `{argument}` has {len(weights)} numbers, but there are {len(names)}: {', '.join(names)}."
        )
    return weights
