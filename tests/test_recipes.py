"""Recipes of today, each equal to a training loop in plain torch that was written without this package."""

import copy

import pytest
import recipe_references as references
import recipe_references_applied as applied
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from toys import gone_on, tensors, trainer

from lightning_gan_stability import (
    MLP,
    AdaptiveAdversarialWeight,
    AdversarialStart,
    Alternating,
    Codec,
    FakePool,
    FeatureMatching,
    GANModule,
    GeneratorEMA,
    GradientPenalty,
    LossBalancer,
    Packed,
    PairedTranslation,
    R1Penalty,
    Reconstruction,
    RelativisticAverage,
    SuperResolution,
    TableSynthesis,
    Tokenizer,
    UnpairedTranslation,
    Vocoder,
    Wasserstein,
)
from lightning_gan_stability.noise import generator
from lightning_gan_stability.optim import lazy_correction

pytestmark = pytest.mark.timeout(120)

LENGTH, EPOCHS = 4, 2  # batches of an epoch


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adam(lr, betas, kind=torch.optim.Adam, **kwargs):
    return lambda parameters: kind(parameters, lr=lr, betas=betas, **kwargs)


class Draws(GANModule):
    """Notes the latents and the shares α that it draws."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.latents, self.alphas = [], []
        draw = self.noise.rand

        def rand(*shape, dtype=None):
            self.alphas.append(draw(*shape, dtype=dtype))
            return self.alphas[-1]

        self.noise.rand = rand

    def draw_latents(self, n):
        self.latents.append(super().draw_latents(n))
        return self.latents[-1]


# ---------- a vocoder: two discriminators of other output sizes, feature matching, a distance of spectrograms


class Maps(nn.Module):
    """A discriminator of waveforms that returns its logits and all its maps, the logits among them."""

    def __init__(self, stride):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(1, 4, 5, stride), nn.Conv1d(4, 6, 3), nn.Conv1d(6, 1, 3)])

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
            x = nn.functional.leaky_relu(x, 0.1)
        return maps[-1].flatten(1), maps


def mel(x):
    return torch.stft(x.squeeze(1), 16, 8, window=torch.hann_window(16, dtype=x.dtype), return_complex=True).abs()


def mel_distance(sample, target):
    return (mel(sample) - mel(target)).abs().mean()


def vocoder():
    torch.manual_seed(0)
    networks = (
        nn.Sequential(nn.Flatten(), nn.Linear(20, 64), nn.Tanh(), nn.Unflatten(1, (1, 64))),
        nn.ModuleDict({"p": Maps(2), "s": Maps(5)}),
    )
    make = adam(2e-3, (0.8, 0.99), torch.optim.AdamW)
    decay = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.999)  # noqa: E731
    schedules = {"g_scheduler": decay, "d_scheduler": decay, "scheduler_interval": "epoch"}
    return Vocoder(*networks, g_optimizer=make, d_optimizer=make, **schedules).double()


def vocoder_callbacks():
    return [Alternating(share_fake=True), FeatureMatching(2.0), Reconstruction(45.0, mel_distance, name="mel")]


VOCODER_DATA = [(randn(6, 4, 5, seed=i), randn(6, 1, 64, seed=100 + i)) for i in range(LENGTH)]


def vocoder_reference(module):
    discriminators = dict(module.discriminator.items())
    logs = references.vocoder(module.generator, discriminators, VOCODER_DATA * EPOCHS, mel, LENGTH, lr=2e-3)
    names = {"g/adversarial": ("adversarial", 0.5), "g/feature_matching": ("features", 2.0), "g/mel": ("mel", 45.0)}
    return logs, names | {"d/adversarial": ("loss_d", 0.5)}


# ---------- a tokenizer: a codebook loss, an adaptive weight, a start


class Quantized(nn.Module):
    """An autoencoder with a codebook of four vectors."""

    def __init__(self):
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(6, 3), nn.Embedding(4, 3), nn.Linear(3, 6)

    def forward(self, x):
        z = self.encoder(x)
        code = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
        loss = (code.detach() - z).square().mean() + 0.25 * (code - z.detach()).square().mean()
        return self.decoder(z + (code - z).detach()), {"codebook": loss}


class AsTuple(nn.Module):
    """The autoencoder as the reference calls it."""

    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x):
        reconstruction, extras = self.autoencoder(x)
        return reconstruction, extras["codebook"]


def tokenizer(order="dg"):
    torch.manual_seed(0)
    make = adam(3e-3, (0.5, 0.9))
    plan = "dg" if order == "dg" else "gd"
    return Tokenizer(Quantized(), MLP([6, 16, 1]), g_optimizer=make, d_optimizer=make, plan=[*plan]).double()


def tokenizer_callbacks(order="dg"):
    weight = AdaptiveAdversarialWeight("decoder", 0.8, terms=["reconstruction"])
    share = [Alternating(share_fake=True)] if order == "dg" else []
    return [Reconstruction(), weight, AdversarialStart(3), *share]


TOKENIZER_DATA = [randn(8, 6, seed=i) for i in range(LENGTH)]


def tokenizer_reference(module, order="dg"):
    last = module.generator.decoder.weight
    judge = module.discriminator
    data = TOKENIZER_DATA * EPOCHS
    logs = references.tokenizer(AsTuple(module.generator), judge, last, data, 3, 0.8, order, lr=3e-3)
    names = {"g/reconstruction": ("nll", 1), "g/codebook": ("codebook", 1), "g/adversarial": ("adversarial", 1)}
    return logs, names | {"d/adversarial": ("loss_d", 2)}


# ---------- translation: two generators, two discriminators, cycles, identities, pools


def pictures():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))


def judge():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 2), nn.Flatten())


def translation():
    torch.manual_seed(0)
    generators, discriminators = (nn.ModuleDict({d: make() for d in "ab"}) for make in (pictures, judge))
    make = adam(2e-3, (0.5, 0.999))
    return UnpairedTranslation(generators, discriminators, g_optimizer=make, d_optimizer=make).double()


def translation_callbacks():
    cycle = Reconstruction(10.0, sample="extras.cycle", name="cycle")
    identity = Reconstruction(5.0, sample="extras.identity", name="identity")
    return [Alternating(share_fake=True), FakePool(7, independent=True), cycle, identity]


TRANSLATION_DATA = [(randn(3, 1, 8, 8, seed=i), randn(3, 1, 8, 8, seed=50 + i)) for i in range(LENGTH)]


def pool_draws(pool, i):
    coin, place = torch.rand(2, generator=generator(0, "pool", pool, i), dtype=torch.float64).tolist()
    return 1 - coin, place


def translation_reference(module):
    g, d = module.generator, module.discriminator
    data = TRANSLATION_DATA * EPOCHS
    logs = references.translation(g["b"], g["a"], d["a"], d["b"], data, pool_draws, pool_size=7, lr=2e-3)
    logs["cycle"] = [a + b for a, b in zip(logs["cycle_a"], logs["cycle_b"], strict=True)]
    logs["identity"] = [a + b for a, b in zip(logs["identity_a"], logs["identity_b"], strict=True)]
    names = {f"d/adversarial/{domain}": (f"loss_d_{domain}", 1) for domain in "ab"}
    names |= {f"g/adversarial/{domain}": (f"adversarial_{domain}", 0.5) for domain in "ab"}
    return logs, names | {"g/cycle": ("cycle", 10.0), "g/identity": ("identity", 5.0)}


# ---------- a codec: normalized waveforms, a distance over several windows, gradients clipped


class Waves(nn.Module):
    """An autoencoder of waveforms with the losses of a codebook."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv1d(1, 4, 8, 4, 2), nn.ConvTranspose1d(4, 1, 8, 4, 2)

    def forward(self, x):
        z = self.encoder(x)
        code = z.round()
        losses = {"commitment": (z - code.detach()).square().mean(), "codebook": (z.sin() - z.detach()).abs().mean()}
        return self.decoder(z + (code - z).detach()).tanh(), losses


class MapsBefore(Maps):
    """The same discriminator, whose features are without the logits."""

    def forward(self, x):
        logits, maps = super().forward(x)
        return logits, maps[:-1]


def dac_distance(sample, target):
    return applied.dac_mel_distance(sample, target, 16000, (16, 32), (4, 8))


def codec():
    torch.manual_seed(0)
    make = adam(2e-3, (0.8, 0.99), torch.optim.AdamW)
    decay = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99)  # noqa: E731
    settings = {"g_optimizer": make, "d_optimizer": make, "g_scheduler": decay, "d_scheduler": decay}
    discriminators = nn.ModuleDict({"p": MapsBefore(2), "s": MapsBefore(5)})
    return Codec(Waves(), discriminators, clip_norm={"d": 0.5, "g": 2.0}, **settings).double()


def codec_callbacks():
    return [Alternating(share_fake=True), FeatureMatching(2.0), Reconstruction(15.0, dac_distance, name="mel")]


CODEC_DATA = [randn(6, 1, 64, seed=i) for i in range(LENGTH)]


def codec_reference(module):
    logs = applied.codec(
        module.generator, dict(module.discriminator.items()), CODEC_DATA * EPOCHS, dac_distance,
        lr=2e-3, decay=0.99, clip_d=0.5, clip_g=2.0,
    )  # fmt: skip
    assert max(logs["norm_d"]) > 0.5
    assert max(logs["norm_g"]) > 2.0
    names = {"g/adversarial": ("adversarial", 0.5), "g/feature_matching": ("features", 2.0), "g/mel": ("mel", 15.0)}
    names |= {"d/adversarial": ("loss_d", 0.5)}
    return logs, names | {"g/commitment": ("commitment", 0.25), "g/codebook": ("codebook", 1.0)}


# ---------- super-resolution: the generator first, a sharpened target, a perceptual distance


def enlarging():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))


def by_pixel(bias=True):
    # a relativistic loss has no gradient by the last bias, of which Adam makes steps of rounding errors
    last = nn.Conv2d(8, 1, 3, padding=1, bias=bias)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.2), last)


def sharpened(image):
    return (image + 0.5 * (image - nn.functional.avg_pool2d(image, 3, 1, 1))).clamp(-1, 1)


def perceptual(sample, target):
    return (sample.diff(dim=-1) - target.diff(dim=-1)).abs().mean()


def against_sharpened(distance):
    return lambda sample, target: distance(sample, sharpened(target))


def super_resolution():
    torch.manual_seed(0)
    make = adam(2e-3, (0.9, 0.99))
    halve = lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [5], 0.5)  # noqa: E731
    settings = {"g_optimizer": make, "d_optimizer": make, "g_scheduler": halve, "d_scheduler": halve}
    return SuperResolution(enlarging(), by_pixel(), **settings).double()


def super_resolution_callbacks():
    l1 = against_sharpened(nn.functional.l1_loss)
    perceived = Reconstruction(1.0, against_sharpened(perceptual), name="perceptual")
    return [Alternating(share_fake=True), Reconstruction(1.0, l1), perceived, GeneratorEMA(decay=0.9)]


SUPER_RESOLUTION_DATA = [(randn(4, 3, 4, 4, seed=i), randn(4, 3, 8, 8, seed=40 + i).tanh()) for i in range(LENGTH)]


def super_resolution_reference(module):
    module.generator_ema = copy.deepcopy(module.generator)
    logs, averages = applied.super_resolution(
        module.generator, module.discriminator, SUPER_RESOLUTION_DATA * EPOCHS,
        lr=2e-3, perceptual=perceptual, sharpen=sharpened, ema_decay=0.9, milestones=(5,),
    )  # fmt: skip
    module.generator_ema.load_state_dict(averages)
    logs["loss_d"] = [a + b for a, b in zip(logs["loss_d_real"], logs["loss_d_fake"], strict=True)]
    names = {"g/reconstruction": ("pixel", 1), "g/perceptual": ("perceptual", 1), "g/adversarial": ("adversarial", 1)}
    return logs, names | {"d/adversarial": ("loss_d", 1)}


# ---------- ESRGAN: relativistic averages


def esrgan():
    torch.manual_seed(0)
    make = adam(2e-3, (0.9, 0.99))
    settings = {"g_optimizer": make, "d_optimizer": make, "g_weight": 5e-3}
    return SuperResolution(enlarging(), by_pixel(bias=False), loss=RelativisticAverage(), **settings).double()


def esrgan_reference(module):
    logs = applied.esrgan(module.generator, module.discriminator, SUPER_RESOLUTION_DATA * EPOCHS, lr=2e-3)
    names = {"g/reconstruction": ("pixel", 0.01), "g/adversarial": ("adversarial", 1)}
    return logs, names | {"d/adversarial": ("loss_d", 1)}


# ---------- paired translation: the discriminator sees the source


def paired():
    torch.manual_seed(0)
    first = nn.Conv2d(1, 4, 3, padding=1, bias=False)  # BatchNorm takes a bias away
    generator = nn.Sequential(first, nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1))
    discriminator = nn.Sequential(nn.Conv2d(4, 4, 4, 2), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 2))
    make = adam(2e-3, (0.5, 0.999))
    return PairedTranslation(generator, discriminator, g_optimizer=make, d_optimizer=make).double()


PAIRED_DATA = [(randn(3, 1, 8, 8, seed=i), randn(3, 3, 8, 8, seed=60 + i)) for i in range(LENGTH)]


def paired_reference(module):
    logs = applied.paired_translation(module.generator, module.discriminator, PAIRED_DATA * EPOCHS, lr=2e-3)
    names = {"g/reconstruction": ("pixel", 100), "g/adversarial": ("adversarial", 1)}
    return logs, names | {"d/adversarial": ("loss_d", 2)}


# ---------- a table: a packed critic, a penalty, a condition


class Rows(nn.Module):
    """Rows of two numbers and two columns of categories; returns them and the logits of the categories."""

    def __init__(self):
        super().__init__()
        self.layers = MLP([4 + 5, 16, 7])

    def forward(self, z, condition):
        out = self.layers(torch.cat([z, condition], 1))
        one, two = out[:, 2:4].softmax(1), out[:, 4:].softmax(1)
        return torch.cat([out[:, :2].tanh(), one, two], 1), out


class Table(Draws):
    """CTGAN, whose penalty is taken by the condition too: it is a part of the sample."""

    def unpack(self, batch):
        rows, condition = batch
        return torch.cat([rows, condition], 1), condition

    def generate(self, network, n, condition, latents):
        rows, logits = network(latents, condition)
        return torch.cat([rows, condition], 1), {"logits": logits}

    def auxiliary_losses(self, player, outputs):
        if player == "d":
            return {}
        logits, condition = outputs.extras["logits"][:, 2:], outputs.condition
        total = 0.0
        for start, end in ((0, 2), (2, 5)):
            wanted = condition[:, start:end]
            losses = nn.functional.cross_entropy(logits[:, start:end], wanted.argmax(1), reduction="none")
            total = total + (wanted.sum(1) * losses).sum() / len(losses)
        return {"entropy": total}


class ByData(Table):
    """The penalty is taken by the rows alone: the condition is one."""

    def unpack(self, batch):
        return batch

    def generate(self, network, n, condition, latents):
        rows, logits = network(latents, condition)
        return rows, {"logits": logits}


class Joined(nn.Module):
    """A critic of packs that puts each row's condition behind it."""

    def __init__(self, critic, m=2):
        super().__init__()
        self.critic, self.m = critic, m

    def forward(self, rows, condition):
        parts = [x.reshape(len(x) * self.m, -1) for x in (rows, condition)]
        return self.critic(torch.cat(parts, 1).reshape(len(rows), -1))


def table(kind=Table):
    torch.manual_seed(0)
    critic = MLP([2 * 12, 16, 1], nn.Tanh)
    make = adam(2e-3, (0.5, 0.9), weight_decay=1e-6)
    discriminator = Packed(critic if kind is Table else Joined(critic), 2)
    return kind(Rows(), discriminator, 4, Wasserstein(), make, make).double()


def table_callbacks():
    return [GradientPenalty(10.0)]


def table_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    condition = torch.zeros(8, 5, dtype=torch.float64)
    condition[torch.arange(8), torch.randint(0, 5, (8,), generator=generator)] = 1
    one, two = (torch.eye(n, dtype=torch.float64)[torch.randint(0, n, (8,), generator=generator)] for n in (2, 3))
    return torch.cat([randn(8, 2, seed=seed).tanh(), one, two], 1), condition


TABLE_DATA = [table_batch(i) for i in range(LENGTH)]


def table_reference(module, penalise="all", drawn=None):
    critic = module.discriminator.discriminator
    critic = critic if penalise == "all" else critic.critic
    latents = [*zip(drawn.latents[::2], drawn.latents[1::2], strict=True)]
    alphas = [alpha[::2, None] for alpha in drawn.alphas]
    data, columns = TABLE_DATA * EPOCHS, [(2, 4), (4, 7)]
    logs = references.table(module.generator, critic, data, latents, alphas, 2, columns, penalise, lr=2e-3)
    names = {"d/adversarial": ("loss_d", 1), "g/adversarial": ("adversarial", 1), "g/entropy": ("entropy", 1)}
    return logs, names | {"d/gradient_penalty": ("penalty", 10)}


# ---------- CTGAN: conditions in the sample, a Gumbel-softmax, and other conditions in the generator's turn


class Synthesis(Draws, TableSynthesis):
    """Notes what it draws."""


class Apart(nn.Module):
    """A network of latents and condition together, as the reference calls it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, latents, condition):
        return self.network(torch.cat([latents, condition], 1))


TABLE_COLUMNS = [
    {"name": "age", "means": [20.0, 60.0], "stds": [5.0, 10.0]},
    {"name": "smokes", "categories": ["no", "yes"]},
    {"name": "weight", "means": [70.0], "stds": [12.0]},
    {"name": "kind", "categories": [1, 2, 3]},
]


def synthesis():
    torch.manual_seed(0)
    make = adam(2e-3, (0.5, 0.9), weight_decay=1e-6)
    makers = [lambda inputs, outputs: MLP([inputs, 16, outputs], nn.Tanh)] * 2
    return Synthesis(*makers, TABLE_COLUMNS, 4, 2, g_optimizer=make, d_optimizer=make).double()


def synthesis_batch(seed):
    rows = [randn(16, 1, seed=seed).tanh(), randn(16, 1, seed=seed + 9).tanh()]
    generator = torch.Generator().manual_seed(seed)
    kinds = [torch.eye(n, dtype=torch.float64)[torch.randint(n, (16,), generator=generator)] for n in (2, 2, 1, 3, 5)]
    age, smokes, weight, kind, condition = kinds
    return torch.cat([rows[0], age, smokes, rows[1], weight, kind], 1), condition


SYNTHESIS_DATA = [synthesis_batch(i) for i in range(LENGTH)]


def synthesis_reference(module, drawn):
    batches = SYNTHESIS_DATA * EPOCHS
    data = [(rows[:8], condition[:8]) for rows, condition in batches]
    conditions = [condition.roll(1, 0).split(8) for _, condition in batches]
    latents = [*zip(drawn.latents[::2], drawn.latents[1::2], strict=True)]
    of_d, alphas, of_g = drawn.alphas[::3], [alpha[::2, None] for alpha in drawn.alphas[1::3]], drawn.alphas[2::3]
    gumbels = [(-(-x.log()).log(), -(-y.log()).log()) for x, y in zip(of_d, of_g, strict=True)]
    spans = [
        (0, 1, "tanh"),
        (1, 3, "softmax"),
        (3, 5, "softmax"),
        (5, 6, "tanh"),
        (6, 7, "softmax"),
        (7, 10, "softmax"),
    ]
    logs = applied.table(
        Apart(module.generator), module.discriminator.discriminator, data, latents, conditions, alphas, 2, spans,
        [((3, 5), (0, 2)), ((7, 10), (2, 5))], gumbels, lr=2e-3,
    )  # fmt: skip
    names = {"d/adversarial": ("loss_d", 1), "g/adversarial": ("adversarial", 1), "g/condition": ("entropy", 1)}
    return logs, names | {"d/gradient_penalty": ("penalty", 10)}


# ---------- the loss balancer of EnCodec


class Balanced(GANModule):
    def unpack(self, batch):
        given, target = batch
        return target, given

    def auxiliary_losses(self, player, outputs):
        return {} if player == "d" else {name: f(outputs.fake, outputs.real) for name, f in DISTANCES.items()}


DISTANCES = {
    "l1": lambda x, y: (x - y).abs().mean(),
    "l2": lambda x, y: 30 * (x - y).square().mean(),
    "max": lambda x, y: (x - y).abs().amax(1).mean(),
}
SHARES = {"l1": 0.1, "l2": 2.0, "max": 1.0}


def balanced():
    torch.manual_seed(0)
    module = Balanced(MLP([3, 16, 4]), MLP([4, 8, 1]), None, g_optimizer=adam(3e-3, (0.5, 0.9))).double()
    module.plan, module.adversarial = ("g",), False
    return module


BALANCED_DATA = [(randn(8, 3, seed=i), randn(8, 4, seed=70 + i)) for i in range(LENGTH)]


def balanced_reference(module):
    data = BALANCED_DATA * EPOCHS
    logs = references.balanced(module.generator, DISTANCES, data, SHARES, lr=3e-3, total_norm=2.0, decay=0.9)
    return logs, {f"g/{name}": (name, 1) for name in DISTANCES}


# ---------- the lazy steps of StyleGAN2


def lazy(order="gd"):
    torch.manual_seed(0)
    d = adam(**lazy_correction(3, 2e-3))
    module = Draws(MLP([4, 16, 2]), MLP([2, 16, 1], nn.SiLU), 4, None, adam(2e-3, (0.0, 0.99)), d).double()
    module.plan = ("g", "d") if order == "gd" else ("d", "g")
    return module


LAZY_DATA = [randn(8, 2, seed=i) for i in range(LENGTH)]


def lazy_reference(module, order="gd", drawn=None):
    first, second = drawn.latents[::2], drawn.latents[1::2]
    latents = zip(first, second, strict=True) if order == "gd" else zip(second, first, strict=True)
    data = LAZY_DATA * EPOCHS
    logs = references.lazy(module.generator, module.discriminator, data, [*latents], 0.7, 3, order, lr=2e-3)
    return logs, {"g/adversarial": ("loss_g", 1), "d/adversarial": ("loss_d", 1), "d/r1": ("penalty", 1)}


# ---------- what holds for each of them

by_data = {"penalise": "data"}
RECIPES = {
    "vocoder": (vocoder, vocoder_callbacks, VOCODER_DATA, vocoder_reference),
    "tokenizer, D first": (tokenizer, tokenizer_callbacks, TOKENIZER_DATA, tokenizer_reference),
    "tokenizer, G first": (
        lambda: tokenizer("taming"),
        lambda: tokenizer_callbacks("taming"),
        TOKENIZER_DATA,
        lambda module: tokenizer_reference(module, "taming"),
    ),
    "codec": (codec, codec_callbacks, CODEC_DATA, codec_reference),
    "super-resolution": (
        super_resolution,
        super_resolution_callbacks,
        SUPER_RESOLUTION_DATA,
        super_resolution_reference,
    ),
    "ESRGAN": (
        esrgan,
        lambda: [Alternating(share_fake=True), Reconstruction(0.01)],
        SUPER_RESOLUTION_DATA,
        esrgan_reference,
    ),
    "paired translation": (
        paired,
        lambda: [Alternating(share_fake=True), Reconstruction(100.0)],
        PAIRED_DATA,
        paired_reference,
    ),
    "translation": (translation, translation_callbacks, TRANSLATION_DATA, translation_reference),
    "table": (table, table_callbacks, TABLE_DATA, table_reference),
    "table, penalty by the rows": (
        lambda: table(ByData),
        table_callbacks,
        TABLE_DATA,
        lambda module, drawn: table_reference(module, "data", drawn),
    ),
    "CTGAN": (
        synthesis,
        lambda: [Alternating(real_batches="split"), GradientPenalty(10.0)],
        SYNTHESIS_DATA,
        synthesis_reference,
    ),
    "balancer": (balanced, lambda: [LossBalancer(SHARES, 2.0, 0.9)], BALANCED_DATA, balanced_reference),
    "lazy steps, G first": (
        lazy,
        lambda: [R1Penalty(0.7, every=3, separate=True)],
        LAZY_DATA,
        lazy_reference,
    ),
    "lazy steps, D first": (
        lambda: lazy("dg"),
        lambda: [R1Penalty(0.7, every=3, separate=True)],
        LAZY_DATA,
        lambda module, drawn: lazy_reference(module, "dg", drawn),
    ),
}


class Terms(ModelCheckpoint):
    """Notes the values of each step; the base keeps Lightning from adding a checkpoint of its own."""

    def __init__(self):
        super().__init__("never", every_n_train_steps=10**6)
        self.rows = []

    def on_train_batch_end(self, trainer, module, *_):
        row = {f"{p}/{name}": value for p, terms in module.last_step.terms.items() for name, value in terms.items()}
        self.rows.append({name: value.item() for name, value in row.items()})


def train(module, callbacks, data, max_epochs=EPOCHS, ckpt_path=None):
    run = trainer(max_epochs=max_epochs, callbacks=callbacks, enable_checkpointing=True, log_every_n_steps=1)
    run.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
    return run


def state(module):
    return tensors(module.state_dict())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_equals_its_reference(name):
    make, callbacks, data, reference = RECIPES[name]
    module, other, terms = make(), make(), Terms()
    start = copy.deepcopy(state(other))
    train(module, [*callbacks(), terms], data)
    logs, names = reference(other, drawn=module) if isinstance(module, Draws) else reference(other)
    for key, expected in state(other).items():
        torch.testing.assert_close(state(module)[key], expected, rtol=0, atol=1e-12)
    assert any(not torch.equal(value, start[key]) for key, value in state(other).items())
    for key, (column, factor) in names.items():
        expected = [None if value is None else factor * value for value in logs[column]]
        found = [row.get(key) for row in terms.rows]
        assert found == [None if value is None else pytest.approx(value, abs=1e-11) for value in expected]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_on_where_it_stopped(name):
    make, callbacks, data, _ = RECIPES[name]
    again = gone_on(make, lambda module, **kwargs: train(module, [*callbacks(), Terms()], data, **kwargs))
    assert again.iteration == LENGTH * EPOCHS
