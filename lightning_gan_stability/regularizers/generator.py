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
    """Refuse a generator without latents for a penalty that needs them."""
    if module.latent_dim is None:
        name = type(regularizer).__name__
        raise MisconfigurationException(
            f"{name} measures how samples depend on latents, but the generator takes none (`latent_dim` is None): "
            f"remove {name}."
        )


class PathLengthPenalty(RunningMeanRegularizer):
    """Adds weight · E(‖J_zᵀ y‖ − a)² to the generator's loss, so that equal steps in z change samples equally.

    J_z is the generator's Jacobian. y is a random image whose pixels have variance 1 / (number of pixels). a is the
    running mean of the lengths and starts at 0. "Analyzing and Improving the Image Quality of StyleGAN",
    https://arxiv.org/abs/1912.04958. By default the Jacobian is with respect to the latents z. StyleGAN2 takes an
    intermediate latent w instead: let :meth:`GANModule.generate` return ``(samples, {"w": w})`` and set
    ``latents="w"``. The penalty shares the forward pass of the loss, unless ``shrink`` or ``separate`` is set, and
    costs second derivatives.

    Args:
        weight: not negative.
        decay: weight of the old mean in the new one, in [0, 1].
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.
        latents: key of the extras to differentiate with respect to, such as ``"w"``, of shape (n, d) or (n, layers, d).
            None: the latents z.
        shrink: n: compute the penalty on one n-th of the batch; 2 in StyleGAN2.
        include_batch: a includes this batch with weight 1 − decay, and the gradient flows through that part, as in the
            authors' code. False: a is the running mean of earlier batches.

    Attributes:
        means: a, a scalar; None before the first batch.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if the generator has BatchNorm in train mode, if it takes no latents, or if
            ``include_batch`` is used with ``accumulate``, where a would include a micro-batch only.

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
        self._lengths: list[Tensor] = []  # of the current batch

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a generator with BatchNorm or without latents, and ``include_batch`` with micro-batches."""
        super().on_fit_start(trainer, pl_module)
        module = as_gan(pl_module)
        if self.latents is None:
            refuse_without_latents(self, module)
        if self.include_batch and module.accumulate > 1:
            raise MisconfigurationException(
                "PathLengthPenalty(include_batch=True) needs the mean length of the full batch, which accumulate="
                f"{module.accumulate} splits into micro-batches: remove one of them."
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
        """The tensor with respect to which the samples are differentiated."""
        if self.latents is None:
            assert outputs.latents is not None
            return outputs.latents
        found = outputs.extras.get(self.latents)
        if not isinstance(found, Tensor) or not found.requires_grad:
            raise ValueError(
                f"PathLengthPenalty differentiates with respect to `extras[{self.latents!r}]`, but `generate` returned "
                f"{describe(found)} there: return (samples, {{{self.latents!r}: tensor}}) with the tensor that the "
                "samples are computed from."
            )
        return found

    def observe(self, module: GANProtocol) -> Tensor | None:
        """The mean length of the batch; None if the penalty was not computed on it."""
        lengths, self._lengths = self._lengths, []
        return at_least_float32(torch.cat(lengths)).mean() if lengths else None

    def start_from(self, now: Tensor) -> Tensor:
        return torch.zeros_like(now)

    def reset(self, module: GANProtocol) -> None:
        super().reset(module)
        self._lengths = []


class ModeSeeking(Regularizer):
    """Adds weight / (mean |G(z₁) − G(z₂)| / mean |z₁ − z₂| + 10⁻⁵) to the generator's loss, against collapse.

    "Mode Seeking Generative Adversarial Networks for Diverse Image Synthesis", https://arxiv.org/abs/1903.05628, z₂ is
    a second draw of latents for the same condition. The means are over the batch of all ranks; with ``accumulate``,
    over the micro-batch. For a tree of samples they are over all values. Costs a forward pass of the generator.

    Args:
        weight: not negative.
        every: n: compute the penalty on every n-th step only, and multiply it by n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2.

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
        """The inverse of the mean change of the samples relative to that of the latents, a scalar."""
        assert outputs.latents is not None
        others = module.noise.randn_like(outputs.latents)
        samples = module.resample(outputs, others).fake
        changed = tree_leaves(tree_map(lambda x, y: (x - y).abs().flatten(), outputs.fake, samples))
        change = changed[0].mean() if len(changed) == 1 else torch.cat(changed).mean()
        means = mean_over_ranks(torch.stack([change, (outputs.latents - others).abs().mean()]))
        inverse: Tensor = 1 / (means[0] / means[1] + 1e-5)
        return inverse
