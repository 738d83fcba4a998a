"""Training through a real Trainer against the closed-form dynamics of the Dirac-GAN, in float64."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from toys import dirac, fit, zeros

from lightning_gan_stability import (
    ConsensusOptimization,
    Extragradient,
    GradientPenalty,
    Minimax,
    NonSaturating,
    R1Penalty,
    R2Penalty,
    Relativistic,
    Simultaneous,
    Wasserstein,
    WeightClipping,
)


def norm(module):
    return math.hypot(module.generator.theta.item(), module.discriminator.psi.item())


class Norms(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, *_):
        self.values.append(norm(module))


@pytest.mark.parametrize("eta", [0.1, 0.2, 0.5])
def test_simultaneous_wasserstein_grows_by_a_known_factor_each_step(eta):
    norms = Norms()
    fit(dirac(eta, loss=Wasserstein()), zeros(50), callbacks=[Simultaneous(), norms])
    norms.values.insert(0, math.sqrt(2))
    for before, after in zip(norms.values, norms.values[1:], strict=False):
        assert after / before == pytest.approx(math.sqrt(1 + eta**2), rel=1e-9)


@pytest.mark.parametrize("eta", [0.1, 0.2, 0.5])
def test_alternating_wasserstein_conserves_its_quadratic_form(eta):
    gan = dirac(eta, loss=Wasserstein())
    fit(gan, zeros(200))
    theta, psi = gan.generator.theta.item(), gan.discriminator.psi.item()
    # the discriminator moves first: ψ ← ψ − ηθ, θ ← θ + ηψ
    assert theta**2 + psi**2 - eta * theta * psi == pytest.approx(2 - eta, rel=1e-9)


# The norms after 500 steps of h = 0.2 in the paper's notebook. It writes the game with the other sign of ψ, so its
# its start (1, 1) is (1, −1) here, its generator moves first, and its penalty of 0.7 has a ½.
SIMULTANEOUS, ONCE, FIVE_TIMES = "simultaneous", ("g", "d"), ("g", *("d",) * 5)


@pytest.mark.parametrize(
    ("loss", "penalty", "order", "expected"),
    [
        (Minimax, None, SIMULTANEOUS, "3.097"),
        (Minimax, None, ONCE, "1.421"),
        (Minimax, None, FIVE_TIMES, "1.845"),
        (NonSaturating, None, SIMULTANEOUS, "0.640"),
        (NonSaturating, None, ONCE, "0.284"),
        (NonSaturating, None, FIVE_TIMES, "0.139"),
        (Minimax, R1Penalty(0.3), SIMULTANEOUS, "2.6e-06"),
        (Minimax, R1Penalty(0.3), ONCE, "2.3e-07"),
        (Minimax, R1Penalty(0.3), FIVE_TIMES, "9e-34"),
        (Minimax, R1Penalty(1), SIMULTANEOUS, "9.5e-22"),
        (Minimax, R1Penalty(1), ONCE, "7.5e-17"),
        (Minimax, R1Penalty(1), FIVE_TIMES, "5.1e-12"),
        (Minimax, R2Penalty(0.3), SIMULTANEOUS, "2.6e-06"),
        (Minimax, R2Penalty(0.3), ONCE, "2.3e-07"),
        (Minimax, R2Penalty(1), SIMULTANEOUS, "9.5e-22"),
        (Minimax, R2Penalty(1), ONCE, "7.5e-17"),
        (NonSaturating, R1Penalty(0.3), SIMULTANEOUS, "2.2e-06"),
        (NonSaturating, R1Penalty(0.3), ONCE, "1.5e-07"),
        (NonSaturating, R1Penalty(0.3), FIVE_TIMES, "4e-34"),
        (Wasserstein, GradientPenalty(0.35), SIMULTANEOUS, "1.802"),
        (Wasserstein, GradientPenalty(0.35), ONCE, "1.221"),
        (Wasserstein, GradientPenalty(0.35), FIVE_TIMES, "0.716"),
        (Wasserstein, WeightClipping(1.0), SIMULTANEOUS, "1.002"),
        (Wasserstein, WeightClipping(1.0), ONCE, "1.024"),
        (Wasserstein, WeightClipping(1.0), FIVE_TIMES, "0.917"),
    ],
)
def test_published_norm_after_500_steps(loss, penalty, order, expected):
    gan = dirac(loss=loss(), psi=-1.0)
    gan.plan = ("d", "g") if order == SIMULTANEOUS else order
    fit(gan, zeros(500), callbacks=[Simultaneous()] * (order == SIMULTANEOUS) + [penalty] * (penalty is not None))
    decimals = len(expected.split("e")[0].partition(".")[2])
    assert f"{norm(gan):.{decimals}{'e' if 'e' in expected else 'f'}}" == expected


def test_wasserstein_with_gradient_penalty_circles_without_end():
    norms = Norms()
    fit(dirac(loss=Wasserstein()), zeros(600), callbacks=[Simultaneous(), GradientPenalty(0.35), norms])
    early, late = norms.values[200:400], norms.values[400:]
    assert min(late) > 1
    assert max(late) == pytest.approx(max(early), rel=0.05)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("simultaneous", [True, False])
def test_r1_contracts_at_the_rate_of_its_eigenvalues(gamma, simultaneous):
    """Near the equilibrium the update is linear: the rate is the spectral radius of its matrix."""
    h = 0.2
    d_step = torch.tensor([[1, 0], [-h / 2, 1 - h * gamma]], dtype=torch.float64)
    g_step = torch.tensor([[1, h / 2], [0, 1]], dtype=torch.float64)
    identity = torch.eye(2, dtype=torch.float64)
    matrix = d_step + g_step - identity if simultaneous else g_step @ d_step
    gan = dirac(h, loss=Minimax())
    with torch.no_grad():
        gan.generator.theta.fill_(1e-6)
        gan.discriminator.psi.fill_(-2e-6)
    state = torch.tensor([1e-6, -2e-6], dtype=torch.float64)
    fit(gan, zeros(100), callbacks=[R1Penalty(gamma), *[Simultaneous()] * simultaneous])
    expected = torch.linalg.matrix_power(matrix, 100) @ state
    assert gan.generator.theta.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert gan.discriminator.psi.item() == pytest.approx(expected[1].item(), rel=1e-6)


def linear_rate(loss, callbacks, h=0.2, scale=1e-7):
    """The spectral radius of the update near the equilibrium, where it is linear."""
    columns = []
    for theta, psi in ((scale, 0.0), (0.0, scale)):
        gan = dirac(h, loss=loss())
        with torch.no_grad():
            gan.generator.theta.fill_(theta)
            gan.discriminator.psi.fill_(psi)
        fit(gan, zeros(1), callbacks=callbacks())
        columns.append([gan.generator.theta.item() / scale, gan.discriminator.psi.item() / scale])
    return torch.linalg.eigvals(torch.tensor(columns, dtype=torch.float64).T).abs().max().item()


@pytest.mark.parametrize(
    ("gamma", "simultaneous", "alternating"),
    [(0.0, 1.004988, 1.0), (0.3, 0.974679, 0.969536), (1.0, 0.9, 0.927016), (2.0, 0.973205, 0.973955)],
)
@pytest.mark.parametrize("penalty", [R1Penalty, R2Penalty])
def test_published_rates_of_r1(gamma, simultaneous, alternating, penalty):
    # at the critical γ = 1 the root is double, and its error is the root of that of the matrix
    error = 1e-4 if gamma == 1.0 else 1e-6
    found = linear_rate(Minimax, lambda: [penalty(gamma), Simultaneous()])
    assert found == pytest.approx(simultaneous, abs=error)
    assert linear_rate(Minimax, lambda: [penalty(gamma)]) == pytest.approx(alternating, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.7])
def test_a_relativistic_loss_with_r1_and_r2_doubles_gamma(gamma):
    both = linear_rate(Relativistic, lambda: [R1Penalty(gamma), R2Penalty(gamma), Simultaneous()])
    one = linear_rate(Minimax, lambda: [R1Penalty(2 * gamma), Simultaneous()])
    assert both == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_consensus_contracts_at_the_rate_of_its_eigenvalues(gamma):
    """The eigenvalues of J − γ JᵀJ are −γ/4 ± i/2."""
    h = 0.2
    found = linear_rate(Minimax, lambda: [ConsensusOptimization(gamma)], h)
    assert found == pytest.approx(abs(1 + h * complex(-gamma / 4, 0.5)), rel=1e-9)


def test_extragradient_converges_where_the_plain_game_does_not():
    h = 0.2  # J = [[0, −½], [½, 0]], so w½ = (1 + hJ) w and w ← (1 + hJ + h²J²) w
    assert linear_rate(Minimax, lambda: [Extragradient()]) == pytest.approx(abs(1 + 0.5j * h - h**2 / 4), rel=1e-9)
