"""Augmentation of the discriminator's inputs, with a strength from a rule or a schedule."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability._checks import check, check_integer, check_share, check_type, is_number
from lightning_gan_stability.augment import AugmentPipe, augment_pairs
from lightning_gan_stability.callback import Cadence, GANCallback, as_gan, callbacks_of
from lightning_gan_stability.distributed import is_distributed
from lightning_gan_stability.noise import batch_randn
from lightning_gan_stability.outputs import Condition, Sample, tree_map
from lightning_gan_stability.protocols import GANProtocol
from lightning_gan_stability.schedules import Schedule, Scheduled, check_scheduled, value_at


class _Pipe(GANCallback):
    """Base of callbacks that set the probability `p` of an AugmentPipe: the module's, or one of their own."""

    p: Scheduled
    pipe: AugmentPipe

    def __init__(self, augment: AugmentPipe | None) -> None:
        super().__init__()
        self.given = None if augment is None else check_type("augment", augment, AugmentPipe)
        self.own = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the module's pipe if it has one, else the callback's own."""
        others = [type(c).__name__ for c in callbacks_of(trainer, _Pipe) if c is not self]
        if others:
            raise MisconfigurationException(
                f"{type(self).__name__} and {others[0]} both set the probability of augmentations: remove one of them."
            )
        theirs = [part for part in as_gan(pl_module).augment.modules() if isinstance(part, AugmentPipe)]
        if len(theirs) > 1:
            raise MisconfigurationException(
                f"The module has {len(theirs)} AugmentPipes, and {type(self).__name__} sets the probability of one: "
                "merge them into one AugmentPipe, with multipliers for its transforms."
            )
        if self.given is not None and theirs:
            raise MisconfigurationException(
                f"Both `GANModule(augment=...)` and {type(self).__name__} have an AugmentPipe: remove one of them."
            )
        self.own = not theirs
        self.pipe = theirs[0] if theirs else self.given or AugmentPipe("bgc")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the probability of the pipe."""
        self.pipe.p = value_at(self.p, as_gan(pl_module).iteration)

    def augment(self, module: GANProtocol, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
        """Augment samples with the callback's own pipe; the module applies its own itself."""
        return augment_pairs(self.pipe, sample, condition) if self.own else (sample, condition)


class AdaptiveAugmentation(_Pipe):
    r"""ADA: adapts the strength of augmentations so that the discriminator does not overfit the real samples.

    Every ``interval`` batches, r = E sign(l(x)) is the mean over the real logits of these batches, and p ← max(p +
    sign(r − ``target``) n / ``speed``, 0), where n is the number of real samples in them, over all processes. Each
    transform of an :class:`~lightning_gan_stability.AugmentPipe` is applied to a sample with probability p. The pipe is
    that of ``GANModule(augment=...)`` if there is one, else ``augment``. If the loss separates real from fake logits at
    another threshold than 0, the sign is that of l(x) minus the threshold. "Training Generative Adversarial Networks
    with Limited Data", https://arxiv.org/abs/2006.06676. As in the authors' code p may rise above 1, which has the same
    effect as 1. The log has p as ``balance/augmentation`` and r as ``balance/overfitting``. Use it with fewer than some
    ten thousand images.

    Args:
        target: target value of r, in [−1, 1]: 0.6 in the paper.
        interval: batches between two changes of p.
        speed: number of real samples after which p reaches 1 from 0 if it only rises: 500,000 in the paper, and 100,000
            to continue a trained network on new data.
        p: initial probability.
        augment: the pipe to use if the module has none; None: ``AugmentPipe("bgc")``, for images with one or three
            channels.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: with a loss whose logits have no threshold between real and fake, such as
            ``Wasserstein`` or ``Relativistic``; or if the module has two AugmentPipes, or the module and this callback
            one each.

    Example:
        >>> AdaptiveAugmentation(target=0.5).p
        0.0
    """

    p: float
    counts: Tensor
    batches: int

    def __init__(
        self,
        target: Scheduled = 0.6,
        interval: int = 4,
        speed: Scheduled = 500_000,
        p: float = 0.0,
        augment: AugmentPipe | None = None,
    ) -> None:
        super().__init__(augment)
        self.target = check_scheduled("target", target, _check_target)
        self.interval = check_integer("interval", interval)
        self.speed = check_scheduled("speed", speed, positive=True)
        self.add_state("p", float(check_share("p", p)))
        self.add_state("counts", torch.zeros(3, dtype=torch.float64))  # sum of signs, logits and samples
        self.add_state("batches", 0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a loss without a threshold."""
        super().on_fit_start(trainer, pl_module)
        loss = as_gan(pl_module).loss
        if loss.threshold is None:
            raise MisconfigurationException(
                f"AdaptiveAugmentation needs a threshold between real and fake logits, which {type(loss).__name__} "
                "does not have: use another loss, or AugmentationSchedule instead of AdaptiveAugmentation."
            )

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """The probability p, and the measure r of overfitting."""
        return {"balance/augmentation": "step", "balance/overfitting": "step"}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the counts; change p every ``interval`` batches."""
        module = as_gan(pl_module)
        record = module.last_step
        if "d" in record.moved and record.pairs:
            self._count(module)
            self.batches += 1
            if self.batches % self.interval == 0:
                self._change(module)
        if record.visible:
            module.log("balance/augmentation", self.p)

    def _count(self, module: GANProtocol) -> None:
        loss = module.loss
        assert loss.threshold is not None
        signs = [(loss.direction * (pair.real.double() - loss.threshold)).sign() for pair in module.last_step.pairs]
        samples = len(signs[0]) * module.packing
        total = torch.stack([sign.sum() for sign in signs]).sum()
        self.counts = self.counts + torch.stack([total, *total.new_tensor([sum(s.numel() for s in signs), samples])])

    def _change(self, module: GANProtocol) -> None:
        counts = self.counts.clone()
        if is_distributed():
            dist.all_reduce(counts)
        signs, logits, samples = counts.tolist()
        overfitting = signs / logits
        iteration = module.last_step.iteration
        target, speed = value_at(self.target, iteration), value_at(self.speed, iteration)
        step = (overfitting > target) - (overfitting < target)
        self.p = max(self.p + step * samples / speed, 0.0)
        self.counts = torch.zeros_like(self.counts)
        module.log("balance/overfitting", overfitting)


def _check_target(name: str, value: Any) -> float:
    found: float = check(is_number(value) and -1 <= value <= 1, name, "in [-1, 1]", value)
    return found


class AugmentationSchedule(_Pipe):
    """Sets the probability of augmentations from a schedule, as in R3GAN, whose loss has no threshold for ADA.

    "The GAN is dead; long live the GAN!", https://arxiv.org/abs/2501.05441, where p rises along half a cosine from 0 to
    0.3 (FFHQ) or 0.55 (CIFAR-10) over the whole run: ``AugmentationSchedule(Schedule(0.0, 0.3, 78125),
    AugmentPipe({"bg": 1, "color": 0.5, "cutout": 1}))``. The log has ``balance/augmentation``.

    Args:
        p: a number or a :class:`~lightning_gan_stability.Schedule`, in [0, 1].
        augment: the pipe to use if the module has none; None: ``AugmentPipe("bgc")``. The module's pipe is that of
            ``GANModule(augment=...)``.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if the module has two AugmentPipes, or the module and this callback one each.

    Example:
        >>> AugmentationSchedule(Schedule(0.0, 0.3, 100)).p(100)
        0.3
    """

    def __init__(self, p: Scheduled, augment: AugmentPipe | None = None) -> None:
        super().__init__(augment)
        self.p = check_scheduled("p", p, check_share)

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """The probability."""
        return {"balance/augmentation": "step"}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the probability."""
        module = as_gan(pl_module)
        if module.last_step.visible:
            module.log("balance/augmentation", self.pipe.p)


class InstanceNoise(GANCallback):
    """Adds normal noise to real and generated samples, which hides small differences from the discriminator.

    x + σ ε with ε ~ N(0, 1) for each value; σ falls from ``std`` to 0 over ``steps`` batches. "Amortised MAP Inference
    for Image Super-resolution", https://arxiv.org/abs/1610.04490, "Towards Principled Methods for Training Generative
    Adversarial Networks", https://arxiv.org/abs/1701.04862. It works for samples of any shape and is applied after
    augmentations. Gradient penalties differentiate with respect to the sample without noise. The log has σ as
    ``balance/instance_noise``.

    Args:
        std: initial σ, in units of the data, not negative, such as 0.1 for images in [−1, 1]; or a
            :class:`~lightning_gan_stability.Schedule`, without ``steps``.
        steps: number of batches until σ is 0; None: σ is constant.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> InstanceNoise(0.1, steps=1000).std(500)
        0.05
    """

    def __init__(self, std: Scheduled = 0.1, steps: int | None = None) -> None:
        super().__init__()
        self.std = check_scheduled("std", std)
        if steps is not None:
            if isinstance(std, Schedule):
                raise ValueError(f"Give `std` as a number or leave out `steps`, got {std} and {steps}.")
            self.std = Schedule(std, 0.0, check_integer("steps", steps), "linear")

    def augment(self, module: GANProtocol, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
        """Add the noise."""
        std = value_at(self.std, module.iteration)
        if std:
            sample = tree_map(lambda x: x + std * batch_randn(*x.shape, device=x.device).to(x.dtype), sample)
        return sample, condition

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """The standard deviation."""
        return {"balance/instance_noise": "step"}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the standard deviation."""
        module = as_gan(pl_module)
        if module.last_step.visible:
            module.log("balance/instance_noise", value_at(self.std, module.last_step.iteration))
