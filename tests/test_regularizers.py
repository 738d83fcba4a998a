"""Penalties as callbacks: their weight in the loss, their interval, and what they refuse."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from toys import fit, points, sgd, small, weights

from lightning_gan_stability import (
    MLP,
    DRAGANPenalty,
    GANModule,
    GradientPenalty,
    LeastSquares,
    R1Penalty,
    R2Penalty,
    Regularizer,
    Wasserstein,
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
    gan._now.in_step = True  # the latents of step 0
    fake = gan.generator(gan.randn(8, 4)).detach()
    gan._now.in_step = False
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
@pytest.mark.parametrize("penalty", PENALTIES)
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
        def penalty(self, module, play):
            return play.fake_logits

    names = [p().name for p in (*PENALTIES, MyOwnPenalty)]
    assert names == ["r1", "r2", "gradient_penalty", "dragan", "my_own"]
