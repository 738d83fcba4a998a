"""Metrics of how much generated samples depend on their conditions, relative to real samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    """The labels (n,) of a condition that consists of labels only; None for others.

    Example:
        >>> as_labels(torch.tensor([[3], [1]]))
        tensor([3, 1])
    """
    leaves = tree_leaves(condition)
    if len(leaves) != 1 or leaves[0].is_floating_point() or leaves[0].is_complex() or leaves[0].dtype == torch.bool:
        return None
    return leaves[0].flatten().long() if leaves[0].numel() == len(leaves[0]) else None


def described(condition: Condition) -> Tensor:
    """A row of numbers (n, d) for each condition: its values, or means of neighbouring values if there are many.

    Example:
        >>> described({"source": torch.zeros(2, 1, 64, 64), "angle": torch.ones(2)}).shape
        torch.Size([2, 1025])
    """
    rows = []
    for leaf in tree_leaves(condition):
        flat = leaf.detach().flatten(1).float() if leaf.dim() > 1 else leaf.detach()[:, None].float()
        rows.append(nn.functional.adaptive_avg_pool1d(flat, WIDTH) if flat.shape[1] > WIDTH else flat)
    return torch.cat(rows, 1)


def parts_of(condition: Condition) -> list[int]:
    """The number of columns of :func:`described` that each tensor of a condition takes.

    Example:
        >>> parts_of({"source": torch.zeros(2, 1, 64, 64), "angle": torch.ones(2)})
        [1, 1024]
    """
    return [min(WIDTH, max(1, leaf.numel() // len(leaf))) for leaf in tree_leaves(condition)]


class Told:
    """Conditions of real samples, and how much the samples depend on them.

    In a condition of several tensors each is measured separately, and the one that samples depend on least counts,
    because a generator may use one and ignore another.

    Args:
        conditions: labels (n,), or rows (n, d) that describe conditions.
        real: features (n, d) of the real samples of these conditions.
        parts: numbers of columns of the parts, see :func:`parts_of`; None: the rows have one part.

    Attributes:
        names: the metrics that can be computed.
        classes: the last measurement of each label.
    """

    def __init__(self, conditions: Tensor, real: Tensor, parts: Sequence[int] | None = None) -> None:
        self.real = real
        self.classes: dict[int, ClassReport] = {}
        self.names: tuple[str, ...] = ()
        self.parts: list[Tensor] = []
        if len(real) < 4:
            return
        conditions = conditions.to(real.device)
        several = conditions.dim() == 2 and parts is not None and sum(parts) == conditions.shape[1]
        every = torch.split(conditions, [*(parts or ())], dim=1) if several else (conditions,)
        for part in every:
            own = condition_dependence(part[:MOST], real[:MOST], permutations=199 * len(every))
            if own.dependence > LEAST and own.p_value < 0.01 / len(every):
                self.parts.append(part)
        if self.parts:
            self.names = ("dependence",)
            if not conditions.is_floating_point():
                self.names = ("dependence", "class_consistency", "class_diversity")

    def measure(self, fake: Tensor) -> dict[str, float]:
        """The metrics of samples (m, d) that were generated for the first m conditions."""
        if not self.names:
            return {}
        n = min(MOST, len(fake))
        found = [condition_dependence(part[:n], fake[:n], self.real[:n], permutations=1) for part in self.parts]
        values = {"dependence": [one.ratio for one in found]}
        if "class_diversity" in self.names:
            (labels,) = self.parts
            self.classes = class_report(self.real, labels, fake, labels[: len(fake)], permutations=1)
            report = [part for part in self.classes.values() if min(part.n_real, part.n_fake) >= ENOUGH]
            values["class_consistency"] = [x.consistency / x.real_consistency for x in report if x.real_consistency > 0]
            values["class_diversity"] = [part.diversity for part in report]
        known = {name: [x for x in parts if math.isfinite(x)] for name, parts in values.items()}
        return {name: min(parts) for name, parts in known.items() if parts}

    def p_values(self, fake: Tensor) -> dict[str, float]:
        """The p-values under a healthy generator; see :mod:`lightning_gan_stability.metrics.decisions`."""
        if not self.names:
            return {}
        n = len(fake)
        p_values = [too_little_dependence(part[:n], fake, self.real[:n]) for part in self.parts]
        values = {"dependence": min(1.0, len(p_values) * min(p_values))}  # Bonferroni's inequality
        if "class_diversity" in self.names:
            (labels,) = self.parts
            values["class_consistency"] = too_little_consistency(self.real, labels, fake, labels[:n])
            values["class_diversity"] = too_little_class_variation(self.real, labels, fake, labels[:n])
        return values
