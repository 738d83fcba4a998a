"""Mode collapse: on a ring of eight Gaussians the plain GAN rotates through the modes; an unrolled one holds all eight.

    python examples/why_gans_are_hard/collapse.py --out collapse.png

Then a generator is trained on against a discriminator that rests: it uses its latents less and less, down to the few
points that this discriminator likes best.
"""

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback
from shared import adam, arguments, points, train
from torch.optim.lr_scheduler import LinearLR

from lightning_gan_stability import MLP, GANModule, Minimax, R1Penalty, R2Penalty, Ring, Unrolling
from lightning_gan_stability.metrics import latent_sensitivity, mode_coverage


class Snapshots(Callback):
    """Samples now and then, and how many modes they hold."""

    def __init__(self, data, steps):
        self.data, self.at, self.seen = data, [max(1, steps * i // 5) for i in range(1, 6)], []

    def on_train_batch_end(self, trainer, module, *_):
        if module.iteration in self.at:
            latents = torch.randn(2500, module.latent_dim, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                samples = module.generator(latents)
            found = mode_coverage(samples, self.data.centers, self.data.std)
            self.seen.append((module.iteration, samples, found.modes))


class Alone(Callback):
    """From now on only the generator moves."""

    def on_train_start(self, trainer, module):
        module.plan = ("g",)


def pair(options):
    """The networks and rates of configs/ring_unrolled.yaml."""
    torch.manual_seed(options.seed)
    fall = lambda optimizer: LinearLR(optimizer, 1.0, 0.1, options.steps)  # noqa: E731
    networks = MLP([256, 128, 128, 2]), MLP([2, 64, 64, 1])
    return GANModule(*networks, 256, Minimax(), adam(1e-3), adam(2e-4), fall, noise_seed=options.seed)


def main():
    options = arguments(__doc__, steps=2000)
    figure, axes = plt.subplots(2, 5, figsize=(12, 5), constrained_layout=True)
    for row, (name, callbacks) in zip(axes, {"plain": [], "unrolled": [Unrolling(5)]}.items(), strict=True):
        data = Ring(batch_size=512, seed=options.seed)
        look = Snapshots(data, options.steps)
        train(pair(options), data, options.steps, *callbacks, look)
        print(f"{name:<16} modes at steps {', '.join(f'{step}: {modes}' for step, _, modes in look.seen)}")
        for axis, (step, samples, modes) in zip(row, look.seen, strict=False):
            axis.plot(*data.centers.T, "k+")
            axis.plot(*samples[:1000].T, "r.", markersize=1)
            axis.set(title=f"{name}, step {step}: {modes}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    gan, steps = points(options.seed), max(1, options.steps // 5)
    train(gan, data, steps, R1Penalty(1.0), R2Penalty(1.0))
    latents = torch.randn(64, gan.latent_dim, generator=torch.Generator().manual_seed(1))
    spreads = [(0, latent_sensitivity(gan.generator, latents))]
    for i in range(4):
        train(gan, data, steps, Alone())
        spreads.append(((i + 1) * steps, latent_sensitivity(gan.generator, latents)))
    print("sensitivity to latents, G alone:", ", ".join(f"step {step}: {value:.3f}" for step, value in spreads))
    figure.savefig(options.out, dpi=60)


if __name__ == "__main__":
    main()
