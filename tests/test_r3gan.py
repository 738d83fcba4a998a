"""The training of R3GAN with all of its schedules, equal to the authors' loop in plain torch."""

import copy
import math

import torch
from toys import fit, gone_on

from lightning_gan_stability import (
    Alternating,
    AugmentationSchedule,
    AugmentPipe,
    GANModule,
    GeneratorEMA,
    OptimizerSchedule,
    R1Penalty,
    R2Penalty,
    R3GANDiscriminator,
    R3GANGenerator,
    Relativistic,
    Schedule,
)

STEPS, N, CLASSES, TOTAL = 42, 4, 3, 30 * 4  # the schedules end, in images, before the run does


class R3GAN(GANModule):
    """Keeps its latents."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn = []

    def draw_latents(self, n):
        self.drawn.append(super().draw_latents(n))
        return self.drawn[-1]


class Pipe(AugmentPipe):
    """Keeps what it draws, and with which probability."""

    def __init__(self):
        super().__init__({"brightness": 0.5, "cutout": 1})
        self.drawn = []

    def draw(self, x):
        self.drawn.append((self.p, super().draw(x)))
        return self.drawn[-1][1]


def make():
    torch.manual_seed(0)
    generator = R3GANGenerator(5, 3, [8, 4], num_classes=CLASSES, embedding_dim=3, groups=2)
    discriminator = R3GANDiscriminator(3, [8, 4], num_classes=CLASSES, groups=2)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=1.0, betas=(0.0, 0.5))  # what the schedule sets

    pipe = Pipe()
    return R3GAN(
        generator, discriminator, 5, Relativistic(), augment=pipe, g_optimizer=adam, d_optimizer=adam
    ).double(), pipe


def schedule(start, end):
    return Schedule(start, end, TOTAL / N)


def callbacks():
    return [
        Alternating(real_batches="split"),
        R1Penalty(schedule(2.0, 0.2)),
        R2Penalty(schedule(2.0, 0.2)),
        OptimizerSchedule({"lr": schedule(2e-3, 5e-4), "betas.1": schedule(0.9, 0.99)}),
        AugmentationSchedule(schedule(0.0, 0.9)),
        GeneratorEMA(half_life=schedule(0.0, 3.0)),
    ]


def train(module, **kwargs):
    return fit(module, DATA, callbacks=callbacks(), **{"max_epochs": 2} | kwargs)


def batch(seed):
    source = torch.Generator().manual_seed(seed)
    images = torch.randn(2 * N, 3, 8, 8, generator=source, dtype=torch.float64)
    return images, torch.randint(CLASSES, (2 * N,), generator=source)


DATA = [batch(i) for i in range(STEPS // 2)]


def cosine(images, base, final):
    c = 0.5 * (1 + math.cos(math.pi * min(images / TOTAL, 1)))
    return base + (1 - c) * (final - base)


def augmented(x, drawn, p):
    """Brightness with probability p / 2, then a box of zeros with probability p."""
    seen, draws = drawn
    assert abs(seen - p) < 1e-12
    x = x + draws["brightness"].double()[:, None, None, None]
    size, across, down = draws["cutout"].double()[..., None].unbind(1)
    place = (torch.arange(8).double() + 0.5) / 8
    row, column = ((place - centre).abs() < size / 2 for centre in (down, across))
    return x * ~(row[:, :, None] & column[:, None, :])[:, None]


def reference(generator, discriminator, batches, latents, draws):
    """D on its real images, then G on others of its own, each number as its schedule has it at so many images.

    Returns the average of the generator's weights.
    """
    latents, draws = iter(latents), iter(draws)
    optimizers = [torch.optim.Adam(net.parameters(), betas=(0.0, 0.9)) for net in (discriminator, generator)]
    average = copy.deepcopy(generator)

    def step(player, loss, images):
        for network in (discriminator, generator):
            network.zero_grad()
        loss.backward()
        for group in optimizers[player].param_groups:
            group["lr"], group["betas"] = cosine(images, 2e-3, 5e-4), (0.0, cosine(images, 0.9, 0.99))
        optimizers[player].step()

    for i, (real, labels) in enumerate(batches):
        images = i * N
        gamma, p = cosine(images, 2.0, 0.2), cosine(images, 0.0, 0.9)
        softplus = torch.nn.functional.softplus
        y = labels[:N]
        fake = generator(next(latents), y).detach().requires_grad_()
        x = real[:N].clone().requires_grad_()
        on_real = discriminator(augmented(x, next(draws), p), y)
        on_fake = discriminator(augmented(fake, next(draws), p), y)
        penalties = 0
        for logits, point in ((on_real, x), (on_fake, fake)):
            (gradients,) = torch.autograd.grad(logits.sum(), point, create_graph=True)
            penalties = penalties + gradients.square().sum((1, 2, 3))
        step(0, (softplus(-(on_real - on_fake)) + gamma / 2 * penalties).mean(), images)
        y = labels[N:]
        fake = generator(next(latents), y)
        on_real = discriminator(augmented(real[N:], next(draws), p), y)
        on_fake = discriminator(augmented(fake, next(draws), p), y)
        step(1, softplus(-(on_fake - on_real)).mean(), images)
        beta = 0.5 ** (N / max(N * cosine(images, 0.0, 3.0), 1e-8))
        for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
            mean.data = value.detach() + beta * (mean.data - value.detach())
    assert next(draws, None) is next(latents, None) is None
    return average


def test_r3gan_equals_its_reference():
    (module, pipe), (other, _) = make(), make()
    fit(module, DATA, max_epochs=2, callbacks=callbacks())
    assert module.iteration == STEPS
    average = reference(other.generator, other.discriminator, DATA * 2, module.drawn, pipe.drawn)
    for found, expected in [
        (module.generator, other.generator),
        (module.discriminator, other.discriminator),
        (module.generator_ema, average),
    ]:
        pairs = zip(found.parameters(), expected.parameters(), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12
    start, _ = make()
    moved = [(a - b).abs().max().item() for a, b in zip(module.parameters(), start.parameters(), strict=False)]
    assert min(moved) > 1e-3
    chosen = [draws["cutout"][:, 0] > 0 for _, draws in pipe.drawn]
    assert not torch.stack(chosen[:8]).any()
    assert torch.stack(chosen).any()


def test_r3gan_goes_on_where_it_stopped():
    """From the midst of all schedules, bit for bit."""
    again = gone_on(lambda: make()[0], train)
    assert again.iteration == STEPS
