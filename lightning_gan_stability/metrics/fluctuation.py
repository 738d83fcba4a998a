"""How much the samples of the same latents change between checkpoints; plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor


class Fluctuation(NamedTuple):
    """Variances over checkpoints, divided by the variance over samples.

    Attributes:
        total: variance over checkpoints, including drift.
        fluctuation: the part that comes and goes, the mean of ``by_sample``.
        by_sample: (n,), the same for each sample.
        checkpoints: (n,), the checkpoint, in 1 ... t − 2, at which a sample differs most from those before and after
            it.
    """

    total: float
    fluctuation: float
    by_sample: Tensor
    checkpoints: Tensor


def checkpoint_fluctuation(samples: Tensor) -> Fluctuation:
    """Artefacts that come and go: ⅔ mean over t of (x_t − ½ (x_{t−1} + x_{t+1}))², relative to the variance of samples.

    The mean also runs over positions. For checkpoints that vary independently, this is the variance over checkpoints. A
    steady change from one checkpoint to the next, as in ongoing training, does not count. The variance over samples is
    the unbiased one of each checkpoint, averaged over checkpoints and positions.

    Args:
        samples: (t, n, ...), at least three checkpoints in their order, each with the samples of the same latents, at
            equal distances in training.

    Returns:
        At least 0; infinite if samples differ over checkpoints but not from each other; 0 if they never differ.

    Raises:
        ValueError: if samples are not finite, floating-point, and of at least three checkpoints and two latents.

    Example:
        >>> samples = torch.tensor([[0.0, 4.0], [0.0, 4.0], [1.0, 4.0], [0.0, 4.0], [0.0, 4.0]])[..., None]
        >>> found = checkpoint_fluctuation(samples)
        >>> found.checkpoints[0].item(), found.by_sample[1].item()
        (2, 0.0)
    """
    if not samples.is_floating_point() or samples.dim() < 3 or len(samples) < 3 or samples.shape[1] < 2:
        what = f"{samples.dtype} of shape {tuple(samples.shape)}"
        raise ValueError(f"`samples` must be floating-point (t, n, ...) with t ≥ 3 and n ≥ 2, got {what}.")
    if not bool(samples.isfinite().all()):
        raise ValueError("`samples` has values that are not finite (NaN or infinite).")
    x = samples.detach().flatten(2)
    spread = torch.stack([part.double().var(0).mean() for part in x]).mean()
    inner = zip(x, x[1:], x[2:], strict=False)
    bends = torch.stack([(b.double() - (a.double() + c.double()) / 2).square().mean(1) for a, b, c in inner])
    by_sample = _ratio(2 / 3 * bends.mean(0), spread)
    total = torch.stack([part.double().var(0).mean() for part in x.unbind(1)]).mean()
    return Fluctuation(float(_ratio(total, spread)), float(by_sample.mean()), by_sample, bends.argmax(0) + 1)


def _ratio(x: Tensor, spread: Tensor) -> Tensor:
    return torch.where(x > 0, x / spread, 0.0)
