"""Unrolled GANs: the generator's gradient flows through updates of the discriminator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_gan_stability._checks import check_bool, check_choice, check_integer
from lightning_gan_stability.callback import UpdateRule, as_gan, check_once
from lightning_gan_stability.distributed import full_tensor
from lightning_gan_stability.optim import Differentiable, Part
from lightning_gan_stability.outputs import GANOutputs, Terms, tree_leaves, tree_map
from lightning_gan_stability.protocols import GANProtocol

UnrolledObjective: TypeAlias = Literal["generator", "saddle"]


class Unrolling(UpdateRule):
    """Lets the generator anticipate K steps of the discriminator, against mode collapse on low-dimensional data.

    ψ₀ = ψ, ψₖ₊₁ = ψₖ − step of D's optimizer on L_D(θ, ψₖ), and the generator descends d/dθ L_G(θ, ψ_K(θ)), in which
    ψ_K depends on θ too. Then ψ_K is discarded, and the discriminator steps from ψ. "Unrolled Generative Adversarial
    Networks", https://arxiv.org/abs/1611.02163. The K steps are those of the discriminator's own optimizer (SGD, Adam,
    AdamW or RMSprop), from its current moment estimates, with penalties, ``clip_norm``, weight clipping and
    ``augment``. All of them use the batch and the latents of the generator's step. BatchNorm's statistics and spectral
    norm's vectors stay fixed during them. Players step in the order of ``module.plan``. The generator's step runs in
    full precision and uncompiled.

    On the ring of eight Gaussians, in the paper's protocol, K = 10 keeps all modes with ten of ten seeds;
    :class:`~lightning_gan_stability.Packed` does so too, in a quarter of the time. On images with a thousand modes it
    kept 37 in the CPU time in which ``Packed`` and :class:`~lightning_gan_stability.R1Penalty` keep all
    (``examples/benchmarks/ring.py``, ``stacked_digits.py``). For images, try these two first.

    For each step of the generator it costs K forward and backward passes of the discriminator on real and fake samples,
    and their differentiation. With K = 5 a step takes three (small MLPs) to seven times (DCGAN) as long as a plain one.
    Memory grows linearly in K.

    Args:
        steps: K, 5 to 10 in the paper. With a high learning rate of the discriminator, too many inner steps diverge.
        second_order: differentiate through the inner steps. False treats ψ_K as a constant, which halves the cost. This
            approximation keeps the modes of a ring of Gaussians with four of ten seeds, the full method with nine.
        objective: ``"generator"``: the module's own generator loss at ψ_K; ``"saddle"``: the paper's −L_D(θ, ψ_K), of
            the adversarial loss, with its real and its fake term.
        checkpoint: keep only weights and moments between inner steps, and recompute the steps in the backward pass.
            This needs the memory of one step and a fifth to a third more time, and gives the same gradient.
        simultaneous: compute both gradients before either player steps, as in the paper.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: with another optimizer of the discriminator, with ``accumulate``, with recurrent
            layers or sparse embeddings in the discriminator, or with ``second_order`` and SyncBatchNorm. With
            ``simultaneous``, also under a gradient scaler, or if ``module.plan`` contains a player twice.
        ValueError: if a layer of the discriminator uses activation checkpoints (``torch.utils.checkpoint``).

    Example:
        >>> Unrolling(steps=5).second_order
        True
    """

    whole_batch = True

    random: bool

    def __init__(
        self,
        steps: int = 5,
        second_order: bool = True,
        objective: UnrolledObjective = "generator",
        checkpoint: bool = False,
        simultaneous: bool = False,
    ) -> None:
        super().__init__()
        self.steps = check_integer("steps", steps)
        self.second_order = check_bool("second_order", second_order)
        self.objective: UnrolledObjective = check_choice("objective", objective, get_args(UnrolledObjective))
        self.checkpoint = check_bool("checkpoint", checkpoint)
        self.simultaneous = self.holds_gradients = check_bool("simultaneous", simultaneous)
        if checkpoint and not second_order:
            raise ValueError("`checkpoint` saves nothing with `second_order=False`, which keeps no graph: remove one.")
        # whether the discriminator draws random numbers; either way gives the same gradient up to rounding
        self.add_state("random", True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Assume that the discriminator draws random numbers until a batch has shown that it does not."""
        super().setup(trainer, pl_module, stage)
        self.random = True

    def check_plan(self, module: GANProtocol) -> None:
        """With ``simultaneous``, refuse a plan that contains a player twice."""
        if self.simultaneous:
            check_once(self, module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a discriminator or an optimizer that cannot be unrolled."""
        super().on_fit_start(trainer, pl_module)
        try:
            _InnerSteps(self, as_gan(pl_module))
        except ValueError as error:
            raise MisconfigurationException(
                f"Unrolling differentiates through the discriminator's steps, but {error} Use another, or remove "
                "Unrolling."
            ) from error

    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Train the players on one batch."""
        for player in module.plan:
            inner = _InnerSteps(self, module) if player == "g" else None
            # a discriminator whose parameters are all frozen does not step, so there is nothing to unroll
            module.compute_gradients(player, batch, inner if inner is not None and inner.parameters else None)
            if not self.simultaneous:
                module.apply_gradients(player)
        if self.simultaneous:
            for player in module.plan:
                module.apply_gradients(player)


class _InnerSteps:
    """The generator's objective after steps of the discriminator, on one batch."""

    def __init__(self, rule: Unrolling, module: GANProtocol) -> None:
        self.rule, self.module = rule, module
        module.sharding.reshard()
        self.parameters = module.trainable_parameters("d")  # read here, because the generator's step freezes them
        self.generator = module.trainable_parameters("g")
        limit = module.clip_norm.get("d") if isinstance(module.clip_norm, Mapping) else module.clip_norm
        self.step = Differentiable(
            module.optimizer("d").optimizer, self.parameters, limit, lambda weights: [*module.constrain("d", weights)]
        )
        self.run_with = module.substitute(self.parameters)
        # for the generator's penalties: their forward passes update the generator's statistics
        self.run_generator_with = module.substitute(self.parameters, frozen=module.discriminator)

    def __call__(self, batch: Any) -> tuple[GANOutputs, Tensor, Terms]:
        module, rule = self.module, self.rule
        weights = [full_tensor(p).detach().requires_grad_() for p in self.parameters]
        with module.full_precision():
            outputs = module.compute_samples("g", batch, [*module.due("d"), *module.due("g")])
            outputs = self.run_with(weights, module.judge, outputs)
        self.start = module.noise.randomness()
        if rule.checkpoint:
            inputs = [*tree_leaves(outputs.real), *tree_leaves(outputs.fake), *self.generator]
            weights = [*_Checkpointed.apply(self, outputs, weights, *inputs)]
        else:
            parts = None
            for k in range(rule.steps):
                # a discriminator that draws random numbers (dropout) must draw the same ones in every step
                judged = k == 0 and not rule.random
                weights, parts = self.advance(outputs, weights, parts, rule.second_order, judged)
        return self._objective(outputs, weights)

    def advance(
        self,
        outputs: GANOutputs,
        weights: Sequence[Tensor],
        parts: list[Part] | None,
        graph: bool,
        judged: bool = False,
    ) -> tuple[list[Tensor], list[Part]]:
        """One step of the discriminator. Without ``graph`` the weights that it returns are leaves."""
        module = self.module

        def gradients() -> tuple[Tensor | None, ...]:
            loss, _ = module.player_loss("d", outputs if judged else module.judge(_separate(outputs, graph)))
            return torch.autograd.grad(loss, weights, create_graph=graph, allow_unused=True)

        with module.full_precision(), module.replay_randomness(self.start):
            found = self.run_with(weights, gradients)
        with torch.set_grad_enabled(graph):
            moved, parts = self.step(weights, found, parts)
        return moved if graph else [w.detach().requires_grad_() for w in moved], parts

    def _objective(self, outputs: GANOutputs, weights: Sequence[Tensor]) -> tuple[GANOutputs, Tensor, Terms]:
        """The generator's total loss, its penalties included, at given weights of the discriminator."""
        module, saddle = self.module, self.rule.objective == "saddle"
        needs_real = saddle or module.loss.needs_real or any(r.needs_real for r in module.due("g"))

        def adversarial() -> tuple[GANOutputs, Tensor, Terms]:
            judged = module.judge(_separate(outputs, graph=True), real=needs_real)
            judged = judged if needs_real else judged.replace(real_logits=None, real_features=None)
            self.rule.random = not module.noise.randomness().equals(self.start)
            loss, terms = module.adversarial_loss("d" if saddle else "g", judged)
            return (judged, -loss, {k: -v for k, v in terms.items()}) if saddle else (judged, loss, terms)

        with module.full_precision(), module.replay_randomness(self.start):
            judged, loss, values = self.run_with(weights, adversarial)
        total, terms = self.run_generator_with(weights, module.player_loss, "g", judged, loss)
        return judged, total, values | terms


class _Checkpointed(torch.autograd.Function):
    """The discriminator's weights after all inner steps, as a function of samples and of the generator's parameters.

    It takes the generator's parameters because a penalty of the discriminator may generate samples of its own. Forward
    keeps the weights and moments before every step. Backward recomputes the steps from the last to the first, each with
    its graph. (torch.utils.checkpoint would recompute everything at every gradient that is taken inside of a step.)
    """

    @staticmethod
    def forward(
        ctx: Any, inner: _InnerSteps, outputs: GANOutputs, weights: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        real, fake = (tree_map(_leaf_like, tree) for tree in (outputs.real, outputs.fake))
        ctx.inner, ctx.outputs, ctx.kept = inner, outputs.replace(real=real, fake=fake), []
        parts: list[Part] | None = None
        with torch.enable_grad():
            for _ in range(inner.rule.steps):
                ctx.kept.append((weights, parts))
                weights, parts = inner.advance(ctx.outputs, weights, parts, graph=False)
        return tuple(w.detach() for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        back: list[Tensor | None] = list(slopes)
        sources = [*tree_leaves(ctx.outputs.real), *tree_leaves(ctx.outputs.fake), *ctx.inner.generator]
        wanted = [x for x in sources if x.requires_grad]
        totals = [torch.zeros_like(x) for x in wanted]
        for weights, parts in reversed(ctx.kept):
            weights, parts = [w.detach().requires_grad_() for w in weights], parts and [p.as_leaves() for p in parts]
            with torch.enable_grad():
                moved, after = ctx.inner.advance(ctx.outputs, weights, parts, graph=True)
            outputs, inputs = [*moved, *_tensors(after)], [*wanted, *weights, *_tensors(parts or [])]
            pairs = [(o, b) for o, b in zip(outputs, back, strict=False) if b is not None and o.requires_grad]
            found = torch.autograd.grad([o for o, _ in pairs], inputs, [b for _, b in pairs], allow_unused=True)
            totals = [t if g is None else t + g for t, g in zip(totals, found, strict=False)]
            back = list(found[len(wanted) :])
        slope = iter(totals)
        return None, None, None, *(next(slope) if x.requires_grad else None for x in sources)


def _tensors(parts: list[Part]) -> list[Tensor]:
    return [value for part in parts for value in part.state.values() if isinstance(value, Tensor)]


def _leaf_like(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _separate(outputs: GANOutputs, graph: bool) -> GANOutputs:
    """The outputs with new tensors for the samples, on which the weights of earlier steps do not depend.

    A penalty takes the partial derivative with respect to the samples. It must not include the path through the
    weights, which earlier steps computed from the same samples.
    """
    if graph:
        real, fake = (tree_map(lambda x: x.view_as(x), tree) for tree in (outputs.real, outputs.fake))
    else:
        real = tree_map(_leaf_like, outputs.real)
        fake = tree_map(lambda x: x.detach().requires_grad_(), outputs.fake)
    return outputs.replace(real=real, fake=fake)
