"""Metrics of reconstructions and codebooks: closed forms, sums over batches and processes, and what they refuse."""

import math

import pytest
import torch
from recipe_references_applied import dac_mel_distance, hifi_mel
from scipy.stats import entropy

from lightning_gan_stability.metrics import CodebookPerplexity, CodebookUsage, LogMelDistance

CODES = [CodebookUsage, CodebookPerplexity]
MEL = (16000, [128, 512], [8, 20])


def waveforms(n, seed):
    return 0.3 * torch.randn(n, 1, 4096, generator=torch.Generator().manual_seed(seed))


def codes(*shape, seed=0, k=8):
    return torch.randint(k, shape, generator=torch.Generator().manual_seed(seed))


def of(metric, *batches):
    for batch in batches:
        metric.update(*(batch if isinstance(batch, tuple) else (batch,)))
    return metric.compute()


def gathered(make, *parts):
    """What the first of several processes computes, each of which has seen a part, as torchmetrics gathers states."""
    others = [make() for _ in parts[1:]]
    for other, part in zip(others, parts[1:], strict=True):
        other.update(*part)
    states = [iter([getattr(other, name) for name in other._reductions]) for other in others]
    metric = make(
        dist_sync_fn=lambda state, group=None: [state, *map(next, states)], distributed_available_fn=lambda: True
    )
    metric.update(*parts[0])
    return metric.compute()


# ---------- spectrograms


def test_the_distance_is_the_mean_over_samples_of_unequal_batches():
    x, y = waveforms(7, 0), waveforms(7, 1) * torch.linspace(0.1, 2, 7)[:, None, None]
    parts = [slice(0, 4), slice(4, 5), slice(5, 7)]
    value = of(LogMelDistance(*MEL), *((x[part], y[part]) for part in parts))
    expected = dac_mel_distance(x.double(), y.double(), 16000, (128, 512), (8, 20)).item()
    assert value.item() == pytest.approx(expected, abs=5e-5)
    alike = sum(of(LogMelDistance(*MEL), (x[part], y[part])).item() for part in parts) / 3
    assert abs(alike - expected) > 1e-2  # the mean over batches is another


def test_the_distance_takes_the_arguments_of_mel_distance():
    x, y = waveforms(2, 0), waveforms(2, 1)
    metric = LogMelDistance(16000, [512], 20, 50.0, 4000, "e", 0.1, False)
    floor = math.log(0.1)
    a, b = (hifi_mel(w.double(), 16000, 512, 128, 20, 4000, 50.0).clamp(min=floor) for w in (x, y))
    assert of(metric, (x, y)).item() == pytest.approx((a - b).abs().mean().item(), abs=2e-5)
    assert (a == floor).any()


def test_the_distance_keeps_no_graph_and_no_state_in_checkpoints():
    x = waveforms(2, 0).requires_grad_()
    metric = LogMelDistance(*MEL)
    assert not of(metric, (x, waveforms(2, 1))).requires_grad
    assert metric.total.dtype == torch.float64
    assert not metric.state_dict()


def test_the_distance_refuses():
    with pytest.raises(ValueError, match=r"got \(2, 1, 4096\) and \(1, 1, 4096\)"):
        LogMelDistance(*MEL).update(waveforms(2, 0), waveforms(1, 0))
    with pytest.raises(ValueError, match="with more than 256 samples"):
        LogMelDistance(*MEL).update(torch.zeros(2, 256), torch.zeros(2, 256))
    with pytest.raises(ValueError, match="`n_mels` must"):
        LogMelDistance(16000, [256, 512], [10])


# ---------- codebooks


@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 2, 2)])
def test_codes_in_equal_use(shape):
    indices = torch.arange(8).reshape(shape)
    assert of(CodebookUsage(8), indices) == 1
    assert of(CodebookPerplexity(8), indices).item() == pytest.approx(8)
    assert of(CodebookUsage(32), indices) == 0.25
    assert of(CodebookPerplexity(32), indices).item() == pytest.approx(8)


def test_one_code():
    indices = torch.full((4, 5), 3)
    assert of(CodebookUsage(8), indices) == 0.125
    assert of(CodebookPerplexity(8), indices) == 1


def test_the_perplexity_is_that_of_scipy():
    batches = [codes(5, 7, seed=0), codes(2, 7, seed=1).square() % 8, codes(3, 7, seed=2)]
    counts = torch.cat([batch.flatten() for batch in batches]).bincount(minlength=8).numpy()
    assert of(CodebookPerplexity(8), *batches).item() == pytest.approx(math.exp(entropy(counts)), rel=1e-6)


def test_several_books_are_averaged():
    uniform, single = torch.arange(4).repeat(2, 1), torch.full((2, 4), 2)
    indices = torch.stack([uniform, single], 1)  # (n, books, frames)
    assert of(CodebookUsage(4, books=2), indices) == pytest.approx((1 + 0.25) / 2)
    assert of(CodebookPerplexity(4, books=2), indices).item() == pytest.approx((4 + 1) / 2)
    pairs = torch.tensor([[0, 2], [1, 2], [2, 2], [3, 2]])  # (n, books)
    assert of(CodebookPerplexity(4, books=2), pairs).item() == pytest.approx((4 + 1) / 2)
    assert of(CodebookPerplexity(4), pairs).item() != pytest.approx((4 + 1) / 2)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers_of_any_width(kind):
    assert of(CodebookUsage(200), torch.tensor([0, 127, 5]).to(kind)).item() == pytest.approx(3 / 200)


@pytest.mark.parametrize("make", CODES)
@pytest.mark.parametrize(
    ("options", "indices", "sentence"),
    [
        ({}, torch.tensor([0.0, 1.0]), "Codes must be integers, got torch.float32"),
        ({}, [1, 2], "Codes must be a tensor of integers, got a list of a int, a int"),
        ({}, torch.tensor([True]), "Codes must be integers, got torch.bool"),
        ({}, torch.tensor([0, 4]), r"Codes must lie in 0 ... 3, got 0 ... 4"),
        ({}, torch.tensor([-1, 2]), r"Codes must lie in 0 ... 3, got -1 ... 2"),
        ({"books": 2}, torch.zeros(4, 3, dtype=torch.long), r"Codes of 2 books must be \(n, 2, ...\), got \(4, 3\)"),
        ({"books": 2}, torch.zeros(2, dtype=torch.long), r"Codes of 2 books must be \(n, 2, ...\), got \(2,\)"),
    ],
)
def test_what_are_no_codes(make, options, indices, sentence):
    metric = make(4, **options)
    with pytest.raises(ValueError, match=sentence):
        metric.update(indices)
    assert metric.counts.sum() == 0


@pytest.mark.parametrize("make", CODES)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="`codes` must be a positive integer, got 0"):
        make(0)
    with pytest.raises(ValueError, match="`books` must be a positive integer"):
        make(4, 1.5)


# ---------- over batches and processes

KINDS = [
    (lambda **kwargs: CodebookUsage(8, **kwargs), [(codes(2, 1, seed=s),) for s in range(3)]),
    (lambda **kwargs: CodebookPerplexity(8, 2, **kwargs), [(codes(1 + s, 2, 3, seed=s),) for s in range(3)]),
    (lambda **kwargs: LogMelDistance(*MEL, **kwargs), [(waveforms(1 + s, s), waveforms(1 + s, 9)) for s in range(3)]),
]


@pytest.mark.parametrize(("make", "parts"), KINDS)
def test_processes_see_what_one_would(make, parts):
    value = of(make(), *parts)
    torch.testing.assert_close(gathered(make, *parts), value)
    merged, other = make(), make()
    merged.update(*parts[0])
    other.update(*parts[1])
    other.update(*parts[2])
    merged.merge_state(other)
    torch.testing.assert_close(merged.compute(), value)
    assert not torch.isclose(of(make(), parts[0]), value)


@pytest.mark.parametrize(("make", "parts"), KINDS)
def test_reset_forgets(make, parts):
    metric = make()
    of(metric, *parts[:2])
    metric.reset()
    assert of(metric, parts[2]) == of(make(), parts[2])
    assert of(make(), *parts) != of(make(), parts[2])


@pytest.mark.parametrize(("make", "parts"), KINDS)
def test_calls_give_the_value_of_a_batch(make, parts):
    metric = make()
    values = [metric(*part) for part in parts]
    assert values == [of(make(), part) for part in parts]
    assert metric.compute() == of(make(), *parts)


@pytest.mark.parametrize(
    ("waveform", "text"),
    [
        (torch.full((1, 1, 4096), math.nan), "`{}` has values that are not finite"),
        (
            torch.ones(1, 1, 4096, dtype=torch.int16),
            "`{}` must be waveforms as a floating-point tensor, got a torch.int16",
        ),
        ([0.0], "`{}` must be waveforms as a floating-point tensor, got a list"),
    ],
)
@pytest.mark.parametrize("side", ["sample", "target"])
def test_waveforms_that_are_refused_leave_those_before_as_they_were(waveform, text, side):
    metric = LogMelDistance(16000, [256], 20)
    one, other = waveforms(3, 0), waveforms(3, 1)
    metric.update(one[:0], other[:0])
    with pytest.raises(ValueError, match="LogMelDistance has no samples: update it first"):
        metric.compute()
    metric.update(one, other)
    expected = metric.compute()
    with pytest.raises(ValueError, match=text.format(side)):
        metric.update(**{"sample": one[:1], "target": other[:1]} | {side: waveform})
    assert torch.equal(metric.compute(), expected)
    assert expected > 0


@pytest.mark.parametrize("kind", [CodebookUsage, CodebookPerplexity])
def test_no_codes_are_refused(kind):
    metric = kind(codes=4)
    metric.update(torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=f"{kind.__name__} has no codes: update it first"):
        metric.compute()
