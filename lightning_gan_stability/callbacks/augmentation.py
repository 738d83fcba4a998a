"""Augmentation of what the discriminator sees, as strong as a rule or a schedule says."""

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
    """What callbacks share that set the probability of an AugmentPipe, to `p`: of the module's, or of their own."""

    p: Scheduled
    pipe: AugmentPipe

    def __init__(self, augment: AugmentPipe | None) -> None:
        super().__init__()
        self.given = None if augment is None else check_type("augment", augment, AugmentPipe)
        self.own = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the pipe."""
        others = [type(c).__name__ for c in callbacks_of(trainer, _Pipe) if c is not self]
        if others:
            raise MisconfigurationException(
                f"{type(self).__name__} and {others[0]} both set the probability of augmentations: remove one of them."
            )
        theirs = [part for part in as_gan(pl_module).augment.modules() if isinstance(part, AugmentPipe)]
        if len(theirs) > 1:
            raise MisconfigurationException(
                f"The module has {len(theirs)} AugmentPipes, and {type(self).__name__} sets the probability of one: "
                "make them one, with multipliers for its transforms."
            )
        if self.given is not None and theirs:
            raise MisconfigurationException(
                f"The module has an AugmentPipe already, and so has {type(self).__name__}: remove the one of "
                "`GANModule(augment=...)`, or the other."
            )
        self.own = not theirs
        self.pipe = theirs[0] if theirs else self.given or AugmentPipe("bgc")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Give the pipe its probability."""
        self.pipe.p = value_at(self.p, as_gan(pl_module).iteration)

    def augment(self, module: GANProtocol, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
        """Send samples through the pipe, unless the module does that."""
        return augment_pairs(self.pipe, sample, condition) if self.own else (sample, condition)


class AdaptiveAugmentation(_Pipe):
    r"""ADA: augments as much as keeps the discriminator from learning the real samples by heart.

    r = E sign(l(x)) over the real logits of ``interval`` batches; then p ← max(p + sign(r − ``target``) n / ``speed``,
    0), where n is the number of real samples in these batches, of all processes. The transforms are those of an
    :class:`~lightning_gan_stability.AugmentPipe`, each of which is applied to a sample with probability p: the one of
    ``GANModule(augment=...)`` if there is one, else ``augment``. With a loss whose logits have another threshold than 0
    the sign is that of what lies above it. "Training Generative Adversarial Networks with Limited Data",
    https://arxiv.org/abs/2006.06676. As in the authors' code p may rise above 1, where it does no more than 1 does.
    The log has ``balance/augmentation``, p, and ``balance/overfitting``, r. For fewer than some ten thousand images.

    Args:
        target: of r, in [−1, 1]: 0.6 in the paper.
        interval: batches between two changes of p.
        speed: real samples in which p goes from 0 to 1, if it only rises: 500,000 in the paper, 100,000 when a
            trained network goes on with new data.
        p: the probability at first.
        augment: None: ``AugmentPipe("bgc")``, for images with one or three channels.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: with a loss whose logits have no threshold between real and fake, such as
            ``Wasserstein`` or ``Relativistic``; if there are two AugmentPipes, in the module or beside it.

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
                f"AdaptiveAugmentation asks what the discriminator takes for real, and {type(loss).__name__} has no "
                "threshold for that: use another loss, or AugmentationSchedule in the place of AdaptiveAugmentation."
            )

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """The probability, and what it follows."""
        return {"balance/augmentation": "step", "balance/overfitting": "step"}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and change p when it is time."""
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
    """Sets the probability of augmentations on every batch, as R3GAN does, whose loss has no threshold for ADA's rule.

    "The GAN is dead; long live the GAN!", https://arxiv.org/abs/2501.05441, where p rises along half a cosine from 0 to
    0.3 (FFHQ) or 0.55 (CIFAR-10) over the whole run: ``AugmentationSchedule(Schedule(0.0, 0.3, 78125),
    AugmentPipe({"bg": 1, "color": 0.5, "cutout": 1}))``. The log has ``balance/augmentation``.

    Args:
        p: a number or a :class:`~lightning_gan_stability.Schedule`, in [0, 1].
        augment: None: the AugmentPipe of ``GANModule(augment=...)``, or if there is none ``AugmentPipe("bgc")``.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if there are two AugmentPipes, in the module or beside it.

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
    """Adds normal noise to real and to generated samples, so that a discriminator cannot tell them apart by a detail.

    x + σ ε with ε ~ N(0, 1) for each value; σ falls from ``std`` to 0 over ``steps`` batches. "Amortised MAP Inference
    for Image Super-resolution", https://arxiv.org/abs/1610.04490, "Towards Principled Methods for Training Generative
    Adversarial Networks", https://arxiv.org/abs/1701.04862. For samples of any shape. It comes after augmentations;
    penalties on gradients see the sample before it. The log has ``balance/instance_noise``, σ.

    Args:
        std: σ at first, in units of the data, not negative: 0.1 for images in [−1, 1]; or a
            :class:`~lightning_gan_stability.Schedule`, without ``steps``.
        steps: batches until it is 0; None: it stays.

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
