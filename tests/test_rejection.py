"""Samples that the discriminator chooses, where densities of data and generator are known.

The generator's are standard normal, or around their condition, the data are narrower and lie elsewhere:
log p/q = −log s − (x − m)² / 2s² + x² / 2, which is largest at x = m / (1 − s²).
"""

import math

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy import integrate, special, stats
from torch import nn
from toys import small

from lightning_gan_stability import (
    MLP,
    BoundaryEquilibrium,
    DiscriminatorRejection,
    FDivergence,
    GANModule,
    Hinge,
    LeastSquares,
    MetropolisHastings,
    MinibatchStdDev,
    Minimax,
    NonSaturating,
    Packed,
    Relativistic,
    RelativisticAverage,
    Wasserstein,
)
from lightning_gan_stability.rejection import acceptance

M, S = 0.5, 0.5  # mean and standard deviation of the data, from the condition if there is one
DATA = stats.norm(M, S)
LOG_BOUND = -math.log(S) + M**2 / (2 * (1 - S**2))
LEVEL = 1e-3  # of tests; seeds are fixed


class Plain(nn.Module):
    """Latents as samples, around their condition."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, z, condition=None):
        return z + 0 * self.weight + (0 if condition is None else condition)


class Odds(nn.Module):
    """The exact log odds, times a factor, with a bias."""

    def __init__(self, factor=1.0, bias=0.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.bias = bias

    def forward(self, x, condition=None):
        x = (x if condition is None else x - condition)[:, 0]
        return self.factor * (-math.log(S) - (x - M) ** 2 / (2 * S**2) + x**2 / 2) + self.bias


def gan(discriminator=None, loss=None, seed=0):
    return GANModule(Plain(), discriminator or Odds(), latent_dim=1, loss=loss, noise_seed=seed).eval()


def real(n, seed=0):
    return M + S * torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))


def p_value(samples, distribution=DATA):
    """Of the test of Kolmogorov and Smirnov that samples have a distribution."""
    return stats.kstest(samples.detach().flatten().double().numpy(), distribution.cdf).pvalue


# ---------- exact


def test_the_test_tells_the_generator_from_the_data():
    assert p_value(gan().sample(4000), stats.norm()) > LEVEL
    assert p_value(gan().sample(4000)) < 1e-12


@pytest.mark.parametrize("bound", [LOG_BOUND, None])
@pytest.mark.parametrize("bias", [0.0, 7.0])
def test_rejection_draws_from_the_data(bound, bias):
    reject = DiscriminatorRejection(log_bound=None if bound is None else bound + bias)
    samples = gan(Odds(bias=bias)).sample(4000, reject=reject)
    assert samples.shape == (4000, 1)
    assert p_value(samples) > LEVEL
    assert samples.mean().item() == pytest.approx(M, abs=4 * S / math.sqrt(4000))
    assert samples.var().item() == pytest.approx(S**2, abs=4 * S**2 * math.sqrt(2 / 4000))
    assert reject.log_bound == pytest.approx(LOG_BOUND + bias, abs=1e-3)


def test_one_in_m_is_accepted():
    reject = DiscriminatorRejection(log_bound=LOG_BOUND)
    gan().sample(20_000, reject=reject)
    share = math.exp(-LOG_BOUND)
    assert share == pytest.approx(0.42, abs=0.01)
    assert reject.acceptance == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / (20_000 / share)))


def test_a_larger_bound_rejects_more_and_draws_the_same():
    reject = DiscriminatorRejection(log_bound=LOG_BOUND + math.log(5))
    assert p_value(gan().sample(4000, reject=reject)) > LEVEL
    assert reject.acceptance == pytest.approx(math.exp(-LOG_BOUND) / 5, rel=0.1)


@pytest.mark.parametrize("gamma", [-3.0, 2.0])
def test_gamma_as_in_the_paper(gamma):
    """σ(F) with the paper's F, and samples whose density is q σ(F) over its integral."""

    def weight(x):
        d = DATA.logpdf(x) - stats.norm.logpdf(x) - LOG_BOUND
        f = d - math.log(1 - math.exp(d - 1e-12)) - gamma
        assert acceptance(torch.tensor(d, dtype=torch.float64), 0.0, gamma).item() == pytest.approx(
            1 / (1 + math.exp(-f)), rel=1e-6
        )
        return stats.norm.pdf(x) / (1 + math.exp(-f))

    grid = torch.linspace(-6, 6, 1200, dtype=torch.float64)
    cumulated = integrate.cumulative_trapezoid([weight(x) for x in grid.tolist()], grid.numpy(), initial=0)
    reject = DiscriminatorRejection(gamma, log_bound=LOG_BOUND)
    samples = gan().sample(4000, reject=reject)
    cdf = lambda x: torch.as_tensor(cumulated)[((x + 6) / 12 * 1199).round().long()] / cumulated[-1]  # noqa: E731
    found = stats.kstest(samples.flatten().double().numpy(), lambda x: cdf(torch.from_numpy(x)).numpy())
    assert found.pvalue > LEVEL
    assert p_value(samples) < LEVEL
    assert reject.acceptance == pytest.approx(cumulated[-1], abs=0.02)


@pytest.mark.parametrize("percentile", [0.0, 80.0, 99.9])
def test_gamma_as_a_percentile(percentile):
    odds = torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    bound = odds.max().item()
    d = odds.numpy() - bound
    with np.errstate(divide="ignore"):
        f = d - np.log(1 - np.exp(d))
    gamma = np.percentile(np.minimum(f, 50), percentile)
    assert np.allclose(acceptance(odds, bound, 0.0, percentile).numpy(), special.expit(f - gamma))


def test_a_percentile_accepts_however_large_m_is():
    """With odds to the power 50, whose M is 10²⁰ or so, and among them the better part."""
    module, reject = gan(Odds(50.0)), DiscriminatorRejection(percentile=80.0)
    samples = module.sample(1000, reject=reject)
    assert 0.15 < reject.acceptance < 0.25
    odds = reject.log_odds(module, torch.cat([samples, module.sample(1000)])).chunk(2)
    assert odds[0].quantile(0.1) > odds[1].quantile(0.6)


def test_chains_end_in_the_data():
    reject = MetropolisHastings(steps=40)
    samples = gan().sample(4000, reject=reject)
    assert p_value(samples) > LEVEL
    assert samples.mean().item() == pytest.approx(M, abs=4 * S / math.sqrt(4000))
    assert samples.var().item() == pytest.approx(S**2, abs=4 * S**2 * math.sqrt(2 / 4000))


def test_one_step_of_a_chain():
    """Its distribution in closed form: q(y) moved to q(x) with min(1, w(x) / w(y)), or left where it is."""
    x = torch.linspace(-6, 6, 1500, dtype=torch.float64)
    q = torch.from_numpy(stats.norm.pdf(x.numpy()))
    w = torch.from_numpy(DATA.pdf(x.numpy())) / q
    step = x[1] - x[0]
    moves = (w[None, :] / w[:, None]).clamp(max=1)  # from a row to a column
    share = (moves * q[None, :]).sum(1) * step
    density = q * ((moves * q[:, None]).sum(0) * step + 1 - share)
    cumulated = density.cumsum(0) * step
    assert cumulated[-1].item() == pytest.approx(1, abs=1e-3)
    reject = MetropolisHastings(steps=1)
    samples = gan().sample(8000, reject=reject).flatten().double()
    cdf = lambda v: cumulated[((torch.from_numpy(v) + 6) / step).round().long()].numpy()  # noqa: E731
    assert stats.kstest(samples.numpy(), cdf).pvalue > LEVEL
    assert p_value(samples) < LEVEL
    assert p_value(samples, stats.norm()) < LEVEL
    expected = ((share * q).sum() * step).item()
    assert reject.acceptance == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 8000))


# ---------- which losses have such logits


def optimal_logits(loss, p, q):
    """Logits on three points that minimize the discriminator's loss, by gradient descent."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=0.5, max_iter=500, tolerance_grad=1e-10, tolerance_change=0)

    def value():
        optimizer.zero_grad()
        pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # a real one and a generated one
        weights = p[pairs[:, 0]] * q[pairs[:, 1]]
        total = (weights * loss.discriminator(logits[pairs[:, 0]], logits[pairs[:, 1]])).sum()
        total.backward()
        return total

    optimizer.step(value)
    return logits.detach()


@pytest.mark.parametrize(
    ("loss", "ratio"),
    [
        (NonSaturating(), True),
        (Minimax(), True),
        (Relativistic(), True),
        (NonSaturating(0.9), False),
        (LeastSquares(), False),
        (FDivergence("pearson"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_optimum_is_a_log_ratio(loss, ratio):
    p, q = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)
    logits, expected = optimal_logits(loss, p, q), (p / q).log()
    assert torch.allclose(logits - logits[0], expected - expected[0], atol=1e-4) == ratio
    assert loss.log_ratio == ratio


@pytest.mark.parametrize("loss", [Hinge(), Wasserstein(), RelativisticAverage(), LeastSquares(), NonSaturating(0.9)])
@pytest.mark.parametrize("reject", [DiscriminatorRejection(), MetropolisHastings()], ids=lambda r: type(r).__name__)
def test_other_losses_need_to_be_calibrated(loss, reject):
    with pytest.raises(MisconfigurationException, match=rf"Logits of {type(loss).__name__} are no ratio of densities"):
        gan(loss=loss).sample(4, reject=reject)


# ---------- calibrated


@pytest.mark.parametrize("kind", [DiscriminatorRejection, MetropolisHastings])
def test_calibrated_logits(kind):
    """Of a loss whose logits have any scale: the regression finds it, up to its standard error."""
    module, reject = gan(Odds(0.2, 3.0), Wasserstein()), kind()
    if kind is MetropolisHastings:
        reject.steps = 40
    assert reject.calibrate(module, real(4000)) is reject
    assert reject.slopes.shape == (1,)
    assert reject.slopes.item() == pytest.approx(1 / 0.2, rel=0.1)
    assert p_value(module.sample(2000, reject=reject)) > LEVEL


def test_odds_the_wrong_way_round():
    """BoundaryEquilibrium's logits are errors: low ones are real."""
    module, reject = gan(Odds(-0.5), BoundaryEquilibrium()), DiscriminatorRejection(burn_in=1000)
    reject.calibrate(module, real(4000))
    assert reject.slopes.item() == pytest.approx(-2, rel=0.1)


def test_several_discriminators_and_patches():
    """Together they have the odds: one has the square of the sample, the other, in patches, its value."""

    class Square(Odds):
        def forward(self, x):
            return self.factor * x[:, 0] ** 2

    class Patches(Odds):
        def forward(self, x):
            return self.factor * torch.cat([x + 1, x - 1], 1)

    module, reject = gan(nn.ModuleDict({"a": Square(), "b": Patches()})), MetropolisHastings(steps=40)
    with pytest.raises(MisconfigurationException, match=r"several logits, which are no ratio of densities: call `cali"):
        module.sample(4, reject=reject)
    with pytest.raises(MisconfigurationException, match="several logits"):
        gan(Patches()).sample(4, reject=reject)
    reject.calibrate(module, real(4000))
    # log p/q is −x²/2s² + x²/2 + xm/s² and a constant
    assert reject.slopes.tolist() == pytest.approx([(1 - 1 / S**2) / 2, M / S**2], rel=0.1)
    assert p_value(module.sample(2000, reject=reject)) > LEVEL


def test_a_discriminator_that_tells_all_cannot_be_calibrated():
    with pytest.raises(ValueError, match="The discriminator tells all of 32 real samples from as many generated ones"):
        DiscriminatorRejection().calibrate(gan(MLP([1, 1])), 1e4 + real(32))


def test_a_new_calibration_looks_for_the_bound_anew():
    module, reject = gan(), DiscriminatorRejection(burn_in=1000)
    module.sample(4, reject=reject)
    before = reject.log_bound
    reject.calibrate(module, real(500))
    assert reject.log_bound is None
    module.sample(4, reject=reject)
    assert reject.log_bound not in (None, before)
    with pytest.raises(ValueError, match="`log_bound` is of log odds that are known: leave it out"):
        DiscriminatorRejection(log_bound=1.0).calibrate(module, real(500))


# ---------- conditions, trees, modes


@pytest.mark.parametrize("batch_size", [7, 256])
@pytest.mark.parametrize("kind", [DiscriminatorRejection, MetropolisHastings])
def test_conditions_stay_with_their_samples(kind, batch_size):
    """They lie far apart, so that a sample with another's condition would be far off."""
    reject = kind(batch_size=batch_size)
    if kind is MetropolisHastings:
        reject.steps = 20
    condition = 1000.0 * torch.arange(600)[:, None]
    samples = gan().sample(condition=condition, reject=reject)
    assert p_value(samples - condition) > LEVEL


def test_calibration_with_conditions():
    module, reject = gan(Odds(0.2), Hinge()), DiscriminatorRejection(burn_in=1000)
    condition = 1000.0 * torch.arange(2000)[:, None]
    reject.calibrate(module, real(2000) + condition, condition)
    assert reject.slopes.item() == pytest.approx(5, rel=0.15)
    assert p_value(module.sample(condition=condition[:500], reject=reject) - condition[:500]) > LEVEL


@pytest.mark.parametrize("reject", [DiscriminatorRejection(), MetropolisHastings(20)], ids=lambda r: type(r).__name__)
def test_samples_that_are_trees(reject):
    class Tree(Plain):
        def forward(self, z):
            return {"x": super().forward(z), "same": z[:, :, None].expand(-1, 1, 3)}

    class Judge(Odds):
        def forward(self, sample):
            return super().forward(sample["x"])

    samples = GANModule(Tree(), Judge(), latent_dim=1).eval().sample(500, reject=reject)
    assert p_value(samples["x"]) > LEVEL
    assert samples["same"].shape == (500, 1, 3)
    assert torch.equal(samples["same"], samples["x"][:, :, None].expand(-1, 1, 3))


@pytest.mark.parametrize("reject", [DiscriminatorRejection(burn_in=64), MetropolisHastings(3)], ids=["drs", "mh"])
def test_samples_depend_on_the_modules_noise_alone(reject):
    def draw():
        state = torch.get_rng_state()
        reject.log_bound = None
        samples = small(noise_seed=3).sample(8, reject=reject)
        assert not samples.requires_grad
        return samples, torch.equal(state, torch.get_rng_state())

    (first, _), (second, _) = draw(), draw()
    assert torch.equal(first, second)


@pytest.mark.parametrize("reject", [DiscriminatorRejection(burn_in=64), MetropolisHastings(3)], ids=["drs", "mh"])
def test_the_discriminator_judges_in_eval_mode_and_modes_stay(reject):
    class Strict(Odds):
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("augmented")

    module = GANModule(Plain(), Strict(), latent_dim=1, augment=Never()).train()
    module.sample(8, reject=reject)
    assert module.training
    assert module.discriminator.training


def test_the_average_makes_the_candidates():
    module = gan()
    module.generator_ema = Plain()
    module.generator_ema.forward = lambda z, condition=None: torch.full_like(z, 0.25)
    samples = module.sample(8, reject=MetropolisHastings(3))
    assert torch.equal(samples, torch.full((8, 1), 0.25))


# ---------- what is refused


class Dropped(nn.Module):
    """Accepts nothing but one sample in ever so many."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return -1e6 + 0 * self.weight * x[:, 0]


def test_it_gives_up():
    reject = DiscriminatorRejection(gamma=1.0, log_bound=0.0, patience=500, batch_size=100)
    with pytest.raises(
        RuntimeError, match=r"accepted 0 of 500 candidates, and none of the last 500: set `percentile=80`, call"
    ):
        gan(Dropped()).sample(8, reject=reject)


def test_it_gives_up_on_one_condition():
    class Some(Odds):
        def forward(self, x, condition):
            return torch.where(condition[:, 0] == 5, -1e6, 0.0) + 0 * self.factor

    reject = DiscriminatorRejection(log_bound=0.0, patience=500, batch_size=100)
    condition = torch.arange(8.0)[:, None]
    with pytest.raises(RuntimeError, match="none of the last 500"):
        gan(Some()).sample(condition=condition, reject=reject)
    samples = gan(Some()).sample(condition=condition[:5], reject=reject)
    assert samples.shape == (5, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reject", [DiscriminatorRejection(), MetropolisHastings()], ids=["drs", "mh"])
def test_logits_must_be_finite(reject, value):
    class Broken(Odds):
        def forward(self, x):
            return self.factor * x[:, 0] * value

    with pytest.raises(ValueError, match="The discriminator's logits of generated samples are not finite"):
        gan(Broken()).sample(4, reject=reject)


@pytest.mark.parametrize("reject", [DiscriminatorRejection(), MetropolisHastings()], ids=["drs", "mh"])
def test_what_has_nothing_to_choose_from(reject):
    without = GANModule(MLP([2, 2]), MLP([2, 1]), latent_dim=None)
    with pytest.raises(MisconfigurationException, match=r"takes no latents .* nothing to choose from: remove `reject`"):
        without.sample(condition=torch.zeros(3, 2), reject=reject)
    packed = GANModule(MLP([4, 2]), Packed(MLP([4, 1]), 2), latent_dim=4)
    with pytest.raises(MisconfigurationException, match=r"judges several samples together \(Packed\)"):
        packed.sample(4, reject=reject)
    deviations = nn.Sequential(MinibatchStdDev(), nn.Flatten(), nn.LazyLinear(1))
    with pytest.raises(MisconfigurationException, match=r"judges several samples together \(MinibatchStdDev\)"):
        GANModule(MLP([4, 2]), deviations, latent_dim=4).sample(4, reject=reject)
    for asked in ({"latents": torch.zeros(4, 1)}, {"truncation": 0.7}):
        with pytest.raises(
            ValueError, match="`reject` draws the latents itself, and its odds do not hold for truncated samples"
        ):
            gan().sample(4, **asked, reject=reject)
    for model in (without, packed):
        with pytest.raises(MisconfigurationException):
            reject.calibrate(model, torch.zeros(8, 2))


def test_sharded_networks_are_refused(monkeypatch):
    monkeypatch.setattr(GANModule, "device_mesh", object())
    with pytest.raises(MisconfigurationException, match="sharded networks need the same: use MetropolisHastings"):
        gan().sample(4, reject=DiscriminatorRejection())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscriminatorRejection(gamma=math.inf), "`gamma` must be a finite number"),
        (lambda: DiscriminatorRejection(percentile=100), r"`percentile` must be in \[0, 100\), got 100"),
        (lambda: DiscriminatorRejection(1.0, 80), "`gamma` must be left out where there is a `percentile`"),
        (lambda: DiscriminatorRejection(burn_in=0), "`burn_in` must be a positive integer"),
        (lambda: DiscriminatorRejection(log_bound=math.nan), "`log_bound` must be a finite number"),
        (lambda: DiscriminatorRejection(patience=0), "`patience` must be a positive integer"),
        (lambda: DiscriminatorRejection(batch_size=0), "`batch_size` must be a positive integer"),
        (lambda: MetropolisHastings(steps=0), "`steps` must be a positive integer"),
        (lambda: MetropolisHastings(batch_size=1.5), "`batch_size` must be a positive integer"),
        (lambda: gan().sample(4, reject="discriminator"), "`reject` must be of type Rejection, got 'discriminator'"),
        (lambda: gan().sample(reject=MetropolisHastings()), "`n` is needed where neither"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
