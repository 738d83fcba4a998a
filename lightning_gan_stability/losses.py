"""Adversarial losses: what the discriminator and the generator minimize, as functions of logits.

A logit l is what the discriminator returns, before any sigmoid; σ(l) = 1/(1 + e⁻ˡ) and sp(l) = log(1 + eˡ). E_r and E_f
are means over real and fake samples. Every method returns one value per logit, and the caller takes the mean; the
discriminator's real and fake parts are added index by index. Losses of float16 and bfloat16 logits are computed in
float32.

With several discriminators the loss of each is computed separately and the losses are summed, as in HiFi-GAN, DAC and
pix2pixHD. ``reduction="mean"`` averages them, as in SPADE and EnCodec.
"""

import abc
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gan_stability._checks import (
    check_bool,
    check_choice,
    check_finite,
    check_number,
    check_share,
    is_plain,
)
from lightning_gan_stability._compat import Float32Buffers
from lightning_gan_stability.distributed import mean_over_ranks

Reduction = Literal["sum", "mean"]
Kind = Literal["kl", "reverse_kl", "pearson", "neyman", "squared_hellinger", "jensen_shannon", "gan", "total_variation"]


class AdversarialLoss(nn.Module, abc.ABC):
    """Base class of adversarial losses. To add a loss, write the two methods and set the attributes that apply.

    Logits are (n,) or (n, patches). Real and fake logits must have the same shape, which is also that of the values.

    Args:
        reduction: how the losses of several discriminators are combined: ``"sum"`` or ``"mean"``.

    Attributes:
        needs_real: the generator's loss also needs the real logits.
        couples_batch: each value depends on all samples of the batch, so micro-batches would change the loss.
        zero_sum: L_D + L_G does not depend on the generator.
        log_ratio: at the optimum a logit is log p/q of the densities of real and generated samples, up to a constant.
        judges_reconstructions: logits are the reconstruction errors of an auto-encoder.
        threshold: the logit that separates real from fake samples, used by :meth:`accuracy`. None, the default: only
            differences of logits have a meaning, and accuracy compares pairs of real and fake logits.
        direction: 1.0: a higher logit looks more real; −1.0: a lower one does.

    Raises:
        ValueError: if ``reduction`` has another value, or if the shapes of logits differ.

    Example:
        >>> class Linear(AdversarialLoss):
        ...     def discriminator(self, real_logits, fake_logits):
        ...         return fake_logits - real_logits
        ...     def generator(self, fake_logits, real_logits=None):
        ...         return -fake_logits
        >>> Linear().discriminator(torch.tensor([2.0]), torch.tensor([-1.0]))
        tensor([-3.])
    """

    needs_real: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False
    zero_sum: bool = False
    log_ratio: bool = False
    judges_reconstructions: ClassVar[bool] = False
    threshold: float | None = None
    direction: float = 1.0
    reduction: Reduction = "sum"

    def __init__(self, reduction: Reduction = "sum") -> None:
        super().__init__()
        self.reduction = check_choice("reduction", reduction, get_args(Reduction))

    @abc.abstractmethod
    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the values whose mean the discriminator minimizes."""

    @abc.abstractmethod
    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """Return the values whose mean the generator minimizes; only a loss with ``needs_real`` reads real logits."""

    def accuracy(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the share of logits that the discriminator classifies correctly, a scalar in [0, 1]."""
        real, fake = (self.direction * logits for logits in _pair(real_logits, fake_logits))
        if self.threshold is None:
            return (real > fake).float().mean()
        tie = self.direction * self.threshold
        return torch.stack([real > tie, fake < tie]).float().mean()


class Minimax(AdversarialLoss):
    """The original minimax loss: the discriminator minimizes the cross-entropy, the generator its negative.

    L_D = E_r sp(−l) + E_f sp(l) and L_G = −E_f sp(l). "Generative Adversarial Nets", https://arxiv.org/abs/1406.2661.
    There is no factor ½: L_D is 2 log 2 for a constant D, and log 4 − 2 JS(p, q) at its optimum l = log p/q. The
    gradient of L_G vanishes as D gets better.

    Example:
        >>> Minimax().discriminator(torch.zeros(2), torch.zeros(2))
        tensor([1.3863, 1.3863])
    """

    zero_sum = True
    log_ratio = True
    threshold = 0.0

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        return _softplus(-real) + _softplus(fake)

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -_softplus(_precise(fake_logits))


class NonSaturating(AdversarialLoss):
    """The original loss with a generator that maximizes log σ(l), whose gradient does not vanish as D gets better.

    L_D = E_r [α sp(−l) + (1 − α) sp(l)] + E_f sp(l) and L_G = E_f sp(−l). "Generative Adversarial Nets",
    https://arxiv.org/abs/1406.2661; α < 1 is the one-sided label smoothing of "Improved Techniques for Training GANs",
    https://arxiv.org/abs/1606.03498: the optimum is σ(l) = α p/(p + q). The label of fake samples stays 0. There is no
    factor ½.

    Args:
        real_label: α in (0, 1], the discriminator's target for real samples.

    Raises:
        ValueError: if ``real_label`` is not in (0, 1].

    Example:
        >>> NonSaturating().generator(torch.tensor([-100.0, 0.0]))
        tensor([100.0000,   0.6931])
    """

    threshold = 0.0

    def __init__(self, real_label: float = 1.0, reduction: Reduction = "sum") -> None:
        super().__init__(reduction)
        self.real_label = check_share("real_label", real_label, open_start=True)
        self.log_ratio = real_label == 1

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        if self.real_label == 1:
            return _softplus(-real) + _softplus(fake)
        return self.real_label * _softplus(-real) + (1 - self.real_label) * _softplus(real) + _softplus(fake)

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return _softplus(-_precise(fake_logits))


class LeastSquares(AdversarialLoss):
    """Squared distances of the logits from labels (LSGAN).

    L_D = ½ E_r (l − b)² + ½ E_f (l − a)² and L_G = ½ E_f (l − c)². "Least Squares Generative Adversarial Networks",
    https://arxiv.org/abs/1611.04076, with its ½. L_D is smallest at l = (b p + a q)/(p + q).

    Args:
        a: the discriminator's label of fake samples.
        b: the discriminator's label of real samples.
        c: the generator's label of its samples.

    Raises:
        ValueError: if a label is not a finite number, or ``a`` equals ``b``.

    Example:
        >>> LeastSquares().discriminator(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor([0.0000, 2.5000])
    """

    def __init__(self, a: float = 0.0, b: float = 1.0, c: float = 1.0, reduction: Reduction = "sum") -> None:
        super().__init__(reduction)
        for name, value in (("a", a), ("b", b), ("c", c)):
            check_finite(name, value)
        if a == b:
            raise ValueError(f"`a` and `b` must differ, got {a!r} for both.")
        self.a, self.b, self.c = a, b, c
        self.threshold, self.direction = (a + b) / 2, math.copysign(1.0, b - a)

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        return ((real - self.b).square() + (fake - self.a).square()) / 2

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return (_precise(fake_logits) - self.c).square() / 2


class Wasserstein(AdversarialLoss):
    """The difference of the mean logits: minus the Wasserstein-1 distance for an optimal 1-Lipschitz discriminator.

    L_D = E_f l − E_r l and L_G = −E_f l. "Wasserstein GAN", https://arxiv.org/abs/1701.07875. It needs a constraint on
    the discriminator: weight clipping, a gradient penalty or spectral normalization. Accuracy is the share of pairs in
    which the real logit is higher.

    Example:
        >>> Wasserstein().discriminator(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([-2.])
    """

    zero_sum = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        return fake - real

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -_precise(fake_logits)


class Hinge(AdversarialLoss):
    """A hinge loss for the discriminator, without gradient from logits beyond ±1; a linear loss for the generator.

    L_D = E_r max(0, 1 − l) + E_f max(0, 1 + l) and L_G = −E_f l. "Geometric GAN", https://arxiv.org/abs/1705.02894.
    There is no factor ½: L_D is 2 for logits of 0, and 2 (1 − TV(p, q)) at its optimum.

    Example:
        >>> Hinge().discriminator(torch.tensor([0.5, 3.0]), torch.tensor([0.5, -3.0]))
        tensor([2., 0.])
    """

    threshold = 0.0

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        return (1 - real).relu() + (1 + fake).relu()

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return -_precise(fake_logits)


class BoundaryEquilibrium(Float32Buffers, AdversarialLoss):
    """The loss of an auto-encoder discriminator, which reconstructs real samples well and fake ones badly (BEGAN).

    L_D = 𝓛(x) − k 𝓛(G(z)) and L_G = 𝓛(G(z)), with k ← clip(k + λ (γ 𝓛(x) − 𝓛(G(z))), 0, 1) after every step of D.
    "BEGAN: Boundary Equilibrium Generative Adversarial Networks", https://arxiv.org/abs/1703.10717. "Logits" are the
    reconstruction errors 𝓛; a smaller one looks more real. Like BatchNorm's statistics, ``k`` and ``convergence`` are
    updated only in train mode: :meth:`discriminator` updates them after computing its values, with means over the batch
    and all ranks.

    Args:
        gamma: γ in [0, 1], the diversity ratio E 𝓛(G(z)) / E 𝓛(x) to settle at. A lower one gives sharper, less diverse
            samples.
        lambda_k: λ > 0, the step size of ``k``.

    Attributes:
        k: 0-dim buffer in [0, 1], initially 0.
        convergence: 0-dim buffer, the paper's measure M = 𝓛(x) + |γ 𝓛(x) − 𝓛(G(z))| at the last update, initially 0.

    Raises:
        ValueError: if ``gamma`` is not in [0, 1], or ``lambda_k`` is not positive and finite.

    Example:
        >>> loss = BoundaryEquilibrium(gamma=0.5, lambda_k=0.1)
        >>> loss.discriminator(torch.tensor([4.0]), torch.tensor([1.0])), loss.k, loss.convergence
        (tensor([4.]), tensor(0.1000), tensor(5.))
    """

    judges_reconstructions = True
    direction = -1.0

    def __init__(self, gamma: float = 0.5, lambda_k: float = 1e-3) -> None:
        super().__init__()
        check_share("gamma", gamma)
        check_number("lambda_k", lambda_k, positive=True)
        self.gamma, self.lambda_k = gamma, lambda_k
        # float32 whatever the module is cast to: in bfloat16 steps of 1e-3 would be lost to rounding
        self.k = nn.Buffer(torch.zeros((), dtype=torch.float32))
        self.convergence = nn.Buffer(torch.zeros((), dtype=torch.float32))

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        values = real - self.k.clone() * fake  # a copy: autograd needs this value of k after the buffer is updated
        if self.training:
            # GANModule keeps its loss in eval mode while it computes gradients. After D's step it calls it once in
            # train mode with all logits of the batch, so micro-batches and repeated evaluations update k only once
            self._move(real, fake)
        return values

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return _precise(fake_logits)

    @torch.no_grad()
    def _move(self, real: Tensor, fake: Tensor) -> None:
        real_mean, fake_mean = mean_over_ranks(torch.stack([real.mean(), fake.mean()]))
        balance = self.gamma * real_mean - fake_mean
        self.k.copy_((self.k + self.lambda_k * balance).clamp(0, 1))
        self.convergence.copy_(real_mean + balance.abs())


class Relativistic(AdversarialLoss):
    """The relativistic pairing loss (RpGAN, RSGAN): each real sample should have a higher logit than its fake partner.

    L_D = E sp(−(l_r − l_f)) and L_G = E sp(l_r − l_f) over pairs by index. "The relativistic discriminator: a key
    element missing from standard GAN", https://arxiv.org/abs/1807.00734; also in "The GAN is dead; long live the GAN! A
    Modern GAN Baseline", https://arxiv.org/abs/2501.05441. L_D is log 2 for a constant D. Accuracy is the share of
    pairs in which the real logit is higher.

    Example:
        >>> Relativistic().discriminator(torch.tensor([100.0, 7.0]), torch.tensor([200.0, 7.0]))
        tensor([100.0000,   0.6931])
    """

    needs_real = True
    log_ratio = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        return _softplus(fake - real)

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return self.discriminator(fake_logits, _need(real_logits, self))


class RelativisticAverage(AdversarialLoss):
    """The relativistic average loss (RaSGAN): each logit is compared with the mean logit of the other kind.

    L_D = ½ [E_r sp(−(l − m_f)) + E_f sp(l − m_r)] and L_G the same with real and fake exchanged, where m_r and m_f are
    the mean logits (of all patches and ranks), through which the gradient flows. "The relativistic discriminator: a key
    element missing from standard GAN", https://arxiv.org/abs/1807.00734. With this ½, L_D is log 2 for a constant D.

    Example:
        >>> RelativisticAverage().discriminator(torch.tensor([7.0, 7.0]), torch.tensor([7.0, 7.0]))
        tensor([0.6931, 0.6931])
    """

    needs_real = True
    couples_batch = True

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        real_mean, fake_mean = mean_over_ranks(torch.stack([real.mean(), fake.mean()]))
        return (_softplus(fake_mean - real) + _softplus(fake - real_mean)) / 2

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        return self.discriminator(fake_logits, _need(real_logits, self))


class FDivergence(AdversarialLoss):
    """The variational bound of an f-divergence D_f(p‖q) = E_q f(p/q) (f-GAN).

    L_D = −E_r g(v) + E_f f∗(g(v)) and L_G = −E_f f∗(g(v)), or −E_f g(v) without ``saturating``; v is the logit, f∗ the
    convex conjugate of f and g the paper's output activation. "f-GAN: Training Generative Neural Samplers using
    Variational Divergence Minimization", https://arxiv.org/abs/1606.00709. At its optimum L_D is −D_f(p‖q), with f(u) =
    u log u for "kl", −log u for "reverse_kl", (u − 1)² for "pearson", (1 − u)²/u for "neyman", (√u − 1)² for
    "squared_hellinger", u log u − (1 + u) log((1 + u)/2) for "jensen_shannon" (twice the usual JS), u log u − (1 + u)
    log(1 + u) for "gan" and ½ |u − 1| for "total_variation". Above the exponent 40 each exponential is continued by its
    tangent, which keeps values and gradients finite in float32. A gradient may still overflow in float16.

    Args:
        kind: the divergence.
        saturating: the generator minimizes the bound itself; False: the paper's heuristic.

    Raises:
        ValueError: if ``kind`` has another value, or ``saturating`` is not a bool.

    Example:
        >>> FDivergence("kl").discriminator(torch.ones(2), torch.ones(2))
        tensor([0., 0.])
    """

    def __init__(self, kind: Kind, saturating: bool = True, reduction: Reduction = "sum") -> None:
        super().__init__(reduction)
        self.kind: Kind = check_choice("kind", kind, get_args(Kind))
        self.saturating = self.zero_sum = check_bool("saturating", saturating)
        self.threshold = 1.0 if kind == "kl" else 0.0  # where g(v) = f'(1)

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        real, fake = _pair(real_logits, fake_logits)
        activation, conjugate = _F_DIVERGENCES[self.kind]
        return conjugate(fake) - activation(real)

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        activation, conjugate = _F_DIVERGENCES[self.kind]
        return -(conjugate if self.saturating else activation)(_precise(fake_logits))


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pair(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    if real.shape != fake.shape:
        raise ValueError(
            f"`real_logits` and `fake_logits` must have the same shape, got {tuple(real.shape)} and "
            f"{tuple(fake.shape)}: the loss pairs them by index."
        )
    return _precise(real), _precise(fake)


def _need(real_logits: Tensor | None, loss: AdversarialLoss) -> Tensor:
    if real_logits is None:
        raise ValueError(f"`{type(loss).__name__}` compares with real logits: pass `real_logits`.")
    return real_logits


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(
        x, threshold=40.0
    )  # above 40 softplus(x) = x in float64; torch's default of 20 has an error of 2e-9


def _exp(x: Tensor, end: float = 40.0) -> Tensor:
    # above `end` the tangent, so that the slope, and its square in Adam, fit into float32
    return x.clamp(max=end).exp() * (1 + (x - end).relu())


# g(v), and f*(g(v)) as one expression, because computing f* of g(v) would overflow or cancel
_F_DIVERGENCES: dict[Kind, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (lambda v: v, lambda v: _exp(v - 1)),
    "reverse_kl": (lambda v: -_exp(-v), lambda v: v - 1),
    "pearson": (lambda v: v, lambda v: v.square() / 4 + v),
    "neyman": (lambda v: 1 - _exp(-v), lambda v: 2 - 2 * _exp(-v / 2)),
    "squared_hellinger": (lambda v: 1 - _exp(-v), lambda v: _exp(v) - 1),
    "jensen_shannon": (lambda v: math.log(2) - _softplus(-v), lambda v: _softplus(v) - math.log(2)),
    "gan": (lambda v: -_softplus(-v), _softplus),
    "total_variation": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
}


# ---------- losses in checkpoints


def loss_recipe(loss: AdversarialLoss) -> dict[str, Any]:
    """The class and the arguments of a loss as plain data for a checkpoint, read from its attributes.

    Arguments are None if some of them are not attributes of the loss. Then the loss cannot be rebuilt.

    Example:
        >>> loss_recipe(NonSaturating(real_label=0.9))
        {'name': 'NonSaturating', 'arguments': {'real_label': 0.9, 'reduction': 'sum'}}
    """
    parameters = inspect.signature(type(loss)).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments = {name: getattr(loss, name, loss) for name in named}
    return {"name": type(loss).__qualname__, "arguments": arguments if is_plain(arguments) else None}


def loss_from_recipe(recipe: Mapping[str, Any]) -> AdversarialLoss:
    """Rebuild the loss of a recipe; its class must have been imported.

    Raises:
        ValueError: if no such class has been imported, or the arguments do not suffice.

    Example:
        >>> loss_from_recipe({"name": "NonSaturating", "arguments": {"real_label": 0.9}}).real_label
        0.9
    """
    try:
        kinds = _subclasses(AdversarialLoss)  # type: ignore[type-abstract]
        return next(kind for kind in kinds if kind.__qualname__ == recipe["name"])(**recipe["arguments"])
    except (StopIteration, TypeError) as error:
        raise ValueError(
            f"The checkpoint was made with {recipe['name']}, which cannot be rebuilt from the arguments "
            f"{recipe['arguments']}: import the class, or pass an instance."
        ) from error


def _subclasses(kind: type[AdversarialLoss]) -> Iterator[type[AdversarialLoss]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
