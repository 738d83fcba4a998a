"""Mode collapse: on a ring of eight Gaussians the plain GAN rotates through the modes; an unrolled one holds all eight.

    python examples/why_gans_are_hard/collapse.py --out collapse.png

Then the generator is trained on without the discriminator: it gives up its latents, and every sample goes to one point.
"""

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback
from shared import adam, arguments, points, train

from lightning_gan_stability import Minimax, Ring, Unrolling
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


def main():
    options = arguments(__doc__, steps=1500)
    figure, axes = plt.subplots(2, 5, figsize=(12, 5), constrained_layout=True)
    for row, (name, callbacks) in zip(axes, {"plain": [], "unrolled, K = 5": [Unrolling(5)]}.items(), strict=True):
        gan = points(options.seed, Minimax(), g_lr=1e-3, d_lr=2e-4, latents=256)
        data = Ring(batch_size=512, seed=options.seed)
        look = Snapshots(data, options.steps)
        train(gan, data, options.steps, *callbacks, look)
        print(f"{name:<16} modes at steps {', '.join(f'{step}: {modes}' for step, _, modes in look.seen)}")
        for axis, (step, samples, modes) in zip(row, look.seen, strict=False):
            axis.plot(*data.centers.T, "k+")
            axis.plot(*samples[:1000].T, "r.", markersize=1)
            axis.set(title=f"{name}, step {step}: {modes}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
    latents = torch.randn(64, gan.latent_dim, generator=torch.Generator().manual_seed(1))
    spreads = [(0, latent_sensitivity(gan.generator, latents, directions=16))]
    gan._make_optimizer = dict.fromkeys("dg", adam(1e-3))
    for _ in range(4):
        train(gan, data, options.steps // 4, Alone())
        spreads.append((spreads[-1][0] + options.steps // 4, latent_sensitivity(gan.generator, latents, directions=16)))
    print("sensitivity to latents, G alone:", ", ".join(f"step {step}: {value:.3f}" for step, value in spreads))
    figure.savefig(options.out, dpi=60)


if __name__ == "__main__":
    main()
