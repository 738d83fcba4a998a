"""Adaptive weights of the terms of the generator's loss, computed from their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_gan_stability._checks import check, check_number, check_share, check_type
from lightning_gan_stability.callback import Cadence, GANCallback, Regularizer, as_gan, callbacks_of
from lightning_gan_stability.distributed import mean_over_ranks, world_size
from lightning_gan_stability.outputs import GANOutputs, Player, Terms, tree_leaves
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at


class AdaptiveAdversarialWeight(GANCallback):
    """Weights the adversarial loss so that its gradient at the generator's last layer matches that of all other terms.

    λ = weight · clamp(‖∇_W L_other‖ / (‖∇_W L_adversarial‖ + 10⁻⁴), 0, max), where W are the parameters of one layer.
    The gradients are computed on every batch and averaged over processes. "Taming Transformers for High-Resolution
    Image Synthesis", https://arxiv.org/abs/2012.09841, eq. 7; the clamp comes before ``weight``, as in its code. Terms
    that do not depend on W, such as a codebook loss, have no effect. A term with ``every=n`` counts n times on the
    batches on which it is computed. On a batch without any other term λ is 0. The module's ``adversarial_weight`` and
    the ramp of ``AdversarialStart`` multiply λ. The log has ``balance/adversarial_weight``. Costs two partial backward
    passes, from the losses to the layer. Networks run uncompiled in the generator's step.

    Args:
        layer: name of the generator's last layer, as in ``generator.named_modules()``, such as ``"decoder.conv_out"``;
            its trainable parameters except biases are W.
        weight: factor of the ratio, not negative: 0.8 for VQGAN, 0.75 and 0.5 for latent diffusion's autoencoders.
        max: largest ratio.
        terms: names of the terms to compare the adversarial one with, such as ``["reconstruction"]``; None: all others.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: with ``accumulate`` or ModelParallelStrategy, or if the generator has no such layer,
            or the layer has no trainable weight.

    Example:
        >>> AdaptiveAdversarialWeight("decoder.conv_out", weight=0.8).max
        10000.0
    """

    keeps_graphs = True

    def __init__(
        self, layer: str, weight: Scheduled = 1.0, max: Scheduled = 1e4, terms: list[str] | None = None
    ) -> None:
        super().__init__()
        self.layer = check_type("layer", layer, str)
        self.weight = check_scheduled("weight", weight)
        self.max = check_scheduled("max", max)
        self.terms = None if terms is None else [*check_type("terms", terms, list)]
        self._parameters: list[nn.Parameter] = []  # of the layer, without biases
        self._weight: Tensor | None = None  # of the batch at hand

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse sharded parameters, and a layer that does not exist or has no trainable weight."""
        module = as_gan(pl_module)
        if module.device_mesh is not None:
            raise MisconfigurationException(
                "AdaptiveAdversarialWeight needs gradients of a layer's unsharded parameters, but "
                "ModelParallelStrategy shards them: use strategy='ddp', or LossBalancer."
            )
        layers = dict(module.generator.named_modules())
        if self.layer not in layers:
            names = ", ".join(name for name in layers if name)
            raise MisconfigurationException(
                f"AdaptiveAdversarialWeight: the generator has no layer {self.layer!r}; it has {names}."
            )
        named = layers[self.layer].named_parameters()
        self._parameters = [p for name, p in named if name.rpartition(".")[2] != "bias"]
        self._moving()

    def _moving(self) -> list[nn.Parameter]:
        """The layer's trainable parameters, read on every batch because they may be frozen during a run."""
        found = [p for p in self._parameters if p.requires_grad]
        if not found:
            raise MisconfigurationException(
                f"AdaptiveAdversarialWeight: the generator's layer {self.layer!r} has no trainable weight."
            )
        return found

    def weigh_terms(
        self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms
    ) -> dict[str, float | Tensor]:
        """The adversarial term's factor in the generator's step."""
        if player == "d" or "adversarial" not in terms:
            return {}
        others = {name: term for name, term in terms.items() if name != "adversarial"}
        lazy = {*_names_of_regularizers(module)} - {*others}
        if self.terms is not None:
            lacking = [name for name in self.terms if name not in others and name not in lazy]
            if lacking:
                raise ValueError(
                    f"AdaptiveAdversarialWeight compares with the term {lacking[0]!r}, but the generator's loss has "
                    f"{', '.join(others) or 'no other term'}."
                )
            others = {name: others[name] for name in self.terms if name in others}
        parameters = self._moving()
        other: Any = sum(others.values())
        if not others and lazy:
            self._weight = terms["adversarial"].detach().new_zeros(())
            return {"adversarial": self._weight}
        if not others:
            raise ValueError(
                "AdaptiveAdversarialWeight compares the adversarial loss with the generator's other terms, but there "
                "are none: add Reconstruction, or override `auxiliary_losses`."
            )
        norms = []
        for name, term in (("other terms", other), ("adversarial loss", terms["adversarial"])):
            gradients = [g for g in module.gradients_of(term, parameters) if g is not None]
            if not gradients:
                raise ValueError(
                    f"AdaptiveAdversarialWeight: the generator's {name} do not depend on its layer {self.layer!r}: "
                    "name a layer between them and the samples."
                )
            flat = mean_over_ranks(torch.cat([g.flatten() for g in gradients]))
            norms.append(torch.linalg.vector_norm(flat))
        ratio = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, value_at(self.max, module.iteration))
        self._weight = value_at(self.weight, module.iteration) * ratio.detach()
        return {"adversarial": self._weight}

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """The weight."""
        return {"balance/adversarial_weight": "step"}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the factor."""
        module = as_gan(pl_module)
        if self._weight is not None and module.last_step.visible:
            module.log("balance/adversarial_weight", self._weight)
        self._weight = None


def _names_of_regularizers(module: GANProtocol) -> list[str]:
    """The names of the terms that the generator's loss may have, including those not computed on every batch."""
    regularizers = callbacks_of(module.trainer, Regularizer)  # type: ignore[type-abstract]
    return [module.term_name(c) for c in regularizers if c.player == "g" and not c.separate]


class LossBalancer(GANCallback):
    """Gives each term of the generator's loss a fixed share of the gradient at the samples, whatever the term's scale.

    Let g_i be the gradient of term i with respect to the samples, and n_i the mean of ‖g_i‖ over samples. The factor of
    term i is total_norm · w_i / Σ_j w_j / (n̄_i + 10⁻¹²), where n̄ is the bias-corrected running mean of n over all
    processes. The weight and ``every`` of a regularizer cancel, as do factors within ``auxiliary_losses``. The module's
    ``adversarial_weight`` and the ramp of ``AdversarialStart`` do not cancel; they multiply the factor. On a batch
    without a term, the other terms share the whole gradient. "High Fidelity Neural Audio Compression",
    https://arxiv.org/abs/2210.13438, eq. 5 to 7. Terms that are not in ``weights`` keep their own factor, such as a
    commitment loss, which does not depend on the samples. Norms are computed over the batch of all processes. The log
    has the factors as ``balance/<term>``. Costs a partial backward pass for each term, from the loss to the samples.
    Networks run uncompiled in the generator's step.

    Args:
        weights: w by the names of terms, such as ``{"adversarial": 4.0, "feature_matching": 4.0, "mel": 2.0}``.
        total_norm: the mean norm of the gradient at a sample if the gradients of all terms have the same direction.
        decay: decay of the running means, in [0, 1).

    Raises:
        ValueError: if an argument has a bad value, if there is no such term, or if a term does not depend on the
            samples.
        MisconfigurationException: with ``accumulate``.

    Example:
        >>> LossBalancer({"adversarial": 3.0, "reconstruction": 1.0}).shares
        {'adversarial': 0.75, 'reconstruction': 0.25}
    """

    keeps_graphs = True

    sums: dict[str, Tensor]
    counts: dict[str, float]

    def __init__(self, weights: dict[str, float], total_norm: Scheduled = 1.0, decay: Scheduled = 0.999) -> None:
        super().__init__()
        known = isinstance(weights, Mapping) and len(weights) > 0
        check(known, "weights", "a dict of numbers by the names of terms", weights)
        self.weights = {name: check_number(f"weights[{name!r}]", weight) for name, weight in weights.items()}
        check(sum(self.weights.values()) > 0, "weights", "a dict with at least one positive number", weights)
        self.total_norm = check_scheduled("total_norm", total_norm, positive=True)
        self.decay = check_scheduled("decay", decay, check_share, open_end=True)
        self.add_state("sums", {})
        self.add_state("counts", {})
        self._factors: dict[str, Tensor] = {}  # of the batch at hand

    @property
    def shares(self) -> dict[str, float]:
        """The share of the gradient that each term gets on a batch with all terms."""
        return {name: weight / sum(self.weights.values()) for name, weight in self.weights.items()}

    def weigh_terms(
        self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms
    ) -> dict[str, float | Tensor]:
        """The terms' factors in the generator's step."""
        if player == "d":
            return {}
        self._check_names(module, terms)
        weights = {name: weight for name, weight in self.weights.items() if name in terms}
        weight_sum = sum(weights.values())
        if not weight_sum:
            return {}
        samples = tree_leaves(outputs.fake)
        norms = torch.stack([self._norm(module, name, terms[name], samples) for name in weights])
        total_norm, decay = value_at(self.total_norm, module.iteration), value_at(self.decay, module.iteration)
        self._factors = {}
        for name, norm in zip(weights, mean_over_ranks(norms) / world_size(), strict=True):
            self.sums[name] = decay * self.sums.get(name, 0.0) + norm
            self.counts[name] = decay * self.counts.get(name, 0.0) + 1
            share = total_norm * weights[name] / weight_sum
            self._factors[name] = share / (self.sums[name] / self.counts[name] + 1e-12)
        return {**self._factors}

    def _norm(self, module: GANProtocol, name: str, term: Tensor, samples: list[Tensor]) -> Tensor:
        """The mean over samples of the norm of a term's gradient."""
        gradients = [g for g in module.gradients_of(term, samples) if g is not None]
        if not gradients:
            raise ValueError(
                f"LossBalancer scales the term {name!r} by its gradient at the samples, but it does not depend on "
                "them: remove it from `weights`."
            )
        precise = (g.to(torch.promote_types(g.dtype, torch.float32)).reshape(len(g), -1) for g in gradients)
        squares: Any = sum(g.square().sum(1) for g in precise)
        norm: Tensor = squares.sqrt().mean()
        return norm

    def _check_names(self, module: GANProtocol, terms: Terms) -> None:
        """Refuse a name that no term has. Adversarial terms and those with ``every`` may appear on a later batch."""
        missing = [name for name in self.weights if name not in terms]
        if not missing:
            return
        later = {"adversarial", *_names_of_regularizers(module)}
        unknown = [name for name in missing if name not in later]
        if unknown:
            raise ValueError(
                f"LossBalancer has a weight for {unknown[0]!r}, but the terms of the generator's loss are "
                f"{', '.join(terms)}."
            )

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """A factor for each term."""
        return {f"balance/{name}": "step" for name in self.weights}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the factors."""
        module = as_gan(pl_module)
        if module.last_step.visible:
            module.log_dict({f"balance/{name}": factor for name, factor in self._factors.items()})
