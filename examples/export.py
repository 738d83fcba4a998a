"""Export a checkpoint to a file for plain torch: the averaged generator, with spectral norm folded in.

    python examples/export.py --out generator.pt2

The file is read in a process that does not import this package, for a batch of another size; it prints by how much the
images differ from ``gan.sample`` (0.0 measured; 17 CPU seconds). `gan-stability export` writes this program, weights
and a model card at once. TorchScript works too, and is deprecated in torch.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_gan_stability import DCGANDiscriminator, DCGANGenerator, Digits, GANModule, GeneratorEMA, SpectralNorm
from lightning_gan_stability.publishing import export_sampler

READ = """
import sys, torch
generator = torch.export.load(sys.argv[1]).module()
latents, images = torch.load(sys.argv[2])
assert not [name for name in sys.modules if name.startswith(("lightning", "torchmetrics"))]
print("largest difference", (generator(latents) - images).abs().max().item())
"""


def networks() -> tuple[DCGANGenerator, DCGANDiscriminator]:
    """The pair, for the run and for loading; a run from a YAML file loads without."""
    return DCGANGenerator(16, channels=1, size=8, width=32), DCGANDiscriminator(channels=1, size=8, width=32)


def train(path: Path, steps: int) -> None:
    """Some run whose checkpoint has an average and spectral norm."""
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        callbacks=[SpectralNorm(["generator", "discriminator"]), GeneratorEMA(decay=0.99)], limit_val_batches=0,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(GANModule(*networks(), latent_dim=16), Digits())
    trainer.save_checkpoint(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="generator.pt2", help="the exported generator")
    options = parser.parse_args()
    seed_everything(0)
    with TemporaryDirectory() as folder:
        train(checkpoint := Path(folder, "last.ckpt"), options.steps)
        # no callback is needed: the checkpoint remembers average and norm; `eval`: `sample` draws from the average
        generator, discriminator = networks()
        gan = GANModule.load_from_checkpoint(checkpoint, generator=generator, discriminator=discriminator).eval()
        latents = torch.randn(5, gan.latent_dim)
        with torch.no_grad():
            images = gan.sample(5, latents=latents)
        SpectralNorm.remove(gan)
        torch.export.save(export_sampler(gan), options.out)
        torch.save((latents, images), pair := Path(folder, "pair.pt"))
        done = subprocess.run(
            [sys.executable, "-c", READ, options.out, pair], capture_output=True, text=True, check=True
        )
    print(f"{options.out}: {Path(options.out).stat().st_size / 1000:.0f} kB, {done.stdout.strip()}")


if __name__ == "__main__":
    main()
