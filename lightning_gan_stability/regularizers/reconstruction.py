"""Reconstruction losses: a distance between the generator's samples and targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_gan_stability._checks import check, check_term_name, check_type, describe
from lightning_gan_stability.callback import Regularizer
from lightning_gan_stability.layers import parameter_dtype
from lightning_gan_stability.outputs import GANOutputs, at_path, same_structure, shapes, tree_leaves
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Scheduled

DistanceName = Literal["l1", "l2"]
Distance: TypeAlias = DistanceName | nn.Module | Callable[[Tensor, Tensor], Tensor]

_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda sample, target: (sample - target).abs().mean(),
    "l2": lambda sample, target: (sample - target).square().mean(),
}


class Reconstruction(Regularizer):
    """Adds weight · E d(G(x), x) to the generator's loss: by default the mean absolute difference of `fake` and `real`.

    "Image-to-Image Translation with Conditional Adversarial Networks", https://arxiv.org/abs/1611.07004, uses a weight
    of 100. Several instances with different names give the terms of a codec or of image translation, such as a distance
    of spectrograms, a cycle loss from ``extras`` and an identity loss. For a tree of samples the distances of the
    leaves are summed. Validation logs the term as ``val/g/<name>``.

    Args:
        weight: not negative.
        distance: ``"l1"``, ``"l2"`` (mean squared), or a module or function of (sample, target) whose values are
            averaged. A module (such as a perceptual distance or a distance of spectrograms) is frozen, put into eval
            mode and moved to the device. It is not saved in checkpoints.
        target: path of the target in :class:`GANOutputs`: ``"real"``, ``"condition"`` or ``"extras.<key>"``. Dots
            separate further keys, indices or attributes.
        sample: path of the sample that is compared with it, such as ``"fake"`` or ``"extras.cycle"``.
        name: of the term in the log, ``g/<name>``.
        every: n: compute the penalty on every n-th step only, and multiply it by n.

    Raises:
        ValueError: if an argument has a bad value, if there is no tensor at a path, if the shapes differ, or if the
            distance fails on them.

    Example:
        >>> import torch
        >>> outputs = GANOutputs(real=torch.zeros(4, 2), fake=torch.full((4, 2), 0.5))
        >>> Reconstruction(weight=10.0).penalty(None, outputs)
        tensor(0.5000)
    """

    player = "g"
    differentiates = ()
    second_order = False
    validated = True

    def __init__(
        self,
        weight: Scheduled = 1.0,
        distance: Distance = "l1",
        target: str = "real",
        sample: str = "fake",
        name: str = "reconstruction",
        every: int = 1,
    ) -> None:
        super().__init__(weight, every)
        named = isinstance(distance, str) and distance in get_args(DistanceName)
        known = named or (callable(distance) and not isinstance(distance, type))
        check(known, "distance", "'l1', 'l2', or a module or function of sample and target", distance)
        self.distance = distance
        self.target, self.sample = check_type("target", target, str), check_type("sample", sample, str)
        self.term = check_term_name(name)

    @property
    def name(self) -> str:
        """The name of the term in the log."""
        return self.term

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze a distance that is a module, and move it to the device and dtype of the networks."""
        super().on_fit_start(trainer, pl_module)
        self._place(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same for ``trainer.validate``."""
        self._place(pl_module)

    def _place(self, module: LightningModule) -> None:
        if isinstance(self.distance, nn.Module):
            dtype = parameter_dtype(module, torch.get_default_dtype())
            self.distance.eval().requires_grad_(False).to(module.device, dtype)

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The distance between samples and targets, a scalar."""
        asker = f"Reconstruction {self.name!r}"
        sample, target = (at_path(outputs, path, asker) for path in (self.sample, self.target))
        fits = same_structure(sample, target)
        if not fits or (isinstance(self.distance, str) and shapes(sample, 0) != shapes(target, 0)):
            raise ValueError(
                f"{asker} compares `{self.sample}` of shape {shapes(sample, 0)} with "
                f"`{self.target}` of shape {shapes(target, 0)}: the shapes must be equal."
            )
        total: Any = 0.0
        for x, y in zip(tree_leaves(sample), tree_leaves(target), strict=True):
            value = self._distance(x, y.detach())
            if not isinstance(value, Tensor):
                raise ValueError(f"The distance of {asker} must return a tensor, got {describe(value)}.")
            total = total + value.mean()
        trains = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree_leaves(outputs.fake))
        if trains and not total.requires_grad:
            raise ValueError(
                f"{asker} has no gradient: let `sample` name something that the generator computes (`target` is "
                "detached), and use a distance that is differentiable (without `detach`, `no_grad` or rounding)."
            )
        return total  # type: ignore[no-any-return]

    def _distance(self, sample: Tensor, target: Tensor) -> Any:
        """Call the distance; an error of its own is raised again with the paths and shapes."""
        if isinstance(self.distance, str):
            return _DISTANCES[self.distance](sample, target)
        try:
            return self.distance(sample, target)
        except (torch.OutOfMemoryError, FloatingPointError):
            raise
        except Exception as error:
            named = isinstance(error, LookupError) or not str(error)  # a missing key says nothing by itself
            cause = f"{type(error).__name__}: {error}".rstrip(": ") if named else str(error)
            raise ValueError(
                f"The distance of Reconstruction {self.name!r} failed on `{self.sample}` of shape "
                f"{tuple(sample.shape)} and `{self.target}` of shape {tuple(target.shape)}: {cause}"
            ) from error
