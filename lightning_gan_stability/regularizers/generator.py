"""Penalties on how the generator's samples depend on its latents."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability import penalties
from lightning_gan_stability._checks import check_bool, check_integer, check_type, describe
from lightning_gan_stability.callback import Regularizer, as_gan
from lightning_gan_stability.distributed import mean_over_ranks
from lightning_gan_stability.outputs import GANOutputs, batch_size, take_rows, tree_leaves, tree_map
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.regularizers.running_mean import RunningMeanRegularizer, at_least_float32
from lightning_gan_stability.schedules import Scheduled


def refuse_without_latents(regularizer: Regularizer, module: GANProtocol) -> None:
    """Refuse a generator without latents, where a penalty asks how samples depend on them."""
    if module.latent_dim is None:
        name = type(regularizer).__name__
        raise MisconfigurationException(
            f"{name} asks how samples depend on latents, but the generator takes none (`latent_dim` is None): remove "
            f"{name}."
        )


class PathLengthPenalty(RunningMeanRegularizer):
    """Adds weight · E(‖J_zᵀ y‖ − a)² to the generator's loss, so that equal steps in z change samples equally.

    J_z is the generator's Jacobian, y a random image with pixels of variance 1 / their number, and a the running mean
    of the lengths, at first 0. "Analyzing and Improving the Image Quality of StyleGAN",
    https://arxiv.org/abs/1912.04958. By default with respect to the latents z themselves; StyleGAN2 has an intermediate
    latent w instead, which :meth:`GANModule.generate` returns as ``(samples, {"w": w})``: ``latents="w"``. Shares the
    forward pass of the loss, unless the batch is smaller or the step separate; costs its second derivatives.

    Args:
        weight: not negative.
        decay: share of the old mean in the new one, in [0, 1].
        every: due on every so many steps, and scaled by as much.
        separate: it takes a step of the optimizer for itself, after the player's own, as in StyleGAN2.
        latents: key of the extras that J is with respect to, such as ``"w"``, of shape (n, d) or (n, layers, d). None:
            the latents that samples are made from.
        shrink: the penalty takes one n-th of the batch; 2 in StyleGAN2.
        include_batch: a is the mean with this batch in it, by a share of 1 − decay through which the gradient flows, as
            in the authors' code. False: the mean of earlier batches.

    Attributes:
        means: a, a scalar; None before the first batch.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if the generator has BatchNorm in train mode, or takes no latents, or for
            ``include_batch`` with ``accumulate``, which would see parts of the batch alone.

    Example:
        >>> PathLengthPenalty().every
        4
    """

    player = "g"
    differentiates = ("latents",)
    reads = ()
    per_sample = True
    weight = 2.0
    every = 4

    def __init__(
        self,
        weight: Scheduled = 2.0,
        decay: Scheduled = 0.99,
        every: int = 4,
        separate: bool = False,
        latents: str | None = None,
        shrink: int = 1,
        include_batch: bool = False,
    ) -> None:
        super().__init__(weight, every, decay, separate)
        self.include_batch = check_bool("include_batch", include_batch)
        self.latents = None if latents is None else check_type("latents", latents, str)
        self.shrink = check_integer("shrink", shrink)
        self._lengths: list[Tensor] = []  # of the batch at hand

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a generator with BatchNorm, or without latents, and micro-batches where they would be wrong."""
        super().on_fit_start(trainer, pl_module)
        module = as_gan(pl_module)
        if self.latents is None:
            refuse_without_latents(self, module)
        if self.include_batch and module.accumulate > 1:
            raise MisconfigurationException(
                "PathLengthPenalty(include_batch=True) takes the mean length of the whole batch, which accumulate="
                f"{module.accumulate} would take apart: drop one of them."
            )

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """(‖J_zᵀ y‖ − a)² of each sample, (n,)."""
        if self.shrink > 1 and not self.separate:
            rows = self.rows_of(batch_size(outputs.fake))
            condition, latents = (take_rows(tree, 0, rows) for tree in (outputs.fake_condition, outputs.latents))
            fewer = outputs.replace(real=None, fake_condition=condition, fake=take_rows(outputs.fake, 0, rows))
            outputs = module.resample(fewer, latents)
        lengths = penalties.path_lengths(self._by(outputs), outputs.fake, module.noise.randn_like(outputs.fake))
        self._lengths.append(lengths.detach())
        mean = torch.zeros_like(lengths[0]) if self.means is None else self.means
        if self.include_batch:
            mean = mean_over_ranks(lengths.mean()).lerp(
                mean.to(lengths.dtype), self.decay_at(module.steps[self.player])
            )
        return (lengths - mean).square()

    def _by(self, outputs: GANOutputs) -> Tensor:
        """What the samples are differentiated by."""
        if self.latents is None:
            assert outputs.latents is not None
            return outputs.latents
        found = outputs.extras.get(self.latents)
        if not isinstance(found, Tensor) or not found.requires_grad:
            raise ValueError(
                f"PathLengthPenalty differentiates by `extras[{self.latents!r}]`, but `generate` returned "
                f"{describe(found)} there: return (samples, {{{self.latents!r}: the tensor that they are made of}})."
            )
        return found

    def observe(self, module: GANProtocol) -> Tensor | None:
        """The mean length of the batch, if the penalty was due."""
        lengths, self._lengths = self._lengths, []
        return at_least_float32(torch.cat(lengths)).mean() if lengths else None

    def start_from(self, now: Tensor) -> Tensor:
        return torch.zeros_like(now)

    def reset(self, module: GANProtocol) -> None:
        super().reset(module)
        self._lengths = []


class ModeSeeking(Regularizer):
    """Adds weight / (mean |G(z₁) − G(z₂)| / mean |z₁ − z₂| + 10⁻⁵) to the generator's loss, against collapse.

    "Mode Seeking Generative Adversarial Networks for Diverse Image Synthesis", https://arxiv.org/abs/1903.05628, with
    second latents for the same condition. The means are over the batch of all ranks, but over the micro-batch with
    ``accumulate``; of a tree of samples over all values. Costs a forward pass of the generator.

    Args:
        weight: not negative.
        every: due on every so many steps, and scaled by as much.
        separate: it takes a step of the optimizer for itself, after the player's own, as in StyleGAN2.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if the generator takes no latents.

    Example:
        >>> ModeSeeking().name
        'mode_seeking'
    """

    player = "g"
    differentiates = ()
    second_order = False

    def __init__(
        self,
        weight: Scheduled = 1.0,
        every: int = 1,
        separate: bool = False,
    ) -> None:
        super().__init__(weight, every, separate)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a generator without latents."""
        super().on_fit_start(trainer, pl_module)
        refuse_without_latents(self, as_gan(pl_module))

    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The inverse of the mean change of samples per change of latents, a scalar."""
        assert outputs.latents is not None
        others = module.noise.randn_like(outputs.latents)
        samples = module.resample(outputs, others).fake
        changed = tree_leaves(tree_map(lambda x, y: (x - y).abs().flatten(), outputs.fake, samples))
        change = changed[0].mean() if len(changed) == 1 else torch.cat(changed).mean()
        means = mean_over_ranks(torch.stack([change, (outputs.latents - others).abs().mean()]))
        inverse: Tensor = 1 / (means[0] / means[1] + 1e-5)
        return inverse
