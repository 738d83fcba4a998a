"""Unrolled GANs: the generator's gradient flows through updates of the discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_gan_stability.callbacks.base import Regularizer, UpdateRule, check_bool, check_once, check_positive_int
from lightning_gan_stability.callbacks.normalize import WeightClipping
from lightning_gan_stability.doors import Play, Substitution, whole
from lightning_gan_stability.gradients import Terms, same
from lightning_gan_stability.optim import Differentiable, Part

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule

Objective = Literal["generator", "saddle"]


@final
class Unrolling(UpdateRule):
    """The generator foresees how the discriminator will answer, which keeps it from collapsing onto one mode.

    ψ₀ = ψ, ψₖ₊₁ = ψₖ − step of D's optimizer on L_D(θ, ψₖ), and the generator descends d/dθ L_G(θ, ψ_K(θ)), in which
    ψ_K depends on θ too; then ψ_K is forgotten, and the discriminator steps from where it stood. "Unrolled Generative
    Adversarial Networks", https://arxiv.org/abs/1611.02163. The K steps are those that the discriminator's own SGD,
    Adam, AdamW or RMSprop would take from its live moments, with due penalties, ``clip_norm``, weight clipping and
    ``augment``, all on the batch and the latents of the generator's step; BatchNorm's statistics and spectral norm's
    vectors do not move in them. Players move in the order of ``module.plan``. The generator's step runs in full
    precision and uncompiled.

    Costs K forward and backward passes of the discriminator on real and fake samples, and their differentiation, for
    each step of the generator: three (small MLPs) to seven times (DCGAN) a plain step with K = 5. Memory grows linearly
    in K.

    Args:
        steps: K. 5 to 10 in the paper; with a high learning rate of the discriminator too many diverge.
        second_order: False: ψ_K is taken for a constant. It halves the cost and is an approximation, which keeps the
            modes of a ring of Gaussians with four of ten seeds where the real method does with nine.
        objective: ``"generator"``: the module's own generator loss at ψ_K; ``"saddle"``: the paper's −L_D(θ, ψ_K), of
            the adversarial loss, with its real and its fake term.
        checkpoint: keep only weights and moments between inner steps, and take the steps again on the way back: the
            memory of one step, a fifth to a third more time, the same gradient.
        simultaneous: take both gradients before either player steps, as the paper does.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: with another optimizer of the discriminator, with ``accumulate``, with recurrent
            layers or sparse embeddings in the discriminator, in second order with SyncBatchNorm, or with
            ``simultaneous`` under a gradient scaler or if a player stands twice in ``module.plan``. Activation
            checkpoints (``torch.utils.checkpoint``) in the discriminator fail with torch's own error.

    Example:
        >>> Unrolling(steps=5).second_order
        True
    """

    whole_batch = True

    def __init__(
        self,
        steps: int = 5,
        second_order: bool = True,
        objective: Objective = "generator",
        checkpoint: bool = False,
        simultaneous: bool = False,
    ) -> None:
        check_positive_int("steps", steps)
        for name, value in (("second_order", second_order), ("checkpoint", checkpoint), ("simultaneous", simultaneous)):
            check_bool(name, value)
        if objective not in get_args(Objective):
            raise ValueError(f"`objective` must be one of {', '.join(get_args(Objective))}, got {objective!r}.")
        if checkpoint and not second_order:
            raise ValueError("`checkpoint` saves nothing with `second_order=False`, which keeps no graph: drop one.")
        self.steps, self.second_order, self.objective = steps, second_order, objective
        self.checkpoint, self.simultaneous = checkpoint, simultaneous
        self.holds_gradients = simultaneous
        self._random = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Until the discriminator has shown that it draws no noise of its own, it counts as one that does."""
        super().setup(trainer, pl_module, stage)
        self._random = True

    def state_dict(self) -> dict[str, Any]:
        """Whether the discriminator draws noise: two ways to the same gradient, which differ by rounding."""
        return {"random": self._random}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._random = state_dict["random"]

    def check_plan(self, module: GANModule) -> None:
        """With ``simultaneous``, refuse a plan in which a player stands twice."""
        if self.simultaneous:
            check_once(self, module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be unrolled."""
        super().on_fit_start(trainer, pl_module)
        try:
            _Inner(self, pl_module)  # type: ignore[arg-type]
        except ValueError as error:
            raise MisconfigurationException(
                f"Unrolling differentiates through the discriminator's steps, but {error} Use another, or remove "
                "Unrolling."
            ) from error

    def __call__(self, module: GANModule, batch: Any) -> None:
        """Move the players on one batch."""
        for player in module.plan:
            if player == "g" and (inner := _Inner(self, module)).parameters:
                module._compute("g", batch, inner)
            else:  # a discriminator whose parameters are all frozen will not answer
                module.compute_gradients(player, batch)
            if not self.simultaneous:
                module.apply_gradients(player)
        if self.simultaneous:
            for player in module.plan:
                module.apply_gradients(player)


class _Inner:
    """The generator's objective after the inner steps, on one batch."""

    def __init__(self, rule: Unrolling, module: GANModule) -> None:
        self.rule, self.module = rule, module
        module._reshard()
        self.parameters = module._moving("d")  # asked for here, because the generator's turn freezes them
        self.generator = module._moving("g")
        limits = [
            c.limit for c in module._callbacks() if isinstance(c, WeightClipping) and c.network == "discriminator"
        ]
        optimizer = module._optimizer("d").optimizer
        self.step = Differentiable(optimizer, self.parameters, module.clip_norm, min(limits, default=None))
        self.substitute = Substitution(module, self.parameters)
        # in the generator's own forward pass its statistics move
        self.meet = Substitution(module, self.parameters, still=module.discriminator)

    def __call__(self, batch: Any, due: list[Regularizer]) -> tuple[Play, Tensor, Terms]:
        module, rule = self.module, self.rule
        self.due = module._due("d")
        module._now.differentiate = module._now.differentiate.union(*(r.differentiates for r in self.due))
        weights = [whole(p).detach().requires_grad_() for p in self.parameters]
        with module._precise(), self.meet(weights):
            play = module._judge(module.play("g", batch), only_missing=True)
        self.start = module._randomness()
        if rule.checkpoint:
            weights = _Checkpointed.apply(self, play, weights, play.real, play.fake, *self.generator)
        else:
            parts = None
            for k in range(rule.steps):
                # a discriminator that draws (dropout) must draw the same in every step, also in the first
                judged = k == 0 and not rule._random
                weights, parts = self.advance(play, weights, parts, rule.second_order, judged)
        return self._objective(play, weights, due)

    def advance(
        self, play: Play, weights: Sequence[Tensor], parts: list[Part] | None, graph: bool, judged: bool = False
    ) -> tuple[list[Tensor], list[Part]]:
        """One step of the discriminator, with a graph or as leaves without."""
        module = self.module
        with module._precise(), self.substitute(weights), module._rewound(self.start):
            play = play if judged else module._judge(_apart(play, graph))
            loss, _ = module._total("d", play, module._adversarial("d", play), self.due)
            gradients = torch.autograd.grad(loss, weights, create_graph=graph, allow_unused=True)
        with torch.set_grad_enabled(graph):
            moved, parts = self.step(weights, gradients, parts)
        return moved if graph else [w.detach().requires_grad_() for w in moved], parts

    def _objective(self, play: Play, weights: Sequence[Tensor], due: list[Regularizer]) -> tuple[Play, Tensor, Terms]:
        """The generator's whole loss, its penalties included, at given weights of the discriminator."""
        module, saddle = self.module, self.rule.objective == "saddle"
        with module._precise(), self.substitute(weights), module._rewound(self.start):
            play = _apart(play, graph=True)
            if saddle or module.loss.needs_real:
                play = module._judge(play)
            else:
                play = play._replace(real_logits=None, fake_logits=module.discriminate(play.fake, play.labels))
            self.rule._random = not same(module._randomness(), self.start)
            loss = -module._adversarial("d", play) if saddle else module._adversarial("g", play)
        with self.meet(weights):
            return play, *module._total("g", play, loss, due)


class _Checkpointed(torch.autograd.Function):
    """The discriminator's weights after all inner steps, as a function of samples and of the generator's parameters.

    Of the parameters, because a penalty of the discriminator may ask for samples of its own. Forward keeps the weights
    and moments before every step; backward takes the steps again, from the last to the first, each with its graph.
    (torch.utils.checkpoint would start over at every gradient that is taken inside of a step.)
    """

    @staticmethod
    def forward(ctx: Any, inner: _Inner, play: Play, weights: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        real, fake = (x.detach().requires_grad_(x.requires_grad) for x in inputs[:2])
        ctx.inner, ctx.play, ctx.kept = inner, play._replace(real=real, fake=fake), []
        parts: list[Part] | None = None
        with torch.enable_grad():
            for _ in range(inner.rule.steps):
                ctx.kept.append((weights, parts))
                weights, parts = inner.advance(ctx.play, weights, parts, graph=False)
        return tuple(w.detach() for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        back: list[Tensor | None] = list(slopes)
        sources = [ctx.play.real, ctx.play.fake, *ctx.inner.generator]
        wanted = [x for x in sources if x.requires_grad]
        totals = [torch.zeros_like(x) for x in wanted]
        for weights, parts in reversed(ctx.kept):
            weights, parts = [w.detach().requires_grad_() for w in weights], parts and [p.as_leaves() for p in parts]
            with torch.enable_grad():
                moved, after = ctx.inner.advance(ctx.play, weights, parts, graph=True)
            outputs, inputs = [*moved, *_tensors(after)], [*wanted, *weights, *_tensors(parts or [])]
            pairs = [(o, b) for o, b in zip(outputs, back, strict=False) if b is not None and o.requires_grad]
            found = torch.autograd.grad([o for o, _ in pairs], inputs, [b for _, b in pairs], allow_unused=True)
            totals = [t if g is None else t + g for t, g in zip(totals, found, strict=False)]
            back = list(found[len(wanted) :])
        slope = iter(totals)
        return None, None, None, *(next(slope) if x.requires_grad else None for x in sources)


def _tensors(parts: list[Part]) -> list[Tensor]:
    return [value for part in parts for value in part.state.values() if isinstance(value, Tensor)]


def _apart(play: Play, graph: bool) -> Play:
    """The play with its samples as tensors of their own, that the weights of the steps before do not depend on.

    A penalty's gradient with respect to samples is partial: not through the weights, which earlier steps have made
    from the same samples.
    """
    if graph:
        return play._replace(real=play.real.view_as(play.real), fake=play.fake.view_as(play.fake))
    real = play.real.detach().requires_grad_(play.real.requires_grad)
    return play._replace(real=real, fake=play.fake.detach().requires_grad_())
