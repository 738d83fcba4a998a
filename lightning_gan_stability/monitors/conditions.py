"""What a generator makes of its conditions, beside what real samples do."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_gan_stability.metrics.conditions import ClassReport, class_report, condition_dependence
from lightning_gan_stability.metrics.decisions import (
    too_little_class_variation,
    too_little_consistency,
    too_little_dependence,
)
from lightning_gan_stability.outputs import Condition, tree_leaves

MOST = 1000  # rows that a measurement compares, of which there are matrices of distances
WIDTH = 1024  # numbers that describe a condition at most
ENOUGH = 20  # real and generated samples of a class that is measured
LEAST = 0.05  # real samples that depend on their conditions less than this say nothing


def as_labels(condition: Condition) -> Tensor | None:
    """The labels (n,) of a condition that is nothing else; None for others.

    Example:
        >>> as_labels(torch.tensor([[3], [1]]))
        tensor([3, 1])
    """
    leaves = tree_leaves(condition)
    if len(leaves) != 1 or leaves[0].is_floating_point() or leaves[0].is_complex() or leaves[0].dtype == torch.bool:
        return None
    return leaves[0].flatten().long() if leaves[0].numel() == len(leaves[0]) else None


def described(condition: Condition) -> Tensor:
    """A row of numbers (n, d) for each condition: its values, means of neighbouring ones if they are many.

    Example:
        >>> described({"source": torch.zeros(2, 1, 64, 64), "angle": torch.ones(2)}).shape
        torch.Size([2, 1025])
    """
    rows = []
    for leaf in tree_leaves(condition):
        flat = leaf.detach().flatten(1).float() if leaf.dim() > 1 else leaf.detach()[:, None].float()
        rows.append(nn.functional.adaptive_avg_pool1d(flat, WIDTH) if flat.shape[1] > WIDTH else flat)
    return torch.cat(rows, 1)


class Told:
    """Conditions of real samples, and how much these depend on them.

    Args:
        conditions: labels (n,), or rows (n, d) that describe conditions.
        real: features (n, d) of the real samples of these conditions.

    Attributes:
        names: what can be measured.
        classes: by label, what was measured last.
    """

    def __init__(self, conditions: Tensor, real: Tensor) -> None:
        self.conditions, self.real = conditions.to(real.device), real
        self.classes: dict[int, ClassReport] = {}
        self.names: tuple[str, ...] = ()
        if len(real) < 4:
            return
        own = condition_dependence(self.conditions[:MOST], real[:MOST], permutations=199)
        if own.dependence > LEAST and own.p_value < 0.01:
            self.names = ("dependence",)
            if not conditions.is_floating_point():
                self.names = ("dependence", "class_consistency", "class_diversity")

    def measure(self, fake: Tensor) -> dict[str, float]:
        """The values of samples (m, d) that were made for the first m conditions."""
        if not self.names:
            return {}
        n = min(MOST, len(fake))
        found = condition_dependence(self.conditions[:n], fake[:n], self.real[:n], permutations=1)
        values = {"dependence": [found.ratio]}
        if "class_diversity" in self.names:
            labels = self.conditions[: len(fake)]
            self.classes = class_report(self.real, self.conditions, fake, labels, permutations=1)
            report = [part for part in self.classes.values() if min(part.n_real, part.n_fake) >= ENOUGH]
            values["class_consistency"] = [x.consistency / x.real_consistency for x in report if x.real_consistency > 0]
            values["class_diversity"] = [part.diversity for part in report]
        known = {name: [x for x in parts if math.isfinite(x)] for name, parts in values.items()}
        return {name: min(parts) for name, parts in known.items() if parts}

    def p_values(self, fake: Tensor) -> dict[str, float]:
        """Those of a healthy generator; see :mod:`lightning_gan_stability.metrics.decisions`."""
        if not self.names:
            return {}
        asked = self.conditions[: len(fake)]
        values = {"dependence": too_little_dependence(asked, fake, self.real[: len(fake)])}
        if "class_diversity" in self.names:
            values["class_consistency"] = too_little_consistency(self.real, self.conditions, fake, asked)
            values["class_diversity"] = too_little_class_variation(self.real, self.conditions, fake, asked)
        return values
