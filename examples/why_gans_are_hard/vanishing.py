"""Diminished gradients: freeze the generator, train the discriminator on, and look at the generator's gradient.

    python examples/why_gans_are_hard/vanishing.py --out vanishing.png

The better the discriminator, the smaller the minimax generator's gradient; that of −log D grows instead, and varies
from batch to batch ("Towards Principled Methods for Training GANs", https://arxiv.org/abs/1701.04862). Penalties and
spectral norm keep both the size and the noise within bounds.
"""

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback
from shared import arguments, points, train

from lightning_gan_stability import (
    GradientPenalty,
    LeastSquares,
    Minimax,
    NonSaturating,
    R1Penalty,
    R2Penalty,
    Ring,
    SpectralNorm,
    Wasserstein,
)

RUNS = {
    "minimax": (Minimax, list),
    "−log D": (NonSaturating, list),
    "minimax + R1 + R2": (Minimax, lambda: [R1Penalty(1.0), R2Penalty(1.0)]),
    "−log D + R1 + R2": (NonSaturating, lambda: [R1Penalty(1.0), R2Penalty(1.0)]),
    "minimax + spectral norm": (Minimax, lambda: [SpectralNorm()]),
    "Wasserstein + penalty": (Wasserstein, lambda: [GradientPenalty(1.0)]),
    "least squares": (LeastSquares, list),
}


class Gradient(Callback):
    """Mean and spread, over ten batches, of the norm of the gradient that the generator would get."""

    def __init__(self, every):
        self.every, self.rows = every, []

    def on_train_start(self, trainer, module):
        module.plan = ("d",)  # the generator rests
        self.look(module)

    def on_train_batch_end(self, trainer, module, *_):
        if module.iteration % self.every == 0:
            self.look(module)

    def look(self, module):
        norms = []
        for _ in range(10):
            loss = module.loss.generator(module.logits(module.sample(128))).mean()
            gradients = torch.autograd.grad(loss, list(module.generator.parameters()))
            norms.append(torch.nn.utils.get_total_norm(gradients).item())
        norms = torch.tensor(norms)
        self.rows.append((module.iteration, norms.mean().item(), (norms.std() / norms.mean()).item()))


def main():
    options = arguments(__doc__, steps=2000)
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    print(f"gradient after 0 and {options.steps} steps of the discriminator, and its spread from batch to batch")
    for name, (loss, callbacks) in RUNS.items():
        look = Gradient(max(1, options.steps // 40))
        train(points(options.seed, loss()), Ring(seed=options.seed), options.steps, *callbacks(), look)
        steps, norms, spreads = zip(*look.rows, strict=True)
        print(f"{name:<26} {norms[0]:9.2e} → {norms[-1]:9.2e}    spread {spreads[0]:.2f} → {spreads[-1]:.2f}")
        axis.semilogy(steps, norms, label=name)
    axis.set(xlabel="steps of the discriminator alone", ylabel="norm of the generator's gradient")
    axis.legend(fontsize=8)
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
