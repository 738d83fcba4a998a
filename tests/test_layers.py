"""Packed discriminators, which play the same game with packs for samples; copies of networks and their types."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader
from toys import fit, ignoring, points, sgd, trainer, weights

from lightning_gan_stability import (
    MLP,
    ApproximateR1Penalty,
    ConsensusOptimization,
    DCGANDiscriminator,
    GANModule,
    GradientPenalty,
    Hinge,
    LeCam,
    MinibatchStdDev,
    Packed,
    R1Penalty,
    R2Penalty,
    Relativistic,
    SpectralNorm,
    Unrolling,
)
from lightning_gan_stability.layers import copy_network, matrices, parameter_dtype
from lightning_gan_stability.nets import MinibatchStdDev as DeviationsFromNets
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
    assert DeviationsFromNets is MinibatchStdDev


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
    with gan.noise.of_step():  # the latents of step 0
        fake = gan.generator(gan.noise.randn(k, 4)).detach()
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
    with gan.noise.of_step():
        fake = gan.generator(gan.noise.randn(n, 4)).detach().reshape(n // m, -1)
        alpha = gan.noise.rand(n)[::m, None]

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
        (("net", 2), "`discriminator` must be of type Module, got 'net'."),
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


# ---------- copies


class Caching(nn.Module):
    """Keeps what it has computed, with its graph, wherever one can keep it."""

    def __init__(self):
        super().__init__()
        self.layer, self.plain = nn.Linear(2, 2), torch.ones(2)
        self.register_buffer("buffer", torch.zeros(2), persistent=False)
        self.last, self.items, self.named, self.nested = None, [], {}, ()

    def forward(self, x):
        y = self.layer(x)
        self.last, self.items, self.named = y, [y, 2 * y], {"y": y}
        self.nested = ({"deep": [self.layer.weight * 3]}, "text")
        return y


def test_a_copy_of_a_network_that_keeps_tensors_with_their_graph():
    network = Caching()
    x = torch.randn(3, 2)
    y = network(x)
    copied = copy_network(network)
    kept = [copied.last, *copied.items, copied.named["y"], copied.nested[0]["deep"][0]]
    for tensor, original in zip(kept, [y, y, 2 * y, y, 3 * network.layer.weight], strict=True):
        assert torch.equal(tensor, original)
        assert not tensor.requires_grad
        assert tensor.is_leaf
    assert copied.nested[1] == "text"
    # one tensor in several places is one in the copy, too, and none is shared with the original
    assert copied.last is copied.items[0] is copied.named["y"]
    pointers = {t.data_ptr() for t in [network.last, *network.items, network.plain, *network.parameters()]}
    assert not pointers & {t.data_ptr() for t in [*kept, copied.plain, *copied.parameters(), *copied.buffers()]}
    # and the original has its graph
    network.last.sum().backward()
    assert network.layer.weight.grad is not None


def test_a_copy_is_a_network_of_its_own():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False)).eval()
    copied = copy_network(network)
    assert torch.equal(weights(copied), weights(network))
    assert not any(p.requires_grad for p in copied.parameters())
    assert [p.requires_grad for p in network.parameters()] == [True] * 4 + [False] * 2
    assert [m.training for m in copied.modules()] == [m.training for m in network.modules()]
    before = weights(copied).clone()
    with torch.no_grad():
        network[0].weight.add_(1)
    network.train()(torch.randn(4, 2))
    assert torch.equal(weights(copied), before)
    assert torch.equal(copied[1].running_mean, torch.zeros(2))


def test_a_copy_ties_what_is_tied():
    network = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    network[1].weight = network[0].weight
    copied = copy_network(network)
    assert copied[1].weight is copied[0].weight
    assert copied[1].weight is not network[1].weight


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda norm: norm.__name__)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(3, 4), lambda: nn.Conv1d(2, 4, 2)], ids=["Linear", "Conv1d"])
def test_a_copy_with_an_older_normalization(layer, norm):
    torch.manual_seed(0)
    with ignoring():
        network = nn.Sequential(norm(layer()))
    x = torch.randn(2, 3) if isinstance(network[0], nn.Linear) else torch.randn(2, 2, 3)
    for _ in range(2):  # before the first forward pass and after it
        network.eval()
        copied = copy_network(network)
        assert torch.equal(copied(x), network(x))
        assert copied.state_dict().keys() == network.state_dict().keys()
        network.train()(x)
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    # the copy computes from its own weights
    before = copied(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2).add_(1)
    assert torch.equal(copied(x), before)
    copied.load_state_dict(network.state_dict())
    network.eval()
    assert torch.equal(copied(x), network(x))


def test_copies_of_other_tensors_are_as_ever():
    """The mode that copies tensors with a graph is over afterwards: elsewhere torch refuses them."""
    copy_network(nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(torch.ones(1, requires_grad=True) * 2)


# ---------- the type that a network computes in


def parts(*layers):
    """A network of layers with (type, whether they train)."""
    network = nn.Module()
    for i, (dtype, trains) in enumerate(layers):
        network.register_parameter(f"p{i}", nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=trains))
    return network


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], torch.float64),
        ([(torch.float32, True)], torch.float32),
        ([(torch.float16, False), (torch.float32, True)], torch.float32),
        ([(torch.float32, True), (torch.float16, False)], torch.float32),
        ([(torch.complex64, True), (torch.bfloat16, True)], torch.bfloat16),
        ([(torch.complex64, True), (torch.float16, False), (torch.float32, True)], torch.float32),
        ([(torch.bfloat16, False), (torch.float32, False)], torch.float32),
        ([(torch.complex64, False), (torch.bfloat16, False)], torch.bfloat16),
        ([(torch.complex64, True)], torch.float64),
        ([(torch.int8, False)], torch.float64),
        ([(torch.int8, False), (torch.float16, True)], torch.float16),
    ],
)
def test_the_type_is_that_of_the_first_real_parameter_that_trains_or_the_widest(layers, expected):
    assert parameter_dtype(parts(*layers), torch.float64) is expected


def test_latents_have_the_type_of_what_trains():
    frozen = nn.Linear(4, 4).half().requires_grad_(False)
    generator = nn.ModuleDict({"frozen": frozen, "head": nn.Linear(4, 2)})
    assert GANModule(generator, MLP([2, 1]), 4).draw_latents(3).dtype is torch.float32


# ---------- deviations over the batch


def deviations(x, group, channels):
    """By loops: σ of sample i and those i + N / G, ... after it, for each share of the channels."""
    n, c = x.shape[:2]
    share, found = c // channels, np.zeros((n, channels))
    for i in range(n):
        members = [j for j in range(n) if j % (n // group) == i % (n // group)]
        for k in range(channels):
            part = x[members, k * share : (k + 1) * share]
            found[i, k] = np.sqrt(((part - part.mean(0)) ** 2).mean(0) + 1e-8).mean()
    return found


def test_minibatch_deviations_are_those_of_strided_groups():
    """Of eight in groups of four: 0, 2, 4, 6 and 1, 3, 5, 7. The first differ, by ±1; the others are equal."""
    x = torch.zeros(8, 3, 2, 2, dtype=torch.float64)
    x[[0, 4]], x[[2, 6]] = 1.0, -1.0
    found = MinibatchStdDev(group_size=4)(x)
    assert found.shape == (8, 4, 2, 2)
    assert torch.equal(found[:, :3], x)
    expected = torch.tensor([(1 + 1e-8) ** 0.5, 1e-4] * 4, dtype=torch.float64)
    torch.testing.assert_close(found[:, 3], expected[:, None, None].expand(8, 2, 2), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "group", "channels"), [(8, 4, 1), (12, 4, 2), (3, 4, 1), (6, 2, 3), (4, 1, 1)])
def test_minibatch_deviations_equal_numpy(n, group, channels):
    x = torch.randn(n, 6, 5, 4, dtype=torch.float64)
    found = MinibatchStdDev(group, channels)(x)[:, 6:]
    expected = deviations(x.numpy(), min(group, n), channels)
    np.testing.assert_allclose(found.numpy(), np.broadcast_to(expected[..., None, None], found.shape), rtol=1e-12)


def test_a_constant_batch_deviates_by_the_root_of_epsilon():
    found = MinibatchStdDev()(torch.full((8, 16, 4, 4), 3.0, dtype=torch.float64))
    torch.testing.assert_close(found[:, 16], torch.full((8, 4, 4), 1e-4, dtype=torch.float64), rtol=1e-12, atol=0)


def test_minibatch_deviations_are_twice_differentiable():
    x = torch.randn(4, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: MinibatchStdDev(2)(x).square(), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_deviations_in_half_precision(dtype, scale):
    """Squares of 300 are no numbers of float16, and ε is none."""
    x = (scale * torch.randn(8, 6, 3, 3)).to(dtype)
    found = MinibatchStdDev(4)(x)
    assert found.dtype == dtype
    expected = deviations(x.double().numpy(), 4, 1)
    np.testing.assert_allclose(found[:, 6:, 0, 0].double().numpy(), expected, rtol=0.01)


@pytest.mark.parametrize(("n", "group"), [(6, 3), (9, 3), (7, 1), (10, 2)])
def test_an_incomplete_batch_is_refused_in_training_and_judged_in_smaller_groups_in_validation(n, group):
    layer, x = MinibatchStdDev(4), torch.randn(n, 2, 3, 3, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=rf"^MinibatchStdDev has groups of 4 samples, .* a batch of {n}: .*drop_last=True"
    ):
        layer(x)
    expected = deviations(x.numpy(), group, 1)
    np.testing.assert_allclose(layer.eval()(x)[:, 2:, 0, 0].numpy(), expected, rtol=1e-12)


def test_a_fit_says_what_an_incomplete_batch_needs():
    def judge():
        return nn.Sequential(nn.Unflatten(1, (2, 1, 1)), MinibatchStdDev(4), nn.Flatten(), nn.Linear(3, 1))

    with pytest.raises(ValueError, match=r"MinibatchStdDev has groups of 4 samples, .*drop_last=True in the loader"):
        fit(GANModule(MLP([4, 2]), judge(), 4), points(1, 6))
    run = trainer(num_sanity_val_steps=0)
    run.fit(GANModule(MLP([4, 2]), judge(), 4), DataLoader(points(1, 8), None), DataLoader(points(1, 6), None))
    assert run.callback_metrics["val/d/adversarial"] > 0


@pytest.mark.parametrize("value", [0, 2.0, True, "4"])
@pytest.mark.parametrize("name", ["group_size", "channels"])
def test_minibatch_deviations_refuse_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be a positive integer, got {value!r}.$"):
        MinibatchStdDev(**{name: value})
    with pytest.raises(ValueError, match=r"^`channels` of MinibatchStdDev must divide the 5 of its input, got 2.$"):
        MinibatchStdDev(channels=2)(torch.randn(4, 5, 2, 2))
