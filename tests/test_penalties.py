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


def test_interpolates_keep_the_graph_of_the_fake_samples():
    real, fake = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    alpha = torch.rand(5)
    points = penalties.interpolate(real, 2 * fake, alpha)
    gradients = torch.autograd.grad(points.sum(), [real, fake], allow_unused=True)
    assert gradients[0] is None
    torch.testing.assert_close(gradients[1], 2 * (1 - alpha[:, None]).expand(5, 2))
    assert penalties.interpolate(real.detach(), fake.detach(), alpha).is_leaf


@pytest.mark.parametrize("m", [2, 3])
def test_a_pack_counts_as_one_sample(m):
    w = torch.randn(m * 2, dtype=torch.float64)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    logits = x.reshape(6 // m, -1) @ w
    torch.testing.assert_close(penalties.zero_centered(x, logits), w.square().sum().expand(6 // m))
    torch.testing.assert_close(penalties.input_gradients(x, logits), w.expand(6 // m, -1))


# ---------- finite differences


def test_differences_of_a_linear_critic_are_the_squared_norm_in_the_mean():
    w = torch.tensor([0.6, -0.8], dtype=torch.float64)
    sigma = 0.01
    n = torch.randn(400_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = penalties.differences(torch.zeros(len(n)), sigma * n @ w)
    error = sigma**2 * (2 / len(n)) ** 0.5  # of the mean of σ² ‖w‖² χ²
    assert values.mean().item() == pytest.approx(sigma**2, abs=5 * error)


def test_differences_of_a_quadratic_critic():
    """E(l(x) − l(x + σn))² = σ²‖∇l‖² + σ⁴/4 (2‖H‖² + (tr H)²), exactly."""
    source = torch.Generator().manual_seed(0)
    a = torch.randn(3, 3, dtype=torch.float64, generator=source)
    a = a + a.T
    x, sigma = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64), 0.5
    n = torch.randn(1_000_000, 3, dtype=torch.float64, generator=source)
    y = x + sigma * n
    values = penalties.differences((0.5 * x @ a @ x).expand(len(n)), 0.5 * (y @ a * y).sum(1))
    expected = sigma**2 * (a @ x).square().sum() + sigma**4 / 4 * (2 * a.square().sum() + a.trace() ** 2)
    assert values.mean().item() == pytest.approx(expected.item(), abs=5 * (values.std() / len(n) ** 0.5).item())


def test_differences_sum_patches():
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(penalties.differences(a, b), (a.sum(1) - b.sum(1)).square())
    assert penalties.differences(a.half(), b.half()).dtype == torch.float32


# ---------- weights, logits, samples


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 2, 3, 3)])
def test_orthogonality_and_its_gradient(shape):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = w.detach().flatten(1)
    mask = 1 - torch.eye(len(rows), dtype=torch.float64)
    products = rows @ rows.T
    torch.testing.assert_close(penalties.orthogonality(w), (products * mask).square().sum())
    (gradient,) = torch.autograd.grad(penalties.orthogonality(w), w)
    torch.testing.assert_close(gradient.flatten(1), 4 * (products * mask) @ rows)  # BigGAN's code adds half of it
    full = (products - torch.eye(len(rows), dtype=torch.float64)).square().sum()
    torch.testing.assert_close(penalties.orthogonality(w, off_diagonal=False), full)


def test_orthogonal_weights_cost_nothing():
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert penalties.orthogonality(3 * q).item() == pytest.approx(0, abs=1e-20)
    assert penalties.orthogonality(q, off_diagonal=False).item() == pytest.approx(0, abs=1e-20)
    assert penalties.orthogonality(3 * q, off_diagonal=False).item() == pytest.approx(5 * 64)


@pytest.mark.parametrize("shape", [(12,), (3, 2, 2), (1, 5, 7)])
def test_path_lengths_of_a_linear_generator(shape):
    n, d = 6, 4
    values = torch.Size(shape).numel()
    a = torch.randn(d, values, dtype=torch.float64)
    z = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(n, *shape, dtype=torch.float64)
    pixels = torch.Size(shape[1:]).numel()
    expected = (noise.flatten(1) @ a.T / pixels**0.5).norm(dim=1)
    torch.testing.assert_close(penalties.path_lengths(z, (z @ a).reshape(n, *shape), noise), expected)


def test_path_lengths_have_a_gradient_where_the_generator_is_constant():
    w = torch.zeros(2, 2, requires_grad=True)
    z = torch.randn(3, 2, requires_grad=True)
    lengths = penalties.path_lengths(z, z @ w, torch.randn(3, 2))
    assert torch.autograd.grad(lengths.sum(), w)[0].isfinite().all()


def test_lecam():
    real, fake = torch.tensor([3.0, -5.0]), torch.tensor([-1.0, 9.0])
    values = penalties.lecam(real, fake, torch.tensor(2.0), torch.tensor(-2.0))
    assert values.tolist() == [(3 + 2) ** 2 + (2 + 1) ** 2, 0 + 0]


def test_flip_and_shift():
    images = torch.arange(2 * 3 * 16 * 24, dtype=torch.float64).reshape(2, 3, 16, 24) + 1
    still = torch.tensor([[0.9, 0.5, 0.5]]).expand(2, 3)
    assert torch.equal(penalties.flip_and_shift(images, still), images)
    mirrored = torch.tensor([[0.1, 0.5, 0.5], [0.9, 0.5, 0.5]])
    found = penalties.flip_and_shift(images, mirrored)
    assert torch.equal(found[0], images[0].flip(-1))
    assert torch.equal(found[1], images[1])
    down = penalties.flip_and_shift(images, torch.tensor([[0.9, 0.999, 0.5]]).expand(2, 3))  # by 16 / 8
    assert torch.equal(down[:, :, 2:], images[:, :, :-2])
    assert not down[:, :, :2].any()
    left = penalties.flip_and_shift(images, torch.tensor([[0.9, 0.5, 0.0]]).expand(2, 3))  # by 24 / 8
    assert torch.equal(left[..., :-3], images[..., 3:])
    assert not left[..., -3:].any()


def test_flip_and_shift_is_differentiable_and_evenly_spread():
    images = torch.rand(4000, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    moved = penalties.flip_and_shift(images, uniform)
    (gradient,) = torch.autograd.grad(moved.sum(), images)
    assert set(gradient.unique().tolist()) == {0.0, 1.0}
    top = (moved.detach()[:, 0, :3] != 0).any(-1).long().sum(1)  # rows of the first three that are filled
    shares = top.bincount(minlength=4) / 4000  # moved down by 2, by 1, and not down
    assert (shares - torch.tensor([0, 0.2, 0.2, 0.6])).abs().max() < 0.03
