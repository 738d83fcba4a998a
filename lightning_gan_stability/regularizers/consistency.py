"""Penalties that make the discriminator invariant to small changes of its input."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_gan_stability import penalties
from lightning_gan_stability._checks import check, check_choice
from lightning_gan_stability.callback import Regularizer, as_gan
from lightning_gan_stability.outputs import (
    Condition,
    GANOutputs,
    Logits,
    Player,
    Sample,
    batch_size,
    tree_leaves,
    tree_map,
)
from lightning_gan_stability.penalties import sum_over_entries
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.regularizers.generator import refuse_without_latents
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at

Consistency: TypeAlias = Literal["real", "balanced", "latent"]


class ConsistencyPenalty(Regularizer):
    """Adds weight · E(l(x) − l(T(x)))², which makes the discriminator invariant to a transform T.

    * ``"real"``: the mean is over real samples. "Consistency Regularization for Generative Adversarial Networks",
      https://arxiv.org/abs/1910.12027.
    * ``"balanced"``: the mean over real samples plus the mean over fake samples. "Improved Consistency Regularization
      for GANs", https://arxiv.org/abs/2002.04724.
    * ``"latent"``: (l(G(z)) − l(G(z + δ)))² with δ ~ N(0, radius²), from the same paper. A second entry with
      ``player="g"`` adds −weight · E(G(z) − G(z + δ))² (mean over values) to the generator's loss, which makes the
      generator sensitive to δ.

    By default T flips images and shifts them by up to an eighth of their size. Costs one forward pass of the
    discriminator; ``"balanced"`` costs two, and ``"latent"`` one of the generator as well.

    Args:
        kind: ``"real"``, ``"balanced"`` or ``"latent"``, as above.
        weight: λ, not negative; None: 10, for ``"latent"`` 20, and 0.5 for the generator.
        transform: T, a module from samples to samples; None: flip and shift, for images (n, channels, height, width).
        radius: standard deviation of δ, positive; None: 0.05.
        player: ``"g"`` for the generator's part of ``"latent"``.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.

    Raises:
        ValueError: if an argument has a bad value or has no effect with ``kind``, or if samples are not images and no
            ``transform`` is given.
        MisconfigurationException: for ``"latent"``, if the generator takes no latents.

    Example:
        >>> ConsistencyPenalty("latent").weight, ConsistencyPenalty("latent", player="g").weight
        (20.0, 0.5)
    """

    differentiates = ()
    second_order = False
    compares = True

    def __init__(
        self,
        kind: Consistency = "real",
        weight: Scheduled | None = None,
        transform: nn.Module | None = None,
        radius: Scheduled | None = None,
        player: Player = "d",
        every: int = 1,
        separate: bool = False,
    ) -> None:
        check_choice("kind", kind, get_args(Consistency))
        latent = kind == "latent"
        if player not in ("d", "g") or (player == "g" and not latent):
            raise ValueError(f"`player` must be 'd', or 'g' with kind='latent', got {player!r} and {kind!r}.")
        if (latent and transform is not None) or (not latent and radius is not None):
            raise ValueError(f"`{'transform' if latent else 'radius'}` has no effect with kind={kind!r}: remove it.")
        module = transform is None or isinstance(transform, nn.Module)
        check(module, "transform", "a module from samples to samples, or None", transform)
        default = 10.0 if not latent else 20.0 if player == "d" else 0.5
        super().__init__(default if weight is None else weight, every, separate=separate)
        self.kind: Consistency = kind
        self.transform = transform
        self.radius = check_scheduled("radius", 0.05 if radius is None else radius, positive=True)
        self.player = player

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a generator without latents if ``kind`` needs them."""
        super().on_fit_start(trainer, pl_module)
        if self.kind == "latent":
            refuse_without_latents(self, as_gan(pl_module))

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The mean squared difference of the logits; for the generator, the negative one of the samples."""
        if self.kind == "latent":
            return self._latent(module, outputs)
        change = self._change(module, outputs.real, outputs.real_logits, outputs.condition)
        if self.kind == "real":
            return change
        return change + self._change(module, outputs.fake, outputs.fake_logits, outputs.fake_condition)

    def _change(self, module: GANProtocol, samples: Sample, logits: Logits, condition: Condition) -> Tensor:
        moved = self._moved(module, samples)
        return sum_over_entries(lambda x, y: (x - y).square().mean(), logits, module.logits(moved, condition))

    def _moved(self, module: GANProtocol, samples: Sample) -> Sample:
        first = tree_leaves(samples)[0]
        if self.transform is not None:
            return self.transform.to(first.device)(samples)
        uniform = module.noise.rand(batch_size(samples), 3, dtype=first.dtype)

        def move(leaf: Tensor) -> Tensor:
            if leaf.dim() != 4:
                raise ValueError(
                    "ConsistencyPenalty flips and shifts images (n, channels, height, width), but samples have shape "
                    f"{tuple(leaf.shape)}: give a `transform`, or use kind='latent'."
                )
            return penalties.flip_and_shift(leaf, uniform)

        return tree_map(move, samples)

    def _latent(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        if outputs.latents is None:
            raise ValueError(
                "ConsistencyPenalty(kind='latent') compares samples with those of nearby latents, but FakePool shows "
                "samples of earlier batches, without latents: remove one of them."
            )
        radius = value_at(self.radius, module.iteration)
        near = outputs.latents + radius * module.noise.randn_like(outputs.latents)
        fake = module.resample(outputs, near).fake
        if self.player == "g":
            changes = tree_leaves(tree_map(lambda x, y: (x - y).square().mean(), outputs.fake, fake))
            return -torch.stack(changes).sum()
        logits = module.logits(fake, outputs.fake_condition)
        return sum_over_entries(lambda x, y: (x - y).square().mean(), outputs.fake_logits, logits)
