"""Penalties against closed forms of linear and quadratic critics, and against central differences."""

import pytest
import torch

from lightning_gan_stability import penalties


def linear(w, n=6):
    x = torch.randn(n, len(w), dtype=torch.float64, requires_grad=True)
    return x, x @ w


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_linear_critic(scale):
    w = (scale * torch.tensor([0.6, -0.8], dtype=torch.float64)).requires_grad_()
    x, logits = linear(w)
    values = penalties.zero_centered(x, logits)
    torch.testing.assert_close(values, torch.full((6,), scale**2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(values.mean() / 2, w)
    torch.testing.assert_close(gradient, w.detach())

    x, logits = linear(w)
    values = penalties.centered(x, logits, target=1.5)
    torch.testing.assert_close(values, torch.full((6,), (scale - 1.5) ** 2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(values.mean(), w)
    torch.testing.assert_close(gradient, 2 * (scale - 1.5) * w.detach() / scale)

    x, logits = linear(w)
    one_sided = penalties.centered(x, logits, one_sided=True)
    torch.testing.assert_close(one_sided, torch.full((6,), max(0.0, scale - 1) ** 2, dtype=torch.float64))


def test_quadratic_critic():
    a = torch.randn(3, 3, dtype=torch.float64)
    a = a + a.T
    x = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    values = penalties.zero_centered(x, 0.5 * (x @ a * x).sum(1))
    torch.testing.assert_close(values, (x @ a).square().sum(1))
    # E‖Ax‖² = tr(AΣA), here with the sample's own second moment
    sigma = (x.T @ x / len(x)).detach()
    torch.testing.assert_close(values.mean(), torch.trace(a @ sigma @ a))


def test_gradient_is_finite_where_the_critic_is_flat():
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for one_sided in (False, True):
        x, logits = linear(w)
        (gradient,) = torch.autograd.grad(penalties.centered(x, logits, one_sided=one_sided).sum(), w)
        assert gradient.isfinite().all()


def test_norm_is_over_all_values_of_an_image():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, 5, dtype=torch.float64)
    values = penalties.zero_centered(x, (x * weights).sum((1, 2, 3)))
    torch.testing.assert_close(values, weights.square().sum().expand(4))


def test_patches_are_summed():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(penalties.zero_centered(x, x @ w), w.sum(1).square().sum().expand(4))


def test_values_and_parameter_gradients_against_central_differences():
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    points = torch.randn(3, 2, dtype=torch.float64)

    def mean_penalty():
        x = points.clone().requires_grad_()
        return penalties.centered(x, net(x), target=0.7).mean()

    def input_gradient_by_differences(i, h=1e-6):
        steps = h * torch.eye(2, dtype=torch.float64)
        return torch.stack([(net(points[i] + s) - net(points[i] - s)) / (2 * h) for s in steps]).squeeze()

    expected = torch.stack([(input_gradient_by_differences(i).norm() - 0.7) ** 2 for i in range(3)]).mean()
    torch.testing.assert_close(mean_penalty(), expected, rtol=1e-7, atol=1e-9)

    weight = net[0].weight
    (gradient,) = torch.autograd.grad(mean_penalty(), weight)
    h = 1e-6
    for index in [(0, 0), (3, 1)]:
        with torch.no_grad():
            weight[index] += h
        up = mean_penalty().item()
        with torch.no_grad():
            weight[index] -= 2 * h
        down = mean_penalty().item()
        with torch.no_grad():
            weight[index] += h
        assert gradient[index].item() == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-9)


def test_interpolates_lie_on_the_line_of_their_pair():
    real, fake = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    alpha = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    points = penalties.interpolate(real, fake, alpha)
    for i in range(5):
        torch.testing.assert_close(points[i], alpha[i] * real[i] + (1 - alpha[i]) * fake[i])
    assert points.requires_grad
    assert points.is_leaf


def test_perturbed_points_against_numpy():
    real = torch.randn(5, 2, 3, dtype=torch.float64)
    alpha, noise = torch.rand(5, dtype=torch.float64), torch.rand(5, 2, 3, dtype=torch.float64)
    x = real.numpy()
    expected = x + alpha.numpy()[:, None, None] * 0.5 * x.std() * noise.numpy()
    torch.testing.assert_close(penalties.perturb(real, alpha, noise).detach(), torch.from_numpy(expected))
