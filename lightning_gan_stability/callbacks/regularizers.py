"""Penalties as callbacks that look at logits, samples or weights instead of the discriminator's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_gan_stability import penalties
from lightning_gan_stability.callbacks.base import NETWORKS, Player, Regularizer, Remembering, check_bool, check_number
from lightning_gan_stability.doors import mean_over_ranks
from lightning_gan_stability.layers import matrices

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule, Play


class _Running(Regularizer, Remembering):
    """A penalty that compares with running means, which move once per batch, by means over it and all ranks."""

    def __init__(self, weight: float, every: int, decay: float) -> None:
        super().__init__(weight, every)
        check_number("decay", decay)
        if decay > 1:
            raise ValueError(f"`decay` must be in [0, 1], got {decay!r}.")
        self.decay = decay
        self._means: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The running means, and the module's iteration when they moved last."""
        return super().state_dict() | {"means": self._means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._means = state_dict["means"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the means of another module."""
        super().on_train_start(trainer, pl_module)
        self._means = None if self._means is None else self._means.to(pl_module.device)

    def _forget(self, module: GANModule) -> None:
        self._means = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the means."""
        module: GANModule = pl_module  # type: ignore[assignment]
        if self.player in module.moved and (seen := self._seen(module)) is not None:
            now = trainer.strategy.reduce(seen, reduce_op="mean")
            start = self._start(now) if self._means is None else self._means
            self._means = torch.lerp(now, start, self._decay_at(module._steps[self.player] - 1))
        self._iteration = module.iteration

    def _seen(self, module: GANModule) -> Tensor | None:
        raise NotImplementedError

    def _start(self, now: Tensor) -> Tensor:
        return now

    def _decay_at(self, step: int) -> float:
        return self.decay


@final
class LeCam(_Running):
    """Adds weight · E[relu(l(x) − α_F)² + relu(α_R − l(G(z)))²] to the discriminator's loss.

    α_R and α_F are running means of the real and fake logits. "Regularizing Generative Adversarial Networks under
    Limited Data", https://arxiv.org/abs/2104.03310, with the relu of the authors' code. Before step ``start`` there is
    no penalty, and the means are those of the last batch. For little data. Costs no pass.

    Args:
        weight: λ, not negative.
        decay: share of the old mean in the new one, in [0, 1].
        start: steps of the discriminator without penalty, 0 or more.
        every: due on every so many steps, and scaled by as much.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> LeCam(start=0).name
        'le_cam'
    """

    differentiates = ()
    second_order = False
    weight = 0.3

    def __init__(self, weight: float = 0.3, decay: float = 0.99, start: int = 1000, every: int = 1) -> None:
        super().__init__(weight, every, decay)
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise ValueError(f"`start` must be an integer that is not negative, got {start!r}.")
        self.start = start

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """The penalty of each pair of logits; 0 before ``start``."""
        real, fake = (module.loss._direction * logits for logits in play.both_logits)
        if self._means is None or module._steps[self.player] < self.start:
            return torch.zeros_like(real)
        return penalties.lecam(real, fake, *self._means)

    def _seen(self, module: GANModule) -> Tensor | None:
        judged = module._now.judged
        return None if judged is None else module.loss._direction * torch.stack([_precise(x).mean() for x in judged])

    def _decay_at(self, step: int) -> float:
        return self.decay if step >= self.start else 0.0


@final
class PathLengthPenalty(_Running):
    """Adds weight · E(‖J_zᵀ y‖ − a)² to the generator's loss, so that equal steps in z change samples equally.

    J_z is the generator's Jacobian, y a random image with pixels of variance 1 / their number, and a the running mean
    of the lengths, at first 0. "Analyzing and Improving the Image Quality of StyleGAN",
    https://arxiv.org/abs/1912.04958; here with respect to the latents themselves. Shares the forward pass of the loss;
    costs its second derivatives.

    Args:
        weight: not negative.
        decay: share of the old mean in the new one, in [0, 1].
        every: due on every so many steps, and scaled by as much.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if the generator has BatchNorm in train mode.

    Example:
        >>> PathLengthPenalty().every
        4
    """

    player = "g"
    differentiates = ("latents",)
    per_sample = True
    weight = 2.0
    every = 4

    def __init__(self, weight: float = 2.0, decay: float = 0.99, every: int = 4) -> None:
        super().__init__(weight, every, decay)
        self._lengths: list[Tensor] = []

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """(‖J_zᵀ y‖ − a)² of each sample, (n,)."""
        noise = module.randn(len(play.fake), *play.fake.shape[1:])
        lengths = penalties.path_lengths(play.latents, play.fake, noise)
        self._lengths.append(lengths.detach())
        return (lengths - (0.0 if self._means is None else self._means)).square()

    def _seen(self, module: GANModule) -> Tensor | None:
        lengths, self._lengths = self._lengths, []
        return _precise(torch.cat(lengths)).mean() if lengths else None

    def _start(self, now: Tensor) -> Tensor:
        return torch.zeros_like(now)

    def _forget(self, module: GANModule) -> None:
        super()._forget(module)
        self._lengths = []


def _precise(x: Tensor) -> Tensor:
    """At least float32: in less a running mean does not move."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


Consistency = Literal["real", "balanced", "latent"]


@final
class ConsistencyPenalty(Regularizer):
    """Adds weight · E(l(x) − l(T(x)))²: the discriminator should not see a difference that does not matter.

    * ``"real"``: over real samples. "Consistency Regularization for Generative Adversarial Networks",
      https://arxiv.org/abs/1910.12027.
    * ``"balanced"``: over real and over fake samples, the sum. "Improved Consistency Regularization for GANs",
      https://arxiv.org/abs/2002.04724, as the next one.
    * ``"latent"``: (l(G(z)) − l(G(z + δ)))² with δ ~ N(0, radius²); and, with ``player="g"``, a second entry, −weight ·
      E(G(z) − G(z + δ))² (mean over values) for the generator, which should see it.

    T mirrors images and moves them by up to an eighth of their size, unless you give another. Costs a forward pass of
    the discriminator (balanced: two; latent: and one of the generator).

    Args:
        kind: over what.
        weight: λ, not negative; None: 10, for ``"latent"`` 20, and 0.5 for the generator.
        transform: T, a module from samples to samples; None: mirror and move, for images (n, channels, height, width).
        radius: standard deviation of δ, positive; None: 0.05.
        player: ``"g"`` for the generator's half of ``"latent"``.
        every: due on every so many steps, and scaled by as much.

    Raises:
        ValueError: if an argument has a bad value or is of no use with ``kind``, or if samples are not images and
            there is no ``transform``.

    Example:
        >>> ConsistencyPenalty("latent").weight, ConsistencyPenalty("latent", player="g").weight
        (20.0, 0.5)
    """

    differentiates = ()
    second_order = False
    compares = True

    def __init__(
        self,
        kind: Consistency = "real",
        weight: float | None = None,
        transform: nn.Module | None = None,
        radius: float | None = None,
        player: Player = "d",
        every: int = 1,
    ) -> None:
        if kind not in get_args(Consistency):
            raise ValueError(f"`kind` must be one of {', '.join(get_args(Consistency))}, got {kind!r}.")
        latent = kind == "latent"
        if player not in ("d", "g") or (player == "g" and not latent):
            raise ValueError(f"`player` must be 'd', or 'g' with kind='latent', got {player!r} and {kind!r}.")
        if (latent and transform is not None) or (not latent and radius is not None):
            raise ValueError(f"`{'transform' if latent else 'radius'}` is of no use with kind={kind!r}.")
        if transform is not None and not isinstance(transform, nn.Module):
            raise ValueError(f"`transform` must be a module from samples to samples, or None, got {transform!r}.")
        super().__init__(
            weight if weight is not None else 10.0 if not latent else 20.0 if player == "d" else 0.5, every
        )
        self.kind: Consistency = kind
        self.transform = transform
        self.radius = 0.05 if radius is None else radius
        check_number("radius", self.radius, positive=True)
        self.player = player

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """The squared difference of each logit; for the generator minus that of each value."""
        if self.kind == "latent":
            return self._latent(module, play)
        real, fake = play.both_logits
        change = self._change(module, play.real, real, play.labels)
        return change + self._change(module, play.fake, fake, play.labels) if self.kind == "balanced" else change

    def _change(self, module: GANModule, samples: Tensor, logits: Tensor, labels: Tensor | None) -> Tensor:
        if self.transform is None and samples.dim() != 4:
            raise ValueError(
                "ConsistencyPenalty mirrors and moves images (n, channels, height, width), but samples have shape "
                f"{tuple(samples.shape)}: give a `transform`, or use kind='latent'."
            )
        if self.transform is None:
            moved = penalties.flip_and_shift(samples, module.rand(len(samples), 3))
        else:
            moved = self.transform.to(samples.device)(samples)
        return (logits - module.discriminate(moved, labels)).square()

    def _latent(self, module: GANModule, play: Play) -> Tensor:
        near = play.latents + self.radius * module.randn(len(play.latents), *play.latents.shape[1:])
        fake = module._fake(play, near)
        if self.player == "g":
            return -(play.fake - fake).square().flatten(1).mean(1)
        return (play.fake_logits - module.discriminate(fake, play.labels)).square()


@final
class OrthogonalPenalty(Regularizer):
    """Adds weight · Σ ‖(W Wᵀ) ⊙ (1 − I)‖_F² over a network's weights to its player's loss: filters at right angles.

    W is a weight as the matrix (out, in · height · width), for every parameter named ``weight`` of two or more
    dimensions but those of embeddings; of a normalized layer, the weight before normalization. "Large Scale GAN
    Training for High Fidelity Natural Image Synthesis", https://arxiv.org/abs/1809.11096 (BigGAN), without the ½ of the
    authors' code. Costs no pass.

    Args:
        weight: β, not negative.
        off_diagonal: leave the lengths of filters alone, as BigGAN does; False: ‖W Wᵀ − I‖_F².
        player: whose network: ``"g"`` (BigGAN) or ``"d"``.
        every: due on every so many steps, and scaled by as much.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> OrthogonalPenalty(weight=1e-4).player
        'g'
    """

    differentiates = ()
    second_order = False
    weight = 1e-4

    def __init__(self, weight: float = 1e-4, off_diagonal: bool = True, player: Player = "g", every: int = 1) -> None:
        super().__init__(weight, every)
        check_bool("off_diagonal", off_diagonal)
        if player not in ("d", "g"):
            raise ValueError(f"`player` must be 'd' or 'g', got {player!r}.")
        self.off_diagonal = off_diagonal
        self.player = player

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a network without matrices."""
        super().on_fit_start(trainer, pl_module)
        name = NETWORKS[self.player]
        try:
            found = matrices(pl_module.get_submodule(name))
        except ValueError as error:
            raise MisconfigurationException(f"OrthogonalPenalty {error}") from None
        if not found:
            raise MisconfigurationException(
                f"OrthogonalPenalty: the {name} has no `weight` of two or more dimensions: remove OrthogonalPenalty."
            )

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """The sum over the network's weights, a scalar."""
        weights = matrices(module.get_submodule(NETWORKS[self.player]))
        return torch.stack([penalties.orthogonality(w, self.off_diagonal) for w in weights]).sum()


@final
class LogitDrift(Regularizer):
    """Adds weight · E l(x)² over real samples to the discriminator's loss, which keeps its logits near 0.

    "Progressive Growing of GANs", https://arxiv.org/abs/1710.10196. For the Wasserstein loss, which does not see a
    constant that is added to all logits. Costs no pass.

    Args:
        weight: ε, not negative.
        every: due on every so many steps, and scaled by as much.
        final_weight: what the weight becomes along half a cosine over ``steps`` steps. None: constant.
        steps: length of this schedule, together with ``final_weight``.

    Raises:
        ValueError: if an argument has a bad value, or one of ``final_weight`` and ``steps`` comes without the other.

    Example:
        >>> LogitDrift().weight
        0.001
    """

    differentiates = ()
    second_order = False

    def __init__(
        self, weight: float = 1e-3, every: int = 1, final_weight: float | None = None, steps: int | None = None
    ) -> None:
        super().__init__(weight, every, final_weight, steps)

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """l(x)² of each real logit."""
        return play.both_logits[0].square()


@final
class ModeSeeking(Regularizer):
    """Adds weight / (mean |G(z₁) − G(z₂)| / mean |z₁ − z₂| + 10⁻⁵) to the generator's loss, against collapse.

    "Mode Seeking Generative Adversarial Networks for Diverse Image Synthesis", https://arxiv.org/abs/1903.05628, with
    second latents for the same labels. The means are over the batch of all ranks, but over the micro-batch with
    ``accumulate``. Costs a forward pass of the generator.

    Args:
        weight: not negative.
        every: due on every so many steps, and scaled by as much.
        final_weight: what the weight becomes along half a cosine over ``steps`` steps. None: constant.
        steps: length of this schedule, together with ``final_weight``.

    Raises:
        ValueError: if an argument has a bad value, or one of ``final_weight`` and ``steps`` comes without the other.

    Example:
        >>> ModeSeeking().name
        'mode_seeking'
    """

    player = "g"
    differentiates = ()
    second_order = False

    def __init__(
        self, weight: float = 1.0, every: int = 1, final_weight: float | None = None, steps: int | None = None
    ) -> None:
        super().__init__(weight, every, final_weight, steps)

    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """The inverse of the mean change of samples per change of latents, a scalar."""
        others = module.randn(len(play.latents), *play.latents.shape[1:])
        samples = module.sample(len(others), play.labels, others)
        changes = torch.stack([(play.fake - samples).abs().mean(), (play.latents - others).abs().mean()])
        change, distance = mean_over_ranks(changes)
        inverse: Tensor = 1 / (change / distance + 1e-5)
        return inverse
