"""Unrolling against closed forms, and against central differences of the whole unrolled objective in float64.

The reference knows nothing of the package: it copies the discriminator and takes real steps with a real optimizer.
"""

from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import softplus
from torch.nn.utils import parametrizations
from toys import fit, points, sgd, small, spy_on_samples, tensors, weights

from lightning_gan_stability import (
    MLP,
    AdversarialLoss,
    BoundaryEquilibrium,
    ConsistencyPenalty,
    GANModule,
    GradientPenalty,
    ModeSeeking,
    NonSaturating,
    OptimisticAdam,
    R1Penalty,
    R2Penalty,
    Regularizer,
    Relativistic,
    SpectralNorm,
    Unrolling,
    WeightClipping,
)
from lightning_gan_stability.optim import Differentiable

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "SGD, weight decay": lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9)),
    "Adam, weight decay": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9), weight_decay=0.1),
    "Adam, AMSGrad": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.5, 0.9), weight_decay=0.3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.03, alpha=0.9),
    "RMSprop, centered, momentum": lambda p: torch.optim.RMSprop(p, lr=0.03, alpha=0.9, centered=True, momentum=0.5),
}


# ---------- the generator's step at the end of a run, and what was there before it


class LastStep(Callback):
    """On the last batch the generator alone moves; keeps what it moved from, and its gradient."""

    def __init__(self, last):
        self.last = last

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx < self.last:
            return
        module.plan = ("g",)
        self.real = batch
        self.generator, self.discriminator = deepcopy(module.generator), deepcopy(module.discriminator)
        self.optimizer = deepcopy(trainer.optimizers[0].state_dict())
        self.before = deepcopy(tensors(module.state_dict()))
        spy_on_samples(module, self.look)

    def look(self, player, outputs):
        self.latents, self.fake = outputs.latents.detach(), outputs.fake

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if hasattr(self, "latents"):
            self.gradient = torch.cat([p.grad.flatten() for p in module.generator.parameters()])

    def on_train_batch_end(self, trainer, module, *_):
        if hasattr(self, "latents"):
            del module.compute_samples
            self.after, self.optimizer_after = (
                deepcopy(tensors(module.state_dict())),
                trainer.optimizers[0].state_dict(),
            )


def gan(optimizer, discriminator=None, **kwargs):
    torch.manual_seed(0)
    generator = MLP([3, 6, 2], nn.Tanh)
    discriminator = MLP([2, 8, 8, 1], nn.SiLU) if discriminator is None else discriminator
    options = {"g_optimizer": sgd(0.1), "d_optimizer": optimizer} | kwargs
    return GANModule(generator, discriminator, latent_dim=3, **options).double()


def last_step(module, rule, callbacks=(), before=3, **kwargs):
    """A few plain steps, so that the optimizer has moments, then the generator's unrolled one."""
    look = LastStep(before)
    fit(module, points(before + 1, 16, dtype=torch.float64), callbacks=[rule, *callbacks, look], **kwargs)
    return look


def frozen(discriminator):
    """Spectral norm with vectors that stay, BatchNorm with statistics of the batch that it forgets."""
    for layer in discriminator.modules():
        if isinstance(layer, parametrizations._SpectralNorm):
            layer.eval()
        if isinstance(layer, nn.BatchNorm1d):
            layer.track_running_stats = False
    return discriminator


class Reference:
    """The unrolled objective as a function of the generator's weights."""

    def __init__(self, look, make_optimizer, steps, d_loss, g_loss, clip_norm=None, limit=None):
        self.look, self.make_optimizer, self.steps = look, make_optimizer, steps
        self.d_loss, self.g_loss, self.clip_norm, self.limit = d_loss, g_loss, clip_norm, limit

    def __call__(self, shift):
        generator, discriminator = deepcopy(self.look.generator), frozen(deepcopy(self.look.discriminator))
        with torch.no_grad():
            for p, s in zip(generator.parameters(), _split(shift, generator), strict=True):
                p.add_(s)
            fake = generator(self.look.latents)
        optimizer = self.make_optimizer(discriminator.parameters())
        optimizer.load_state_dict(deepcopy(self.look.optimizer))
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.d_loss(discriminator, self.look.real, fake).backward()
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(discriminator.parameters(), self.clip_norm)
            optimizer.step()
            if self.limit is not None:
                with torch.no_grad():
                    for p in discriminator.parameters():
                        p.clamp_(-self.limit, self.limit)
        return self.g_loss(discriminator, self.look.real, fake).item()

    def error(self, directions=6, h=1e-5):
        """The relative error of the gradient that was found, along random directions."""
        source = torch.Generator().manual_seed(1)
        found, expected = [], []
        for _ in range(directions):
            u = torch.randn(self.look.gradient.shape, generator=source, dtype=torch.float64).to(self.look.gradient)
            found.append(self.look.gradient @ u)
            expected.append((self(h * u) - self(-h * u)) / (2 * h))
        found, expected = torch.stack(found).cpu(), torch.tensor(expected, dtype=torch.float64)
        return ((found - expected).norm() / expected.norm()).item()


def _split(shift, module):
    parameters = list(module.parameters())
    return [s.view_as(p) for s, p in zip(shift.split([p.numel() for p in parameters]), parameters, strict=True)]


def plain_d(discriminator, real, fake):
    return (softplus(-discriminator(real)) + softplus(discriminator(fake))).mean()


def plain_g(discriminator, real, fake):
    return softplus(-discriminator(fake)).mean()


def squared_norm(discriminator, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().sum(1).mean()


def with_r1(discriminator, real, fake):
    return plain_d(discriminator, real, fake) + 0.35 * squared_norm(discriminator, real)


def with_r1_and_r2(discriminator, real, fake):
    return with_r1(discriminator, real, fake) + 0.2 * squared_norm(discriminator, fake)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_for_every_inner_optimizer(name, steps):
    look = last_step(gan(OPTIMIZERS[name]), Unrolling(steps))
    assert Reference(look, OPTIMIZERS[name], steps, plain_d, plain_g).error() < 1e-6


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_gradient_with_r1(name, steps):
    look = last_step(gan(OPTIMIZERS[name]), Unrolling(steps), [R1Penalty(0.7)])
    assert Reference(look, OPTIMIZERS[name], steps, with_r1, plain_g).error() < 1e-6
    assert Reference(look, OPTIMIZERS[name], steps, plain_d, plain_g).error() > 1e-4  # R1 is in the inner steps


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_gradient_with_spectral_norm_and_r1(name, factor, steps):
    callbacks = [SpectralNorm(factor=factor), R1Penalty(0.7)]
    look = last_step(gan(OPTIMIZERS[name]), Unrolling(steps), callbacks)
    assert Reference(look, OPTIMIZERS[name], steps, with_r1, plain_g).error() < 1e-6


def test_gradient_before_the_first_step():
    """No moments yet: Adam's first step is nearly the sign of its gradient."""
    look = last_step(gan(OPTIMIZERS["Adam"]), Unrolling(3), before=0)
    # so the objective bends at the scale of Adam's eps, and differences need a shorter step
    assert Reference(look, OPTIMIZERS["Adam"], 3, plain_d, plain_g).error(h=1e-6) < 1e-6


def test_gradient_with_r2_flows_through_the_penalty():
    look = last_step(gan(OPTIMIZERS["Adam"]), Unrolling(3), [R1Penalty(0.7), R2Penalty(0.4)])
    assert Reference(look, OPTIMIZERS["Adam"], 3, with_r1_and_r2, plain_g).error() < 1e-6


def test_gradient_with_interpolates_flows_through_them():
    alpha = torch.rand(16, dtype=torch.float64)

    def wgan_gp(discriminator, real, fake):
        x = (alpha[:, None] * real + (1 - alpha[:, None]) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
        return plain_d(discriminator, real, fake) + 0.5 * (gradient.norm(dim=1) - 1).square().mean()

    module = gan(OPTIMIZERS["SGD"])
    module.noise.rand = lambda n, *shape, dtype: alpha
    look = last_step(module, Unrolling(3), [GradientPenalty(0.5)])
    assert Reference(look, OPTIMIZERS["SGD"], 3, wgan_gp, plain_g).error() < 1e-6


def test_lazy_penalties_act_when_they_are_due():
    for before, d_loss in ((4, with_r1_lazy), (3, plain_d)):
        look = last_step(gan(OPTIMIZERS["Adam"]), Unrolling(2), [R1Penalty(0.7, every=4)], before=before)
        assert Reference(look, OPTIMIZERS["Adam"], 2, d_loss, plain_g).error() < 1e-6


def with_r1_lazy(discriminator, real, fake):
    return plain_d(discriminator, real, fake) + 4 * 0.35 * squared_norm(discriminator, real)


class Scale(nn.Module):
    def forward(self, x):
        return 1.7 * x


def test_augmentation_acts_in_the_inner_steps():
    module = gan(OPTIMIZERS["Adam"])
    module.augment = Scale()
    look = last_step(module, Unrolling(3))

    def scaled_d(discriminator, real, fake):
        return plain_d(discriminator, 1.7 * real, 1.7 * fake)

    def scaled_g(discriminator, real, fake):
        return plain_g(discriminator, real, 1.7 * fake)

    assert Reference(look, OPTIMIZERS["Adam"], 3, scaled_d, scaled_g).error() < 1e-6


def test_augmentation_noise_is_the_same_in_every_inner_step():
    class Jitter(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.noise = module.noise
            self.seen = []

        def forward(self, x):
            noise = self.noise.randn_like(x)
            self.seen.append(noise[0, 0].item())
            return x + 0.1 * noise

    module = gan(OPTIMIZERS["SGD"])
    module.plan = ("g",)
    module.augment = jitter = Jitter(module)
    fit(module, points(1, 16, dtype=torch.float64), callbacks=[Unrolling(4)])
    inner = jitter.seen[2:-1]  # the play itself draws twice, the objective once
    assert len(inner) == 8
    assert len(set(inner)) == 2


@pytest.mark.parametrize("clip_norm", [0.05, 10.0])
def test_clip_norm_acts_in_the_inner_steps(clip_norm):
    look = last_step(gan(OPTIMIZERS["SGD"], clip_norm=clip_norm), Unrolling(3))
    # what arrives at the generator's own optimizer is not clipped yet
    assert Reference(look, OPTIMIZERS["SGD"], 3, plain_d, plain_g, clip_norm=clip_norm).error() < 1e-6


def test_weight_clipping_acts_in_the_inner_steps():
    limit = 0.3
    look = last_step(gan(OPTIMIZERS["SGD"]), Unrolling(3), [WeightClipping(limit)])
    assert Reference(look, OPTIMIZERS["SGD"], 3, plain_d, plain_g, limit=limit).error() < 1e-6
    assert Reference(look, OPTIMIZERS["SGD"], 3, plain_d, plain_g).error() > 1e-4


class Noisy(nn.Module):
    """A discriminator that drops units by a function or by a layer."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 1)
        self.drop = nn.Dropout(0.4) if layer else None

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(nn.functional.dropout(h, 0.4, self.training) if self.drop is None else self.drop(h))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_discriminator_that_draws_draws_the_same_in_every_inner_step(checkpoint):
    found = []
    for layer, rule in ((True, Unrolling(3, checkpoint=True)), (False, Unrolling(3, checkpoint=checkpoint))):
        torch.manual_seed(3)
        module = gan(sgd(0.3), Noisy(layer))
        torch.manual_seed(5)
        found.append(last_step(module, rule).gradient)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


class Sometimes(nn.Module):
    """Stochastic depth: some passes leave a layer out."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h + self.middle(h).tanh() if torch.rand(()) < 0.5 else h)


@pytest.mark.parametrize("seed", range(4))
def test_stochastic_depth(seed):
    module = gan(sgd(0.3), Sometimes())
    torch.manual_seed(seed)
    assert last_step(module, Unrolling(3)).gradient.isfinite().all()


class Looks(Regularizer):
    """Differentiates the logits of the generator's samples, and adds nothing."""

    player = "g"
    differentiates = ("latents",)

    def penalty(self, module, outputs):
        (slope,) = torch.autograd.grad(outputs.fake_logits.sum(), outputs.latents, retain_graph=True)
        return 0 * slope.sum(1)


def test_a_look_through_checkpointed_steps_changes_nothing():
    found = [
        last_step(gan(OPTIMIZERS["Adam"]), Unrolling(3, checkpoint=checkpoint), [Looks()]).gradient
        for checkpoint in (False, True)
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


class Slope(Looks):
    def penalty(self, module, outputs):
        return torch.autograd.grad(outputs.fake_logits.sum(), outputs.latents, create_graph=True)[0].square().sum(1)


def test_second_derivatives_of_checkpointed_steps_are_an_error():
    with pytest.raises(RuntimeError, match="trying to differentiate twice a function that was marked with @once_diff"):
        last_step(gan(OPTIMIZERS["Adam"]), Unrolling(3, checkpoint=True), [Slope()])


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_penalties_with_samples_of_their_own(name):
    """zCR asks the generator again, so that the steps depend on its parameters not through the batch alone."""
    found = [
        last_step(gan(OPTIMIZERS[name]), rule, [ConsistencyPenalty("latent", weight=2.0, radius=0.5)]).gradient
        for rule in (Unrolling(3), Unrolling(3, checkpoint=True), Unrolling(3, second_order=False))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)
    assert (found[0] - found[2]).norm() > 1e-3 * found[0].norm()


def test_the_generators_statistics_move_as_in_a_plain_step():
    again = lambda: [ConsistencyPenalty("latent"), ModeSeeking()]  # noqa: E731  # both ask the generator again
    module = gan(sgd(0.1))
    module.generator = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    fit(module, points(2, 16, dtype=torch.float64), callbacks=[Unrolling(5), *again()])
    once = gan(sgd(0.1))
    once.generator = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    fit(once, points(2, 16, dtype=torch.float64), callbacks=again())
    assert module.generator[1].num_batches_tracked == once.generator[1].num_batches_tracked


class Judges(Regularizer):
    """Judges the generator's samples once more."""

    player = "g"
    differentiates = ()

    def penalty(self, module, outputs):
        self.difference = (module.logits(outputs.fake) - outputs.fake_logits).abs().max()
        return outputs.fake_logits


def test_the_generators_penalties_see_the_unrolled_discriminator():
    judges = Judges()
    last_step(gan(OPTIMIZERS["Adam"]), Unrolling(3), [judges])
    assert judges.difference < 1e-12


class Encoding(GANModule):
    """Real pairs come from an encoder that trains with the generator, as in BiGAN."""

    def unpack(self, batch):
        return self.generator.encoder(batch), None


def test_samples_that_the_generator_makes_of_the_data():
    found = []
    for rule in (None, Unrolling(1), Unrolling(1, checkpoint=True)):
        torch.manual_seed(0)
        generator = MLP([3, 6, 2], nn.Tanh)
        generator.encoder = nn.Linear(2, 2)
        options = {"g_optimizer": sgd(0.1), "d_optimizer": sgd(0.0)}  # without steps, unrolling changes nothing
        module = Encoding(generator, MLP([2, 8, 1], nn.SiLU), 3, Relativistic(), **options).double()
        fit(module, points(1, 8, dtype=torch.float64), callbacks=[rule] if rule else [])
        found.append(weights(module.generator))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=0)


def test_a_frozen_discriminator_does_not_answer():
    found = []
    for callbacks in ([], [Unrolling(3)]):
        module = gan(sgd(0.1))
        module.discriminator.requires_grad_(False)
        module.plan = ("g",)
        fit(module, points(2, 8, dtype=torch.float64), callbacks=callbacks)
        found.append(weights(module))
    assert torch.equal(*found)


def test_relativistic_loss_sees_real_samples():
    def pairs_d(discriminator, real, fake):
        return softplus(discriminator(fake) - discriminator(real)).mean()

    def pairs_g(discriminator, real, fake):
        return softplus(discriminator(real) - discriminator(fake)).mean()

    look = last_step(gan(OPTIMIZERS["Adam"], loss=Relativistic()), Unrolling(3))
    assert Reference(look, OPTIMIZERS["Adam"], 3, pairs_d, pairs_g).error() < 1e-6


def test_saddle_objective_has_both_terms():
    look = last_step(gan(OPTIMIZERS["Adam"]), Unrolling(3, objective="saddle"), [R1Penalty(0.7)])
    reference = Reference(look, OPTIMIZERS["Adam"], 3, with_r1, lambda d, real, fake: -plain_d(d, real, fake))
    assert reference.error() < 1e-6
    # the real term depends on θ through ψ_K
    half = Reference(look, OPTIMIZERS["Adam"], 3, with_r1, lambda d, real, fake: -softplus(d(fake)).mean())
    assert half.error() > 1e-4


def test_batch_norm_uses_its_batch():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))
    look = last_step(gan(OPTIMIZERS["SGD"], network), Unrolling(3))
    assert Reference(look, OPTIMIZERS["SGD"], 3, plain_d, plain_g).error() < 1e-6


# ---------- what stays where it was


@pytest.mark.parametrize("second_order", [True, False])
def test_nothing_of_the_discriminator_moves_in_the_generators_step(second_order):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))
    look = last_step(gan(OPTIMIZERS["Adam"], network), Unrolling(3, second_order), [SpectralNorm(factor=2.0)])
    for name, value in look.before.items():
        if name != "generator.layers.2.bias":  # BatchNorm takes a shift of all samples out again
            assert torch.equal(look.after[name], value) == (not name.startswith("generator")), name
    for row, state in look.optimizer["state"].items():
        after = look.optimizer_after["state"][row]
        assert all(torch.equal(value, after[name].to(value.device)) for name, value in state.items())
    assert any("_u" in name for name in look.before)
    assert any("running_mean" in name for name in look.before)


def test_the_discriminators_own_step_is_the_plain_one():
    plain, unrolled = (gan(OPTIMIZERS["Adam"]) for _ in range(2))
    for module in (plain, unrolled):
        module.plan = ("d",)
    fit(plain, points(4, dtype=torch.float64))
    fit(unrolled, points(4, dtype=torch.float64), callbacks=[Unrolling(5)])
    assert torch.equal(weights(plain), weights(unrolled))


def test_global_random_state_is_used_as_by_a_plain_step():
    """Dropout draws from it; inner steps use the same masks and give the state back."""
    states = []
    for callbacks in ([], [Unrolling(3)]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        module = gan(OPTIMIZERS["SGD"], network)
        module.plan = ("d",) if not callbacks else ("g",)
        torch.manual_seed(5)
        fit(module, points(2, dtype=torch.float64), callbacks=callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)  # two forward passes of the discriminator either way


# ---------- approximation, checkpointing


def test_first_order_takes_the_unrolled_discriminator_for_a_constant():
    look = last_step(gan(OPTIMIZERS["Adam"]), Unrolling(3, second_order=False), [R1Penalty(0.7), R2Penalty(0.4)])
    generator, discriminator = look.generator, look.discriminator
    optimizer = OPTIMIZERS["Adam"](discriminator.parameters())
    optimizer.load_state_dict(look.optimizer)
    fake = generator(look.latents)
    for _ in range(3):
        optimizer.zero_grad()
        with_r1_and_r2(discriminator, look.real, fake.detach()).backward()
        optimizer.step()
    gradients = torch.autograd.grad(plain_g(discriminator, look.real, fake), [*generator.parameters()])
    torch.testing.assert_close(look.gradient, torch.cat([g.flatten() for g in gradients]), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_checkpointing_gives_the_same_run(name):
    runs = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.SiLU(), nn.Linear(8, 1))
        module = gan(OPTIMIZERS[name], network)
        module.plan = ("g", "d")
        torch.manual_seed(7)
        callbacks = [Unrolling(4, checkpoint=checkpoint), R1Penalty(0.5), GradientPenalty(0.3), SpectralNorm()]
        fit(module, points(3, 16, dtype=torch.float64), callbacks=callbacks)
        runs.append(weights(module))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


class Kept:
    """A tensor that autograd keeps for the way back; counts the bytes of all that live at once."""

    live = peak = 0

    def __init__(self, tensor):
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        Kept.live += self.bytes
        Kept.peak = max(Kept.peak, Kept.live)

    def __del__(self):
        Kept.live -= self.bytes


def peak_bytes(steps, checkpoint):
    class Watch(Callback):
        def on_train_batch_start(self, *_):
            self.hooks = torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor)
            self.hooks.__enter__()

        def on_train_batch_end(self, *_):
            self.hooks.__exit__()

    module = gan(OPTIMIZERS["Adam"])
    module.plan = ("g",)
    Kept.live = Kept.peak = 0
    fit(module, points(1, 256, dtype=torch.float64), callbacks=[Unrolling(steps, checkpoint=checkpoint), Watch()])
    return Kept.peak


def test_memory_is_linear_in_steps_and_checkpointing_saves_it():
    plain = [peak_bytes(steps, False) for steps in (2, 4, 8)]
    assert plain[2] - plain[1] == pytest.approx(2 * (plain[1] - plain[0]), rel=1e-3)
    kept = [peak_bytes(steps, True) for steps in (2, 4, 8)]
    assert kept[2] - kept[0] < (plain[2] - plain[0]) / 20
    assert kept[2] < plain[0]


# ---------- closed form


class Quadratic(nn.Module):
    """l(x) = −(½ xᵀAx + xᵀBψ − ½ ψᵀCψ)."""

    def __init__(self, a, b, c):
        super().__init__()
        for name, value in {"a": a, "b": b, "c": c}.items():
            self.register_buffer(name, value)
        self.psi = nn.Parameter(torch.linspace(-1, 1, len(c), dtype=torch.float64))

    def forward(self, x):
        return -(0.5 * (x @ self.a * x).sum(1) + x @ self.b @ self.psi - 0.5 * self.psi @ self.c @ self.psi)


class Constant(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(1, 2, n, dtype=torch.float64))

    def forward(self, latents):
        return self.theta.expand(len(latents), -1)


class Value(AdversarialLoss):
    """L_D = −f and L_G = f, without a real part."""

    def discriminator(self, real_logits, fake_logits):
        return fake_logits + 0 * real_logits

    def generator(self, fake_logits, real_logits=None):
        return -fake_logits


@pytest.mark.parametrize("steps", [1, 3, 5, 400])
def test_quadratic_game(steps):
    torch.manual_seed(0)
    n, m, eta = 3, 4, 0.2
    a, b, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((n, n), (n, m), (m, m)))
    a, c = a + a.T, 0.3 * c @ c.T + torch.eye(m, dtype=torch.float64)
    module = GANModule(Constant(n), Quadratic(a, b, c), 1, Value(), g_optimizer=sgd(1.0), d_optimizer=sgd(eta))
    theta, psi = module.generator.theta.detach().clone(), module.discriminator.psi.detach().clone()
    module.plan = ("g",)
    fit(module, [torch.zeros(2, n, dtype=torch.float64)], callbacks=[Unrolling(steps)])
    found = theta - module.generator.theta.detach()
    power = torch.linalg.matrix_power(torch.eye(m, dtype=torch.float64) - eta * c, steps)
    answer = (torch.eye(m, dtype=torch.float64) - power) @ torch.linalg.inv(c) @ b.T  # dψ_K/dθ
    psi_k = power @ psi + answer @ theta
    expected = a @ theta + b @ psi_k + answer.T @ (b.T @ theta - c @ psi_k)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if steps == 400:
        torch.testing.assert_close(found, (a + b @ torch.linalg.inv(c) @ b.T) @ theta, rtol=1e-8, atol=1e-8)


# ---------- differentiable steps alone


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_are_those_of_the_optimizer(name):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2, dtype=torch.float64)), nn.Parameter(torch.randn(4).double())]
    optimizer = OPTIMIZERS[name](parameters)
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(6)]
    for step in gradients[:3]:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    moved, parts = list(parameters), None
    steps = Differentiable(optimizer, parameters)
    for step in gradients[3:]:
        moved, parts = steps(moved, step, parts)
    for step in gradients[3:]:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, q in zip(parameters, moved, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-14)


def test_groups_and_parameters_without_gradient():
    torch.manual_seed(0)
    p, q, r = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(3))
    optimizer = torch.optim.Adam([{"params": [p, q], "lr": 0.1}, {"params": [r], "lr": 0.2, "betas": (0.1, 0.5)}])
    p.grad, r.grad = torch.ones_like(p), torch.ones_like(r)  # p and q have different numbers of steps from now on
    optimizer.step()
    gradients = [torch.full_like(p, 0.3), torch.full_like(q, -2.0), None]
    moved, _ = Differentiable(optimizer, [p, q, r])([p, q, r], gradients, None)
    p.grad, q.grad, r.grad = gradients
    optimizer.step()
    for a, b in zip((p, q, r), moved, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_units_have_exact_steps_and_finite_second_derivatives(name, dtype):
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype))
    x = torch.tensor([0.5, 0.0, 0.25], dtype=dtype, requires_grad=True)  # the second unit is dead
    optimizer = OPTIMIZERS[name]([w])
    (g,) = torch.autograd.grad((x.square() * w.square()).sum() / 2, w, create_graph=True)
    (moved,), _ = Differentiable(optimizer, [w])([w], [g], None)
    derivative = torch.autograd.grad(moved.square().sum(), [x, w])
    assert all(d.isfinite().all() for d in derivative)
    w.grad = g.detach()
    optimizer.step()
    torch.testing.assert_close(moved.detach(), w.detach(), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_torchs_own_differentiable_adam_fails_there():
    """Why it is written anew."""
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    x = torch.tensor([0.5, 0.0], requires_grad=True)
    (g,) = torch.autograd.grad((x.square() * w.square()).sum() / 2, w, create_graph=True)
    v = w.clone()
    v.grad = g
    torch.optim.Adam([v], differentiable=True).step()
    assert torch.autograd.grad(v.sum(), x)[0].isnan().any()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_dead_units_in_a_run(activation):
    discriminator = MLP([2, 16, 16, 1], activation)
    with torch.no_grad():
        discriminator.layers[0].bias[:8] = -100.0  # half of the units never fire
        discriminator.layers[2].weight[:, :4] = 0
    module = small(d_optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    module.discriminator = discriminator
    fit(module, points(5), callbacks=[Unrolling(5)])
    assert weights(module).isfinite().all()


# ---------- precision, compilation


def test_under_a_gradient_scaler_the_gradient_is_that_of_full_precision():
    def run(**kwargs):
        module = small(d_optimizer=sgd(0.1), g_optimizer=sgd(0.1))
        module.plan = ("g",)
        fit(module, points(1, 32), callbacks=[Unrolling(3), R1Penalty(0.5)], **kwargs)
        return weights(module.generator) - weights(small().generator)

    exact = run()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for kwargs in ({"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}, {"precision": "bf16-mixed"}):
        assert ((run(**kwargs) - exact).norm() / exact.norm()).item() < 1e-3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_with_a_compiled_discriminator(checkpoint):
    torch._dynamo.reset()
    compiled, plain = (small(d_optimizer=sgd(0.1), g_optimizer=sgd(0.1)) for _ in range(2))
    compiled.discriminator.compile(backend="aot_eager")  # which has no second derivatives
    for module in (compiled, plain):
        fit(module, points(3), callbacks=[Unrolling(3, checkpoint=checkpoint)])
    torch._dynamo.reset()
    assert (weights(compiled) - weights(plain)).abs().max() <= 1e-5


# ---------- what is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "`steps` must be a positive integer, got 0."),
        ({"steps": -1}, "`steps` must be a positive integer, got -1."),
        ({"steps": 2.0}, "`steps` must be a positive integer, got 2.0."),
        ({"second_order": "false"}, "`second_order` must be True or False, got 'false'."),
        ({"checkpoint": 1}, "`checkpoint` must be True or False, got 1."),
        ({"simultaneous": None}, "`simultaneous` must be True or False, got None."),
        ({"objective": "minimax"}, "`objective` must be one of 'generator', 'saddle', got 'minimax'."),
        ({"checkpoint": True, "second_order": False}, "`checkpoint` saves nothing with `second_order=False`"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Unrolling(**kwargs)


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.Adagrad(p), lambda p: torch.optim.NAdam(p), lambda p: OptimisticAdam(p, lr=1e-3)],
    ids=["Adagrad", "NAdam", "OptimisticAdam"],
)
def test_other_optimizers_are_refused_by_name(optimizer):
    module = small(d_optimizer=optimizer)
    name = type(optimizer([nn.Parameter(torch.ones(1))])).__name__
    with pytest.raises(MisconfigurationException, match=rf"{name} is not SGD, Adam, AdamW or RMSprop .* remove Unroll"):
        fit(module, points(1), callbacks=[Unrolling(2)])
    fit(small(g_optimizer=optimizer), points(1), callbacks=[Unrolling(2)])  # the generator's may be any


def test_accumulate_is_refused():
    with pytest.raises(MisconfigurationException, match=r"Unrolling differentiates gradients .* accumulate=2 would"):
        fit(small(accumulate=2), points(1), callbacks=[Unrolling(2)])


def test_recurrent_discriminators_are_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(2, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(x[:, None])[0][:, 0, :1]

    module = GANModule(MLP([4, 2]), Recurrent(), 4)
    with pytest.raises(MisconfigurationException, match="GRU keeps its own list of weights"):
        fit(module, points(1), callbacks=[Unrolling(2)])
    fit(module, points(1))


def test_simultaneous_unrolling_refuses_scaler_and_repeated_players():
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    with pytest.raises(MisconfigurationException, match="Unrolling takes both gradients before either step"):
        fit(small(), points(1), callbacks=[Unrolling(2, simultaneous=True)], plugins=plugins)
    module = small()
    module.plan = ("d", "d", "g")
    with pytest.raises(MisconfigurationException, match="Unrolling steps every player once, but the plan is"):
        fit(module, points(1), callbacks=[Unrolling(2, simultaneous=True)])


def test_a_loss_with_a_state_is_held_still():
    torch.manual_seed(0)
    generator = MLP([4, 8, 16], output_shape=[1, 4, 4])
    loss = BoundaryEquilibrium(gamma=0.7, lambda_k=0.05)
    autoencoder = MLP([16, 8, 16], output_shape=[1, 4, 4])
    module = GANModule(generator, autoencoder, 4, loss)
    module.plan = ("g",)
    fit(module, [torch.randn(8, 1, 4, 4)], callbacks=[Unrolling(3)])
    assert module.loss.k == 0
    module.plan = ("d", "g")
    fit(module, [torch.randn(8, 1, 4, 4)], callbacks=[Unrolling(3)])
    assert module.loss.k > 0


def test_default_loss_is_what_the_reference_assumes():
    assert isinstance(small().loss, NonSaturating)
