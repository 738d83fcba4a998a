"""Losses against closed forms, tables and formulas written here, without the package."""

import inspect
import math
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_gan_stability import losses
from lightning_gan_stability.losses import (
    AdversarialLoss,
    BoundaryEquilibrium,
    FDivergence,
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    Relativistic,
    RelativisticAverage,
    Wasserstein,
)

torch.set_num_threads(1)

P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
Q = torch.tensor([0.35, 0.15, 0.45, 0.05], dtype=torch.float64)
U = P / Q
TV = 0.5 * float((P - Q).abs().sum())
JS = 0.5 * float((P * (2 * P / (P + Q)).log()).sum() + (Q * (2 * Q / (P + Q)).log()).sum())


def _sp(x):
    return np.logaddexp(0.0, x)


# f(u), f'(u), g(v), f*(t), the v with g(v) = f'(u); METHODS.md 2.9, none of it from the package
F_TABLE = {
    "kl": (lambda u: u * np.log(u), lambda u: np.log(u) + 1, lambda v: v, lambda t: np.exp(t - 1), lambda t: t),
    "reverse_kl": (
        lambda u: -np.log(u),
        lambda u: -1 / u,
        lambda v: -np.exp(-v),
        lambda t: -1 - np.log(-t),
        lambda t: -np.log(-t),
    ),
    "pearson": (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1), lambda v: v, lambda t: t * t / 4 + t, lambda t: t),
    "neyman": (
        lambda u: (1 - u) ** 2 / u,
        lambda u: 1 - u**-2.0,
        lambda v: 1 - np.exp(-v),
        lambda t: 2 - 2 * np.sqrt(1 - t),
        lambda t: -np.log(1 - t),
    ),
    "squared_hellinger": (
        lambda u: (np.sqrt(u) - 1) ** 2,
        lambda u: 1 - u**-0.5,
        lambda v: 1 - np.exp(-v),
        lambda t: t / (1 - t),
        lambda t: -np.log(1 - t),
    ),
    "jensen_shannon": (
        lambda u: -(u + 1) * np.log((1 + u) / 2) + u * np.log(u),
        lambda u: np.log(2 * u / (1 + u)),
        lambda v: np.log(2) - np.log(1 + np.exp(-v)),
        lambda t: -np.log(2 - np.exp(t)),
        lambda t: -np.log(2 * np.exp(-t) - 1),
    ),
    "gan": (
        lambda u: u * np.log(u) - (u + 1) * np.log(u + 1),
        lambda u: np.log(u / (1 + u)),
        lambda v: -np.log(1 + np.exp(-v)),
        lambda t: -np.log(1 - np.exp(t)),
        lambda t: -np.log(np.exp(-t) - 1),
    ),
    "total_variation": (
        lambda u: np.abs(u - 1) / 2,
        lambda u: np.sign(u - 1) / 2,
        lambda v: np.tanh(v) / 2,
        lambda t: t,
        lambda t: 60 * t,  # tanh(30) is 1 in float64
    ),
}
KINDS = tuple(F_TABLE)
EXPONENTIAL = ("kl", "reverse_kl", "neyman", "squared_hellinger")
ALL = {
    "minimax": Minimax,
    "non-saturating": NonSaturating,
    "smoothed": lambda: NonSaturating(0.9),
    "least-squares": LeastSquares,
    "wasserstein": Wasserstein,
    "hinge": Hinge,
    "began": BoundaryEquilibrium,
    "relativistic": Relativistic,
    "relativistic-average": RelativisticAverage,
    **{kind: lambda kind=kind: FDivergence(kind) for kind in KINDS},
    **{f"{kind}-heuristic": lambda kind=kind: FDivergence(kind, saturating=False) for kind in KINDS},
}
every_loss = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


def expected(loss, logits):
    """L_D when the real sample i has probability P[i], the fake sample j Q[j]: all pairs with their weights."""
    n = len(logits)
    values = loss.discriminator(logits[:, None].expand(n, n), logits[None, :].expand(n, n))
    return (P[:, None] * Q[None, :] * values).sum()


def gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(expected(loss, logits), logits)[0]


# ---------------------------------------------------------------------------------------------------- the optimum


def test_minimax_optimum_is_log4_minus_2js():
    for loss in (Minimax(), NonSaturating()):
        assert float(expected(loss, U.log())) == pytest.approx(math.log(4) - 2 * JS, abs=1e-12)
        assert gradient(loss, U.log()).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.5])
def test_smoothed_optimum_is_alpha_p_over_p_plus_q(alpha):
    loss, best = NonSaturating(alpha), alpha * P / (P + Q)
    assert gradient(loss, torch.logit(best)).abs().max() < 1e-12
    assert gradient(loss, torch.logit(best) + 0.1).abs().min() > 1e-3


@pytest.mark.parametrize(("a", "b", "c"), [(0.0, 1.0, 1.0), (-1.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
def test_least_squares_optimum(a, b, c):
    assert gradient(LeastSquares(a, b, c), (b * P + a * Q) / (P + Q)).abs().max() < 1e-12


def test_least_squares_is_half_the_overlap():
    overlap = float((P * Q / (P + Q)).sum())
    assert float(expected(LeastSquares(), P / (P + Q))) == pytest.approx(overlap / 2, abs=1e-12)


def test_least_squares_generator_is_pearson():
    logits = (P - Q) / (P + Q)
    assert gradient(LeastSquares(-1, 1, 0), logits).abs().max() < 1e-12
    values = LeastSquares(-1, 1, 0).generator(logits)
    pearson = ((P - Q).square() / (P + Q)).sum()  # χ²(p + q ‖ 2q) with the ½ of both terms
    assert float(2 * ((P + Q) * values).sum()) == pytest.approx(float(pearson), abs=1e-12)


def test_hinge_optimum_is_twice_one_minus_tv():
    assert float(expected(Hinge(), torch.sign(P - Q))) == pytest.approx(2 * (1 - TV), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 7.0, -20.0])
def test_relativistic_optimum_is_log_ratio_up_to_a_constant(shift):
    assert gradient(Relativistic(), U.log() + shift).abs().max() < 1e-12
    assert float(expected(Relativistic(), U.log() + shift)) < math.log(2) - 0.01


def test_wasserstein_is_the_difference_of_means():
    logits = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    assert float(expected(Wasserstein(), logits)) == pytest.approx(float(((Q - P) * logits).sum()), abs=1e-12)


@pytest.mark.parametrize(
    ("make", "discriminator", "generator"),
    [
        (Minimax, 2 * math.log(2), -math.log(2)),
        (NonSaturating, 2 * math.log(2), math.log(2)),
        (Wasserstein, 0, 0),
        (Hinge, 2, 0),
        (Relativistic, math.log(2), math.log(2)),
        (RelativisticAverage, math.log(2), math.log(2)),
        (LeastSquares, 0.5, 0.5),
    ],
)
@pytest.mark.parametrize("shape", [(6,), (3, 2)])
def test_values_where_nothing_can_be_told(make, discriminator, generator, shape):
    logits = torch.zeros(shape, dtype=torch.float64)
    torch.testing.assert_close(make().discriminator(logits, logits), torch.full_like(logits, discriminator))
    torch.testing.assert_close(make().generator(logits, logits), torch.full_like(logits, generator))


# ------------------------------------------------------------------------------------- formulas, logit for logit


def _numbers(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-3, 3, shape)


def _relativistic_average(r, f):
    return 0.5 * (_sp(-(r - f.mean())) + _sp(f - r.mean()))


FORMULAS = {
    Minimax: (lambda r, f: _sp(-r) + _sp(f), lambda r, f: -_sp(f)),
    NonSaturating: (lambda r, f: _sp(-r) + _sp(f), lambda r, f: _sp(-f)),
    LeastSquares: (lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2, lambda r, f: 0.5 * (f - 1) ** 2),
    Wasserstein: (lambda r, f: f - r, lambda r, f: -f),
    Hinge: (lambda r, f: np.maximum(0, 1 - r) + np.maximum(0, 1 + f), lambda r, f: -f),
    BoundaryEquilibrium: (lambda r, f: r, lambda r, f: f),  # k = 0 at first
    Relativistic: (lambda r, f: _sp(-(r - f)), lambda r, f: _sp(-(f - r))),
    RelativisticAverage: (_relativistic_average, lambda r, f: _relativistic_average(f, r)),
}


@pytest.mark.parametrize("shape", [(6,), (6, 4)], ids=str)
@pytest.mark.parametrize("make", FORMULAS)
def test_values_per_element(make, shape):
    real, fake = _numbers(*shape), _numbers(*shape, seed=1)
    for value, formula in zip(
        (
            make().discriminator(torch.tensor(real), torch.tensor(fake)),
            make().generator(torch.tensor(fake), torch.tensor(real)),
        ),
        FORMULAS[make],
        strict=True,
    ):
        np.testing.assert_allclose(value.numpy(), formula(real, fake), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_f_divergence_values_per_element(kind):
    _, _, g, conjugate, _ = F_TABLE[kind]
    real, fake = _numbers(6, 2), _numbers(6, 2, seed=1)
    value = FDivergence(kind).discriminator(torch.tensor(real), torch.tensor(fake))
    np.testing.assert_allclose(value.numpy(), -g(real) + conjugate(g(fake)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(FDivergence(kind).generator(torch.tensor(fake)).numpy(), -conjugate(g(fake)), atol=1e-12)
    np.testing.assert_allclose(FDivergence(kind, saturating=False).generator(torch.tensor(fake)).numpy(), -g(fake))


@pytest.mark.parametrize("kind", KINDS)
def test_f_divergence_identity(kind):
    f, slope, _, _, inverse = F_TABLE[kind]
    best = torch.tensor(inverse(slope(U.numpy())))
    divergence = float((Q.numpy() * f(U.numpy())).sum())
    assert -float(expected(FDivergence(kind), best)) == pytest.approx(divergence, abs=1e-12)
    assert gradient(FDivergence(kind), best).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "total_variation"])
def test_f_divergence_saturating_generator_descends_the_divergence(kind):
    f, slope, _, _, inverse = F_TABLE[kind]
    best, p, q, h = torch.tensor(inverse(slope(U.numpy()))), P.numpy(), Q.numpy(), 1e-6
    numeric = ((q + h) * f(p / (q + h)) - (q - h) * f(p / (q - h))) / (2 * h)  # ∂D_f/∂q(x), by central differences
    np.testing.assert_allclose(FDivergence(kind).generator(best).numpy(), numeric, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", EXPONENTIAL)
def test_exponentials_are_exact_up_to_40_and_tangents_above(kind):
    sign = 1 if kind in ("kl", "squared_hellinger") else -1
    loss = FDivergence(kind, saturating=kind in ("kl", "squared_hellinger"))
    below, above = (torch.tensor([sign * x], dtype=torch.float64, requires_grad=True) for x in (39.0, 60.0))
    exponent = 38 if kind == "kl" else 39
    assert float(loss.generator(below).detach().abs()) == pytest.approx(math.exp(exponent), rel=1e-12)
    (steep,) = torch.autograd.grad(loss.generator(above).sum(), above)
    assert float(steep.abs()) == pytest.approx(math.exp(40), rel=1e-12)


# ---------------------------------------------------------------------------------------------------- dynamics

SHIFTED_GAUSSIANS = [  # μ, saturating and non-saturating gradient for p = N(0, 1), q = N(μ, 1): METHODS.md 11.3
    (0.5, 0.2352635, 0.264736),
    (1, 0.3979729, 0.602027),
    (2, 0.4495995, 1.550400),
    (3, 0.2958638, 2.704136),
    (5, 4.737962e-2, 4.952620),
    (8, 3.928747e-4, 7.999607),
    (10, 4.464100e-6, 9.999996),
    (20, 2.388e-22, 20),
    (30, 1.728e-49, 30),
]


def _location_gradient(loss, mu):
    """|d/dμ E L_G(l*(μ + z))| for the optimal discriminator, held fixed, by the trapezoid rule over z ~ N(0, 1)."""
    z = torch.linspace(-38, 38, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    location = torch.tensor(float(mu), dtype=torch.float64, requires_grad=True)
    values = loss.generator(-mu * (location + z) + mu**2 / 2)
    return float(torch.autograd.grad(torch.trapezoid(density * values, z), location)[0].abs())


@pytest.mark.parametrize(("mu", "saturating", "non_saturating"), SHIFTED_GAUSSIANS)
def test_shifted_gaussians(mu, saturating, non_saturating):
    g_s, g_ns = _location_gradient(Minimax(), mu), _location_gradient(NonSaturating(), mu)
    assert g_s == pytest.approx(saturating, rel=3e-4 if mu >= 20 else 2e-7)
    assert g_ns == pytest.approx(non_saturating, abs=6e-7)
    assert g_s + g_ns == pytest.approx(mu, abs=1e-10)
    assert _location_gradient(Wasserstein(), mu) == pytest.approx(mu, abs=1e-10)  # its critic here has the slope μ


def _generator_gradient(loss, logit):
    logits = torch.tensor([logit], requires_grad=True)
    return float(torch.autograd.grad(loss.generator(logits, torch.zeros(1)).sum(), logits)[0])


def test_gradients_against_a_confident_discriminator():
    assert _generator_gradient(NonSaturating(), -100.0) == -1
    assert _generator_gradient(Relativistic(), -100.0) == -1
    assert _generator_gradient(Hinge(), -100.0) == -1
    assert abs(_generator_gradient(Minimax(), -100.0)) < 1e-40
    assert _generator_gradient(Minimax(), 100.0) == -1


# ------------------------------------------------------------------------------------------------- the precision

CORNERS = [[100.0, 100.0, -100.0, -100.0, 0.0], [100.0, -100.0, 100.0, -100.0, 0.0]]


def _results(loss, dtype, numbers=CORNERS):
    """Both players' values and the gradients of all logits."""
    real, fake = (torch.tensor(row, dtype=dtype, requires_grad=True) for row in numbers)
    values = [loss.discriminator(real, fake), loss.generator(fake, real)]
    gradients = [torch.autograd.grad(v.sum(), (real, fake), allow_unused=True, retain_graph=True) for v in values]
    return values, [g for pair in gradients for g in pair if g is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_loss
def test_extreme_logits_are_finite(make, dtype, request):
    values, gradients = _results(make(), dtype)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in values)
    if dtype != torch.float16 or not any(kind in request.node.name for kind in EXPONENTIAL):
        assert all(g.isfinite().all() for g in gradients)
    assert all(g.float().square().isfinite().all() for g in gradients if dtype == torch.float32)  # as Adam squares them


EPSILONS = [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]


@pytest.mark.parametrize(("dtype", "epsilon"), EPSILONS)
@every_loss
def test_low_precision_agrees_with_float64(make, dtype, epsilon):
    numbers = [torch.tensor(row, dtype=dtype).tolist() for row in _numbers(2, 16)]  # what dtype can hold
    values, gradients = _results(make(), dtype, numbers)
    reference_values, reference_gradients = _results(make(), torch.float64, numbers)
    assert all(v.dtype == torch.float64 for v in reference_values)
    for value, reference in zip(values, reference_values, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2e-6, atol=2e-6)  # float32, whatever the logits are
    for value, reference in zip(gradients, reference_gradients, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2 * epsilon, atol=epsilon)


# -------------------------------------------------------------------------------------------------- the accuracy


@every_loss
def test_accuracy_of_the_best_discriminator_and_its_opposite(make, request):
    """Logits at the optimum for likely (u = 2) and unlikely (u = ½) samples."""
    loss, name = make(), request.node.callspec.id.removesuffix("-heuristic")
    likely, unlikely = math.log(2), -math.log(2)
    if name in F_TABLE:
        _, slope, _, _, inverse = F_TABLE[name]
        likely, unlikely = (float(inverse(slope(np.float64(u)))) for u in (2, 0.5))
    elif name == "least-squares":
        likely, unlikely = 2 / 3, 1 / 3
    elif name == "began":
        likely, unlikely = 0.1, 0.5  # reconstruction errors
    real, fake = torch.full((5, 2), likely), torch.full((5, 2), unlikely)
    assert loss.accuracy(real, fake).shape == ()
    assert float(loss.accuracy(real, fake)) == 1
    assert float(loss.accuracy(fake, real)) == 0


@pytest.mark.parametrize("make", [Minimax, NonSaturating, Hinge, lambda: FDivergence("gan")])
def test_accuracy_counts_logits(make):
    assert float(make().accuracy(torch.tensor([1.0, -1.0, 2.0, 3.0]), torch.tensor([5.0, -1.0, 1.0, 1.0]))) == 0.5


@pytest.mark.parametrize("make", [Wasserstein, Relativistic, RelativisticAverage])
def test_accuracy_counts_pairs(make):
    assert float(make().accuracy(torch.tensor([9.0, 8.0, 7.0, 1.0]), torch.tensor([8.0, 9.0, 6.0, 0.0]))) == 0.75


class Brier(AdversarialLoss):
    """Least squares of one's own with the targets 1 and 0, which says nothing of a threshold."""

    def discriminator(self, real_logits, fake_logits):
        return (real_logits - 1).square() + fake_logits.square()

    def generator(self, fake_logits, real_logits=None):
        return (fake_logits - 1).square()


def test_accuracy_of_a_loss_of_ones_own():
    """0.9 for real and 0.1 for generated samples is right on all of them, whatever the targets are."""
    real, fake = torch.full((4,), 0.9), torch.full((4,), 0.1)
    assert Brier().accuracy(real, fake) == 1
    assert Brier().accuracy(fake, real) == 0
    assert Brier().accuracy(torch.tensor([0.9, 0.4]), torch.tensor([0.6, 0.6])) == 0.5  # pairs by index

    class Halfway(Brier):
        threshold = 0.5

    assert Halfway().accuracy(real, fake) == 1
    assert Halfway().accuracy(torch.tensor([0.9, 0.4]), torch.tensor([0.6, 0.3])) == 0.5  # 0.4 and 0.6 are wrong

    class Error(Halfway):
        direction = -1.0

    assert Error().accuracy(fake, real) == 1
    assert Error().accuracy(real, fake) == 0


def test_accuracy_of_least_squares_follows_its_labels():
    real, fake = torch.tensor([0.6, 0.6, 0.1]), torch.tensor([0.1, 0.1, 0.6])
    assert float(LeastSquares().accuracy(real, fake)) == pytest.approx(2 / 3)
    assert float(LeastSquares(-1, 1, 0).accuracy(real, fake)) == pytest.approx(0.5)
    assert float(LeastSquares(1, 0, 0).accuracy(real, fake)) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------------- BEGAN


def _began_step(loss, real=2.0, fake=0.4):
    return loss.discriminator(torch.tensor([real - 1, real + 1]), torch.tensor([fake - 0.1, fake + 0.1]))


@pytest.mark.parametrize(("real", "fake", "limit"), [(2.0, 0.4, 1.0), (0.5, 0.25, 0.0), (0.1, 3.0, 0.0)])
def test_began_k_has_its_closed_form(real, fake, limit):
    loss, step = BoundaryEquilibrium(gamma=0.5, lambda_k=0.05), 0.05 * (0.5 * real - fake)
    for t in range(1, 61):
        _began_step(loss, real, fake)
        assert float(loss.k) == pytest.approx(min(max(t * step, 0), 1), abs=1e-5)
        assert float(loss.convergence) == pytest.approx(real + abs(0.5 * real - fake), rel=1e-6)
    assert float(loss.k) == pytest.approx(limit, abs=1e-6)


def test_began_k_leaves_its_bounds_again():
    loss = BoundaryEquilibrium(gamma=0.5, lambda_k=0.1)
    loss.k.fill_(1.0)
    _began_step(loss, real=1.0, fake=1.5)
    assert float(loss.k) == pytest.approx(0.9)


def test_began_uses_k_from_before_the_move():
    loss = BoundaryEquilibrium(lambda_k=0.5)
    torch.testing.assert_close(_began_step(loss), torch.tensor([1.0, 3.0]))
    assert float(loss.k) == pytest.approx(0.3)
    torch.testing.assert_close(_began_step(loss), torch.tensor([1.0, 3.0]) - 0.3 * torch.tensor([0.3, 0.5]))


def test_began_gradient_survives_the_move():
    loss, fake = BoundaryEquilibrium(lambda_k=0.5), torch.ones(2, requires_grad=True)
    loss.k.fill_(0.25)
    values = loss.discriminator(torch.full((2,), 9.0), fake)
    assert float(loss.k) == 1
    assert torch.autograd.grad(values.sum(), fake)[0].tolist() == [-0.25, -0.25]


def test_began_moves_only_in_train_mode():
    loss = BoundaryEquilibrium(lambda_k=0.5).eval()
    loss.k.fill_(0.5)
    torch.testing.assert_close(_began_step(loss), torch.tensor([1.0, 3.0]) - 0.5 * torch.tensor([0.3, 0.5]))
    loss.train().generator(torch.ones(2))
    loss.accuracy(torch.ones(2), torch.ones(2))
    assert (float(loss.k), float(loss.convergence)) == (0.5, 0)


def test_began_state_goes_through_a_checkpoint():
    loss, resumed = BoundaryEquilibrium(lambda_k=0.1), BoundaryEquilibrium(lambda_k=0.1)
    for _ in range(3):
        _began_step(loss)
    resumed.load_state_dict(loss.state_dict())
    torch.testing.assert_close(_began_step(resumed), _began_step(loss), rtol=0, atol=0)
    assert sorted(loss.state_dict()) == ["convergence", "k"]
    assert (float(resumed.k), float(resumed.convergence)) == (float(loss.k), float(loss.convergence))


def test_began_k_stays_precise_in_a_low_precision_module():
    module = torch.nn.ModuleList([torch.nn.Linear(1, 1), BoundaryEquilibrium(lambda_k=1e-3)]).to(torch.bfloat16)
    loss = module[1]
    loss.k.fill_(0.75)
    _began_step(loss, real=1.0, fake=0.25)
    assert module[0].weight.dtype == torch.bfloat16
    assert float(loss.k) == pytest.approx(0.75025, abs=1e-7)  # bfloat16 holds 0.75 and then 0.7539


# ------------------------------------------------------------------------------------------------- many processes


def _linear_problem():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 8, 4, generator=generator, dtype=torch.float64)  # real samples, fake samples, weights


def _relativistic_average_gradients(rows):
    """The weights' gradients of both players' losses on some rows, and of half the squared norms of these gradients."""
    real, fake, weights = _linear_problem()
    weight, loss = weights[0].clone().requires_grad_(), RelativisticAverage()
    logits = (real[rows] @ weight).tanh(), (fake[rows] @ weight).tanh()
    players = loss.discriminator(*logits), loss.generator(*reversed(logits))
    first = [torch.autograd.grad(v.mean(), weight, create_graph=True)[0] for v in players]
    norms = [losses.mean_over_ranks(g).square().sum() / 2 for g in first]
    second = [torch.autograd.grad(norm, weight, retain_graph=True)[0] for norm in norms]
    return torch.stack([*first, *second]).detach()


def _began_state(rows):
    real, fake, _ = _linear_problem()
    loss = BoundaryEquilibrium(lambda_k=0.1)
    for _ in range(2):
        loss.discriminator(real[rows].square().sum(1) + 12, fake[rows].square().sum(1))
    return torch.stack([loss.k, loss.convergence])


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = slice(4 * rank, 4 * rank + 4)
    gradients, state = _relativistic_average_gradients(rows), _began_state(rows)
    dist.all_reduce(gradients)  # what DistributedDataParallel does
    torch.save((gradients / 2, state), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(150)
def test_two_processes_equal_one(tmp_path):
    context = mp.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the two processes hang"
    finally:
        for process in context.processes:
            process.kill()
    whole = slice(0, 8)
    gradients, state = _relativistic_average_gradients(whole), _began_state(whole)
    assert 0 < float(state[0]) < 1
    for rank in range(2):
        rank_gradients, rank_state = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(rank_gradients, gradients, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank_state, state, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the errors


@every_loss
def test_shapes_must_agree(make):
    text = r"^`real_logits` and `fake_logits` must have the same shape, got \(8,\) and \(4,\): the loss pairs them by "
    for call in (make().discriminator, make().accuracy):
        with pytest.raises(ValueError, match=text):
            call(torch.zeros(8), torch.zeros(4))


@pytest.mark.parametrize("make", [Relativistic, RelativisticAverage])
def test_relativistic_generators_need_real_logits(make):
    with pytest.raises(ValueError, match=f"^`{make.__name__}` compares with real logits: pass `real_logits`.$"):
        make().generator(torch.zeros(2))
    with pytest.raises(ValueError, match="must have the same shape"):
        make().generator(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NonSaturating(0), "`real_label` must be in (0, 1], got 0."),
        (lambda: NonSaturating(1.1), "`real_label` must be in (0, 1], got 1.1."),
        (lambda: NonSaturating(math.nan), "`real_label` must be in (0, 1], got nan."),
        (lambda: NonSaturating(True), "`real_label` must be in (0, 1], got True."),
        (lambda: NonSaturating("1"), "`real_label` must be in (0, 1], got '1'."),
        (lambda: LeastSquares(a=math.inf), "`a` must be a finite number, got inf."),
        (lambda: LeastSquares(b="x"), "`b` must be a finite number, got 'x'."),
        (lambda: LeastSquares(c=None), "`c` must be a finite number, got None."),
        (lambda: LeastSquares(a=1, b=1.0), "`a` and `b` must differ, got 1 for both."),
        (lambda: BoundaryEquilibrium(gamma=2), "`gamma` must be in [0, 1], got 2."),
        (lambda: BoundaryEquilibrium(gamma=-0.1), "`gamma` must be in [0, 1], got -0.1."),
        (lambda: BoundaryEquilibrium(lambda_k=0), "`lambda_k` must be a positive finite number, got 0."),
        (lambda: BoundaryEquilibrium(lambda_k=math.inf), "`lambda_k` must be a positive finite number, got inf."),
        (lambda: FDivergence("js"), f"`kind` must be one of {', '.join(map(repr, KINDS))}, got 'js'."),
        (lambda: FDivergence(["kl"]), f"`kind` must be one of {', '.join(map(repr, KINDS))}, got ['kl']."),
        (lambda: FDivergence("kl", saturating=1), "`saturating` must be True or False, got 1."),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole text is compared below
        make()
    assert str(error.value) == message


# ------------------------------------------------------------------------------------------------ the interface


def test_flags_and_finality():
    classes = [c for _, c in inspect.getmembers(losses, inspect.isclass) if issubclass(c, AdversarialLoss)]
    concrete = set(classes) - {AdversarialLoss}
    assert len(concrete) == 9
    assert {c for c in concrete if c.needs_real} == {Relativistic, RelativisticAverage}
    assert {c for c in concrete if c.couples_batch} == {RelativisticAverage}
    assert {c for c in concrete if c.judges_reconstructions} == {BoundaryEquilibrium}
    with pytest.raises(TypeError, match="abstract"):
        AdversarialLoss()


@every_loss
def test_couples_batch_tells_the_truth(make):
    loss = make().eval()
    real, fake = torch.tensor(_numbers(6)), torch.tensor(_numbers(6, seed=1))
    parts = torch.cat([loss.discriminator(real[i : i + 1], fake[i : i + 1]) for i in range(6)])
    assert torch.allclose(loss.discriminator(real, fake), parts) != loss.couples_batch
