"""Samples over checkpoints: closed forms, NumPy, and which sample changed when."""

import math

import numpy as np
import pytest
import torch

from lightning_gan_stability.metrics import checkpoint_fluctuation


def samples(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_are_those_of_numpy():
    x = samples(5, 7, 3, 4).cumsum(0)
    found = checkpoint_fluctuation(x)
    y = x.numpy().reshape(5, 7, 12)
    spread = y.var(1, ddof=1).mean()
    bends = (np.convolve([-0.5, 1, -0.5], [1])[:, None, None, None] * np.stack([y[:-2], y[1:-1], y[2:]])).sum(0) ** 2
    assert found.total == pytest.approx(y.var(0, ddof=1).mean() / spread)
    np.testing.assert_allclose(found.by_sample, 2 / 3 * bends.mean((0, 2)) / spread)
    assert found.fluctuation == pytest.approx(found.by_sample.mean().item())
    assert found.checkpoints.tolist() == (bends.mean(2).argmax(0) + 1).tolist()


def test_independent_checkpoints_have_their_variance():
    """Samples of variance 4, checkpoints of variance 1: 1 of 5 in all, and all of it comes and goes."""
    found = checkpoint_fluctuation(2 * samples(1, 400, 50) + samples(12, 400, 50, seed=1))
    assert found.total == pytest.approx(0.2, rel=0.03)
    assert found.fluctuation == pytest.approx(0.2, rel=0.03)


def test_steady_training_does_not_fluctuate():
    found = checkpoint_fluctuation(samples(1, 30, 8) + torch.arange(6)[:, None, None] * samples(1, 30, 8, seed=1))
    assert found.total > 0.1
    assert found.fluctuation == pytest.approx(0, abs=1e-25)


def test_an_artefact_is_found_where_and_when_it_is():
    x = samples(1, 20, 3, 8, 8).repeat(7, 1, 1, 1, 1)
    x[4, 6, :, :2, :2] += 10
    found = checkpoint_fluctuation(x)
    assert found.by_sample.argmax() == 6
    assert found.checkpoints[6] == 4
    assert found.by_sample[6] == pytest.approx(100 / 16 / 5 / x.var(1).mean().item())
    assert found.by_sample.count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_changes_nothing(dtype):
    x = samples(4, 5, 6).to(dtype)
    expected, found = checkpoint_fluctuation(x), checkpoint_fluctuation(8 * x)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-12)


def test_samples_that_do_not_differ():
    found = checkpoint_fluctuation(torch.ones(4, 5, 6))
    assert found[:2] == (0, 0)
    assert checkpoint_fluctuation(samples(4, 1, 6).expand(4, 5, 6)).fluctuation == math.inf


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(2, 5, 3), r"with t ≥ 3 and n ≥ 2, got torch.float32 of shape \(2, 5, 3\)"),
        (torch.zeros(3, 1, 3), r"with t ≥ 3 and n ≥ 2, got torch.float32 of shape \(3, 1, 3\)"),
        (torch.zeros(3, 5), r"must be floating-point \(t, n, ...\)"),
        (torch.zeros(3, 5, 2, dtype=torch.uint8), r"must be floating-point \(t, n, ...\) .* got torch.uint8"),
        (torch.full((3, 5, 2), math.nan), "`samples` has values that are not finite"),
    ],
)
def test_bad_input(x, text):
    with pytest.raises(ValueError, match=text):
        checkpoint_fluctuation(x)
