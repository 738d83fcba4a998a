"""The training of StyleGAN2, equal to its four phases in plain torch, and its parts alone."""

import copy
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import softplus
from toys import fit, gone_on, points, trainer

from lightning_gan_stability import (
    MLP,
    Alternating,
    ConsistencyPenalty,
    FakePool,
    GANModule,
    GeneratorEMA,
    MinibatchStdDev,
    ModeSeeking,
    PathLengthPenalty,
    R1Penalty,
    R2Penalty,
    StyleGenerator,
)
from lightning_gan_stability.optim import lazy_correction

STEPS, N, LAYERS, CLASSES = 42, 8, 4, 3  # half of the steps are within a period of both lazy penalties
LABELS = torch.tensor([0, 0, 1, 2, 2, 2])  # those of a data set
GAMMA, R1_EVERY, PATH_EVERY, PATH_WEIGHT, MIXING, RATE = 0.7, 16, 4, 2.0, 0.9, 2e-3


class Mapping(nn.Module):
    """Latents and a class to w."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(CLASSES, 3), MLP([5 + 3, 8, 6], nn.Tanh)

    def forward(self, z, y):
        return self.layers(torch.cat([z, self.embedding(y)], 1))


class Synthesis(nn.Module):
    """4x4 images, of which each layer scales the channels by its own w."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.randn(4, 4, 4))
        self.scales = nn.ModuleList([nn.Linear(6, 4) for _ in range(LAYERS)])
        self.layers = nn.ModuleList([nn.Conv2d(4, 4 if i < LAYERS - 1 else 2, 3, padding=1) for i in range(LAYERS)])

    def forward(self, w):
        x = self.base.expand(len(w), -1, -1, -1)
        for i, (scale, layer) in enumerate(zip(self.scales, self.layers, strict=True)):
            x = layer(x.tanh() * (1 + scale(w[:, i])[..., None, None]))
        return x


class Judge(nn.Module):
    """One logit by the class's row of a linear layer, behind the deviations over the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 5, 3), nn.Linear(6 * 4, CLASSES)
        self.deviations = MinibatchStdDev(4)

    def forward(self, x, y):
        h = self.deviations(nn.functional.silu(self.first(x)))
        return self.last(h.flatten(1)).gather(1, y[:, None]).squeeze(1)


class StyleGAN2(GANModule):
    """Mixes styles and draws labels in training."""

    def generate(self, network, n, condition, latents):
        w = network.styles(latents, condition, update_average=self.turn == "d")
        if self.noise.in_step:
            chance, place = self.noise.rand(1, 2)[0].tolist()
            if chance < MIXING:
                cut = 1 + int(place * (LAYERS - 1))
                w = torch.cat([w[:, :cut], network.styles(self.draw_latents(n), condition)[:, cut:]], 1)
        return network.synthesis(w), {"w": w}

    def draw_condition(self, n, condition):
        return LABELS[(self.noise.rand(n, dtype=torch.float64) * len(LABELS)).long()]


class Noted(StyleGAN2):
    """Notes everything that it draws."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn = []
        for name in ("rand", "randn"):
            setattr(self.noise, name, self.noting(getattr(self.noise, name)))

    def noting(self, draw):
        def noted(*shape, **kwargs):
            self.drawn.append(draw(*shape, **kwargs))
            return self.drawn[-1]

        return noted


def adam(every):
    return lambda parameters: torch.optim.Adam(parameters, **lazy_correction(every, RATE))


def make(kind=StyleGAN2):
    torch.manual_seed(0)
    generator = StyleGenerator(Mapping(), Synthesis(), w_dim=6, num_layers=LAYERS)
    makers = {"g_optimizer": adam(PATH_EVERY), "d_optimizer": adam(R1_EVERY)}
    return kind(generator, Judge(), 5, plan=("g", "d"), **makers).double()


def callbacks():
    path = PathLengthPenalty(
        PATH_WEIGHT, every=PATH_EVERY, separate=True, latents="w", shrink=2, include_batch=True
    )  # fmt: skip
    r1 = R1Penalty(GAMMA, every=R1_EVERY, separate=True)
    return [path, r1, GeneratorEMA(half_life=10, ramp_up=0.4)]


def train(module, **kwargs):
    return fit(module, DATA, callbacks=callbacks(), **{"max_epochs": 2} | kwargs)


def batch(seed):
    source = torch.Generator().manual_seed(seed)
    images = torch.randn(N, 2, 4, 4, generator=source, dtype=torch.float64)
    return images, torch.randint(CLASSES, (N,), generator=source)


DATA = [batch(i) for i in range(STEPS // 2)]


def reference(generator, discriminator, batches, drawn):
    """G main, G reg every 4, D main, D reg every 16, each with latents and labels of its own: as in the authors' loop.

    ``drawn`` are the random numbers in the order of use. Returns the average of the generator's weights, the running
    mean of the path lengths, and how often a batch was mixed.
    """
    draws = iter(drawn)
    optimizers = []
    for network, every in ((generator, PATH_EVERY), (discriminator, R1_EVERY)):
        ratio = every / (every + 1)
        betas = (0.0**ratio, 0.99**ratio)
        optimizers.append(torch.optim.Adam(network.parameters(), lr=RATE * ratio, betas=betas))
    average, w_average, path_mean, mixed = copy.deepcopy(generator), torch.zeros(6).double(), torch.tensor(0.0), 0

    def run_g(n, update_w_average=False):
        nonlocal w_average, mixed
        z, u = next(draws), next(draws)
        assert len(z) == len(u) == n
        labels = LABELS[(u * 6).long()]
        w = generator.mapping(z, labels)
        if update_w_average:
            w_average = 0.998 * w_average + 0.002 * w.detach().mean(0)
        ws = torch.stack([w] * LAYERS, 1)
        ((chance, place),) = next(draws).tolist()
        if chance < 0.9:
            mixed += 1
            cutoff = 1 + int(3 * place)
            tail = torch.stack([generator.mapping(next(draws), labels)] * LAYERS, 1)
            ws = torch.cat([ws[:, :cutoff], tail[:, cutoff:]], 1)
        return generator.synthesis(ws), ws, labels

    def step(player, loss):
        optimizers[player].zero_grad()
        loss.backward()
        optimizers[player].step()

    for i, (real, real_labels) in enumerate(batches):
        fake, _, labels = run_g(N)
        step(0, softplus(-discriminator(fake, labels)).mean())
        if i % PATH_EVERY == 0:
            fake, ws, _ = run_g(N // 2)
            noise = next(draws) / 16**0.5
            (gradients,) = torch.autograd.grad((fake * noise).sum(), ws, create_graph=True)
            lengths = gradients.square().sum(2).mean(1).sqrt()
            mean = path_mean + 0.01 * (lengths.mean() - path_mean)
            path_mean = mean.detach()
            step(0, PATH_EVERY * PATH_WEIGHT * (lengths - mean).square().mean())
        fake, _, labels = run_g(N, update_w_average=True)
        step(1, (softplus(discriminator(fake.detach(), labels)) + softplus(-discriminator(real, real_labels))).mean())
        if i % R1_EVERY == 0:
            point = real.clone().requires_grad_()
            (gradients,) = torch.autograd.grad(discriminator(point, real_labels).sum(), point, create_graph=True)
            step(1, R1_EVERY * GAMMA / 2 * gradients.square().sum((1, 2, 3)).mean())
        beta = 0.5 ** (1 / max(min(10, 0.4 * i), 1e-8))
        for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
            mean.data = value.detach() + beta * (mean.data - value.detach())
    assert next(draws, None) is None
    return average, w_average, path_mean, mixed


def test_stylegan2_equals_its_reference():
    module, other, parts = make(Noted), make(), callbacks()
    fit(module, DATA, max_epochs=2, callbacks=parts)
    assert module.iteration == STEPS
    average, w_average, path_mean, mixed = reference(other.generator, other.discriminator, DATA * 2, module.drawn)
    passes = 2 * STEPS + math.ceil(STEPS / PATH_EVERY)
    assert 0 < mixed < passes  # some batches were not
    for found, expected in [
        (module.generator, other.generator),
        (module.discriminator, other.discriminator),
        (module.generator_ema, average),
    ]:
        pairs = zip(found.parameters(), expected.parameters(), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12
    for network in (module.generator, module.generator_ema):
        torch.testing.assert_close(network.w_average, w_average, rtol=0, atol=1e-13)
    torch.testing.assert_close(parts[0].means, path_mean, rtol=0, atol=1e-12)
    start = make()
    assert all(not torch.equal(a, b) for a, b in zip(module.parameters(), start.parameters(), strict=False))


def test_stylegan2_goes_on_where_it_stopped():
    """Labels, styles and the average of w too, bit for bit, from within a period of both lazy penalties."""
    again = gone_on(make, train)
    assert again.iteration == STEPS


# ---------- truncation


def test_samples_are_truncated_where_they_are_asked_to_be():
    """w̄ + ψ (w − w̄) of the average of weights, in a module whose `generate` is its own."""
    module = make().eval()
    module.generator_ema = copy.deepcopy(module.generator)
    module.generator_ema.w_average.normal_()
    average, w_average = module.generator_ema, module.generator_ema.w_average
    z, labels = torch.randn(5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    w = average.mapping(z, labels)
    for psi in (1.0, 0.5, 0.0):
        expected = average.synthesis(torch.stack([(1 - psi) * w_average + psi * w] * LAYERS, 1))
        found = module.sample(latents=z, condition=labels, truncation=psi)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert average.truncation == 1.0  # for these samples alone
    with pytest.raises(ValueError, match="The generator failed"):
        module.sample(latents=z, condition=labels[:, None], truncation=0.5)
    assert average.truncation == 1.0


def test_any_generator_with_the_attribute_is_truncated():
    class Own(nn.Module):
        truncation = 1.0

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, z):
            return self.truncation * z * self.weight

    module = GANModule(nn.Sequential(nn.Identity(), Own()), MLP([2, 1]), 2)
    assert module.sample(latents=torch.ones(1, 2), truncation=0.25).tolist() == [[0.25, 0.25]]


def test_truncation_that_cannot_be_is_refused():
    module = GANModule(MLP([4, 2]), MLP([2, 1]), 4)
    with pytest.raises(
        ValueError, match=r"^`truncation` needs a generator with an attribute .* MLP has none: keep `truncation`"
    ):
        module.sample(3, truncation=0.5)
    with pytest.raises(ValueError, match=r"^`truncation` must be a finite number, got 'half'.$"):
        module.sample(3, truncation="half")
    with pytest.raises(ValueError, match="the average of w, which has never been updated"):
        make().eval().sample(condition=torch.zeros(3, dtype=torch.long), truncation=0.5)


# ---------- whose turn it is


class Turns(GANModule):
    """Notes the turns in which its networks run."""

    def __init__(self, **kwargs):
        super().__init__(MLP([4, 8, 2]), MLP([2, 8, 1], nn.Tanh), 4, **kwargs)
        self.seen = []

    def generate(self, network, n, condition, latents):
        self.seen.append(("generate", self.turn))
        samples = super().generate(network, n, condition, latents)
        return samples, {"w": latents}

    def discriminate(self, network, sample, condition):
        self.seen.append(("discriminate", self.turn))
        return super().discriminate(network, sample, condition)


D = [("generate", "d"), ("discriminate", "d"), ("discriminate", "d")]
G = [("generate", "g"), ("discriminate", "g")]
APART = [("generate", None), ("discriminate", None)]


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        ([], D + G),
        ([R1Penalty(), PathLengthPenalty(every=1)], D + G),
        ([R2Penalty(separate=True)], D + APART + G),
        ([PathLengthPenalty(separate=True)], D + G + APART[:1]),
        ([Alternating(share_fake=True)], [("generate", "g"), *D[1:], G[1]]),
    ],
)
def test_a_module_knows_whose_turn_it_is(callbacks, expected):
    module = Turns()
    fit(module, points(1), callbacks=callbacks)
    assert module.seen == expected
    assert module.turn is None
    assert isinstance(module.sample(2), torch.Tensor)
    assert module.seen[-1] == ("generate", None)


def test_validation_is_nobodys_turn():
    module = Turns()
    trainer().validate(module, torch.utils.data.DataLoader(points(1), None), verbose=False)
    assert {turn for _, turn in module.seen} == {None}


def test_a_turn_ends_with_an_error():
    module = Turns()
    module.generate = lambda *_: 1 / 0
    with pytest.raises(ValueError, match="The generator failed"):
        fit(module, points(1))
    assert module.turn is None


# ---------- conditions of samples


class Drawn(GANModule):
    """Data of one class, and samples of another."""

    def __init__(self, **kwargs):
        torch.manual_seed(0)
        super().__init__(MLP([4, 8, 2], num_classes=9), MLP([2, 8, 1], nn.Tanh, num_classes=9), 4, **kwargs)
        self.made, self.judged = [], []

    def unpack(self, batch):
        return batch, torch.full((len(batch),), 7)

    def draw_condition(self, n, condition):
        assert condition.tolist() == [7] * n
        return torch.full((n,), 2)

    def generate(self, network, n, condition, latents):
        self.made += condition.tolist()
        return super().generate(network, n, condition, latents)

    def discriminate(self, network, sample, condition):
        self.judged.append({*condition.tolist()})
        return super().discriminate(network, sample, condition)


@pytest.mark.parametrize(
    ("callbacks", "of_d", "of_g"),
    [
        ([], [{7}, {2}], [{2}]),
        ([Alternating(share_fake=True)], [{7}, {2}], [{2}]),
        ([ModeSeeking()], [{7}, {2}], [{2}]),
        ([PathLengthPenalty(every=1, shrink=2)], [{7}, {2}], [{2}]),
        ([PathLengthPenalty(every=1, separate=True)], [{7}, {2}], [{2}]),
        ([FakePool(4)], [{7}, {2}], [{2}]),
        ([ConsistencyPenalty(kind="latent")], [{7}, {2}, {2}], [{2}]),
        ([R2Penalty(separate=True)], [{7}, {2}, {2}], [{2}]),
    ],
    ids=lambda part: type(part[0]).__name__ if part and not isinstance(part[0], set) else "",
)
def test_samples_have_conditions_of_their_own(callbacks, of_d, of_g):
    """Real samples are judged with 7, generated ones made and judged with 2, in every part of a step."""
    module = Drawn()
    fit(module, points(1), callbacks=callbacks)
    assert {*module.made} == {2}
    assert module.judged == of_d + of_g


def test_a_micro_batch_has_its_rows_of_the_labels_of_the_batch():
    seen = {}
    for accumulate in (1, 2, 4):
        module = Drawn(accumulate=accumulate)
        module.draw_condition = lambda n, condition, m=module: (m.noise.rand(n, dtype=torch.float64) * 9).long()
        fit(module, points(2))
        seen[accumulate] = module.made
    assert seen[1] == seen[2] == seen[4]
    assert len({*seen[1]}) > 4


def test_conditions_of_another_number_are_refused():
    module = Drawn()
    module.draw_condition = lambda n, condition: torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`condition` must have 8 entries, one for each sample, got 3."):
        fit(module, points(1))


# ---------- the mean of path lengths


def test_the_mean_with_the_batch_in_it_is_refused_with_micro_batches():
    with pytest.raises(MisconfigurationException, match=r"PathLengthPenalty\(include_batch=True\) .* accumulate=2"):
        fit(Turns(accumulate=2), points(1), callbacks=[PathLengthPenalty(include_batch=True)])
    with pytest.raises(ValueError, match=r"`include_batch` must be True or False, got 1."):
        PathLengthPenalty(include_batch=1)
