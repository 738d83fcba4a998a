"""No convergence: on the game min_x max_y xy gradient descent circles for ever, or away; what other rules make of it.

    python examples/why_gans_are_hard/nash.py --out nash.png

The Dirac-GAN with the Wasserstein loss is this game, with its equilibrium at (0, 0). The rate is by how much a step
shrinks (below 1) or stretches (above 1) the distance to it, over the second half of the run, and in closed form.
"""

import math

import matplotlib.pyplot as plt
import torch
from shared import arguments, play

from lightning_gan_stability import (
    Alternating,
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

PLAIN = torch.optim.SGD


def heavy(p, lr):
    return NegativeMomentum(p, lr, momentum=-0.5)


def radius(step):
    return torch.linalg.eigvals(torch.tensor(step)).abs().max().item()


def rules(eta):
    """Callbacks, the optimizer, and the rate, of a step as a matrix where it is no short formula."""
    optimistic = math.sqrt((1 + math.sqrt(1 - 4 * eta**2)) / 2)
    lookahead = abs(0.5 + 0.5 * (1 + 1j * eta) ** 5) ** 0.2
    unrolled = [[1 - 2 * 5 * eta**2, -eta], [eta, 1]]  # of (x, y); the next one of them and of those a step before
    momentum = [[0.5, -eta, 0.5, 0], [0.5 * eta, 0.5 - eta**2, 0.5 * eta, 0.5], [1, 0, 0, 0], [0, 1, 0, 0]]
    return {
        "Simultaneous": ([Simultaneous()], PLAIN, math.sqrt(1 + eta**2)),
        "Alternating": ([Alternating()], PLAIN, 1.0),
        "Extragradient": ([Extragradient()], PLAIN, math.sqrt(1 - eta**2 + eta**4)),
        "OptimisticSGD": ([Simultaneous()], OptimisticSGD, optimistic),
        "NegativeMomentum": ([Alternating()], heavy, radius(momentum)),
        "ConsensusOptimization(1)": ([ConsensusOptimization(1.0)], PLAIN, math.sqrt((1 - eta) ** 2 + eta**2)),
        "CompetitiveGradientDescent": ([CompetitiveGradientDescent()], PLAIN, 1 / math.sqrt(1 + eta**2)),
        "Lookahead(5), simultaneous": ([Simultaneous(), Lookahead()], PLAIN, lookahead),
        "Unrolling(5), simultaneous": ([Unrolling(5, simultaneous=True)], PLAIN, radius(unrolled)),
    }  # fmt: skip


def main():
    options = arguments(__doc__, steps=200, eta=0.1)
    figure, axes = plt.subplots(3, 3, figsize=(9, 9), constrained_layout=True)
    for axis, (name, (callbacks, optimizer, closed)) in zip(axes.flat, rules(options.eta).items(), strict=True):
        path = play(callbacks, lambda p, make=optimizer: make(p, lr=options.eta), options.steps, Wasserstein())
        distance, half = path.norm(dim=1), options.steps // 2
        rate = (distance[-1] / distance[half]).item() ** (1 / (options.steps - half))
        print(f"{name:<28} rate {rate:.4f}, closed form {closed:.4f}")
        axis.plot(*path.T, linewidth=1)
        axis.plot(0, 0, "r+")
        axis.set(title=f"{name}: {rate:.3f}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    figure.savefig(options.out, dpi=60)


if __name__ == "__main__":
    main()
