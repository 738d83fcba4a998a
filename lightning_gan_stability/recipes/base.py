"""Recipe, the base of the recipes: weights of the adversarial loss, and losses that the generator returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_gan_stability._checks import check, check_number, describe
from lightning_gan_stability.losses import AdversarialLoss
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.outputs import GANOutputs, Player, Sample, Terms


class Recipe(GANModule):
    """A GANModule with weights for its loss terms as arguments; the base class of the recipes, and of your own.

    L_D = d_weight · adversarial, L_G = g_weight · adversarial + Σ losses[k] · extras[k], where ``extras`` is the dict
    that the generator returns as ``(sample, extras)``. Distances to a target are callbacks:
    :class:`~lightning_gan_stability.Reconstruction`, :class:`~lightning_gan_stability.FeatureMatching`.

    Args:
        generator: as for :class:`~lightning_gan_stability.GANModule`.
        discriminator: the same.
        loss: the same.
        d_weight: factor of the discriminator's adversarial loss.
        g_weight: factor of the generator's adversarial loss.
        losses: names of extras to add to the generator's loss, with their weights; None: none.
        **kwargs: further arguments of :class:`~lightning_gan_stability.GANModule`.

    Raises:
        ValueError: if an argument has a bad value, or if the generator does not return one of the losses.

    Example:
        >>> import torch
        >>> from lightning_gan_stability import MLP
        >>> recipe = Recipe(MLP([2, 4]), MLP([4, 1]), losses={"codebook": 0.25})
        >>> recipe.auxiliary_losses("g", GANOutputs(None, None, extras={"codebook": torch.tensor(2.0)}))
        {'codebook': tensor(0.5000)}
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: AdversarialLoss | None = None,
        d_weight: float = 1.0,
        g_weight: float = 1.0,
        losses: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, discriminator, loss=loss, **kwargs)
        self.weights: dict[Player, float] = {
            "d": check_number("d_weight", d_weight),
            "g": check_number("g_weight", g_weight),
        }
        check(losses is None or isinstance(losses, Mapping), "losses", "a dict of names and weights", losses)
        self.extra_weights = {name: check_number(f"losses[{name!r}]", w) for name, w in (losses or {}).items()}

    def auxiliary_losses(self, player: Player, outputs: GANOutputs) -> Terms:
        """The weighted losses among the extras."""
        if player == "d":
            return {}
        found = {}
        for name, weight in self.extra_weights.items():
            value = outputs.extras.get(name)
            if not isinstance(value, Tensor) or value.dim():
                got = describe(value) if name in outputs.extras else f"extras {[*outputs.extras]}"
                raise ValueError(
                    f"The generator must return the loss {name!r} as a scalar tensor, in a dict beside its samples: "
                    f"`return samples, {{{name!r}: loss}}`, got {got}. Remove {name!r} from `losses` if it has none."
                )
            found[name] = weight * value
        return found

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Sample:
        """Samples for a batch; ``{"source": x}``, or x with other items that are not tensors, is a batch of sources."""
        if isinstance(batch, Mapping) and {*batch} == {"source"}:
            batch = batch["source"]
        elif isinstance(batch, list | tuple) and len(batch) > 1 and not any(isinstance(x, Tensor) for x in batch[1:]):
            batch = batch[0] if all(_are_names(x) for x in batch[1:]) else batch
        return super().predict_step(batch, batch_idx, dataloader_idx)

    def adversarial_weight(self, player: Player, outputs: GANOutputs) -> float | Tensor:
        """``d_weight`` or ``g_weight``."""
        return self.weights[player]


def _are_names(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def _are_labels(values: Any) -> bool:
    return isinstance(values, Tensor) and values.dim() == 1 and not values.is_floating_point()


def lone_target(batch: Any) -> Tensor | None:
    """The target of a batch without a source: a tensor alone, in a tuple, or with integer labels; None for others.

    Example:
        >>> import torch
        >>> lone_target([torch.zeros(2)]), lone_target((torch.zeros(2), torch.ones(2)))
        (tensor([0., 0.]), None)
    """
    several = isinstance(batch, list | tuple) and len(batch) in (1, 2)
    if several and len(batch) == 2 and not _are_labels(batch[1]):
        return None
    alone = batch[0] if several else batch
    return alone if isinstance(alone, Tensor) else None


def source_and_target(batch: Any, recipe: str, missing: str = "") -> tuple[Sample, Sample]:
    """Split a batch ``(source, target)`` or ``{"source": ..., "target": ...}`` into its parts.

    Args:
        batch: a batch of a loader.
        recipe: name of the recipe, for the message.
        missing: the argument that would make the recipe accept targets alone.

    Raises:
        ValueError: if the batch has another form, or no target.

    Example:
        >>> source_and_target(["spectrogram", "waveform"], "Vocoder")
        ('spectrogram', 'waveform')
    """
    if isinstance(batch, Mapping):
        source, target = batch.get("source"), batch.get("target")
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        source, target = batch
    else:
        source, target = batch, None
    if source is None or target is None:
        got = f"a dict of {[*batch]}" if isinstance(batch, Mapping) else describe(batch)
        recipe = f"{recipe} without {missing}" if missing else recipe
        raise ValueError(
            f"A batch of {recipe} must be (source, target) or {{'source': ..., 'target': ...}}, in validation too, got "
            f"{got}. `module(source)` and a loader of sources in `trainer.predict` need no target."
        )
    return source, target
