"""Penalties as callbacks: their weight in the loss, their interval, and what they refuse."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from toys import Point, fit, points, sgd, small, weights

from lightning_gan_stability import (
    MLP,
    ApproximateR1Penalty,
    ApproximateR2Penalty,
    ConsistencyPenalty,
    DRAGANPenalty,
    GANModule,
    GradientPenalty,
    LeastSquares,
    LeCam,
    LogitDrift,
    ModeSeeking,
    OrthogonalPenalty,
    Packed,
    PathLengthPenalty,
    R1Penalty,
    R2Penalty,
    Regularizer,
    Schedule,
    SpectralNorm,
    UpdateRatio,
    Wasserstein,
    penalties,
)

PENALTIES = [R1Penalty, R2Penalty, GradientPenalty, DRAGANPenalty]


def linear_gan(w, **kwargs):
    """Wasserstein on identical real and fake samples: the penalty alone moves the discriminator."""
    gan = GANModule(nn.Linear(4, 2), nn.Linear(2, 1), latent_dim=4, loss=Wasserstein(), **kwargs).double()
    with torch.no_grad():
        for p in gan.generator.parameters():
            p.zero_()
        gan.discriminator.weight.copy_(torch.tensor([w]))
    gan.plan = ("d",)
    return gan


ZEROS = [torch.zeros(6, 2, dtype=torch.float64)]


@pytest.mark.parametrize(
    ("penalty", "slope"),
    [
        (R1Penalty(0.7), lambda norm: 0.7 * norm),  # γ/2 · norm²
        (R2Penalty(0.7), lambda norm: 0.7 * norm),
        (GradientPenalty(3.0), lambda norm: 2 * 3.0 * (norm - 1)),
        (GradientPenalty(3.0, target=0.0), lambda norm: 2 * 3.0 * norm),
        (GradientPenalty(3.0, target=7.0), lambda norm: 2 * 3.0 * (norm - 7)),
        (GradientPenalty(3.0, target=7.0, one_sided=True), lambda norm: 0.0),
        (GradientPenalty(3.0, one_sided=True), lambda norm: 2 * 3.0 * (norm - 1)),
        (DRAGANPenalty(3.0), lambda norm: 2 * 3.0 * (norm - 1)),
        (DRAGANPenalty(3.0, target=0.5), lambda norm: 2 * 3.0 * (norm - 0.5)),
    ],
)
def test_one_step_on_a_linear_critic(penalty, slope):
    w = torch.tensor([3.0, -4.0], dtype=torch.float64)
    gan = linear_gan([3.0, -4.0], d_optimizer=sgd(0.1))
    fit(gan, ZEROS, callbacks=[penalty])
    expected = w - 0.1 * slope(5.0) * w / 5.0
    torch.testing.assert_close(gan.discriminator.weight[0].detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [R1Penalty, R2Penalty])
def test_due_steps_are_scaled_by_the_interval(penalty):
    """With a frozen critic, the sum of the gradients of a cycle is that of a penalty on every step."""

    class Sum(Callback):
        def __init__(self):
            self.total, self.due = 0, []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            gradient = module.discriminator.weight.grad.clone()
            self.total = self.total + gradient
            self.due.append(bool(gradient.abs().sum() > 0))

    sums = []
    for every in (1, 4):
        gan = linear_gan([3.0, -4.0], d_optimizer=sgd(0.0))
        recorder = Sum()
        fit(gan, ZEROS * 8, callbacks=[penalty(0.5, every=every), recorder])
        sums.append(recorder)
    torch.testing.assert_close(sums[0].total, sums[1].total)
    assert sums[1].due == [i % 4 == 0 for i in range(8)]


def test_samples_require_grad_only_when_a_penalty_is_due():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x):
            seen.append(x.requires_grad)
            return self.net(x)

    gan = GANModule(MLP([4, 2]), Spy(), latent_dim=4)
    gan.plan = ("d",)
    fit(gan, points(4), callbacks=[R1Penalty(1.0, every=2)])
    assert seen == [True, False, False, False] * 2  # real and fake, on due and other steps
    seen.clear()
    fit(gan, points(1), callbacks=[R2Penalty(1.0)])
    assert seen == [False, True]


def test_the_forward_pass_is_shared():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    gan = GANModule(MLP([4, 2]), Counting(2, 1), latent_dim=4)
    fit(gan, points(1), callbacks=[R1Penalty(), R2Penalty()])
    assert len(calls) == 3
    calls.clear()
    fit(gan, points(1), callbacks=[GradientPenalty(), DRAGANPenalty()])
    assert len(calls) == 5


def test_r1_against_the_gradient_of_the_whole_loss_by_hand():
    gan = small(loss=LeastSquares(), d_optimizer=sgd(0.1), g_optimizer=sgd(0.1)).double()
    gan.plan = ("d",)
    batch = points(1, dtype=torch.float64)[0]
    parameters = list(gan.discriminator.parameters())
    with gan.noise.of_step():  # the latents of step 0
        fake = gan.generator(gan.noise.randn(8, 4)).detach()
    x = batch.clone().requires_grad_()
    logits = gan.discriminator(x)
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    loss = (
        0.5 * (logits - 1).square().mean()
        + 0.5 * gan.discriminator(fake).square().mean()
        + 0.4 / 2 * g.square().sum(1).mean()
    )
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = [p.detach() - 0.1 * (0 if g is None else g) for p, g in zip(parameters, gradients, strict=True)]
    fit(gan, [batch], callbacks=[R1Penalty(0.4)])
    torch.testing.assert_close(weights(gan.discriminator), torch.cat([p.flatten() for p in expected]))


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")  # on purpose
@pytest.mark.parametrize("penalty", [*PENALTIES, ApproximateR1Penalty, ApproximateR2Penalty])
def test_batch_norm_in_train_mode_is_refused(penalty):
    def gan():
        return GANModule(MLP([4, 2]), nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), 4)

    with pytest.raises(
        Exception, match=rf"{penalty.__name__} needs each sample's own .* `discriminator.1` .*GroupNorm"
    ):
        fit(gan(), points(1), callbacks=[penalty()])
    frozen = gan()
    frozen.discriminator[1].eval()
    fit(frozen, points(1), callbacks=[penalty()])
    mended = gan()
    mended.discriminator[1] = nn.GroupNorm(2, 4)
    fit(mended, points(1), callbacks=[penalty()])


def test_batch_norm_in_the_generator_is_no_matter():
    gan = GANModule(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), MLP([2, 1]), 4)
    fit(gan, points(1), callbacks=[R1Penalty(), GradientPenalty()])


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_interval_is_checked(penalty, value):
    with pytest.raises(ValueError, match="`every` must be a positive integer, got"):
        penalty(every=value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", True])
def test_coefficients_are_checked(value):
    for penalty in (R1Penalty, R2Penalty):
        with pytest.raises(ValueError, match="`gamma` must be a finite number that is not negative, got"):
            penalty(gamma=value)
    for penalty in (GradientPenalty, DRAGANPenalty):
        with pytest.raises(ValueError, match="`weight` must be a finite number that is not negative, got"):
            penalty(weight=value)
        with pytest.raises(ValueError, match="`target` must be a finite number that is not negative, got"):
            penalty(target=value)


def test_names_in_the_log():
    class MyOwnPenalty(Regularizer):
        def penalty(self, module, outputs):
            return outputs.fake_logits

    names = [p().name for p in (*PENALTIES, MyOwnPenalty)]
    assert names == ["r1", "r2", "gradient_penalty", "dragan", "my_own"]


# ---------- schedules


@pytest.mark.parametrize("penalty", [R1Penalty, R2Penalty])
def test_gamma_follows_half_a_cosine(penalty):
    """R3GAN: γ(t) = γ₀ + (1 − ½(1 + cos πt/T)) (γ₁ − γ₀), and constant from T on."""
    scheduled = penalty(gamma=Schedule(2.0, 0.2, 40))
    for t in (0, 1, 10, 20, 39, 40, 41, 1000):
        progress = 1 - 0.5 * (1 + math.cos(math.pi * min(t, 40) / 40))
        assert 2 * scheduled.weight_at(t) == pytest.approx(2.0 + progress * (0.2 - 2.0))
    assert penalty(gamma=2.0).weight_at(123) == 1.0


def test_schedule_acts_in_training():
    gan = linear_gan([3.0, -4.0], d_optimizer=sgd(0.0))
    record = Record()
    run = fit(gan, ZEROS * 5, callbacks=[R1Penalty(Schedule(2.0, 0.0, 4)), record], log_every_n_steps=1)
    expected = [25 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(5)]
    assert record.logged("d/r1") == pytest.approx(expected, abs=1e-12)
    assert run.global_step == 5


class Record(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({key: value.item() for key, value in trainer.callback_metrics.items()})

    def logged(self, name):
        return [row[name] for row in self.rows]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": Schedule(1.0, -0.1, 10)}, "`gamma.end` must be a finite number that is not negative, got -0.1."),
        ({"gamma": Schedule(-0.1, 1.0, 10)}, "`gamma.start` must be a finite number that is not negative, got -0.1."),
        ({"gamma": Schedule(1.0, 1.0, 10, warm_up=2, warm_up_from=-1.0)}, "`gamma.warm_up_from` must be a finite"),
    ],
)
def test_schedules_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        R1Penalty(**kwargs)


# ---------- finite differences


def test_zero_centred_on_interpolates():
    """Thanh-Tung et al.: λ E‖∇D(x̂)‖², one α for each pair."""
    gan = GANModule(nn.Linear(4, 2), MLP([2, 8, 1], nn.Tanh), 4, loss=Wasserstein(), d_optimizer=sgd(0.0)).double()
    gan.plan = ("d",)
    batch = points(1, dtype=torch.float64)[0]
    run = fit(gan, [batch], callbacks=[GradientPenalty(weight=2.0, target=0.0)])
    with first_draws(gan):
        fake, alpha = gan.generator(gan.noise.randn(8, 4)).detach(), gan.noise.rand(8)[:, None]
    x = (alpha * batch + (1 - alpha) * fake).requires_grad_()
    (g,) = torch.autograd.grad(gan.discriminator(x).sum(), x)
    assert run.callback_metrics["d/gradient_penalty"].item() == pytest.approx(2 * g.square().sum(1).mean().item())


@pytest.mark.parametrize(
    ("approximate", "exact"), [(ApproximateR1Penalty, R1Penalty), (ApproximateR2Penalty, R2Penalty)]
)
def test_approximate_penalties_on_a_linear_critic(approximate, exact):
    """In the mean over directions γ = 2 λ σ²; here the direction is known."""
    w, sigma, weight = torch.tensor([3.0, -4.0], dtype=torch.float64), 0.1, 7.0
    gan = linear_gan(w.tolist(), d_optimizer=sgd(0.01))
    fit(gan, ZEROS, callbacks=[approximate(weight, sigma)])
    with first_draws(gan):
        gan.noise.draw = 1  # draw 0 are the latents
        n = gan.noise.randn(6, 2)
    gradient = 2 * weight * sigma**2 * ((n @ w)[:, None] * n).mean(0)
    torch.testing.assert_close(gan.discriminator.weight[0].detach(), w - 0.01 * gradient)
    gans = [linear_gan(w.tolist(), d_optimizer=sgd(0.0)) for _ in range(2)]
    many = [torch.zeros(100_000, 2, dtype=torch.float64)]
    found = fit(gans[0], many, callbacks=[approximate(weight, sigma)]).callback_metrics
    expected = fit(gans[1], many, callbacks=[exact(2 * weight * sigma**2)]).callback_metrics
    name = exact().name
    assert found[f"d/approximate_{name}"].item() == pytest.approx(expected[f"d/{name}"].item(), rel=0.03)


@pytest.mark.parametrize("penalty", [ApproximateR1Penalty, ApproximateR2Penalty])
@pytest.mark.parametrize("kind", ["dropout", "spectral norm", "augmentation"])
def test_approximate_penalties_use_the_same_network_twice(penalty, kind):
    """A direction of length 0 costs nothing, whatever the network draws or moves between two forward passes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Linear(16, 1))
    with torch.no_grad():  # singular values that are nearly the same: power iteration goes on for long
        network[2].weight.copy_(torch.eye(16) + 0.01 * torch.randn(16, 16))
    gan = GANModule(MLP([4, 2]), network, 4)
    if kind == "augmentation":

        class Jitter(nn.Module):
            def forward(self, x):
                return x + gan.noise.randn(*x.shape)

        gan.augment = Jitter()
    callbacks = [SpectralNorm()] if kind == "spectral norm" else []
    run = fit(gan, points(3), callbacks=[penalty(weight=1.0, sigma=1e-30), *callbacks])
    assert run.callback_metrics[f"d/{penalty().name}"] == 0


def test_approximate_penalties_draw_no_more_from_the_global_generator_than_one_forward_pass():
    states = []
    for callbacks in ([], [ApproximateR1Penalty()]):
        torch.manual_seed(0)
        gan = GANModule(MLP([4, 2]), nn.Sequential(nn.Linear(2, 8), nn.Dropout(), nn.Linear(8, 1)), 4)
        gan.plan = ("d",) if callbacks else ("d", "g")  # three forward passes of D either way
        torch.manual_seed(0)
        fit(gan, points(1), callbacks=callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ---------- LeCam


def test_lecam_against_the_authors_recursion():
    gan = small(d_optimizer=sgd(0.05), g_optimizer=sgd(0.05)).double()
    lecam, record, logits = LeCam(weight=0.7, decay=0.9, start=2), Record(), []
    seen = gan.compute_gradients

    def spy(player, batch):
        outputs = seen(player, batch)
        if player == "d":
            logits.append((outputs.real_logits, outputs.fake_logits))
        return outputs

    gan.compute_gradients = spy
    fit(gan, points(6, dtype=torch.float64), callbacks=[lecam, record], log_every_n_steps=1)
    means = None
    for step, (real, fake) in enumerate(logits):
        expected = 0.0
        if step >= 2:
            expected = 0.7 * ((real - means[1]).relu().square() + (means[0] - fake).relu().square()).mean().item()
        assert record.logged("d/le_cam")[step] == pytest.approx(expected, rel=1e-5, abs=1e-9)
        now = torch.stack([real.mean(), fake.mean()])
        # the mean moves after the step; before step `start` it is that of the last batch
        means = now if step < 2 else 0.9 * means + 0.1 * now
    torch.testing.assert_close(lecam.state_dict()["means"].double(), means, rtol=1e-5, atol=1e-6)


def test_lecam_forgets_another_module():
    lecam = LeCam(start=0)
    fit(small(), points(3), callbacks=[lecam])
    other = small(seed=1)
    fresh, used = Record(), Record()
    fit(other, points(3), callbacks=[lecam, used], log_every_n_steps=1)
    fit(small(seed=1), points(3), callbacks=[LeCam(start=0), fresh], log_every_n_steps=1)
    assert used.logged("d/le_cam") == fresh.logged("d/le_cam")


# ---------- consistency


def image_gan(**kwargs):
    torch.manual_seed(0)
    generator = MLP([4, 8, 64], output_shape=[1, 8, 8])
    return GANModule(generator, MLP([64, 8, 1]), 4, d_optimizer=sgd(0.0), g_optimizer=sgd(0.0), **kwargs).double()


IMAGES = [torch.randn(6, 1, 8, 8, dtype=torch.float64)]


def first_draws(gan):
    """The noise of step 0 from the start."""
    gan.iteration = 0
    return gan.noise.of_step()


@pytest.mark.parametrize("kind", ["real", "balanced"])
def test_consistency_of_mirrored_and_moved_images(kind):
    gan = image_gan()
    run = fit(gan, IMAGES, callbacks=[ConsistencyPenalty(kind, weight=3.0)])
    with first_draws(gan):
        fake = gan.generator(gan.noise.randn(6, 4)).detach()
        expected = 0
        for x in (IMAGES[0], fake)[: 1 + (kind == "balanced")]:
            moved = penalties.flip_and_shift(x, gan.noise.rand(6, 3))
            expected = expected + 3 * (gan.discriminator(x) - gan.discriminator(moved)).square().mean()
    assert run.callback_metrics["d/consistency"].item() == pytest.approx(expected.item())


def test_consistency_with_a_transformation_of_your_own():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    gan = linear_gan([3.0, -4.0], d_optimizer=sgd(0.0))
    batch = points(1, dtype=torch.float64)[0]
    run = fit(gan, [batch], callbacks=[ConsistencyPenalty("real", weight=1.0, transform=Double())])
    expected = (batch @ gan.discriminator.weight[0].detach()).square().mean()
    assert run.callback_metrics["d/consistency"].item() == pytest.approx(expected.item())


def test_latent_consistency_of_both_players():
    gan = image_gan()
    entries = [
        ConsistencyPenalty("latent", weight=2.0),
        ConsistencyPenalty("latent", weight=0.3, player="g", radius=0.5),
    ]
    run = fit(gan, IMAGES, callbacks=entries)
    with first_draws(gan):
        z, near = gan.noise.randn(6, 4), gan.noise.randn(6, 4)
        logits = [gan.discriminator(gan.generator(x)) for x in (z, z + 0.05 * near)]
        expected = 2 * (logits[0] - logits[1]).square().mean()
        assert run.callback_metrics["d/consistency"].item() == pytest.approx(expected.item())
        z, near = gan.noise.randn(6, 4), gan.noise.randn(6, 4)
    expected = -0.3 * (gan.generator(z) - gan.generator(z + 0.5 * near)).square().mean()
    assert run.callback_metrics["g/consistency"].item() == pytest.approx(expected.item())


def test_generators_half_of_latent_consistency_moves_the_generator():
    """L_G − λ E(G(z) − G(z + δ))²: without an adversarial loss the generator grows."""
    gan = GANModule(nn.Linear(4, 2, bias=False), nn.Linear(2, 1), 4, loss=Wasserstein(), g_optimizer=sgd(0.1)).double()
    with torch.no_grad():
        gan.discriminator.weight.zero_()
    gan.plan = ("g",)
    before = gan.generator.weight.norm().item()
    fit(gan, points(1, dtype=torch.float64), callbacks=[ConsistencyPenalty("latent", player="g", radius=1.0)])
    assert gan.generator.weight.norm().item() > before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "fake"}, "`kind` must be one of 'real', 'balanced', 'latent', got 'fake'."),
        ({"player": "g"}, "`player` must be 'd', or 'g' with kind='latent', got 'g' and 'real'."),
        ({"player": "x", "kind": "latent"}, "`player` must be 'd', or 'g' with kind='latent', got 'x' and 'latent'."),
        ({"radius": 0.1}, "`radius` has no effect with kind='real': remove it."),
        ({"kind": "latent", "transform": nn.Identity()}, "`transform` has no effect with kind='latent': remove it."),
        ({"kind": "latent", "radius": 0.0}, "`radius` must be a positive finite number, got 0.0."),
    ],
)
def test_consistency_is_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyPenalty(**kwargs)


def test_points_need_a_transformation():
    with pytest.raises(ValueError, match=r"flips and shifts images .* have shape \(8, 2\): give a `transform`"):
        fit(small(), points(1), callbacks=[ConsistencyPenalty()])


# ---------- orthogonality, drift, path length, mode seeking


@pytest.mark.parametrize("player", ["d", "g"])
@pytest.mark.parametrize("normalized", [False, True])
def test_orthogonality_is_over_all_weights_but_embeddings(player, normalized):
    network = nn.Sequential(nn.Linear(2, 6), nn.ConvTranspose1d(3, 2, 2), nn.Embedding(7, 5), nn.LayerNorm(6))

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = network, nn.Linear(2, 1) if player == "d" else nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    networks = (MLP([4, 2]), Only()) if player == "d" else (Only(), MLP([2, 1]))
    gan = GANModule(*networks, 4, d_optimizer=sgd(0.0), g_optimizer=sgd(0.0)).double()
    used = (gan.discriminator if player == "d" else gan.generator).used
    raw = [network[0].weight, network[1].weight.transpose(0, 1), used.weight]
    expected = 0.5 * sum(penalties.orthogonality(w.detach()) for w in raw)
    callbacks = [SpectralNorm("discriminator" if player == "d" else "generator", factor=3.0)] if normalized else []
    run = fit(gan, points(1, dtype=torch.float64), callbacks=[OrthogonalPenalty(0.5, player=player), *callbacks])
    assert run.callback_metrics[f"{player}/orthogonal"].item() == pytest.approx(expected.item())


def test_orthogonal_penalty_makes_filters_orthogonal():
    gan = small(g_optimizer=sgd(0.05), d_optimizer=sgd(0.0))
    weight = gan.generator.layers[2].weight
    before = penalties.orthogonality(weight.detach()).item()
    fit(gan, points(200), callbacks=[OrthogonalPenalty(weight=1.0)])
    assert penalties.orthogonality(weight.detach()).item() < before / 100


def test_logit_drift():
    gan = linear_gan([3.0, -4.0], d_optimizer=sgd(0.1))
    batch = points(1, dtype=torch.float64)[0]
    fake = gan.generator(torch.zeros(8, 4, dtype=torch.float64))
    logits = batch @ torch.tensor([3.0, -4.0], dtype=torch.float64) + gan.discriminator.bias.detach()
    wasserstein = fake.mean(0).detach() - batch.mean(0)
    expected = torch.tensor([3.0, -4.0]) - 0.1 * (wasserstein + 0.4 * 2 * (logits[:, None] * batch).mean(0))
    fit(gan, [batch], callbacks=[LogitDrift(weight=0.4)])
    torch.testing.assert_close(gan.discriminator.weight[0].detach(), expected)


def test_path_length_against_a_linear_generator():
    torch.manual_seed(0)
    gan = GANModule(nn.Linear(4, 2, bias=False), MLP([2, 8, 1]), 4, g_optimizer=sgd(0.0), d_optimizer=sgd(0.0)).double()
    record, penalty = Record(), PathLengthPenalty(weight=3.0, decay=0.8, every=2)
    fit(gan, points(5, dtype=torch.float64), callbacks=[penalty, record], log_every_n_steps=1)
    mean, a = 0.0, gan.generator.weight.detach()
    for step in (0, 2, 4):
        gan.iteration = step
        with gan.noise.of_step():
            gan.noise.draw = 2  # latents of D and of G came first
            lengths = (gan.noise.randn(8, 2) @ a).norm(dim=1)
        expected = 3.0 * (lengths - mean).square().mean().item()
        assert record.logged("g/path_length")[step] == pytest.approx(expected, rel=1e-5)
        mean = 0.8 * mean + 0.2 * lengths.mean().item()
    assert penalty.state_dict()["means"].item() == pytest.approx(mean, rel=1e-5)


def test_path_length_refuses_batch_norm_in_the_generator():
    gan = GANModule(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), MLP([2, 1]), 4)
    with pytest.raises(Exception, match=r"PathLengthPenalty needs each sample's own gradient, .* `generator.1` mixes"):
        fit(gan, points(1), callbacks=[PathLengthPenalty()])


@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_mode_seeking_of_a_scaled_identity(scale):
    """G(z) = a z: the term is 1 / (|a| + 1e-5)."""
    gan = GANModule(nn.Linear(2, 2, bias=False), MLP([2, 8, 1]), 2, g_optimizer=sgd(0.0)).double()
    with torch.no_grad():
        gan.generator.weight.copy_(scale * torch.eye(2))
    run = fit(gan, points(1, dtype=torch.float64), callbacks=[ModeSeeking(weight=0.3)])
    assert run.callback_metrics["g/mode_seeking"].item() == pytest.approx(0.3 / (abs(scale) + 1e-5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ApproximateR1Penalty(sigma=0.0), "`sigma` must be a positive finite number, got 0.0."),
        (lambda: ApproximateR2Penalty(weight=-1), "`weight` must be a finite number that is not negative, got -1."),
        (lambda: LeCam(decay=1.5), r"`decay` must be in \[0, 1\], got 1.5."),
        (lambda: LeCam(start=2.5), "`start` must be an integer that is not negative, got 2.5."),
        (lambda: GradientPenalty(one_sided="false"), "`one_sided` must be True or False, got 'false'."),
        (lambda: OrthogonalPenalty(off_diagonal=None), "`off_diagonal` must be True or False, got None."),
        (
            lambda: ConsistencyPenalty(transform="flip"),
            "`transform` must be a module from samples to samples, or None,",
        ),
        (lambda: LeCam(start=-1), "`start` must be an integer that is not negative, got -1."),
        (lambda: PathLengthPenalty(decay=-0.1), r"`decay` must be in \[0, 1\], got -0.1."),
        (lambda: OrthogonalPenalty(player="x"), "`player` must be one of 'd', 'g', got 'x'."),
        (lambda: LogitDrift(weight=float("nan")), "`weight` must be a finite number that is not negative, got nan."),
        (lambda: ModeSeeking(every=0), "`every` must be a positive integer, got 0."),
    ],
)
def test_other_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [ApproximateR1Penalty, lambda: GradientPenalty(target=0.0), LeCam, LogitDrift])
def test_micro_batches_give_the_penalty_of_the_batch(make):
    found = []
    for accumulate in (1, 3):
        gan = small(accumulate=accumulate, d_optimizer=sgd(0.1), g_optimizer=sgd(0.1)).double()
        fit(gan, points(3, dtype=torch.float64), callbacks=[make()])
        found.append(weights(gan))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


class Norms(nn.Module):
    """The same weights three times: spectral norm new and old, weight norm."""

    def __init__(self):
        super().__init__()
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 4))
        self.old = nn.utils.spectral_norm(nn.Linear(2, 4))
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(2, 4))
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.new(x) + self.old(x) + self.norm(x))


def test_orthogonal_penalty_sees_normalized_layers():
    torch.manual_seed(0)
    module = GANModule(MLP([4, 8, 2]), Norms(), 4, d_optimizer=sgd(0.0), g_optimizer=sgd(0.0))
    d, record = module.discriminator, Record()
    layers = [d.new.parametrizations.weight.original, d.old.weight_orig, d.norm.weight, d.last.weight]
    off = [w @ w.T * (1 - torch.eye(len(w))) for w in layers]
    expected = sum(x.square().sum().item() for x in off)
    fit(module, points(1), callbacks=[OrthogonalPenalty(1.0, player="d"), record], log_every_n_steps=1)
    assert record.logged("d/orthogonal")[0] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_orthogonal_penalty_refuses_what_it_cannot_see():
    module = small()
    module.discriminator = nn.utils.weight_norm(nn.Linear(2, 1))
    with pytest.raises(MisconfigurationException, match=r"cannot see the weight of a Linear layer with torch"):
        fit(module, points(1), callbacks=[OrthogonalPenalty(player="d")])
    module = GANModule(Point(dtype=torch.float32), MLP([1, 8, 1]), 1)
    with pytest.raises(MisconfigurationException, match="the generator has no `weight` of two or more dimensions: rem"):
        fit(module, [torch.zeros(2, 1)], callbacks=[OrthogonalPenalty()])


def test_a_pack_is_perturbed_by_one_share():
    """With packs of two and std(x) = 1, both samples of a pack are moved by the same α."""
    seen = []

    class Packs(GANModule):
        def discriminate(self, network, sample, condition):
            seen.append(sample.detach())
            return super().discriminate(network, sample, condition)

    gan = Packs(MLP([2, 4, 1]), Packed(MLP([2, 4, 1]), 2), 2)
    gan.noise.rand_like = torch.ones_like
    gan.plan = ("d",)
    real = torch.tensor([[-1.0], [1.0]] * 4)
    fit(gan, [real], callbacks=[DRAGANPenalty()])
    alpha = (seen[-1] - real).reshape(4, 2)
    torch.testing.assert_close(alpha[:, 0], alpha[:, 1])
    assert len(alpha[:, 0].unique()) == 4


def test_running_means_in_low_precision_move():
    path = PathLengthPenalty(decay=0.999, every=1)
    path.load_state_dict({"means": torch.tensor(1.0)})
    path.setup = lambda *_, **__: None  # or the state would count as another run's
    fit(small(), points(4, dtype=torch.bfloat16), callbacks=[path], precision="bf16-true")
    assert path.state_dict()["means"].dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "weight", "every"),
    [
        (GradientPenalty, 10.0, 1),
        (DRAGANPenalty, 10.0, 1),
        (ApproximateR1Penalty, 100.0, 1),
        (LeCam, 0.3, 1),
        (PathLengthPenalty, 2.0, 4),
        (OrthogonalPenalty, 1e-4, 1),
    ],
)
def test_none_is_the_default_that_is_documented(make, weight, every):
    assert (make(weight=None, every=None).weight, make(weight=None, every=None).every) == (weight, every)
    assert (make().weight, make().every) == (weight, every)


def test_schedules_and_starts_count_the_players_own_steps():
    asked = []

    class Watched(Regularizer):
        player = "g"

        def weight_at(self, step):
            asked.append(step)
            return super().weight_at(step)

        def penalty(self, module, outputs):
            return outputs.fake.square().mean()

    lecam = LeCam(1.0, start=2)
    shown = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if "d" in module.moved:
                shown.append(module.last_step.values["d/le_cam"].item() > 0)

    fit(small(), points(12), callbacks=[Watched(Schedule(1.0, 0.0, 4)), lecam, UpdateRatio(3), Look()])
    assert asked == [0, 1, 2, 3]
    assert shown == [False] * 2 + [True] * 10


def test_a_regularizer_without_an_init_of_the_base():
    class Mine(Regularizer):
        def __init__(self):
            self.target = 1.0

        def penalty(self, module, outputs):
            return (outputs.real_logits - self.target).square()

    assert fit(small(), points(2), callbacks=[Mine()]).callback_metrics["d/mine"] > 0
