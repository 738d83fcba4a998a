"""StyleGAN2 with all of its parts, for handwritten digits by class: a minute on one core.

    python examples/stylegan2.py --out stylegan2.png

A mapping and a synthesis network with modulated convolutions (without noise inputs); four phases, of which R1 and the
path length take separate steps; mixed styles, labels drawn from the data, minibatch standard deviations, an average
of weights by half-life, and an average of w. The picture has the same latents with the truncations 1, 0.7 and 0.5, one
class a row. The output says how many digits a classifier recognizes as the requested class, and how much they vary.

Measured: 97.0, 91.0 and 79.4 % are recognized, with 0.37, 0.20 and 0.11 of the data's variance within a class. Digits
are legible; the one is worst, and digits of a class are too much alike. Truncation reduces variety, as it should, but
here also quality: w is pulled to one average of all classes, which belongs to no digit, and the digits blur towards it.
"""

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gan_stability import (
    Digits,
    GANModule,
    GeneratorEMA,
    MinibatchStdDev,
    PathLengthPenalty,
    R1Penalty,
    StyleGenerator,
)
from lightning_gan_stability.metrics import DigitClassifier
from lightning_gan_stability.monitors.pictures import picture
from lightning_gan_stability.optim import lazy_correction

LATENTS, W, WIDTH, LAYERS, CLASSES = 32, 48, 16, 4, 10


class Equalized(nn.Module):
    """A layer whose weights start as N(0, 1) / rate and are scaled at run time, so that all layers learn alike."""

    def __init__(self, *shape: int, bias: float = 0.0, rate: float = 1.0, up: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / rate)
        self.bias = nn.Parameter(torch.full(shape[:1], bias / rate))
        self.gain, self.rate, self.up = rate / self.weight[0].numel() ** 0.5, rate, up

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.gain, self.bias * self.rate
        return F.linear(x, weight, bias) if x.dim() == 2 else F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def modulated(self, x: Tensor, scales: Tensor, demodulate: bool = True) -> Tensor:
        """The convolution with its inputs scaled for each sample, and its outputs divided by what that comes to."""
        weight = self.weight * self.gain
        x = x * scales[..., None, None]
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        if demodulate:
            norms = (scales.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()
            x = x * norms[..., None, None]
        return x + self.bias[:, None, None]


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * 2**0.5


class Mapping(nn.Module):
    """Maps latents and a class, both of unit variance, to w."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Equalized(W, CLASSES)
        self.layers = nn.ModuleList([Equalized(W, LATENTS + W if i == 0 else W, rate=0.01) for i in range(4)])

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        y = self.embed(F.one_hot(labels, CLASSES).to(z.dtype))
        x = torch.cat([v * (v.square().mean(1, keepdim=True) + 1e-8).rsqrt() for v in (z, y)], 1)
        for layer in self.layers:
            x = act(layer(x))
        return x


class Synthesis(nn.Module):
    """A learned 4x4 base, followed by convolutions that w modulates; the last one makes the image."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(WIDTH, 4, 4))
        self.styles = nn.ModuleList([Equalized(WIDTH, W, bias=1.0) for _ in range(LAYERS)])
        hidden = [Equalized(WIDTH, WIDTH, 3, 3, up=i == 1) for i in range(LAYERS - 1)]
        self.layers = nn.ModuleList([*hidden, Equalized(1, WIDTH, 1, 1)])

    def forward(self, w: Tensor) -> Tensor:
        x = self.base.expand(len(w), -1, -1, -1)
        for i, (style, layer) in enumerate(zip(self.styles, self.layers, strict=True)):
            last = i == LAYERS - 1
            x = layer.modulated(x, style(w[:, i]), demodulate=not last)
            x = x if last else act(x)
        return x


class Discriminator(nn.Module):
    """Convolutions from 8x8 to 4x4, deviations over the batch, and an inner product with the class."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Equalized(WIDTH, 1, 3, 3), Equalized(2 * WIDTH, WIDTH, 3, 3)
        self.skip, self.third = Equalized(2 * WIDTH, WIDTH, 1, 1), Equalized(2 * WIDTH, 2 * WIDTH + 1, 3, 3)
        self.deviations = MinibatchStdDev()
        self.fourth, self.last = Equalized(2 * WIDTH, 32 * WIDTH), Equalized(W, 2 * WIDTH)
        self.embed = Equalized(W, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = act(self.first(x))
        x = (F.avg_pool2d(act(self.second(x)), 2) + self.skip(F.avg_pool2d(x, 2))) / 2**0.5
        x = act(self.fourth(act(self.third(self.deviations(x))).flatten(1)))
        return (self.last(x) * self.embed(F.one_hot(labels, CLASSES).to(x.dtype))).sum(1) / W**0.5


class StyleGAN2(GANModule):
    """The training of StyleGAN2 beyond the networks: mixed styles, an average of w, and labels for each pass."""

    labels: Tensor

    def generate(self, network, n, condition, latents):
        w = network.styles(latents, condition, update_average=self.turn == "d")
        if self.noise.in_step:
            chance, place = self.noise.rand(1, 2)[0].tolist()  # of the whole batch
            if chance < 0.9:
                cut = 1 + int(place * (LAYERS - 1))
                w = torch.cat([w[:, :cut], network.styles(self.draw_latents(n), condition)[:, cut:]], 1)
        return network.synthesis(w), {"w": w}

    def draw_condition(self, n, condition):
        return self.labels[(self.noise.rand(n, dtype=torch.float64) * len(self.labels)).long()]


def make(labels: Tensor) -> StyleGAN2:
    """Each player's Adam has the rates that go with its penalty's own steps."""
    generator = StyleGenerator(Mapping(), Synthesis(), w_dim=W, num_layers=LAYERS)
    makers = {}
    for player, every in (("g", 4), ("d", 16)):
        rates = lazy_correction(every, lr=2.5e-3)
        makers[f"{player}_optimizer"] = lambda parameters, rates=rates: torch.optim.Adam(parameters, **rates)
    gan = StyleGAN2(generator, Discriminator(), LATENTS, plan=("g", "d"), **makers)
    gan.register_buffer("labels", labels, persistent=False)
    return gan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", default="stylegan2.png", help="the picture")
    options = parser.parse_args()
    seed_everything(0)
    data = Digits(batch_size=32)
    images, labels = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    gan = make(labels)
    path = PathLengthPenalty(every=4, separate=True, latents="w", shrink=2, include_batch=True)
    r1 = R1Penalty(2.0, every=16, separate=True)
    trainer = Trainer(
        max_steps=options.steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        callbacks=[path, r1, GeneratorEMA(half_life=300, ramp_up=0.05)], limit_val_batches=0,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(gan, data)
    gan.eval()
    classes, read = torch.arange(CLASSES).repeat_interleave(100), DigitClassifier().eval().classify
    latents = gan.draw_latents(len(classes))
    sheet = Image.new("L", (3 * 380, 380), 255)
    for i, psi in enumerate((1.0, 0.7, 0.5)):
        with torch.no_grad():
            samples = gan.sample(condition=classes, latents=latents, truncation=psi)
            right = (read(samples).argmax(1) == classes).float().mean()
        by_class = samples.view(CLASSES, 100, -1)
        spread = by_class.var(1).sum() / sum(images[labels == c].flatten(1).var(0).sum() for c in range(CLASSES))
        print(f"truncation {psi}: {right:.1%} are read as what was asked for, {spread:.2f} of the variance in a class")
        shown = picture(samples.view(CLASSES, 100, 1, 8, 8)[:, :10].flatten(0, 1), images)
        sheet.paste(shown.resize((372, 372), 0), (380 * i, 4))
    sheet.save(options.out)


if __name__ == "__main__":
    main()
