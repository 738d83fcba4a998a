"""Generators and discriminators: MLP, DCGAN, ResNet and an auto-encoder, the networks of R3GAN, and a style generator.

Any `torch.nn.Module` can be trained; these are ready-made ones. All are twice differentiable, as gradient penalties
need. With `num_classes` each of them, except `AutoEncoder` and `StyleGenerator`, is class-conditional and needs labels,
int64 in [0, num_classes). Without it they ignore labels, which a labelled batch passes to every network.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_gan_stability._checks import check, check_integer, check_number, check_share, check_type, is_integer
from lightning_gan_stability.distributed import mean_over_ranks
from lightning_gan_stability.layers import MinibatchStdDev as MinibatchStdDev
from lightning_gan_stability.layers import Packed as Packed
from lightning_gan_stability.layers import condition_parameter
from lightning_gan_stability.outputs import Condition, Sample

__all__ = [
    "MLP",
    "AutoEncoder",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "R3GANDiscriminator",
    "R3GANGenerator",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "StyleGenerator",
]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
_SIZES = (8, 16, 32, 64, 128, 256)
_SLOPE = 0.2  # of every LeakyReLU here, as in the DCGAN and R3GAN papers
_GAIN = nn.init.calculate_gain("leaky_relu", _SLOPE)


def _check(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is None and name in ("output_activation", "gain", "num_classes"):
            continue
        if name == "size":
            check(is_integer(value) and value in _SIZES, name, f"one of {', '.join(map(str, _SIZES))}", value)
        elif name in ("input_scale", "gain"):
            check_number(name, value, positive=True)
        elif "activation" in name:
            valid = isinstance(value, type) and issubclass(value, nn.Module)
            check(valid, name, "a module class such as torch.nn.Tanh", value)
        else:
            check_integer(name, value)


def _are_positive(values: object, at_least: int) -> bool:
    whole = isinstance(values, Sequence) and all(is_integer(value) and value > 0 for value in values)
    return whole and len(values) >= at_least  # type: ignore[arg-type]


def _need(labels: Tensor | None, num_classes: int, network: str) -> Tensor:
    if labels is None:
        raise ValueError(f"`labels` are needed: this {network} has {num_classes} classes.")
    return labels


def _widths(size: int, width: int, limit: int = 32) -> list[int]:
    """Return the channels at size, size / 2, ..., 4, which double each time up to `limit` · width."""
    return [width * min(2**i, limit) for i in range((size // 4).bit_length())]


def _draw(layer: Layer, std: float, mean: float = 0.0) -> Layer:
    """Return the layer with weights from N(mean, std²) and zero biases."""
    nn.init.normal_(layer.weight, mean, std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Multilayer perceptron: a generator or a discriminator of points and of small images.

    h₀ = [s x, e_y], hᵢ = a(Wᵢ hᵢ₋₁ + bᵢ), f(x, y) = o(W_L h_(L−1) + b_L).

    Maps input (n, ...), flattened to (n, sizes[0]), and labels (n,) to (n, sizes[-1]) or (n, *output_shape).

    Args:
        sizes: Lengths of the input (without the label), of each hidden layer and of the output.
        activation: Class of the nonlinearity a.
        output_activation: Class of the nonlinearity o; None: none.
        output_shape: Shape of one output, such as [1, 8, 8], or [] for one logit per sample; its product is the last
            of `sizes`. None: the output stays flat.
        input_scale: Factor s of the input, positive; 1/4 in the Unrolled GAN, https://arxiv.org/abs/1611.02163.
        gain: Gain of an orthogonal initialization of all weights, with zero biases; positive. None: torch's own.
        num_classes: Number of classes; their one-hot code e_y is concatenated to the input. None: no classes.

    Raises:
        ValueError: If an argument is out of its range, or labels are missing.

    Example:
        >>> generator = MLP([16, 32, 64], output_activation=nn.Tanh, output_shape=[1, 8, 8], num_classes=10)
        >>> generator(torch.randn(5, 16), torch.tensor([0, 1, 2, 3, 9])).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: type[nn.Module] = nn.ReLU,
        output_activation: type[nn.Module] | None = None,
        output_shape: Sequence[int] | None = None,
        input_scale: float = 1.0,
        gain: float | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check(_are_positive(sizes, 2), "sizes", "two or more positive integers", sizes)
        _check(activation=activation, output_activation=output_activation)
        _check(input_scale=input_scale, gain=gain, num_classes=num_classes)
        shape = sizes[-1:] if output_shape is None else output_shape
        fits = _are_positive(shape, 0) and math.prod(shape) == sizes[-1]
        check(fits, "output_shape", f"positive integers with the product {sizes[-1]}, as in `sizes`", shape)
        self.output_shape, self.input_scale, self.num_classes = tuple(shape), input_scale, num_classes
        layers: list[nn.Module] = []
        for inside, outside in pairwise([sizes[0] + (num_classes or 0), *sizes[1:]]):
            linear = nn.Linear(inside, outside)
            if gain is not None:
                nn.init.orthogonal_(_draw(linear, 0.0).weight, gain)
            layers += [linear, activation()]
        layers[-1:] = [] if output_activation is None else [output_activation()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the network's output for each row of `x`."""
        x = x.flatten(1) * self.input_scale
        if self.num_classes is not None:
            labels = _need(labels, self.num_classes, "network")
            x = torch.cat([x, nn.functional.one_hot(labels, self.num_classes).to(x.dtype)], dim=1)
        output: Tensor = self.layers(x)
        return output.reshape(x.shape[0], *self.output_shape)  # len(x) would be a constant on export


class _Generator(nn.Module):
    """Concatenates latents and a class embedding, which has their length by default and starts as N(0, 1)."""

    layers: nn.Sequential

    def __init__(self, latent_dim: int, num_classes: int | None, embedding_dim: int | None = None) -> None:
        super().__init__()
        length = latent_dim if embedding_dim is None else embedding_dim
        _check(latent_dim=latent_dim, num_classes=num_classes, embedding_dim=length)
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.features = latent_dim if num_classes is None else latent_dim + length
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, length)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return one image for each latent vector."""
        if self.embedding is not None:
            labels = _need(labels, self.embedding.num_embeddings, "generator")
            latents = torch.cat([latents, self.embedding(labels)], dim=1)
        images: Tensor = self.layers(latents)
        return images


class _Discriminator(nn.Module):
    """Logit w·h(x) + b + <e(y), h(x)> of the features h of `layers`; without classes the last term is missing.

    "cGANs with Projection Discriminator", https://arxiv.org/abs/1802.05637. Both w and e start as N(0, 1 / features).
    """

    def __init__(self, layers: list[nn.Module], features: int, num_classes: int | None, bias: bool = True) -> None:
        super().__init__()
        _check(num_classes=num_classes)
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.linear = _draw(nn.Linear(features, 1, bias=bias), features**-0.5)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, features)
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=features**-0.5)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return one logit for each image."""
        features: Tensor = self.layers(samples)
        logits: Tensor = self.linear(features).squeeze(1)
        if self.embedding is None:
            return logits
        labels = _need(labels, self.embedding.num_embeddings, "discriminator")
        return logits.add((self.embedding(labels) * features).sum(dim=1))


class DCGANGenerator(_Generator):
    """Generator of DCGAN: transposed 4x4 convolutions and ReLU, from a 4x4 base to the full size, then tanh.

    "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks",
    https://arxiv.org/abs/1511.06434. With batch normalization, weights start as N(0, 0.02²) and no layer has a bias.
    Without it, all layers have one and weights start as N(0, 2 / fan-in), because with 0.02 the signal would vanish.
    Maps latents (n, latent_dim) and labels (n,) to images (n, channels, size, size) in [-1, 1].

    Args:
        latent_dim: Length of a latent vector.
        channels: Channels of an image.
        size: Height and width in pixels: 8, 16, 32, 64, 128 or 256.
        width: Channels of the last hidden layer; they double towards the base.
        batch_norm: Normalize hidden layers with BatchNorm.
        num_classes: Number of classes; their learned embedding is concatenated to the latents. None: no classes.

    Raises:
        ValueError: If an argument is out of its range, or labels are missing.

    Example:
        >>> DCGANGenerator(latent_dim=16, size=32, width=8)(torch.randn(4, 16)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        latent_dim: int = 128,
        channels: int = 3,
        size: int = 64,
        width: int = 64,
        batch_norm: bool = True,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(latent_dim, num_classes)
        _check(channels=channels, size=size, width=width)
        widths = [self.features, *_widths(size // 2, width)[::-1], channels]
        layers: list[nn.Module] = [nn.Unflatten(1, (-1, 1, 1))]
        for i, (inside, outside) in enumerate(pairwise(widths)):
            stride, padding, taps = (2, 1, 4) if i else (1, 0, 1)  # the first makes 4x4 from 1x1
            convolution = nn.ConvTranspose2d(inside, outside, 4, stride, padding, bias=not batch_norm)
            layers += [_draw(convolution, 0.02 if batch_norm else math.sqrt(2 / (inside * taps)))]
            if i < len(widths) - 2:
                layers += [_draw(nn.BatchNorm2d(outside), 0.02, mean=1.0)] if batch_norm else []
                layers += [nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Tanh())


class DCGANDiscriminator(_Discriminator):
    """Discriminator of DCGAN: 4x4 convolutions of stride 2 and LeakyReLU(0.2) down to 4x4, then one logit.

    https://arxiv.org/abs/1511.06434, with biases and initial weights as in `DCGANGenerator`. Class-conditional by
    projection, w·h + b + <e(y), h> of the 4x4 features h, https://arxiv.org/abs/1802.05637. Maps images (n, channels,
    size, size) and labels (n,) to logits (n,).

    Args:
        channels: Channels of an image.
        size: Height and width in pixels: 8, 16, 32, 64, 128 or 256.
        width: Channels of the first hidden layer; they double towards the logit.
        batch_norm: Normalize hidden layers except the first with BatchNorm; then gradients mix the samples.
        num_classes: Number of classes of the projection; None: no classes.

    Raises:
        ValueError: If an argument is out of its range, or labels are missing.

    Example:
        >>> DCGANDiscriminator(size=32, width=8)(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 64,
        width: int = 64,
        batch_norm: bool = False,
        num_classes: int | None = None,
    ) -> None:
        _check(channels=channels, size=size, width=width)
        widths = _widths(size // 2, width)
        layers: list[nn.Module] = []
        for i, (inside, outside) in enumerate(pairwise([channels, *widths])):
            convolution = nn.Conv2d(inside, outside, 4, stride=2, padding=1, bias=not batch_norm)
            layers += [_draw(convolution, 0.02 if batch_norm else _GAIN / math.sqrt(inside * 16))]
            layers += [_draw(nn.BatchNorm2d(outside), 0.02, mean=1.0)] if batch_norm and i else []
            layers += [nn.LeakyReLU(_SLOPE)]
        super().__init__(layers, widths[-1] * 16, num_classes, bias=not batch_norm)
        if batch_norm:
            _draw(self.linear, 0.02)


def _convolution(
    inside: int, outside: int, kernel: int = 1, gain: float = 1.0, bias: bool = False, groups: int = 1
) -> nn.Conv2d:
    layer = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, groups=groups, bias=bias)
    return _draw(layer, gain / math.sqrt(inside // groups * kernel**2))


class ResidualBlock(nn.Module):
    """Residual block without normalization, x + W3 a(W2 a(W1 x)), which starts as the identity, with W3 = 0.

    "Fixup Initialization", https://arxiv.org/abs/1901.09321: W1 and W2 start with He's gain times depth^(-1/4), where
    depth is the number of such blocks in the network. Input and output are (n, channels, height, width). Inside there
    are expansion · channels, and the 3x3 convolution W2 is grouped.
    """

    def __init__(self, channels: int, depth: int, expansion: int = 1, groups: int = 1) -> None:
        super().__init__()
        inner = expansion * channels
        self.layers = nn.Sequential(
            _convolution(channels, inner, 1, _GAIN * depth**-0.25, bias=True),
            nn.LeakyReLU(_SLOPE),
            _convolution(inner, inner, 3, _GAIN * depth**-0.25, bias=True, groups=groups),
            nn.LeakyReLU(_SLOPE),
            _convolution(inner, channels, 1, gain=0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus its residual."""
        return x.add(self.layers(x))


class ResNetGenerator(_Generator):
    """Residual generator without normalization, similar to R3GAN.

    A linear layer to 4x4, one residual block per resolution with 1x1 convolutions and bilinear upsampling in between,
    and a 1x1 convolution at the end. There is no tanh; after training on images in [-1, 1], outputs are roughly in [-1,
    1]. "The GAN is dead; long live the GAN! A Modern GAN Baseline", https://arxiv.org/abs/2501.05441, without its
    groups and 4x4 basis. Maps latents (n, latent_dim) and labels (n,) to images (n, channels, size, size).

    Args:
        latent_dim: Length of a latent vector.
        channels: Channels of an image.
        size: Height and width in pixels: 8, 16, 32, 64, 128 or 256.
        width: Channels at the full resolution; they double towards the base, up to 8 · width.
        num_classes: Number of classes; their learned embedding is concatenated to the latents. None: no classes.

    Raises:
        ValueError: If an argument is out of its range, or labels are missing.

    Example:
        >>> ResNetGenerator(latent_dim=16, size=32, width=8)(torch.randn(4, 16)).shape
        torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self, latent_dim: int = 128, channels: int = 3, size: int = 64, width: int = 64, num_classes: int | None = None
    ) -> None:
        super().__init__(latent_dim, num_classes)
        _check(channels=channels, size=size, width=width)
        widths = _widths(size, width, limit=8)[::-1]
        linear = _draw(nn.Linear(self.features, widths[0] * 16, bias=False), self.features**-0.5)
        layers = [linear, nn.Unflatten(1, (widths[0], 4, 4)), ResidualBlock(widths[0], len(widths))]
        for inside, outside in pairwise(widths):
            change = [_convolution(inside, outside)] if inside != outside else []
            layers += [*change, nn.Upsample(scale_factor=2, mode="bilinear"), ResidualBlock(outside, len(widths))]
        self.layers = nn.Sequential(*layers, _convolution(width, channels))


class ResNetDiscriminator(_Discriminator):
    """Residual discriminator without normalization, similar to R3GAN: the mirror image of `ResNetGenerator`.

    Bilinear downsampling to one half is the mean of 2x2 pixels. A depthwise 4x4 convolution computes the features h.
    https://arxiv.org/abs/2501.05441. Class-conditional by projection, w·h + b + <e(y), h>,
    https://arxiv.org/abs/1802.05637. Maps images (n, channels, size, size) and labels (n,) to logits (n,).

    Args:
        channels: Channels of an image.
        size: Height and width in pixels: 8, 16, 32, 64, 128 or 256.
        width: Channels at the full resolution; they double towards 4x4, up to 8 · width.
        num_classes: Number of classes of the projection; None: no classes.

    Raises:
        ValueError: If an argument is out of its range, or labels are missing.

    Example:
        >>> ResNetDiscriminator(size=32, width=8)(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4])
    """

    def __init__(self, channels: int = 3, size: int = 64, width: int = 64, num_classes: int | None = None) -> None:
        _check(channels=channels, size=size, width=width)
        widths = _widths(size, width, limit=8)
        layers: list[nn.Module] = [_convolution(channels, width), ResidualBlock(width, len(widths))]
        for inside, outside in pairwise(widths):
            change = [_convolution(inside, outside)] if inside != outside else []
            layers += [nn.AvgPool2d(2), *change, ResidualBlock(outside, len(widths))]
        basis = nn.Conv2d(widths[-1], widths[-1], 4, groups=widths[-1], bias=False)
        super().__init__([*layers, _draw(basis, 16**-0.5)], widths[-1], num_classes)


class _Resample(nn.Module):
    """Doubles or halves the size with the filter [1, 3, 3, 1] along each axis and zero padding."""

    kernel: Tensor

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / (4.0 if up else 8.0)  # upsampling inserts zeros between pixels
        self.register_buffer("kernel", taps.outer(taps).reshape(1, 1, 4, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        resample = nn.functional.conv_transpose2d if self.up else nn.functional.conv2d
        planes = resample(x.flatten(0, 1).unsqueeze(1), self.kernel, stride=2, padding=1)
        return planes.reshape(*x.shape[:2], *planes.shape[2:])


class _Basis(nn.Module):
    """Learned 4x4 maps, one per channel, scaled by a linear function of the input."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(outside, 4, 4))
        self.linear = _draw(nn.Linear(inside, outside, bias=False), inside**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        scales: Tensor = self.linear(x)
        return self.maps * scales[..., None, None]


def _per_stage(name: str, value: object, stages: int) -> list[int]:
    """An integer for each stage, given as one integer for all or as a sequence."""
    values = [value] * stages if is_integer(value) else value
    valid = _are_positive(values, 1) and len(values) == stages  # type: ignore[arg-type]
    check(valid, name, f"a positive integer, or {stages} of them, one for each of `widths`", value)
    return [*values]  # type: ignore[misc]


def _r3gan_stages(widths: Sequence[int], blocks: object, groups: object, expansion: int) -> list[list[nn.Module]]:
    """The residual blocks of each stage, 4x4 first."""
    check(_are_positive(widths, 1), "widths", "one or more positive integers, 4x4 first", widths)
    _check(expansion=expansion)
    numbers = _per_stage("blocks", blocks, len(widths))
    default = [_divisor(expansion * width, expansion * width // 16) for width in widths]
    cardinalities = default if groups is None else _per_stage("groups", groups, len(widths))
    for width, group in zip(widths, cardinalities, strict=True):
        if expansion * width % group:
            raise ValueError(
                f"`groups` must divide {expansion * width}, the channels in a block of width {width}, got {group}."
            )
    return [
        [ResidualBlock(width, sum(numbers), expansion, group) for _ in range(number)]
        for width, number, group in zip(widths, numbers, cardinalities, strict=True)
    ]


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most another one."""
    return next((part for part in range(most, 0, -1) if number % part == 0), 1)


class R3GANGenerator(_Generator):
    """Generator of R3GAN: learned 4x4 maps, then residual blocks of grouped convolutions without normalization.

    Channel c at 4x4 is bᶜ · (A [z, e_y])_c with learned maps b. A block is x + W3 a(W2 a(W1 x)) with a bias in each
    LeakyReLU(0.2) a. Between stages there is upsampling by [1, 3, 3, 1], after a 1x1 convolution where widths differ.
    The last layer is a 1x1 convolution without tanh. W1 and W2 start as N(0, g² / fan-in) with g = √(2 / 1.04) ·
    L^(−1/4) and the number L of blocks, W3 as 0, b as N(0, 1), all else as N(0, 1 / fan-in), where the fan-in of an
    embedding is `num_classes`.

    "The GAN is dead; long live the GAN! A Modern GAN Baseline", https://arxiv.org/abs/2501.05441; the defaults are
    those of CIFAR-10. For 64x64 use `widths=[768, 768, 768, 768, 384]`, for 256x256 `[768, 768, 768, 768, 384, 192,
    96]`. Maps latents (n, latent_dim) and labels (n,) to images (n, channels, size, size), size = 4 · 2^(stages − 1).

    Args:
        latent_dim: Length of a latent vector.
        channels: Channels of an image.
        widths: Channels of each stage, 4x4 first; each further stage has twice the size.
        blocks: Residual blocks in a stage, or one number for each stage.
        groups: Groups of the 3x3 convolutions (the cardinality), or one number for each stage; they divide expansion ·
            width. None: as many as have 16 channels, or the next fewer that divide.
        num_classes: Number of classes; their learned embedding is concatenated to the latents. None: no classes.
        embedding_dim: Length of the embedding.
        expansion: Ratio of the channels inside a block to those outside.

    Raises:
        ValueError: If an argument is out of its range, or labels are missing.

    Example:
        >>> R3GANGenerator(latent_dim=16, widths=[32, 32, 16])(torch.randn(4, 16)).shape
        torch.Size([4, 3, 16, 16])
    """

    def __init__(
        self,
        latent_dim: int = 64,
        channels: int = 3,
        widths: Sequence[int] = (768, 768, 768, 768),
        blocks: int | Sequence[int] = 2,
        groups: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        embedding_dim: int = 64,
        expansion: int = 2,
    ) -> None:
        _check(channels=channels)
        first, *others = _r3gan_stages(widths, blocks, groups, expansion)
        super().__init__(latent_dim, num_classes, embedding_dim)
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=self.embedding.num_embeddings**-0.5)
        layers = [_Basis(self.features, widths[0]), *first]
        for (inside, outside), stage in zip(pairwise(widths), others, strict=True):
            change = [_convolution(inside, outside)] if inside != outside else []
            layers += [*change, _Resample(up=True), *stage]
        self.layers = nn.Sequential(*layers, _convolution(widths[-1], channels))


class R3GANDiscriminator(nn.Module):
    """Discriminator of R3GAN: the mirror image of `R3GANGenerator`, down to 4x4 and one logit, <e_y, A h> with classes.

    The first layer is a 1x1 convolution. Then come blocks and downsampling by [1, 3, 3, 1], followed by a 1x1
    convolution where widths differ. A depthwise 4x4 convolution computes the features h. A linear layer A without bias
    returns the logit, or, with classes, a vector that is multiplied with the embedding e_y of the class. Weights start
    as in `R3GANGenerator`, and e with the gain embedding_dim^(−1/2). https://arxiv.org/abs/2501.05441. Maps images (n,
    channels, size, size) and labels (n,) to logits (n,), size = 4 · 2^(stages − 1).

    Args:
        channels: Channels of an image.
        widths: Channels of each stage, 4x4 first, as in the generator.
        blocks: Residual blocks in a stage, or one number for each stage.
        groups: Groups of the 3x3 convolutions (the cardinality), or one number for each stage; they divide expansion ·
            width. None: as many as have 16 channels, or the next fewer that divide.
        num_classes: Number of classes; None: no classes.
        embedding_dim: Length of the embedding. None: the width at 4x4, as in the paper.
        expansion: Ratio of the channels inside a block to those outside.

    Raises:
        ValueError: If an argument is out of its range, or labels are missing.

    Example:
        >>> R3GANDiscriminator(widths=[32, 32, 16])(torch.randn(4, 3, 16, 16)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (768, 768, 768, 768),
        blocks: int | Sequence[int] = 2,
        groups: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        _check(channels=channels, num_classes=num_classes)
        first, *others = _r3gan_stages(widths, blocks, groups, expansion)
        dim = widths[0] if embedding_dim is None else check_integer("embedding_dim", embedding_dim)
        layers: list[nn.Module] = [_convolution(channels, widths[-1])]
        for (inside, outside), stage in reversed([*zip(pairwise(widths), others, strict=True)]):
            change = [_convolution(outside, inside)] if inside != outside else []
            layers += [*stage, _Resample(up=False), *change]
        basis = _draw(nn.Conv2d(widths[0], widths[0], 4, groups=widths[0], bias=False), 16**-0.5)
        self.layers = nn.Sequential(*layers, *first, basis, nn.Flatten())
        outputs = 1 if num_classes is None else dim
        self.linear = _draw(nn.Linear(widths[0], outputs, bias=False), widths[0] ** -0.5)
        self.embedding = None
        if num_classes is not None:
            self.embedding = nn.Embedding(num_classes, dim)
            nn.init.normal_(self.embedding.weight, std=(dim * num_classes) ** -0.5)

    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return one logit for each image."""
        outputs: Tensor = self.linear(self.layers(samples))
        if self.embedding is None:
            return outputs.squeeze(1)
        labels = _need(labels, self.embedding.num_embeddings, "discriminator")
        return outputs.mul(self.embedding(labels)).sum(dim=1)


class StyleGenerator(nn.Module):
    """Style-based generator: a mapping and a synthesis network, with a running average of w and truncation towards it.

    x = S(w₁, ..., w_L) with w = M(z, y) for each of L layers. A call with ``update_average=True`` sets w̄ ← β w̄ + (1 −
    β) E w. With the truncation ψ, w becomes w̄ + ψ (w − w̄), which gives better samples with less variety. "A
    Style-Based Generator Architecture for Generative Adversarial Networks", https://arxiv.org/abs/1812.04948; w̄ starts
    at 0.

    StyleGAN2 updates w̄ in the discriminator's step only. To do so, override :meth:`GANModule.generate`::

        def generate(self, network, n, condition, latents):
            return network(latents, condition, update_average=self.turn == "d")

    Calling it returns samples and ``{"w": w}``, where ``PathLengthPenalty(latents="w")`` finds w. A module that mixes
    styles calls :meth:`styles` and `synthesis` instead, as in `examples/stylegan2.py`; then ModelParallelStrategy
    cannot shard it. w̄ is a mean over all processes. With `accumulate` it is updated once per micro-batch.

    Args:
        mapping: Maps latents (n, latent_dim), and a condition if its `forward` takes one, to w (n, w_dim).
        synthesis: Maps w (n, num_layers, w_dim) to samples.
        w_dim: Length of w.
        num_layers: Number L of vectors that `synthesis` takes for a sample.
        decay: β in [0, 1].

    Attributes:
        w_average: w̄, a buffer (w_dim,), in at least float32 after its first update.
        truncation: ψ of the next samples; ``GANModule.sample(truncation=...)`` sets it for one call.

    Raises:
        ValueError: If an argument is out of its range, if `mapping` returns another shape, or if ψ is not 1 and the
            average has never been updated.

    Example:
        >>> synthesis = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8, 2))
        >>> generator = StyleGenerator(MLP([4, 16, 8]), synthesis, w_dim=8, num_layers=3)
        >>> samples, extras = generator(torch.randn(5, 4))
        >>> samples.shape, extras["w"].shape
        (torch.Size([5, 2]), torch.Size([5, 3, 8]))
    """

    w_average: Tensor

    def __init__(
        self, mapping: nn.Module, synthesis: nn.Module, w_dim: int, num_layers: int, decay: float = 0.998
    ) -> None:
        super().__init__()
        self.mapping = check_type("mapping", mapping, nn.Module)
        self.synthesis = check_type("synthesis", synthesis, nn.Module)
        self.w_dim, self.num_layers = check_integer("w_dim", w_dim), check_integer("num_layers", num_layers)
        self.decay = check_share("decay", decay)
        self.truncation = 1.0
        self.takes, self.needs = condition_parameter(mapping)
        self.register_buffer("w_average", torch.zeros(w_dim))

    def styles(self, latents: Tensor, condition: Condition = None, update_average: bool = False) -> Tensor:
        """Return w (n, num_layers, w_dim), truncated if `truncation` is not 1; first update the average if asked to."""
        if self.needs and condition is None:
            raise ValueError("`condition` is needed: the mapping takes one.")
        w: Tensor = self.mapping(latents, condition) if self.takes and condition is not None else self.mapping(latents)
        if w.shape != (len(latents), self.w_dim):
            raise ValueError(f"`mapping` must return w of shape {(len(latents), self.w_dim)}, got {tuple(w.shape)}.")
        if update_average:
            precise = torch.promote_types(self.w_average.dtype, torch.float32)
            if self.w_average.dtype != precise:  # in half precision small updates would be lost
                self.w_average = self.w_average.to(precise)
            mean = mean_over_ranks(w.detach().mean(0, dtype=precise))
            self.w_average.copy_(mean.lerp(self.w_average, self.decay))
        if self.truncation != 1:
            if not self.w_average.any():
                raise ValueError(
                    "`truncation` interpolates with the average of w, which has never been updated: call the generator "
                    "with update_average=True in training, such as in the discriminator's step."
                )
            w = self.w_average.to(w.dtype).lerp(w, self.truncation)
        return w.unsqueeze(1).expand(-1, self.num_layers, -1)

    def forward(
        self, latents: Tensor, condition: Condition = None, update_average: bool = False
    ) -> tuple[Sample, dict[str, Tensor]]:
        """Return samples and w; update the average if requested."""
        w = self.styles(latents, condition, update_average)
        return self.synthesis(w), {"w": w}


class AutoEncoder(nn.Sequential):
    """Auto-encoder, the discriminator of BEGAN: it returns a reconstruction instead of a logit.

    3x3 convolutions of stride 2 with width, 2 · width, ... channels and ELU down to 4x4, and a linear layer to the
    code. The decoder has a linear layer to 4x4, then 3x3 convolutions, ELU and nearest upsampling. "BEGAN: Boundary
    Equilibrium Generative Adversarial Networks", https://arxiv.org/abs/1703.10717; with one convolution per resolution,
    where the paper has two. Maps images (n, channels, size, size) to reconstructions of the same shape, without tanh.

    Args:
        channels: Channels of an image.
        size: Height and width in pixels: 8, 16, 32, 64, 128 or 256.
        width: Channels at the full resolution.
        code_dim: Length of the code.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> AutoEncoder(size=16, width=8)(torch.randn(4, 3, 16, 16)).shape
        torch.Size([4, 3, 16, 16])
    """

    def __init__(self, channels: int = 3, size: int = 32, width: int = 32, code_dim: int = 64) -> None:
        _check(channels=channels, size=size, width=width, code_dim=code_dim)
        encoder: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ELU()]
        decoder: list[nn.Module] = [nn.Linear(code_dim, width * 16), nn.Unflatten(1, (width, 4, 4))]
        widths = [width * i for i, _ in enumerate(_widths(size, width), start=1)]
        for inside, outside in pairwise(widths):
            encoder += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.ELU()]
            decoder += [nn.Conv2d(width, width, 3, padding=1), nn.ELU(), nn.Upsample(scale_factor=2)]
        encoder += [nn.Flatten(), nn.Linear(widths[-1] * 16, code_dim)]
        decoder += [nn.Conv2d(width, width, 3, padding=1), nn.ELU(), nn.Conv2d(width, channels, 3, padding=1)]
        super().__init__(OrderedDict(encoder=nn.Sequential(*encoder), decoder=nn.Sequential(*decoder)))
