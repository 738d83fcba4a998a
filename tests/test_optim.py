"""The package's own optimizers against recursions written down here, and as drop-ins for torch's."""

import pytest
import torch
from torch import nn
from toys import fit, points, small, weights

from lightning_gan_stability import NegativeMomentum, OptimisticAdam, OptimisticSGD

OPTIMIZERS = [OptimisticSGD, OptimisticAdam, NegativeMomentum]


def gradients(n=6, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(3, generator=source, dtype=torch.float64) for _ in range(n)]


def run(optimizer_class, steps, rates=None, **kwargs):
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = optimizer_class([w], **kwargs)
    path = []
    for i, g in enumerate(steps):
        if rates:
            optimizer.param_groups[0]["lr"] = rates[i]
        w.grad = g.clone()
        optimizer.step()
        path.append(w.detach().clone())
    return path


def close(path, expected):
    for a, b in zip(path, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("rates", [None, [0.1, 0.2, 0.05, 0.1, 0.3, 0.1]])
def test_optimistic_sgd(rates):
    w, expected, before = START, [], None
    for i, g in enumerate(gradients()):
        before = g if before is None else before
        w = w - (rates[i] if rates else 0.1) * (2 * g - before)
        expected.append(w)
        before = g
    close(run(OptimisticSGD, gradients(), rates, lr=0.1), expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_optimistic_adam(weight_decay):
    lr, (b1, b2), eps = 0.1, (0.5, 0.9), 1e-3
    w, m, v, before, expected = START, 0, 0, None, []
    for t, g in enumerate(gradients(), start=1):
        g = g + weight_decay * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        w = w - 2 * lr * u + lr * (u if before is None else before)
        before = u
        expected.append(w)
    path = run(OptimisticAdam, gradients(), lr=lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay)
    close(path, expected)


def test_the_first_step_of_optimistic_adam_is_adams():
    close(run(OptimisticAdam, gradients(1), lr=0.1), run(torch.optim.Adam, gradients(1), lr=0.1))


@pytest.mark.parametrize("momentum", [-0.5, -0.25, 0.0, 0.9])
def test_negative_momentum(momentum):
    before, w, expected = START, START, []
    for g in gradients():
        w, before = w - 0.1 * g + momentum * (w - before), w
        expected.append(w)
    close(run(NegativeMomentum, gradients(), lr=0.1, momentum=momentum), expected)


def test_positive_momentum_is_torchs():
    close(
        run(NegativeMomentum, gradients(), lr=0.1, momentum=0.9, weight_decay=0.2),
        run(torch.optim.SGD, gradients(), lr=0.1, momentum=0.9, weight_decay=0.2),
    )


def test_torchs_sgd_refuses_a_negative_momentum():
    """Why there is one here."""
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.SGD([nn.Parameter(START)], lr=0.1, momentum=-0.5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_without_gradient_rest_and_the_others_move(optimizer):
    still, moving = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    moving.grad = torch.ones(2)
    optimizer([still, moving], lr=0.1).step()
    assert torch.equal(still, torch.ones(2))
    assert not torch.equal(moving, torch.ones(2))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_survives_a_checkpoint(optimizer, tmp_path):
    steps, w = gradients(), nn.Parameter(START.clone())
    first = optimizer([w], lr=0.1)
    for g in steps[:3]:
        w.grad = g.clone()
        first.step()
    torch.save({"w": w.detach(), "state": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    w = nn.Parameter(saved["w"].clone())
    second = optimizer([w], lr=0.1)
    second.load_state_dict(saved["state"])
    for g in steps[3:]:
        w.grad = g.clone()
        second.step()
    assert torch.equal(w.detach(), run(optimizer, steps, lr=0.1)[-1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_closures_are_called_with_gradients_on(optimizer):
    w = nn.Parameter(torch.ones(1))
    instance = optimizer([w], lr=0.1)

    def closure():
        loss = (3 * w).sum()
        (w.grad,) = torch.autograd.grad(loss, w)
        return loss

    assert instance.step(closure).item() == 3
    assert w.item() == pytest.approx(0.9 if optimizer is OptimisticAdam else 0.7, abs=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_a_gan_with_a_schedule(optimizer):
    schedule = lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)  # noqa: E731
    make = lambda p: optimizer(p, lr=1e-2)  # noqa: E731
    gan = small(g_optimizer=make, d_optimizer=make, g_scheduler=schedule, d_scheduler=schedule)
    run = fit(gan, points(4))
    assert weights(gan).isfinite().all()
    assert [o.param_groups[0]["lr"] for o in run.optimizers] == [2.5e-3] * 2


@pytest.mark.parametrize(
    ("optimizer", "kwargs", "message"),
    [
        (OptimisticSGD, {"lr": -0.1}, "`lr` must be a finite number that is not negative, got -0.1."),
        (OptimisticSGD, {"lr": "1e-3"}, "`lr` must be a finite number that is not negative, got '1e-3'."),
        (OptimisticSGD, {"lr": None}, "`lr` must be a finite number that is not negative, got None."),
        (OptimisticSGD, {"lr": float("inf")}, "`lr` must be a finite number that is not negative, got inf."),
        (OptimisticAdam, {"lr": torch.ones(2)}, r"`lr` must be a finite number that is not negative, got tensor"),
        (OptimisticAdam, {"betas": 0.5}, r"`betas` must be two numbers in \[0, 1\), got 0.5."),
        (OptimisticAdam, {"betas": (False, 0.9)}, r"`betas` must be two numbers in \[0, 1\), got \(False, 0.9\)."),
        (OptimisticAdam, {"betas": ("a", "b")}, r"`betas` must be two numbers in \[0, 1\), got \('a', 'b'\)."),
        (NegativeMomentum, {"momentum": "x"}, r"`momentum` must be in \(-1, 1\), got 'x'."),
        (OptimisticSGD, {"weight_decay": -1}, "`weight_decay` must be a finite number that is not negative, got -1."),
        (OptimisticAdam, {"lr": float("nan")}, "`lr` must be a finite number that is not negative, got nan."),
        (OptimisticAdam, {"eps": -1e-8}, "`eps` must be a finite number that is not negative, got -1e-08."),
        (OptimisticAdam, {"betas": (0.5, 1.0)}, r"`betas` must be two numbers in \[0, 1\), got \(0.5, 1.0\)."),
        (OptimisticAdam, {"betas": (0.5,)}, r"`betas` must be two numbers in \[0, 1\), got \(0.5,\)."),
        (NegativeMomentum, {"momentum": -1.0}, r"`momentum` must be in \(-1, 1\), got -1.0."),
        (NegativeMomentum, {"momentum": True}, r"`momentum` must be in \(-1, 1\), got True."),
    ],
)
def test_bad_arguments(optimizer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        optimizer([nn.Parameter(torch.ones(1))], **kwargs)


@pytest.mark.parametrize("optimizer", [OptimisticSGD, OptimisticAdam, NegativeMomentum])
def test_groups_are_checked_too(optimizer):
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"`lr` must be a finite number that is not negative, got -1.0"):
        optimizer([{"params": weights[:1]}, {"params": weights[1:], "lr": -1.0}], lr=0.1)
    assert optimizer(weights, lr=torch.tensor(0.1)).param_groups[0]["lr"] == torch.tensor(0.1)
