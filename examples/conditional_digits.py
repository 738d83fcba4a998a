"""Generate digits by class: both networks take the class, and a classifier measures how often samples match it.

    python examples/conditional_digits.py --out digits.png

The picture has ten samples of each class, one class a row. Measured: 98.7 % of 1,000 samples are classified as
requested, by class 94 (the eight) to 100 %; 43 CPU seconds.
"""

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lightning_gan_stability import MLP, Digits, GANModule, GeneratorEMA, R1Penalty, R2Penalty, Relativistic
from lightning_gan_stability.metrics import DigitClassifier
from lightning_gan_stability.monitors.pictures import picture


def make() -> GANModule:
    """Labels are passed to each network whose ``forward`` has a second parameter: nothing else is needed."""
    generator = MLP([32, 128, 128, 64], output_activation=nn.Tanh, output_shape=[1, 8, 8], num_classes=10)
    discriminator = MLP([64, 128, 128, 1], activation=nn.LeakyReLU, num_classes=10)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=5e-4, betas=(0.0, 0.99))

    return GANModule(generator, discriminator, 32, Relativistic(), adam, adam)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", default="conditional_digits.png", help="the picture")
    options = parser.parse_args()
    seed_everything(0)
    gan = make()
    trainer = Trainer(
        max_steps=options.steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        callbacks=[R1Penalty(1.0), R2Penalty(1.0), GeneratorEMA(decay=0.99)], limit_val_batches=0,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(gan, Digits())
    gan.eval()
    classes = torch.arange(10).repeat_interleave(100)
    with torch.no_grad():
        samples = gan.sample(1000, condition=classes)
        read = DigitClassifier().eval().classify(samples).argmax(1)
    right = (read == classes).view(10, 100).sum(1)
    for digit, number in enumerate(right.tolist()):
        print(f"{digit}  read as {digit} in {number:3d} of 100")
    picture(samples.view(10, 100, 1, 8, 8)[:, :10].flatten(0, 1), samples).resize((408, 408), 0).save(options.out)
    print(f"the classifier reads the asked-for digit in {right.sum() / 1000:.1%} of the samples")


if __name__ == "__main__":
    main()
