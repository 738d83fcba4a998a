"""Packed discriminators: the same game with packs for samples, with penalties, odd batches and micro-batches."""

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader
from toys import fit, points, sgd, trainer, weights

from lightning_gan_stability import (
    MLP,
    ApproximateR1Penalty,
    ConsensusOptimization,
    DCGANDiscriminator,
    GANModule,
    GradientPenalty,
    Hinge,
    LeCam,
    Packed,
    R1Penalty,
    R2Penalty,
    Relativistic,
    SpectralNorm,
    Unrolling,
)
from lightning_gan_stability.layers import matrices
from lightning_gan_stability.nets import Packed as FromNets


def packed(m=2, accumulate=1, loss=None, patches=1):
    torch.manual_seed(0)
    discriminator = Packed(MLP([2 * m, 16, patches], nn.Tanh), m)
    options = {"d_optimizer": sgd(0.1), "g_optimizer": sgd(0.1), "accumulate": accumulate}
    return GANModule(MLP([4, 16, 2], nn.Tanh), discriminator, 4, loss, **options).double()


def data(n, batch_size):
    return points(n, batch_size, dtype=torch.float64)


def test_it_is_in_nets():
    assert FromNets is Packed


@pytest.mark.parametrize("m", [1, 2, 3])
def test_points_are_joined_in_order(m):
    x = torch.arange(24.0).reshape(12, 2)
    joined = Packed(nn.Identity(), m)(x)
    assert joined.shape == (12 // m, 2 * m)
    assert joined[0].tolist() == list(range(2 * m))


def test_images_are_joined_along_channels():
    x = torch.randn(6, 3, 8, 8)
    joined = Packed(nn.Identity(), 2)(x)
    assert joined.shape == (3, 6, 8, 8)
    assert torch.equal(joined[1, :3], x[2])
    assert torch.equal(joined[1, 3:], x[3])
    assert Packed(DCGANDiscriminator(6, 8, 4), 2)(x).shape == (3,)


@pytest.mark.parametrize(("n", "m"), [(8, 2), (9, 2), (11, 4), (7, 3)])
@pytest.mark.parametrize("loss", [None, Relativistic(), Hinge()])
def test_a_step_is_that_of_a_plain_gan_whose_samples_are_packs(n, m, loss):
    gan = packed(m, loss=loss)
    gan.plan = ("d",)
    (batch,) = data(1, n)
    parameters = list(gan.discriminator.parameters())
    k = n - n % m
    gan._now.in_step = True
    fake = gan.generator(gan.randn(k, 4)).detach()
    gan._now.in_step = False
    l_r = gan.discriminator.discriminator(batch[:k].reshape(k // m, -1)).squeeze(1)
    l_f = gan.discriminator.discriminator(fake.reshape(k // m, -1)).squeeze(1)
    gradients = torch.autograd.grad(gan.loss.discriminator(l_r, l_f).mean(), parameters, allow_unused=True)
    expected = torch.cat(
        [(p if g is None else p - 0.1 * g).detach().flatten() for p, g in zip(parameters, gradients, strict=True)]
    )
    run = fit(gan, [batch])
    torch.testing.assert_close(weights(gan.discriminator), expected)
    assert run.callback_metrics["d/accuracy"] <= 1


@pytest.mark.parametrize("m", [2, 3])
def test_penalties_are_of_packs(m):
    """R1 is the squared norm over all values of a pack, WGAN-GP has one α for it."""
    n = 12
    gan = packed(m)
    gan.plan = ("d",)
    (batch,) = data(1, n)
    inner = gan.discriminator.discriminator
    gan._now.in_step = True
    fake = gan.generator(gan.randn(n, 4)).detach().reshape(n // m, -1)
    alpha = gan.rand(n)[::m, None]
    gan._now.in_step, gan._now.draw = False, 0

    def squares(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(inner(x).sum(), x)[0].square().sum(1)

    real = batch.reshape(n // m, -1)
    between = squares(alpha * real + (1 - alpha) * fake)
    expected = squares(real).mean(), squares(fake).mean(), (between.sqrt() - 1).square().mean()
    run = fit(gan, [batch], callbacks=[R1Penalty(2.0), R2Penalty(2.0), GradientPenalty(1.0)])
    names = ("d/r1", "d/r2", "d/gradient_penalty")
    found = [run.callback_metrics[name].item() for name in names]
    assert found == pytest.approx([value.item() for value in expected], rel=1e-6)


@pytest.mark.parametrize("n", [12, 13, 9, 7])
@pytest.mark.parametrize("accumulate", [2, 3, 5])
@pytest.mark.parametrize(
    "callbacks", [[], [R1Penalty(0.5), GradientPenalty(0.3), ApproximateR1Penalty(), LeCam(start=0)]]
)
def test_micro_batches_of_whole_packs_give_the_gradient_of_the_batch(n, accumulate, callbacks):
    found = []
    for k in (1, accumulate):
        gan = packed(m=2, accumulate=k)
        fit(gan, data(3, n), callbacks=callbacks)
        found.append(weights(gan))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_a_pack_is_refused_in_training(accumulate):
    expected = r"judges 4 samples together, but the batch has 3: use a larger batch size, and drop_last=True"
    with pytest.raises(ValueError, match=expected):
        fit(packed(4, accumulate), data(1, 3))


def test_the_rest_of_a_validation_set_is_left_out():
    gan = packed(m=4)
    run = trainer()
    held_out = DataLoader(torch.cat(data(1, 10)), batch_size=7)  # 7, of which 4 fill a pack, and 3
    run.fit(gan, DataLoader(data(2, 8), batch_size=None), held_out)
    assert run.callback_metrics["val/d/adversarial"].isfinite()


@pytest.mark.parametrize("patches", [1, 3])
def test_with_other_rules_and_callbacks(patches):
    for rule in (Unrolling(2), ConsensusOptimization(0.1)):
        gan = packed(3, patches=patches)
        fit(gan, data(3, 10), callbacks=[rule, SpectralNorm(), R1Penalty(0.1), R2Penalty(0.1)])
        assert weights(gan).isfinite().all()


def test_labelled_data_train_a_discriminator_without_labels():
    batches = [(x, torch.arange(len(x)) % 3) for x in data(2, 9)]
    fit(packed(2), batches)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
def test_compiled():
    gan = packed(2)
    gan.discriminator = torch.compile(gan.discriminator, backend="eager")
    fit(gan, data(1, 9), callbacks=[R1Penalty(0.1)])
    torch._dynamo.reset()


def test_the_loss_of_a_pack_of_copies():
    """Samples of one mode look alike: a discriminator that compares them sees it, one sample at a time cannot."""
    discriminator = Packed(nn.Linear(4, 1), 2)
    with torch.no_grad():
        discriminator.discriminator.weight.copy_(torch.tensor([[1.0, 0, -1, 0]]))
        discriminator.discriminator.bias.zero_()
    assert softplus(discriminator(torch.ones(4, 2))).unique().numel() == 1
    assert not discriminator(torch.ones(4, 2)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Identity(), 0), "`m` must be a positive integer, got 0."),
        ((nn.Identity(), 2.0), "`m` must be a positive integer, got 2.0."),
        ((nn.Identity(), True), "`m` must be a positive integer, got True."),
        (("net", 2), "`discriminator` must be a module, got 'net'."),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Packed(*arguments)


def test_a_discriminator_for_single_samples_is_explained():
    gan = GANModule(MLP([4, 2]), Packed(MLP([2, 1]), 2), 4)
    with pytest.raises(ValueError, match=r"The discriminator failed on an input of shape \(8, 2\)"):
        fit(gan, points(1))


def test_matrices_of_groups_are_those_of_the_same_linear_map():
    """A transposed convolution of 1×1 filters is the convolution with the same products."""
    torch.manual_seed(0)
    back, forth = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False), nn.Conv2d(4, 6, 1, groups=2, bias=False)
    with torch.no_grad():
        for g in range(2):
            forth.weight[3 * g : 3 * g + 3] = back.weight[2 * g : 2 * g + 2].transpose(0, 1)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(back(x), forth(x))
    assert torch.equal(matrices(back)[0], matrices(forth)[0])


def test_a_shared_matrix_counts_once():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    assert len(matrices(nn.Sequential(a, b, nn.Linear(3, 2)))) == 2
