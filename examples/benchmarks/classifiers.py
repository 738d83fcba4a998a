"""The training of small classifiers, whose features and answers benchmarks measure samples with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.enable_grad()
def train_classifier(network: nn.Module, batch: Callable[[int], tuple[Tensor, Tensor]], steps: int) -> None:
    """Train a network to tell the labels of images, on `batch(0)`, `batch(1)`, ..."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(steps):
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
