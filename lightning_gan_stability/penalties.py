"""Gradient penalties as functions of samples and the logits that a discriminator gave them.

All of them use ∇ₓl(x), the gradient of the logit with respect to the sample it judges. The samples must require grad
before the forward pass; the values can be differentiated again, so a penalty can be added to a loss. The gradient of a
batch is taken as the gradient of the sum of its logits, which is each sample's own gradient as long as the
discriminator judges every sample by itself: BatchNorm in train mode breaks that.
"""

import torch
from torch import Tensor


def input_gradients(samples: Tensor, logits: Tensor) -> Tensor:
    """Each sample's ∇ₓl(x), flattened, in float32 or better.

    Args:
        samples: (n, ...), requires grad, and ``logits`` were computed from it.
        logits: (n,) or (n, patches); patches are summed.

    Returns:
        (n, d) with d the number of values in a sample.

    Example:
        >>> x = torch.randn(4, 2, requires_grad=True)
        >>> input_gradients(x, x @ torch.tensor([3.0, 4.0]))[0].tolist()
        [3.0, 4.0]
    """
    (gradients,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    gradients = gradients.reshape(len(samples), -1)
    return gradients.float() if gradients.dtype in (torch.float16, torch.bfloat16) else gradients


def zero_centered(samples: Tensor, logits: Tensor) -> Tensor:
    """The squared gradient norm ‖∇ₓl(x)‖² of each sample: R1 on real samples, R2 on fake ones.

    "Which Training Methods for GANs do actually Converge?", https://arxiv.org/abs/1801.04406. No factor ½ and no mean:
    R1 in the paper's convention is (γ/2) times the mean of these values.

    Args:
        samples: (n, ...), requires grad.
        logits: (n,) or (n, patches).

    Returns:
        (n,), not negative.

    Example:
        >>> x = torch.randn(4, 2, requires_grad=True)
        >>> zero_centered(x, x @ torch.tensor([3.0, 4.0])).tolist()
        [25.0, 25.0, 25.0, 25.0]
    """
    return input_gradients(samples, logits).square().sum(1)


def centered(samples: Tensor, logits: Tensor, target: float = 1.0, one_sided: bool = False) -> Tensor:
    """The squared distance (‖∇ₓl(x)‖ − target)² of each sample's gradient norm from a target.

    "Improved Training of Wasserstein GANs", https://arxiv.org/abs/1704.00028; with ``one_sided`` max(0, ‖∇ₓl(x)‖ −
    target)², "On the regularization of Wasserstein GANs", https://arxiv.org/abs/1709.08894. Finite, with a finite
    gradient, where ∇ₓl(x) = 0.

    Args:
        samples: (n, ...), requires grad.
        logits: (n,) or (n, patches).
        target: the norm that costs nothing.
        one_sided: charge only norms above the target.

    Returns:
        (n,), not negative.

    Example:
        >>> x = torch.randn(4, 2, requires_grad=True)
        >>> centered(x, x @ torch.tensor([3.0, 4.0])).tolist()
        [16.0, 16.0, 16.0, 16.0]
    """
    # vector_norm has the gradient 0 at 0; the square root of a sum of squares has NaN there
    excess: Tensor = torch.linalg.vector_norm(input_gradients(samples, logits), dim=1) - target
    return (excess.relu() if one_sided else excess).square()


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """Points α·real + (1 − α)·fake on the lines between pairs of samples, as a leaf that requires grad.

    Args:
        real: (n, ...).
        fake: (n, ...).
        alpha: (n,) in [0, 1]: one weight for each pair.

    Returns:
        (n, ...), requires grad.

    Example:
        >>> interpolate(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0.25, 0.75])).tolist()
        [[0.25], [0.75]]
    """
    alpha = _per_sample(alpha, real)
    return (alpha * real + (1 - alpha) * fake).detach().requires_grad_()


def perturb(real: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
    """DRAGAN's points x + ½·α·std(x)·u around the data, as a leaf that requires grad.

    "On Convergence and Stability of GANs", https://arxiv.org/abs/1705.07215, as in the authors' code: std(x) is one
    number, the standard deviation of all values in the batch.

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
    return (real + 0.5 * _per_sample(alpha, real) * real.std(correction=0) * noise).detach().requires_grad_()


def _per_sample(weights: Tensor, samples: Tensor) -> Tensor:
    return weights.reshape(-1, *[1] * (samples.dim() - 1))
