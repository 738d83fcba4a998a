"""Which distance: KL, reverse KL and JS between N(0, 1) and N(μ, 1), and what each forgives.

    python examples/why_gans_are_hard/divergences.py --out divergences.png

JS saturates at log 2, and its gradient dies, while KL goes on growing: a perfect discriminator leaves the minimax
generator nothing to learn from. Below, one Gaussian is fitted to a density with two modes: KL covers both and the void
between them (it forgives bad samples), reverse KL takes one mode (it forgives missing ones).
"""

import math

import matplotlib.pyplot as plt
import torch
from shared import arguments
from torch.distributions import Normal

X = torch.linspace(-45, 75, 240_001, dtype=torch.float64)
STEP = (X[1] - X[0]).item()


def kl(p, q):
    """KL(p ‖ q) of log densities on the grid."""
    return ((p.exp() * (p - q)).sum() * STEP).item()


def js(p, q):
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, middle) + kl(q, middle)) / 2


def gradient(mu):
    """The sizes of the generator's gradients for the best discriminator l* = −μx + μ²/2: minimax and −log D."""
    q = Normal(mu, 1.0).log_prob(X).exp()
    logits = -mu * X + mu**2 / 2
    return [mu * STEP * (q * side.sigmoid()).sum().item() for side in (logits, -logits)]


def fit(target, reverse, steps):
    """The Gaussian (mean, deviation) nearest to a density by KL or reverse KL."""
    mean, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.5))
    optimizer = torch.optim.Adam([mean, scale], lr=0.05)
    for _ in range(steps):
        model = Normal(mean, scale.exp()).log_prob(X)
        p, q = (model, target) if reverse else (target, model)
        loss = (p.exp() * (p - q)).sum() * STEP
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return mean.item(), scale.exp().item()


def main():
    options = arguments(__doc__, steps=400)
    p, rows = Normal(0.0, 1.0).log_prob(X), []
    print("  μ      KL  reverse KL      JS   minimax gradient   −log D gradient")
    for mu in (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 10.0, 20.0, 30.0):
        q = Normal(mu, 1.0).log_prob(X)
        rows.append((mu, kl(p, q), kl(q, p), js(p, q), *gradient(mu)))
        print("{:4.1f} {:7.2f}     {:7.2f} {:7.4f}         {:10.3e}        {:10.3f}".format(*rows[-1]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    mus, *columns = zip(*rows, strict=True)
    for name, column in zip(("KL", "reverse KL", "JS", "minimax gradient", "−log D gradient"), columns, strict=True):
        left.semilogy(mus, column, label=name)
    left.set(xlabel="μ", ylim=(1e-12, 1e3), title="JS saturates, its gradient dies")
    left.legend()
    two = torch.logaddexp(Normal(-3.0, 0.7).log_prob(X), Normal(3.0, 0.7).log_prob(X)) - math.log(2)
    near = X.abs() < 8
    right.plot(X[near], two.exp()[near], "k", label="two modes")
    for name, reverse in (("KL", False), ("reverse KL", True)):
        mean, scale = fit(two, reverse, options.steps)
        print(f"best single Gaussian by {name}: mean {mean:.2f}, deviation {scale:.2f}")
        right.plot(X[near], Normal(mean, scale).log_prob(X).exp()[near], label=name)
    right.set(title="KL covers, reverse KL picks")
    right.legend()
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
