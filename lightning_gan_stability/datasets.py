"""Labelled images that come with scikit-learn, so that nothing is downloaded."""

import torch
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Return the digits of scikit-learn: images (1797, 1, 8, 8) in [-1, 1] and labels (1797,) in 0 ... 9."""
    from sklearn.datasets import load_digits  # slow to import

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.as_tensor(data.target, dtype=torch.int64)


def stratified(labels: Tensor, source: torch.Generator) -> Tensor:
    """Return a random order of the rows of which every beginning has the labels in proportion."""
    place = torch.empty(len(labels))
    order = torch.randperm(len(labels), generator=source)
    for label in set(labels.tolist()):
        rows = order[labels[order] == label]
        place[rows] = (torch.arange(len(rows)) + 0.5) / len(rows)
    return place.argsort(stable=True)
