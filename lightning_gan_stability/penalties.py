"""Gradient penalties as functions of samples and the logits that a discriminator gave them.

All of them use ∇ₓl(x), the gradient of the logit with respect to the sample it judges. The samples must require grad
before the forward pass; the values can be differentiated again, so a penalty can be added to a loss. The gradient of a
batch is taken as the gradient of the sum of its logits, which is each sample's own gradient as long as the
discriminator judges every sample by itself: BatchNorm in train mode breaks that. Where it judges packs of m samples,
there are n / m logits, and a pack counts as one sample.

A sample may be a tree of tensors: a norm is over all of its leaves. Logits may be those of several discriminators, in a
dict or a list: a penalty is taken for each of them alone, and summed. A discriminator may give a sample several logits,
one for each patch, of which ``patches`` takes the sum or the mean. Their number grows with the sample, and a penalty of
their sum with it, while an adversarial loss is a mean: with ``"sum"``, as papers write it, the right weight depends on
the size of the crops, with ``"mean"`` it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_gan_stability._checks import describe
from lightning_gan_stability.distributed import mean_over_ranks
from lightning_gan_stability.outputs import Logits, Sample, differentiable, entries, tree_leaves, tree_map

Patches: TypeAlias = Literal["sum", "mean"]


def over_patches(logits: Tensor, patches: Patches = "sum") -> Tensor:
    """One value (n,) for each sample from logits (n,) or (n, patches).

    Example:
        >>> over_patches(torch.tensor([[1.0, 3.0]])), over_patches(torch.tensor([[1.0, 3.0]]), "mean")
        (tensor([4.]), tensor([2.]))
    """
    rows = logits.reshape(len(logits), -1)
    return rows.sum(1) if patches == "sum" else rows.mean(1)


def sum_over_entries(function: Callable[..., Tensor], *logits: Logits) -> Tensor:
    """The sum of a function over discriminators, of the logits of each.

    Example:
        >>> sum_over_entries(torch.square, [torch.tensor([1.0]), torch.tensor([2.0])])
        tensor([5.])
    """
    columns = [entries(tree) for tree in logits]
    values = [function(*(column[name] for column in columns)) for name in columns[0]]
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)


def input_gradients(samples: Sample, logits: Tensor, patches: Patches = "sum") -> Tensor:
    """Each sample's ∇ₓl(x), flattened over all leaves, in float32 or better.

    Args:
        samples: (n, ...), requires grad, and ``logits`` were computed from it.
        logits: (n,) or (n, patches) of one discriminator. (n / m,) for packs of m.
        patches: what is differentiated: the sum of a sample's logits, or their mean.

    Returns:
        (n, d) with d the number of values in a sample; (n / m, m d) for packs.

    Raises:
        ValueError: if the samples do not require grad, or the logits do not depend on them.

    Example:
        >>> x = torch.randn(4, 2, requires_grad=True)
        >>> input_gradients(x, x @ torch.tensor([3.0, 4.0]))[0].tolist()
        [3.0, 4.0]
    """
    leaves = tree_leaves(samples)
    fixed = next((leaf for leaf in leaves if not leaf.requires_grad), None)
    if fixed is not None:
        raise ValueError(
            f"A gradient penalty differentiates by samples, but got {describe(fixed)} that does not require grad: let "
            "the discriminator judge the very samples that require grad."
        )
    total = over_patches(logits, patches).sum()
    found = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True) if total.requires_grad else []
    if all(gradient is None for gradient in found):
        raise ValueError(
            "A gradient penalty differentiates logits by samples, but these logits do not depend on them: something in "
            "`discriminate` or `augment` has no gradient (`detach`, `no_grad`, or rounding), or makes new samples."
        )
    both = zip(found, leaves, strict=True)
    parts = [(torch.zeros_like(leaf) if g is None else g).reshape(len(logits), -1) for g, leaf in both]
    gradients = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return gradients.float() if gradients.dtype in (torch.float16, torch.bfloat16) else gradients


def zero_centered(samples: Sample, logits: Logits, patches: Patches = "sum") -> Tensor:
    """The squared gradient norm ‖∇ₓl(x)‖² of each sample: R1 on real samples, R2 on fake ones.

    "Which Training Methods for GANs do actually Converge?", https://arxiv.org/abs/1801.04406. No factor ½ and no mean:
    R1 in the paper's convention is (γ/2) times the mean of these values.

    Args:
        samples: (n, ...), requires grad.
        logits: (n,) or (n, patches), of each discriminator.
        patches: what is differentiated: the sum of a sample's logits, or their mean.

    Returns:
        (n,), not negative.

    Example:
        >>> x = torch.randn(4, 2, requires_grad=True)
        >>> zero_centered(x, x @ torch.tensor([3.0, 4.0])).tolist()
        [25.0, 25.0, 25.0, 25.0]
    """
    return sum_over_entries(lambda entry: input_gradients(samples, entry, patches).square().sum(1), logits)


def centered(
    samples: Sample, logits: Logits, target: float = 1.0, one_sided: bool = False, patches: Patches = "sum"
) -> Tensor:
    """The squared distance (‖∇ₓl(x)‖ − target)² of each sample's gradient norm from a target.

    "Improved Training of Wasserstein GANs", https://arxiv.org/abs/1704.00028; with ``one_sided`` max(0, ‖∇ₓl(x)‖ −
    target)², "On the regularization of Wasserstein GANs", https://arxiv.org/abs/1709.08894. Finite, with a finite
    gradient, where ∇ₓl(x) = 0.

    Args:
        samples: (n, ...), requires grad.
        logits: (n,) or (n, patches), of each discriminator.
        target: the norm that costs nothing.
        one_sided: charge only norms above the target.
        patches: what is differentiated: the sum of a sample's logits, or their mean.

    Returns:
        (n,), not negative.

    Example:
        >>> x = torch.randn(4, 2, requires_grad=True)
        >>> centered(x, x @ torch.tensor([3.0, 4.0])).tolist()
        [16.0, 16.0, 16.0, 16.0]
    """

    def distance(entry: Tensor) -> Tensor:
        # vector_norm has the gradient 0 at 0; the square root of a sum of squares has NaN there
        excess: Tensor = torch.linalg.vector_norm(input_gradients(samples, entry, patches), dim=1) - target
        return (excess.relu() if one_sided else excess).square()

    return sum_over_entries(distance, logits)


def interpolate(real: Sample, fake: Sample, alpha: Tensor) -> Sample:
    """Points α·real + (1 − α)·fake on the lines between pairs of samples; they keep the graph of the fake ones.

    Args:
        real: (n, ...).
        fake: (n, ...).
        alpha: (n,) in [0, 1]: one weight for each pair, for all of its leaves.

    Returns:
        (n, ...), requires grad.

    Example:
        >>> interpolate(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0.25, 0.75])).tolist()
        [[0.25], [0.75]]
    """

    def between(x: Tensor, y: Tensor) -> Tensor:
        share = _per_sample(alpha, x).to(x.dtype)
        return (share * x.detach() + (1 - share) * y).requires_grad_()

    return tree_map(between, real, fake)


def perturb(real: Sample, alpha: Tensor, noise: Sample) -> Sample:
    """DRAGAN's points x + ½·α·std(x)·u around the data, as leaves that require grad.

    "On Convergence and Stability of GANs", https://arxiv.org/abs/1705.07215, as in the authors' code: std(x) is one
    number, the standard deviation of all values in the batch, of all processes; for each leaf of a tree its own.

    Args:
        real: (n, ...).
        alpha: (n,) in [0, 1]: one weight for each sample.
        noise: u, (n, ...), uniform in [0, 1).

    Returns:
        (n, ...), requires grad.

    Example:
        >>> perturb(torch.tensor([[-1.0], [1.0]]), torch.ones(2), torch.ones(2, 1)).tolist()
        [[-0.5], [1.5]]
    """

    def around(x: Tensor, u: Tensor) -> Tensor:
        x = x.detach()
        std = mean_over_ranks((x - mean_over_ranks(x.mean())).square().mean()).sqrt()
        return x + 0.5 * _per_sample(alpha, x).to(x.dtype) * std * u

    return differentiable(tree_map(around, real, noise))


def differences(logits: Logits, others: Logits, patches: Patches = "sum") -> Tensor:
    """The squared difference (l(x) − l(x′))² of two judgements of each sample.

    With x′ = x + σ n and n ~ N(0, I) a gradient penalty without gradients: its mean over n is σ² ‖∇ₓl(x)‖² + O(σ⁴),
    and exactly that for a linear critic. "Diffusion Adversarial Post-Training for One-Step Video Generation",
    https://arxiv.org/abs/2501.08316.

    Args:
        logits: (n,) or (n, patches), of each discriminator.
        others: as ``logits``.
        patches: what is compared: the sum of a sample's logits, or their mean.

    Returns:
        (n,), not negative, in float32 or better.

    Example:
        >>> differences(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0]))
        tensor([9., 0.])
    """

    def squared(entry: Tensor, other: Tensor) -> Tensor:
        difference = over_patches(entry - other, patches)
        return (difference.float() if difference.dtype in (torch.float16, torch.bfloat16) else difference).square()

    return sum_over_entries(squared, logits, others)


def orthogonality(weight: Tensor, off_diagonal: bool = True) -> Tensor:
    """‖(W Wᵀ) ⊙ (1 − I)‖_F² of a weight as the matrix (out, in · height · width), or ‖W Wᵀ − I‖_F².

    "Large Scale GAN Training for High Fidelity Natural Image Synthesis", https://arxiv.org/abs/1809.11096; the authors'
    code adds the gradient of half of it.

    Args:
        weight: (out, ...).
        off_diagonal: leave the lengths of the rows alone, as the paper does; False: make them 1.

    Returns:
        A scalar, not negative; 0 where the rows are orthogonal (and, without ``off_diagonal``, of length 1).

    Example:
        >>> orthogonality(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        tensor(18.)
    """
    rows = weight.flatten(1)
    products = rows @ rows.T
    identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return (products * (1 - identity) if off_diagonal else products - identity).square().sum()


def path_lengths(latents: Tensor, samples: Sample, noise: Sample) -> Tensor:
    """‖J_zᵀ y‖₂ of each sample with the generator's Jacobian J_z and an image y of noise.

    "Analyzing and Improving the Image Quality of StyleGAN", https://arxiv.org/abs/1912.04958; y is ``noise`` divided by
    the root of the number of pixels. With latents (n, layers, d), one for each layer of a synthesis network, the root
    of the mean square over layers, as in the authors' code.

    Args:
        latents: (n, latent_dim) or (n, layers, latent_dim), requires grad, and ``samples`` were computed from it.
        samples: (n, channels, ...) or (n, d).
        noise: standard normal, as ``samples``.

    Returns:
        (n,), not negative.

    Example:
        >>> z = torch.randn(4, 2, requires_grad=True)
        >>> path_lengths(z, 5 * z, torch.tensor([[0.6, 0.8]]).expand(4, 2)).tolist()
        [5.0, 5.0, 5.0, 5.0]
    """

    def projection(x: Tensor, y: Tensor) -> Tensor:
        pixels = x[0, 0].numel() if x.dim() > 1 else 1
        return torch.sum(x * y) / math.sqrt(pixels)

    product = torch.stack(tree_leaves(tree_map(projection, samples, noise))).sum()
    (gradients,) = torch.autograd.grad(product, latents, create_graph=True)
    layers = latents[0, ..., 0].numel()
    lengths: Tensor = torch.linalg.vector_norm(gradients.reshape(len(latents), -1), dim=1)
    return lengths / math.sqrt(layers)


def lecam(real_logits: Tensor, fake_logits: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """relu(l(x) − α_F)² + relu(α_R − l(G(z)))² with running means α_R and α_F of real and fake logits.

    "Regularizing Generative Adversarial Networks under Limited Data", https://arxiv.org/abs/2104.03310, with the relu
    of the authors' code, which the paper's equation does not have.

    Args:
        real_logits: (n,) or (n, patches).
        fake_logits: as ``real_logits``.
        real_mean: α_R, a scalar.
        fake_mean: α_F, a scalar.

    Returns:
        As ``real_logits``, not negative.

    Example:
        >>> lecam(torch.tensor([3.0]), torch.tensor([-1.0]), torch.tensor(2.0), torch.tensor(-2.0))
        tensor([34.])
    """
    return (real_logits - fake_mean).relu().square() + (real_mean - fake_logits).relu().square()


def flip_and_shift(images: Tensor, uniform: Tensor) -> Tensor:
    """Images mirrored left to right with probability ½ and moved by up to an eighth of their size, 0 outside.

    The transformation of "Consistency Regularization for Generative Adversarial Networks",
    https://arxiv.org/abs/1910.12027. Differentiable.

    Args:
        images: (n, channels, height, width).
        uniform: (n, 3) in [0, 1): whether to mirror, and how far to move down and to the right.

    Returns:
        As ``images``.

    Example:
        >>> flip_and_shift(torch.arange(8.0).reshape(1, 1, 1, 8), torch.tensor([[0.9, 0.5, 0.9]]))
        tensor([[[[0., 0., 1., 2., 3., 4., 5., 6.]]]])
    """
    images = torch.where(_per_sample(uniform[:, 0] < 0.5, images), images.flip(-1), images)
    for axis, column in ((2, 1), (3, 2)):
        size = images.shape[axis]
        reach = size // 8
        shift = (uniform[:, column] * (2 * reach + 1)).long() - reach
        source = torch.arange(size, device=images.device) - shift[:, None]  # (n, size)
        shape = (len(images), 1, size, 1) if axis == 2 else (len(images), 1, 1, size)
        inside = ((source >= 0) & (source < size)).reshape(shape)
        moved = images.gather(axis, source.clamp(0, size - 1).reshape(shape).expand_as(images))
        images = torch.where(inside, moved, torch.zeros((), dtype=images.dtype, device=images.device))
    return images


def _per_sample(weights: Tensor, samples: Tensor) -> Tensor:
    return weights.reshape(-1, *[1] * (samples.dim() - 1))
