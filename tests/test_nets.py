"""The networks against shapes, hand counts, matrix algebra and numerical derivatives."""

import copy
import inspect
import io
import itertools
import math
import pickle

import jsonargparse
import numpy as np
import pytest
import torch
from scipy.signal import upfirdn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gan_stability.nets import (
    MLP,
    AutoEncoder,
    DCGANDiscriminator,
    DCGANGenerator,
    R3GANDiscriminator,
    R3GANGenerator,
    ResidualBlock,
    ResNetDiscriminator,
    ResNetGenerator,
    StyleGenerator,
)

torch.set_num_threads(1)

SIZES = (8, 16, 32, 64, 128, 256)
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(kind: type[nn.Module], num_classes: int | None = None, **options: object) -> nn.Module:
    """Return a network for 2-channel 8x8 images and 5 latents."""
    if kind is MLP:
        return MLP([5, 6, 1], activation=nn.Tanh, num_classes=num_classes)
    options = {"channels": 2, "size": 8, "width": 4, **options}
    if kind in R3GAN:
        size, width = options.pop("size"), options.pop("width")
        options |= {"widths": [2 * width, *[width] * (size // 8).bit_length()], "blocks": 1, "groups": 2}
    if kind is AutoEncoder:
        return AutoEncoder(code_dim=5, **options)
    latent_dim = {"latent_dim": 5} if issubclass(kind, GENERATORS) else {}
    return kind(num_classes=num_classes, **latent_dim, **options)


def inputs(kind: type[nn.Module], size: int = 8) -> Tensor:
    return torch.randn(3, 5) if kind is MLP or issubclass(kind, GENERATORS) else torch.randn(3, 2, size, size)


R3GAN = (R3GANGenerator, R3GANDiscriminator)
GENERATORS = (DCGANGenerator, ResNetGenerator, R3GANGenerator)
DISCRIMINATORS = (DCGANDiscriminator, ResNetDiscriminator, R3GANDiscriminator)
CONDITIONAL = (MLP, *GENERATORS, *DISCRIMINATORS)
EVERY = (*CONDITIONAL, AutoEncoder)


# Shapes and ranges


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("kind", [*GENERATORS, *DISCRIMINATORS])
def test_shapes_for_every_size_with_and_without_classes(kind, num_classes, size):
    network = small(kind, num_classes, size=size, width=2)
    output = network(inputs(kind, size), LABELS)
    assert output.shape == ((3, 2, size, size) if kind in GENERATORS else (3,))
    assert output.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_auto_encoder_reconstructs_the_shape(size):
    network = small(AutoEncoder, size=size, width=2)
    assert network(inputs(AutoEncoder, size)).shape == (3, 2, size, size)
    assert network.encoder(inputs(AutoEncoder, size)).shape == (3, 5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_dcgan_generator_is_in_the_range_of_tanh(batch_norm):
    images = small(DCGANGenerator, batch_norm=batch_norm)(1e4 * torch.randn(64, 5))
    assert images.abs().max() <= 1
    assert images.min() < -0.2
    assert images.max() > 0.2


def test_resnet_generator_has_no_tanh():
    assert small(ResNetGenerator)(100 * torch.randn(3, 5)).abs().max() > 10


@pytest.mark.parametrize("kind", EVERY)
def test_the_signature_tells_whether_labels_are_taken(kind):
    parameters = list(inspect.signature(small(kind).forward).parameters.values())
    assert len(parameters) == (1 if kind is AutoEncoder else 2)
    assert all(parameter.default is None for parameter in parameters[1:])


# Architecture


def parameters_of(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_dcgan_64_has_the_parameters_of_the_paper():
    # Counted by hand: 4x4 kernels, no biases, two numbers per channel of batch normalization.
    generator = 100 * 512 * 16 + 512 * 256 * 16 + 256 * 128 * 16 + 128 * 64 * 16 + 64 * 3 * 16
    generator += 2 * (512 + 256 + 128 + 64)
    discriminator = 3 * 64 * 16 + 64 * 128 * 16 + 128 * 256 * 16 + 256 * 512 * 16 + 512 * 16
    discriminator += 2 * (128 + 256 + 512)
    assert (generator, discriminator) == (3_576_704, 2_765_568)  # as those of PyTorch's DCGAN example
    assert parameters_of(DCGANGenerator(latent_dim=100)) == generator
    assert parameters_of(DCGANDiscriminator(batch_norm=True)) == discriminator
    biases = 64 + 128 + 256 + 512 + 1
    assert parameters_of(DCGANDiscriminator()) == discriminator - 2 * (128 + 256 + 512) + biases


def test_dcgan_starts_as_in_the_paper():
    for network in (DCGANGenerator(size=32), DCGANDiscriminator(size=32, batch_norm=True)):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert module.weight.mean().abs() < 0.001
            elif isinstance(module, nn.BatchNorm2d):
                assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("width", [8, 32])
def test_dcgan_without_batch_norm_keeps_the_signal_alive(width):
    options = {"size": 64, "width": width, "batch_norm": False}
    images = DCGANGenerator(**options)(torch.randn(16, 128))
    logits = DCGANDiscriminator(**options)(torch.randn(16, 3, 64, 64))
    assert 0.2 < images.std() < 1
    assert 0.1 < logits.std() < 2


def test_channels_double_towards_4x4_and_stop_at_8_widths_in_the_resnets():
    widths = [m.in_channels for m in DCGANGenerator(size=128, width=1).modules() if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [128, 16, 8, 4, 2, 1]
    blocks = [m.layers[0].in_channels for m in ResNetDiscriminator(size=128, width=1).layers if hasattr(m, "layers")]
    assert blocks == [1, 2, 4, 8, 8, 8]


@pytest.mark.parametrize("kind", [*DISCRIMINATORS, AutoEncoder, ResNetGenerator])
def test_no_normalization_by_default(kind):
    assert not any("norm" in type(module).__name__.lower() for module in small(kind).modules())


@pytest.mark.parametrize("kind", [*DISCRIMINATORS, AutoEncoder])
def test_samples_do_not_see_each_other(kind):
    network, samples = small(kind).double(), inputs(kind).double()
    torch.testing.assert_close(network(samples)[1:2], network(samples[1:2]), rtol=1e-12, atol=1e-12)


def test_dcgan_discriminator_normalizes_all_but_the_first_layer_when_asked():
    kinds = [type(module) for module in DCGANDiscriminator(size=16, width=2, batch_norm=True).layers]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, nn.Flatten]


@pytest.mark.parametrize("kind", [ResNetGenerator, ResNetDiscriminator])
def test_residual_blocks_start_as_the_identity_and_can_learn(kind):
    network = small(kind, size=16)
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 3  # at 4x4, 8x8, 16x16
    for block in blocks:
        x = torch.randn(2, block.layers[0].in_channels, 4, 4)
        assert torch.equal(block(x), x)
    network(torch.randn(3, 5) if kind is ResNetGenerator else torch.randn(3, 2, 16, 16)).sum().backward()
    assert all(block.layers[-1].weight.grad.abs().sum() > 0 for block in blocks)


def test_residual_block_equals_its_formula_and_its_fixup_scale():
    block = ResidualBlock(64, depth=16)
    assert block.layers[2].weight.std().item() == pytest.approx(math.sqrt(2 / 1.04 / (64 * 9)) / 2, rel=0.02)
    nn.init.normal_(block.layers[-1].weight)
    x = torch.randn(2, 64, 5, 5)
    w1, b1, w2, b2, w3 = block.parameters()
    hidden = F.leaky_relu(F.conv2d(x, w1, b1), 0.2)
    hidden = F.leaky_relu(F.conv2d(hidden, w2, b2, padding=1), 0.2)
    torch.testing.assert_close(block(x), x + F.conv2d(hidden, w3))


def test_resnets_resample_bilinearly():
    x = torch.randn(2, 3, 8, 8)
    (up,) = (m for m in small(ResNetGenerator).modules() if isinstance(m, nn.Upsample))
    (down,) = (m for m in small(ResNetDiscriminator).modules() if isinstance(m, nn.AvgPool2d))
    torch.testing.assert_close(up(x), F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
    torch.testing.assert_close(down(x), F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False))


# R3GAN


def blocks_of(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, ResidualBlock)]


def resampling(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.layers if hasattr(module, "kernel")]


def test_r3gan_of_cifar10_has_as_many_parameters_as_by_hand():
    # 768 channels, 1536 inside of a block, in groups of 16; a bias for each of its two activations
    block = 768 * 1536 + 1536 + 1536 * 16 * 9 + 1536 + 1536 * 768
    generator, discriminator = R3GANGenerator(), R3GANDiscriminator()
    assert {b.layers[2].groups for b in blocks_of(generator) + blocks_of(discriminator)} == {96}
    assert parameters_of(generator) == 8 * block + 64 * 768 + 768 * 16 + 768 * 3 == 20_732_160
    assert parameters_of(discriminator) == 8 * block + 3 * 768 + 768 * 16 + 768 == 20_683_776
    assert generator(torch.randn(1, 64)).shape == (1, 3, 32, 32)


def test_r3gan_of_other_widths_and_classes_has_as_many_parameters_as_by_hand():
    def blocks(width, group):
        return width * 3 * width * 2 + 3 * width * 2 + 3 * width * group * 9

    options = {"widths": [24, 24, 12], "blocks": [1, 3, 2], "groups": [8, 8, 4], "expansion": 3, "num_classes": 5}
    both = blocks(24, 9) + 3 * blocks(24, 9) + 2 * blocks(12, 9) + 24 * 12
    generator = R3GANGenerator(7, 2, embedding_dim=6, **options)
    assert parameters_of(generator) == both + 13 * 24 + 24 * 16 + 12 * 2 + 5 * 6
    discriminator = R3GANDiscriminator(2, embedding_dim=11, **options)
    assert parameters_of(discriminator) == both + 2 * 12 + 24 * 16 + 24 * 11 + 5 * 11
    assert R3GANDiscriminator(2, **options).embedding.embedding_dim == 24
    outer = [m for m in generator.layers if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in outer] == [(24, 12), (12, 2)]  # none where widths are equal


@pytest.mark.parametrize("kind", R3GAN)
def test_r3gan_starts_as_published(kind):
    """Standard deviations g / √fan-in of every weight, zeros behind every block and in every bias."""
    network = kind(widths=[64, 64, 32], blocks=[2, 1, 1], groups=[8, 8, 4], num_classes=100)
    gain = math.sqrt(2 / 1.04) * 4**-0.25
    for block in blocks_of(network):
        first, _, second, _, last = block.layers
        width = first.in_channels
        assert first.weight.std().item() == pytest.approx(gain / math.sqrt(width), rel=0.05)
        assert second.weight.std().item() == pytest.approx(gain / math.sqrt(2 * width / second.groups * 9), rel=0.05)
        assert not last.weight.any()
        assert last.bias is None
        assert not first.bias.any()
        assert not second.bias.any()
    outer = [module for module in network.layers if isinstance(module, nn.Conv2d)]
    if kind is R3GANGenerator:
        basis = network.layers[0]
        assert basis.maps.std().item() == pytest.approx(1, rel=0.1)
        assert basis.linear.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)  # latents and embedding
        assert network.embedding.weight.std().item() == pytest.approx(100**-0.5, rel=0.05)
        found = [module.weight.std().item() for module in outer]
        assert found == pytest.approx([64**-0.5, 32**-0.5], rel=0.2)
    else:
        found = [module.weight.std().item() for module in outer]
        assert found == pytest.approx([3**-0.5, 32**-0.5, 16**-0.5], rel=0.2)
        assert network.linear.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert network.embedding.weight.std().item() == pytest.approx((64 * 100) ** -0.5, rel=0.05)
    assert all(module.bias is None for module in [*outer, *(m for m in network.modules() if type(m) is nn.Linear)])


@pytest.mark.parametrize("kind", R3GAN)
def test_r3gan_blocks_start_as_the_identity_and_can_learn(kind):
    network = small(kind)
    for block in blocks_of(network):
        x = torch.randn(2, block.layers[0].in_channels, 4, 4)
        assert torch.equal(block(x), x)
    network(inputs(kind)).sum().backward()
    assert all(block.layers[-1].weight.grad.abs().sum() > 0 for block in blocks_of(network))


def test_groups_are_dense_convolutions_of_each_part():
    block = ResidualBlock(6, depth=1, expansion=2, groups=3).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    w1, b1, w2, b2, w3 = block.parameters()
    assert w2.shape == (12, 4, 3, 3)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    hidden = F.leaky_relu(F.conv2d(x, w1, b1), 0.2)
    parts = zip(hidden.split(4, 1), w2.split(4), strict=True)
    hidden = torch.cat([F.conv2d(part, w, padding=1) for part, w in parts], 1) + b2[:, None, None]
    torch.testing.assert_close(block(x), x + F.conv2d(F.leaky_relu(hidden, 0.2), w3), rtol=1e-12, atol=1e-12)


def test_r3gan_resamples_by_its_filter():
    """Against scipy: zeros between pixels and around the image, [1, 3, 3, 1] along each axis, every second value."""
    x, taps = torch.randn(2, 3, 6, 8, dtype=torch.float64), np.array([1.0, 3.0, 3.0, 1.0])
    (up,), (down,) = resampling(small(R3GANGenerator).double()), resampling(small(R3GANDiscriminator).double())
    larger = smaller = x.numpy()
    for axis, size in ((2, 6), (3, 8)):
        larger = upfirdn(taps / 4, larger, up=2, axis=axis).take(range(1, 1 + 2 * size), axis)
        smaller = upfirdn(taps / 8, smaller, axis=axis).take(range(2, 2 + size, 2), axis)
    np.testing.assert_allclose(up(x).numpy(), larger, atol=1e-14)
    np.testing.assert_allclose(down(x).numpy(), smaller, atol=1e-14)
    assert torch.equal(up(torch.ones(1, 1, 4, 4).double())[0, 0, 1:-1, 1:-1], torch.ones(6, 6).double())


def test_r3gan_generator_begins_with_maps_times_a_linear_function_of_latents_and_class():
    network = R3GANGenerator(5, 2, [8], 1, 1, num_classes=3, embedding_dim=4).double()
    z, y = torch.randn(3, 5, dtype=torch.float64), torch.tensor([2, 0, 2])
    maps, linear = network.layers[0].parameters()
    scales = z @ linear[:, :5].T + network.embedding.weight[y] @ linear[:, 5:].T
    images = torch.einsum("oc,nc,chw->nohw", network.layers[-1].weight[..., 0, 0], scales, maps)
    torch.testing.assert_close(network(z, y), images, rtol=1e-12, atol=1e-12)  # the blocks are the identity


def test_r3gan_discriminator_ends_with_an_inner_product_with_the_class():
    network, images = small(R3GANDiscriminator, 3).double(), inputs(R3GANDiscriminator).double()
    features = network.layers(images)
    assert features.shape == (3, 8)
    vectors = features @ network.linear.weight.T
    expected = (vectors * network.embedding.weight[LABELS]).sum(1)
    torch.testing.assert_close(network(images, LABELS), expected, rtol=1e-12, atol=1e-12)
    plain = small(R3GANDiscriminator).double()
    torch.testing.assert_close(plain(images), plain.layers(images) @ plain.linear.weight[0])


@pytest.mark.parametrize("kind", R3GAN)
def test_widths_that_sixteen_does_not_divide_have_the_groups_that_fit(kind):
    blocks = blocks_of(kind(widths=[24, 50, 10], blocks=1))
    assert sorted(block.layers[2].groups for block in blocks) == [1, 3, 5]  # of 20, 48 and 100 channels


@pytest.mark.parametrize("kind", R3GAN)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": []}, r"`widths` must be one or more positive integers, 4x4 first, got \[\]."),
        ({"widths": [8, 0]}, r"`widths` must be one or more positive integers, 4x4 first, got \[8, 0\]."),
        ({"widths": 8}, "`widths` must be one or more positive integers, 4x4 first, got 8."),
        ({"blocks": [1]}, r"`blocks` must be a positive integer, or 2 of them, one for each of `widths`, got \[1\]."),
        ({"blocks": 0}, "`blocks` must be a positive integer, or 2 of them, one for each of `widths`, got 0."),
        ({"blocks": 1.0}, "`blocks` must be a positive integer, or 2 of them, one for each of `widths`, got 1.0."),
        ({"blocks": True}, "`blocks` must be a positive integer, or 2 of them, one for each of `widths`, got True."),
        ({"groups": [1, -1]}, r"`groups` must be a positive integer, or 2 of them, .*, got \[1, -1\]."),
        ({"groups": [4, 3]}, "`groups` must divide 8, the channels in a block of width 4, got 3."),
        ({"channels": 0}, "`channels` must be a positive integer, got 0."),
        ({"num_classes": 2.0}, "`num_classes` must be a positive integer, got 2.0."),
        ({"embedding_dim": 0, "num_classes": 2}, "`embedding_dim` must be a positive integer, got 0."),
        ({"expansion": "2"}, "`expansion` must be a positive integer, got '2'."),
    ],
)
def test_r3gan_refuses_bad_arguments(kind, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(**{"widths": [8, 4], "groups": 1, **arguments})


# A mapping and a synthesis network


def style(decay: float = 0.998, mapping: nn.Module | None = None) -> StyleGenerator:
    synthesis = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 2))
    return StyleGenerator(mapping or nn.Linear(5, 4), synthesis, w_dim=4, num_layers=3, decay=decay).double()


def test_the_average_of_w_follows_its_formula():
    """w̄ = Σ β^(t − s) (1 − β) E w_s, from 0; a pass that is not asked to leaves it."""
    network, expected = style(decay=0.9), np.zeros(4)
    for _ in range(5):
        z = torch.randn(7, 5, dtype=torch.float64)
        w = (z @ network.mapping.weight.T + network.mapping.bias).detach()
        network(z)
        _, extras = network(z, update_average=True)
        assert torch.equal(extras["w"], w.unsqueeze(1).expand(7, 3, 4))
        expected = 0.9 * expected + 0.1 * w.numpy().mean(0)
    np.testing.assert_allclose(network.w_average.numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_w_moves_in_half_precision(dtype):
    """In bfloat16, 0.5 + 0.002 · 0.5 is 0.5."""
    network = style(decay=0.998).to(dtype)
    network.mapping.weight.data.zero_()
    network.mapping.bias.data.fill_(1.0)
    for _ in range(2000):
        network.styles(torch.zeros(2, 5, dtype=dtype), update_average=True)
    np.testing.assert_allclose(network.w_average.numpy(), 1 - 0.998**2000, rtol=1e-4)
    network.truncation = 0.5
    assert network(torch.zeros(2, 5, dtype=dtype))[0].dtype == dtype


@pytest.mark.parametrize("psi", [0.7, 0.0, -1.0, 1.0])
def test_truncation_pulls_w_to_its_average(psi):
    network, z = style(), torch.randn(7, 5, dtype=torch.float64)
    network.w_average.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    network.truncation = psi
    w = z.numpy() @ network.mapping.weight.detach().numpy().T + network.mapping.bias.detach().numpy()
    pulled = network.w_average.numpy() + psi * (w - network.w_average.numpy())
    samples, extras = network(z)
    np.testing.assert_allclose(extras["w"].detach().numpy(), np.stack([pulled] * 3, 1), atol=1e-14)
    assert torch.equal(samples, network.synthesis(extras["w"]))


def test_the_average_takes_w_as_it_was_before_truncation():
    network, z = style(decay=0.0), torch.randn(7, 5, dtype=torch.float64)
    network.w_average.fill_(1.0)
    network.truncation = 0.5
    network.styles(z, update_average=True)
    torch.testing.assert_close(network.w_average, network.mapping(z).mean(0), rtol=0, atol=1e-14)


def test_a_mapping_may_take_a_condition():
    class Mapping(nn.Module):
        def forward(self, z, y):
            return z[:, :4] + y[:, None]

    network, z = style(mapping=Mapping()), torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(network(z, LABELS)[1]["w"][:, 1], z[:, :4] + LABELS[:, None])
    with pytest.raises(ValueError, match=r"^`condition` is needed: the mapping takes one.$"):
        network(z)
    plain = style()
    assert torch.equal(plain(z, LABELS)[0], plain(z)[0])  # a labelled batch hands its labels to every network


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mapping": 3}, "`mapping` must be of type Module, got 3."),
        ({"synthesis": None}, "`synthesis` must be of type Module, got None."),
        ({"w_dim": 0}, "`w_dim` must be a positive integer, got 0."),
        ({"num_layers": 1.0}, "`num_layers` must be a positive integer, got 1.0."),
        ({"decay": 1.5}, r"`decay` must be in \[0, 1\], got 1.5."),
    ],
)
def test_style_generator_refuses_bad_arguments(arguments, message):
    given = {"mapping": nn.Identity(), "synthesis": nn.Identity(), "w_dim": 4, "num_layers": 2, **arguments}
    with pytest.raises(ValueError, match=f"^{message}$"):
        StyleGenerator(**given)


def test_style_generator_refuses_other_shapes_and_an_average_that_never_moved():
    network = StyleGenerator(nn.Linear(5, 3), nn.Flatten(), w_dim=4, num_layers=2)
    with pytest.raises(ValueError, match=r"^`mapping` must return w of shape \(2, 4\), got \(2, 3\).$"):
        network(torch.randn(2, 5))
    network = style()
    network.truncation = 0.5
    with pytest.raises(
        ValueError, match=r"^`truncation` interpolates with the average of w, which has never been updated: call"
    ):
        network(torch.randn(2, 5, dtype=torch.float64))


# MLP


def test_mlp_equals_matrix_algebra():
    network = MLP([4, 3, 6], nn.Tanh, nn.Sigmoid, output_shape=[1, 2, 3], input_scale=0.25, num_classes=2).double()
    w1, b1, w2, b2 = network.parameters()
    x, labels = torch.randn(3, 2, 2, dtype=torch.float64), torch.tensor([1, 0, 1])
    code = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.float64)
    hidden = torch.tanh(x.reshape(3, 4) / 4 @ w1[:, :4].T + code @ w1[:, 4:].T + b1)
    expected = torch.sigmoid(hidden @ w2.T + b2).reshape(3, 1, 2, 3)
    torch.testing.assert_close(network(x, labels), expected, rtol=1e-12, atol=1e-12)


def test_mlp_output_shapes():
    x = torch.randn(3, 4)
    assert MLP([4, 1])(x).shape == (3, 1)
    assert MLP([4, 1], output_shape=[])(x).shape == (3,)
    assert MLP((4, 5, 8), output_shape=(2, 4))(x).shape == (3, 2, 4)
    assert MLP([4, 8], output_shape=[2, 4])(x[:0]).shape == (0, 2, 4)


def test_mlp_has_no_activation_behind_the_last_layer_unless_asked():
    assert [type(layer) for layer in MLP([2, 3, 1]).layers] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in MLP([2, 1], output_activation=nn.Tanh).layers] == [nn.Linear, nn.Tanh]


def test_gain_makes_orthogonal_weights_and_zero_biases():
    network = MLP([8, 4, 4, 2], gain=0.8)
    for layer in network.layers[::2]:
        torch.testing.assert_close(layer.weight @ layer.weight.T, 0.64 * torch.eye(layer.out_features))
        assert not layer.bias.any()


# Classes


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_conditional_outputs_differ_by_label(kind):
    network, x = small(kind, 3).eval(), inputs(kind)
    first, second = network(x, torch.zeros(3, dtype=torch.long)), network(x, torch.ones(3, dtype=torch.long))
    assert ((first - second).flatten(1) if first.ndim > 1 else first - second).abs().max() > 1e-3
    mixed = network(x, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1], first[2]]))
    mixed.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # the embedding is learned


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_unconditional_networks_do_not_look_at_labels(kind):
    network, x = small(kind).eval(), inputs(kind)
    assert torch.equal(network(x), network(x, LABELS))


@pytest.mark.parametrize("kind", [DCGANDiscriminator, ResNetDiscriminator])
def test_projection_is_an_inner_product_with_the_features(kind):
    network, samples = small(kind, 3).double(), inputs(kind).double()
    features = network.layers(samples)
    a, b = network.embedding.weight[0], network.embedding.weight[2]
    difference = network(samples, torch.tensor([0, 0, 0])) - network(samples, torch.tensor([2, 2, 2]))
    torch.testing.assert_close(difference, features @ (a - b), rtol=1e-12, atol=1e-12)
    plain = features @ network.linear.weight[0] + network.linear.bias
    torch.testing.assert_close(network(samples, torch.zeros(3, dtype=torch.long)), plain + features @ a)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(MLP, "network"), *((k, "generator") for k in GENERATORS), *((k, "discriminator") for k in DISCRIMINATORS)],
)
def test_missing_labels_are_refused(kind, name):
    with pytest.raises(ValueError, match=f"^`labels` are needed: this {name} has 3 classes.$"):
        small(kind, 3)(inputs(kind))


# Derivatives, precisions, and what PyTorch does with modules


def test_second_derivatives_of_the_mlp_are_exact():
    network = MLP([2, 3, 1], nn.Tanh, input_scale=0.25, num_classes=2).double()
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    parameters = dict(network.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(network, weights, (x, torch.tensor([1, 0])))

    assert torch.autograd.gradgradcheck(call, (x, *parameters.values()))


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_second_derivatives_of_the_discriminators_are_exact(kind):
    network = small(kind, 3, channels=1, width=1).double()
    for parameter in network.parameters():  # away from the zero of the residual blocks
        nn.init.normal_(parameter)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: network(x, LABELS[1:2]).square(), (x,))


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_r1_reaches_the_weights(kind, num_classes):
    network, x = small(kind, num_classes), inputs(kind).requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, LABELS).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    for name in ("layers.0.weight", "linear.weight"):
        gradient = network.get_parameter(name).grad
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", [*GENERATORS, AutoEncoder])
def test_generators_and_auto_encoder_are_twice_differentiable(kind):
    network, x = small(kind), inputs(kind).requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    gradients = torch.autograd.grad(gradient.square().sum(), list(network.parameters()), allow_unused=True)
    assert all(g.isfinite().all() for g in gradients if g is not None)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", EVERY)
def test_precisions(kind, dtype):
    network, x = small(kind, 3), inputs(kind)
    arguments = () if kind is AutoEncoder else (LABELS,)
    expected = network(x, *arguments)
    output = network.to(dtype)(x.to(dtype), *arguments)
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", EVERY)
def test_copies_give_the_same_output(kind):
    network, x = small(kind, 3).eval(), inputs(kind)
    arguments = (x,) if kind is AutoEncoder else (x, LABELS)
    expected = network(*arguments)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = small(kind, 3).eval()
    assert not torch.equal(loaded(*arguments), expected)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), loaded):
        assert torch.equal(other(*arguments), expected)
    zeros = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    assert not torch.func.functional_call(network, zeros, arguments).any()


@pytest.mark.parametrize("kind", EVERY)
def test_compiles_in_one_graph(kind):
    network, x = small(kind, 3).eval(), inputs(kind)
    arguments = (x,) if kind is AutoEncoder else (x, LABELS)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), network(*arguments))


# YAML


def parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    return parser


def from_yaml(text: str) -> nn.Module:
    """Return the network of a YAML text, after a round trip through the printed configuration."""
    dumped = parser().dump(parser().parse_string(text))
    assert parser().dump(parser().parse_string(dumped)) == dumped
    last = parser()
    instantiate = getattr(last, "instantiate", None) or last.instantiate_classes  # renamed after jsonargparse 4.39
    return instantiate(last.parse_string(dumped)).network


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own
@pytest.mark.parametrize(
    ("kind", "num_classes"), [*((kind, 3) for kind in CONDITIONAL), (MLP, None), (AutoEncoder, None)]
)
def test_exports_for_every_batch_size(kind, num_classes):
    network = small(kind) if kind is AutoEncoder else small(kind, num_classes)
    x, rows = inputs(kind), {0: torch.export.Dim("n")}
    given = (x, LABELS) if num_classes else (x,)
    program = torch.export.export(network.eval(), given, dynamic_shapes=(rows,) * len(given)).module()
    larger = tuple(torch.cat([t, t.flip(0)]) for t in given)
    torch.testing.assert_close(program(*larger), network(*larger))


def test_mlp_from_yaml():
    network = from_yaml("""
        network:
          class_path: lightning_gan_stability.nets.MLP
          init_args:
            sizes: [4, 3, 6]
            activation: torch.nn.Tanh
            output_activation: torch.nn.Sigmoid
            output_shape: [2, 3]
            input_scale: 0.25
            gain: 0.8
            num_classes: 2
    """)
    assert isinstance(network, MLP)
    assert [type(layer) for layer in network.layers] == [nn.Linear, nn.Tanh, nn.Linear, nn.Sigmoid]
    assert network.layers[0].weight.shape == (3, 6)
    assert network.input_scale == 0.25
    assert network(torch.randn(2, 4), torch.tensor([0, 1])).shape == (2, 2, 3)


@pytest.mark.parametrize("kind", [*GENERATORS, *DISCRIMINATORS, AutoEncoder])
def test_networks_from_yaml(kind):
    latent_dim = ", latent_dim: 5" if kind in GENERATORS else ""
    size = "widths: [8, 4], blocks: 1, groups: [2, 1]" if kind in R3GAN else "size: 8, width: 4"
    network = from_yaml(f"""
        network:
          class_path: lightning_gan_stability.nets.{kind.__name__}
          init_args: {{channels: 2, {size}{latent_dim}}}
    """)
    assert type(network) is kind
    assert network(inputs(kind)).shape == ((3,) if kind in DISCRIMINATORS else (3, 2, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("{sizes: [2, two]}", "two"), ("{sizes: [2, 1], activation: torch.tanh}", "torch.tanh"), ("{}", "sizes")],
)
def test_yaml_of_the_wrong_type_is_refused(arguments, message):
    text = f"network: {{class_path: lightning_gan_stability.nets.MLP, init_args: {arguments}}}"
    with pytest.raises(jsonargparse.ArgumentError, match=message):
        parser().parse_string(text)


# Errors


INTEGERS = {
    DCGANGenerator: ("latent_dim", "channels", "width", "num_classes"),
    DCGANDiscriminator: ("channels", "width", "num_classes"),
    ResNetGenerator: ("latent_dim", "channels", "width", "num_classes"),
    ResNetDiscriminator: ("channels", "width", "num_classes"),
    AutoEncoder: ("channels", "width", "code_dim"),
}


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in INTEGERS.items() for name in names])
def test_integers_must_be_positive(kind, name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be a positive integer, got {value!r}.$"):
        kind(**{"size": 8, "width": 2, name: value})


@pytest.mark.parametrize(("kind", "size"), [*itertools.product(INTEGERS, [48, 4, 512, 64.0, True, None])])
def test_sizes_are_powers_of_two(kind, size):
    with pytest.raises(ValueError, match=f"^`size` must be one of 8, 16, 32, 64, 128, 256, got {size}.$"):
        kind(size=size, width=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [3]}, r"`sizes` must be two or more positive integers, got \[3\]."),
        ({"sizes": [3, 0, 1]}, r"`sizes` must be two or more positive integers, got \[3, 0, 1\]."),
        ({"sizes": 3}, "`sizes` must be two or more positive integers, got 3."),
        ({"sizes": "34"}, "`sizes` must be two or more positive integers, got '34'."),
        ({"activation": "tanh"}, "`activation` must be a module class such as torch.nn.Tanh, got 'tanh'."),
        ({"activation": None}, "`activation` must be a module class such as torch.nn.Tanh, got None."),
        ({"activation": nn.Tanh()}, r"`activation` must be a module class such as torch.nn.Tanh, got Tanh\(\)."),
        ({"output_activation": torch.tanh}, "`output_activation` must be a module class such as torch.nn.Tanh, got .*"),
        (
            {"output_shape": [3, 3]},
            r"`output_shape` must be positive integers with the product 8, as in `sizes`, got \[3, 3\].",
        ),
        (
            {"output_shape": [-2, -4]},
            r"`output_shape` must be positive integers with the product 8, as in `sizes`, got \[-2, -4\].",
        ),
        ({"output_shape": 8}, "`output_shape` must be positive integers with the product 8, as in `sizes`, got 8."),
        ({"input_scale": 0.0}, "`input_scale` must be a positive finite number, got 0.0."),
        ({"input_scale": math.inf}, "`input_scale` must be a positive finite number, got inf."),
        ({"gain": math.nan}, "`gain` must be a positive finite number, got nan."),
        ({"gain": True}, "`gain` must be a positive finite number, got True."),
        ({"num_classes": 0}, "`num_classes` must be a positive integer, got 0."),
    ],
)
def test_mlp_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MLP(**{"sizes": [4, 8], **arguments})
