"""Every update rule on the game min_x max_y xy, through a real Trainer in float64, against its closed-form rate.

The Dirac-GAN with the Wasserstein loss is that game: L_D = ψθ and L_G = −ψθ. An update that is linear in the last one
or two states has a matrix, found here from the trajectories of enough starts; its largest eigenvalue is the rate.
"""

import cmath
import math

import pytest
import torch
from lightning.pytorch import Callback
from toys import dirac, fit, sgd, zeros

from lightning_gan_stability import (
    CompetitiveGradientDescent,
    ConsensusOptimization,
    Extragradient,
    Lookahead,
    NegativeMomentum,
    OptimisticSGD,
    Simultaneous,
    Unrolling,
    Wasserstein,
)

ETAS = [0.1, 0.2, 0.5]


class Trajectory(Callback):
    """(θ, ψ) at the start and after every step."""

    def __init__(self):
        self.points = []

    def _look(self, module):
        self.points.append([module.generator.theta.item(), module.discriminator.psi.item()])

    def on_train_start(self, trainer, module):
        self._look(module)

    def on_train_batch_end(self, trainer, module, *_):
        self._look(module)


def trajectories(callbacks, optimizer, steps):
    """From (1, 0) and from (0, 1), each (steps + 1, 2)."""
    found = []
    for theta, psi in ((1.0, 0.0), (0.0, 1.0)):
        gan = dirac(loss=Wasserstein())
        gan.make_optimizer = {"d": optimizer, "g": optimizer}
        with torch.no_grad():
            gan.generator.theta.fill_(theta)
            gan.discriminator.psi.fill_(psi)
        look = Trajectory()
        fit(gan, zeros(steps), callbacks=[*callbacks(), look])
        found.append(torch.tensor(look.points, dtype=torch.float64))
    return found


def rate(callbacks, optimizer, cycle=1):
    """The spectral radius of an update that depends on the last state alone."""
    a, b = trajectories(callbacks, optimizer, cycle)
    matrix = torch.stack([a[cycle], b[cycle]], dim=1)
    return torch.linalg.eigvals(matrix).abs().max().item()


def rate_of_two(callbacks, optimizer):
    """The spectral radius of an update that depends on the last two states."""
    return torch.linalg.eigvals(matrix_of_two(callbacks, optimizer)).abs().max().item()


def matrix_of_two(callbacks, optimizer):
    before, after = [], []
    for path in trajectories(callbacks, optimizer, 6):
        pairs = torch.cat([path[1:], path[:-1]], dim=1)
        before.append(pairs[:-1])
        after.append(pairs[1:])
    before, after = torch.cat(before), torch.cat(after)
    matrix = torch.linalg.lstsq(before, after).solution.T
    torch.testing.assert_close(before @ matrix.T, after, rtol=0, atol=1e-12)  # it is linear
    return matrix


def plain(eta):
    return sgd(eta)


def check(found, closed_form):
    assert found == pytest.approx(closed_form, rel=1e-9, abs=0)


@pytest.mark.parametrize("eta", ETAS)
def test_simultaneous_diverges(eta):
    check(rate(lambda: [Simultaneous()], plain(eta)), math.sqrt(1 + eta**2))


@pytest.mark.parametrize("eta", ETAS)
def test_alternating_cycles(eta):
    check(rate(list, plain(eta)), 1.0)


@pytest.mark.parametrize("eta", ETAS)
def test_extragradient(eta):
    check(rate(lambda: [Extragradient()], plain(eta)), math.sqrt(1 - eta**2 + eta**4))


@pytest.mark.parametrize("eta", [0.1, 0.2, 0.5, 0.577, 0.578])
def test_optimistic(eta):
    matrix = matrix_of_two(lambda: [Simultaneous()], lambda p: OptimisticSGD(p, lr=eta))
    found = torch.linalg.eigvals(matrix).abs().max().item()
    # λ² − (1 + 2iη) λ + iη = 0
    b, c = -(1 + 2j * eta), 1j * eta
    roots = [(-b + sign * cmath.sqrt(b * b - 4 * c)) / 2 for sign in (1, -1)]
    closed_form = max(abs(root) for root in roots)
    if eta <= 0.5:
        assert closed_form == pytest.approx(math.sqrt((1 + math.sqrt(1 - 4 * eta**2)) / 2))
    assert (closed_form < 1) == (eta < 1 / math.sqrt(3))
    if eta == 0.5:
        # a double root, which eigenvalues show to half the digits only, and their product to all of them
        assert found == pytest.approx(closed_form, rel=1e-7)
        found = torch.linalg.det(matrix).item() ** 0.25
    check(found, closed_form)


@pytest.mark.parametrize("eta", [*ETAS, 3.0])
def test_competitive_is_the_proximal_point(eta):
    check(rate(lambda: [CompetitiveGradientDescent()], plain(eta)), 1 / math.sqrt(1 + eta**2))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("eta", ETAS)
def test_consensus(eta, gamma):
    found = rate(lambda: [ConsensusOptimization(gamma)], plain(eta))
    check(found, math.sqrt((1 - eta * gamma) ** 2 + eta**2))
    assert (found < 1) == (eta < 2 * gamma / (1 + gamma**2))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("eta", ETAS)
def test_unrolled_simultaneously(eta, steps, second_order):
    rule = lambda: [Unrolling(steps, second_order=second_order, simultaneous=True)]  # noqa: E731
    found = rate(rule, plain(eta))
    pull = (2 if second_order else 1) * steps * eta**2
    matrix = torch.tensor([[1 - pull, -eta], [eta, 1]], dtype=torch.float64)
    assert torch.linalg.det(matrix).item() == pytest.approx(1 - pull + eta**2)
    check(found, torch.linalg.eigvals(matrix).abs().max().item())
    if steps == 1:
        assert found < 1 if second_order else found == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "second_order", "expected"),
    [(1, True, 0.994987), (5, True, 0.953939), (10, True, 0.9), (1, False, 1), (5, False, 0.979796)],
)
def test_published_numbers_of_unrolling(steps, second_order, expected):
    found = rate(lambda: [Unrolling(steps, second_order, simultaneous=True)], plain(0.1))
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("steps", "expected"), [(1, 0.989949), (5, 0.948683), (10, 0.927016)])
@pytest.mark.parametrize("plan", [("d", "g"), ("g", "d")])
def test_unrolled_in_turn(steps, expected, plan):
    class Order(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            module.plan = plan

    assert rate(lambda: [Unrolling(steps), Order()], plain(0.1)) == pytest.approx(expected, abs=1e-6)


def test_too_many_inner_steps_of_a_high_rate_diverge():
    for steps, expected in ((5, 1.396), (10, 3.95)):
        found = rate(lambda: [Unrolling(steps, simultaneous=True)], plain(0.5))  # noqa: B023
        assert found == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("eta", ETAS)
def test_saddle_objective_is_the_same_here(eta):
    rule = lambda: [Unrolling(3, objective="saddle", simultaneous=True)]  # noqa: E731
    check(rate(rule, plain(eta)), rate(lambda: [Unrolling(3, simultaneous=True)], plain(eta)))


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (10, 0.5), (3, 0.2), (1, 1.0)])
@pytest.mark.parametrize("eta", ETAS)
def test_lookahead_over_simultaneous(eta, k, alpha):
    found = rate(lambda: [Simultaneous(), Lookahead(k, alpha)], plain(eta), cycle=k)
    check(found, abs(1 - alpha + alpha * (1 + 1j * eta) ** k))


@pytest.mark.parametrize(("eta", "expected"), [(0.1, 0.968887), (0.2, 0.877181), (0.5, 0.302577)])
def test_lookahead_over_alternating(eta, expected):
    found = rate(lambda: [Lookahead(5, 0.5)], plain(eta), cycle=5)
    step = torch.tensor([[1 - eta**2, eta], [-eta, 1]], dtype=torch.float64)
    cycle = 0.5 * torch.eye(2, dtype=torch.float64) + 0.5 * torch.linalg.matrix_power(step, 5)
    check(found, torch.linalg.eigvals(cycle).abs().max().item())
    assert found == pytest.approx(expected, abs=1e-6)


def test_lookahead_with_a_long_cycle_diverges():
    found = rate(lambda: [Simultaneous(), Lookahead(10, 0.5)], plain(0.5), cycle=10)
    assert found == pytest.approx(1.569, abs=1e-3)


def momentum_matrix(eta, beta, alternating):
    """Of (θ, ψ, θ₋, ψ₋), the discriminator first."""
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    psi = torch.tensor([-eta, 1 + beta, 0, -beta], dtype=torch.float64)
    seen = psi if alternating else torch.tensor([0.0, 1, 0, 0], dtype=torch.float64)
    matrix[0] = eta * seen + torch.tensor([1 + beta, 0, -beta, 0], dtype=torch.float64)
    matrix[1] = psi
    matrix[2, 0] = matrix[3, 1] = 1
    return matrix


@pytest.mark.parametrize("beta", [-0.5, -0.25, 0.5])
@pytest.mark.parametrize("eta", ETAS)
def test_simultaneous_momentum_diverges(eta, beta):
    found = rate_of_two(lambda: [Simultaneous()], lambda p: NegativeMomentum(p, lr=eta, momentum=beta))
    check(found, torch.linalg.eigvals(momentum_matrix(eta, beta, False)).abs().max().item())
    assert found > 1


@pytest.mark.parametrize(
    ("eta", "expected"), [(0.1, 0.998518), (0.2, 0.994063), (0.5, 0.962544), (0.8, 0.9029), (1.0, 1.0), (1.2, None)]
)
def test_alternating_negative_momentum_converges(eta, expected):
    found = rate_of_two(list, lambda p: NegativeMomentum(p, lr=eta, momentum=-0.5))
    check(found, torch.linalg.eigvals(momentum_matrix(eta, -0.5, True)).abs().max().item())
    if expected is None:
        assert found > 1
    else:
        assert found == pytest.approx(expected, abs=1e-4 if eta > 0.5 else 1e-6)


def test_published_numbers():
    """The table that the closed forms stand for, η = 0.1, 0.2 and 0.5."""
    rows = [
        ([Simultaneous], (1.004988, 1.019804, 1.118034)),
        ([Extragradient], (0.995038, 0.980612, 0.901388)),
        ([CompetitiveGradientDescent], (0.995037, 0.980581, 0.894427)),
        ([lambda: ConsensusOptimization(1.0)], (0.905539, 0.824621, 0.707107)),
    ]
    for makers, expected in rows:
        found = [rate(lambda: [make() for make in makers], plain(eta)) for eta in ETAS]  # noqa: B023
        assert found == pytest.approx(expected, abs=1e-6)
    optimistic = [rate_of_two(lambda: [Simultaneous()], lambda p: OptimisticSGD(p, lr=eta)) for eta in ETAS]  # noqa: B023
    assert optimistic == pytest.approx((0.994936, 0.978906, 0.707107), abs=1e-6)
    lookahead = [rate(lambda: [Simultaneous(), Lookahead(5, 0.5)], plain(eta), cycle=5) for eta in ETAS]
    assert lookahead == pytest.approx((0.981327, 0.926371, 0.647448), abs=1e-6)


@pytest.mark.parametrize("eta", ETAS)
def test_costs_are_what_the_docstrings_say(eta):
    """Forward passes of each network in one step."""

    class Count(Callback):
        def setup(self, trainer, module, stage):
            self.calls = {"discriminator": 0, "generator": 0}
            for name in self.calls:
                getattr(module, name).register_forward_pre_hook(lambda *_, name=name: self._add(name))

        def _add(self, name):
            self.calls[name] += 1

    expected = {
        Simultaneous: (3, 2),
        Extragradient: (6, 4),
        ConsensusOptimization: (2, 1),
        CompetitiveGradientDescent: (2, 1),
        Unrolling: (2 + 2 * 5 + 1, 2),  # D's own step, five inner steps, the objective
    }
    for rule, (d, g) in expected.items():
        count, n = Count(), 3
        fit(dirac(eta, loss=Wasserstein()), zeros(n), callbacks=[rule(), count])
        # in its first step Unrolling does not trust yet that the discriminator draws no noise
        once = 2 if rule is Unrolling else 0
        assert (count.calls["discriminator"] - once, count.calls["generator"]) == (n * d, n * g), rule
