"""The energy distance of two samples; plain torch."""

import torch
from torch import Tensor


def mean_distance(x: Tensor) -> float:
    """E‖x − x′‖ over all pairs of rows, including those of a row with itself.

    Args:
        x: features (n, d).

    Example:
        >>> mean_distance(torch.tensor([[0.0], [4.0]]))
        2.0
    """
    x = x.detach().double()
    return float(torch.cdist(x, x).mean())


def energy_distance(real: Tensor, fake: Tensor, within_real: float | None = None) -> float:
    """2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖, means over all pairs of rows; 0 for equal samples.

    "Energy statistics: A class of statistics based on distances", https://doi.org/10.1016/j.jspi.2013.03.018. It needs
    no kernel, no bandwidth and no fit, and compares even samples that are far from the data. For n rows each of one
    distribution it is 2/n · E‖x − x′‖ on average.

    Args:
        real: features (n, d).
        fake: features (m, d).
        within_real: :func:`mean_distance` of ``real``, to reuse for many distances; None: compute it.

    Returns:
        At least 0, in the units of the features; NaN if they are not finite.

    Raises:
        ValueError: unless both are (n, d) of the same width.

    Example:
        >>> energy_distance(torch.tensor([[0.0]]), torch.tensor([[3.0]]))
        6.0
    """
    if real.dim() != 2 or fake.dim() != 2 or real.shape[1] != fake.shape[1] or 0 in (len(real), len(fake)):
        raise ValueError(
            f"`real` and `fake` must be features (n, d) of the same width, got {tuple(real.shape)} and "
            f"{tuple(fake.shape)}."
        )
    across = float(torch.cdist(real.detach().double(), fake.detach().double()).mean())
    value = 2 * across - (mean_distance(real) if within_real is None else within_real) - mean_distance(fake)
    return max(value, 0.0) if value == value else value  # rounding may leave it below 0
