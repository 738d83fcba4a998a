"""Engine: computes the gradients and takes the steps of the players of a GANModule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from lightning_gan_stability._checks import describe, is_number, is_term_name
from lightning_gan_stability._compat import is_compiled, unscales_itself, version
from lightning_gan_stability.callback import GANCallback, Regularizer, UpdateRule, callbacks_of, gradient_scaler
from lightning_gan_stability.finite import (
    Finding,
    NotFinite,
    Replay,
    Turn,
    after_delay,
    finite_so_far,
    in_data,
    in_turn,
    in_weights,
    is_finite,
    isolated,
)
from lightning_gan_stability.layers import parameter_dtype
from lightning_gan_stability.losses import AdversarialLoss
from lightning_gan_stability.outputs import (
    NETWORKS,
    PLAYERS,
    GANOutputs,
    Player,
    Terms,
    Unpacked,
    batch_size,
    clone,
    concatenate,
    detached,
    differentiable,
    entries,
    micro_batches,
    take_rows,
    tree_map,
)
from lightning_gan_stability.sharding import total_norm, without_exchange

if TYPE_CHECKING:
    from lightning_gan_stability.protocols import GANProtocol

#: For a (micro-)batch: the player's outputs, its total loss, and the terms of the loss for the log.
Objective: TypeAlias = Callable[[Any], tuple[GANOutputs, Tensor, Terms]]

# what networks that run in half precision return
_HALVED = (
    "extras",
    *(f"{side}{suffix}" for side in ("real", "fake") for suffix in ("", "_logits", "_features", "_activations")),
)


def adversarial_losses(loss: AdversarialLoss, player: Player, outputs: GANOutputs) -> dict[str, Tensor]:
    """A player's adversarial loss for each discriminator: the mean over its logits.

    Example:
        >>> from lightning_gan_stability import Wasserstein
        >>> outputs = GANOutputs(None, None, fake_logits=[torch.ones(2), torch.full((2,), 3.0)])
        >>> adversarial_losses(Wasserstein(), "g", outputs)
        {'0': tensor(-1.), '1': tensor(-3.)}
    """
    if player == "d":
        return {name: loss.discriminator(real, fake).mean() for name, real, fake in outputs.pairs()}
    fake = entries(outputs.fake_logits)
    if outputs.real_logits is None:
        return {name: loss.generator(logits, None).mean() for name, logits in fake.items()}
    return {name: loss.generator(logits, real).mean() for name, real, logits in outputs.pairs()}


@dataclass(slots=True)
class Failure:
    """A loss or a gradient that was not finite.

    Attributes:
        step: the iteration.
        player: the player whose update it was.
        terms: the terms that were not finite, by their keys in the log.
        turn: inputs of the gradient's computation, if known.
        versions: how often each parameter had changed at that time.
    """

    step: int
    player: Player
    terms: list[str]
    turn: Turn | None
    versions: list[int]

    def message(self, finding: Finding | None = None) -> str:
        """The error message."""
        advice = (
            f"lower the learning rate of `{self.player}_optimizer`, or of the other player's, set `clip_norm`, or add "
            "R1Penalty."
        )
        text = f"Not finite in the {NETWORKS[self.player]}'s update at step {self.step}: {', '.join(self.terms)}."
        if finding is None:
            return f"{text} If the data are finite, {advice}"
        return f"{text} {finding.text} {finding.advice or advice[0].upper() + advice[1:]}"


class Engine:
    """Computes the gradients and takes the steps of a GANModule's players.

    Args:
        module: the GAN.
    """

    def __init__(self, module: GANProtocol) -> None:
        self.module = module
        self.compiled: bool | None = None  # whether a network is; None: nobody has looked yet
        self._looked = False  # at what the discriminator returns beside its logits
        self._separate: Regularizer | None = None  # the penalty whose own step is being taken
        self.turn: Player | None = None  # whose main pass through the networks is under way in a step
        # of the batch at hand, which asks for them often
        self._callbacks: list[GANCallback] | None = None
        self._optimizers: dict[Player, LightningOptimizer] | None = None
        self._latent_dtype: torch.dtype | None = None
        self._stateful: tuple[AdversarialLoss, bool] | None = None  # the loss, and whether it has buffers
        # iterations, players and values that may not be finite
        self._unchecked: list[tuple[int, Player, dict[str, Tensor]]] = []
        self._turns: dict[Player, Turn] = {}  # of the batch at hand, which may have to be taken again
        self._moves = 0  # steps that optimizers have taken
        self._failure: Failure | None = None  # which nobody has explained yet

    def start(self) -> None:
        """Reset everything for a new fit."""
        self.compiled, self._unchecked, self._looked = None, [], False
        self._turns, self._failure = {}, None

    # ---------- the run

    def callbacks(self) -> list[GANCallback]:
        """The run's callbacks that act on a GANModule."""
        if self._callbacks is not None:
            return self._callbacks
        return callbacks_of(self.module.trainer, GANCallback)

    @contextmanager
    def adjusted_for_batch(self, rule: UpdateRule) -> Iterator[None]:
        """Apply the plan and the adversarial terms that callbacks choose for a batch, checked; then restore them."""
        module = self.module
        plan, adversarial = module.plan, module.adversarial
        self._callbacks = self.callbacks()
        try:
            self._latent_dtype = self.latent_dtype()
            self._optimizers = {player: self.optimizer(player) for player in PLAYERS}
            for callback in self._callbacks:
                module.plan = callback.adjust_plan(module, module.plan)
                module.adversarial = module.adversarial and callback.allows_adversarial(module)
            rule.check_plan(module)
            if rule.whole_batch and not module.adversarial:
                name = type(rule).__name__
                raise MisconfigurationException(
                    f"{name} looks at the adversarial loss on every batch, and `module.adversarial` is False: remove "
                    f"{name} or what sets it."
                )
            yield
        finally:
            self._callbacks, self._optimizers, self._latent_dtype, self._turns = None, None, None, {}
            module.plan, module.adversarial = plan, adversarial

    def turn_of(self, player: Player) -> AbstractContextManager[None]:
        """Set `turn` during a forward pass: None outside of steps, and in separate steps of penalties."""
        turn = player if self.module.noise.in_step and self._separate is None else None
        return nullcontext() if turn == self.turn else self._with_turn(turn)

    @contextmanager
    def _with_turn(self, turn: Player | None) -> Iterator[None]:
        before, self.turn = self.turn, turn
        try:
            yield
        finally:
            self.turn = before

    def latent_dtype(self) -> torch.dtype:
        """The dtype that the generator computes in."""
        if self._latent_dtype is not None:
            return self._latent_dtype
        return parameter_dtype(self.module.generator, torch.get_default_dtype())

    def due(self, player: Player, separate: bool = False) -> list[Regularizer]:
        """The regularizers of a player's loss on this batch, or those that take separate steps."""
        step = self.module.steps[player]
        rests = player == "g" and not self.module.adversarial
        return [
            c
            for c in self.callbacks()
            if isinstance(c, Regularizer)
            and c.player == player
            and step % c.every == 0
            and c.separate == separate
            and not c.rests
            and not (rests and c.needs_real)
        ]

    def term_names(self, player: Player) -> dict[Regularizer, str]:
        """The names of the terms that a player's regularizers add, in the order of the run's callbacks."""
        names: dict[Regularizer, str] = {}
        for callback in self.callbacks():
            if isinstance(callback, Regularizer) and callback.player == player:
                names[callback] = _unused(callback.name, names.values())
        return names

    def optimizer(self, player: Player) -> LightningOptimizer:
        """A player's optimizer."""
        if self._optimizers is not None:
            return self._optimizers[player]
        optimizers: Any = self.module.optimizers()
        return optimizers[PLAYERS.index(player)]  # type: ignore[no-any-return]

    def trainable_parameters(self, player: Player) -> list[nn.Parameter]:
        """The parameters of a player's optimizer."""
        groups = self.optimizer(player).param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    # ---------- gradients

    def compute_gradients(self, player: Player, batch: Any, objective: Objective | None = None) -> GANOutputs:
        """Store the gradient of an objective (None: the player's loss) on a batch in ``grad``, by micro-batches."""
        self.check_trainable(player)
        self._note_turn(player, batch, objective is not None and self._separate is None)
        objective = functools.partial(self._objective, player) if objective is None else objective
        parts: list[GANOutputs] = []
        shares: list[float] = []
        terms: Terms = {}
        with self._toggled(player), self.loss_at_rest(), self.rerunnable(player):
            for part, share in self._parts(batch):
                outputs, total, seen = objective(part)
                self._backward(player, total if share == 1 else share * total)
                terms = {k: v if share == 1 else terms.get(k, 0) + share * v for k, v in seen.items()}
                parts.append(detached(outputs))
                shares.append(share)
        whole = parts[0] if len(parts) == 1 else concatenate(parts, shares)
        self._record(player, whole, terms)
        if player == "d" and self._separate is None and not self._looked:
            self._looked = True
            self._warn_of_idle_logits(whole)
        return whole

    def _record(self, player: Player, outputs: GANOutputs, terms: Terms) -> None:
        """Record a player's outputs and the terms of its loss, in memory that outlives the step."""
        if self.module.replays_graphs:
            logits = {name: clone(getattr(outputs, name)) for name in ("real_logits", "fake_logits")}
            outputs, terms = outputs.replace(**logits), clone(terms)
        self.module.last_step.add(player, outputs, terms)

    def _objective(self, player: Player, part: Any) -> tuple[GANOutputs, Tensor, Terms]:
        """A player's outputs on a (micro-)batch, its total loss, and the terms."""
        outputs = self.module.compute_outputs(player, part)
        return outputs, *self.module.player_loss(player, outputs)

    def _warn_of_idle_logits(self, outputs: GANOutputs) -> None:
        """Warn of a discriminator of which no parameter trains, because its logits are taken for features."""
        logits, features = outputs.fake_logits, outputs.fake_features
        if not (isinstance(logits, Tensor) and isinstance(features, Tensor) and features.shape[:1] == logits.shape[:1]):
            return
        mine = {id(p) for p in self.trainable_parameters("d")}
        parameters = self.module.discriminator.named_parameters()
        idle = [name for name, p in parameters if id(p) in mine and p.grad is None]
        if idle:
            rank_zero_warn(
                "`discriminate` returned two tensors, which are (logits, features), and the discriminator's loss does "
                f"not depend on `{idle[0]}`: if the second one is the logits of another discriminator, return them in "
                "a list or a dict."
            )

    def _parts(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """The micro-batches of a batch and their weights; gradients are exchanged on the last one only."""
        module = self.module
        if module.accumulate == 1:
            yield batch, 1
            return
        noise = module.noise
        draw, unpacked = noise.draw, module.unpacked(batch)
        parts = list(micro_batches(unpacked, module.accumulate, module.packing))
        total = parts[-1][2]
        for part, start, stop in parts:
            with (
                noise.rows(start, stop, total, draw),
                nullcontext() if stop == total else without_exchange(module.trainer),
            ):
                yield part, (stop - start) / total

    def _backward(self, player: Player, total: Tensor) -> None:
        if not total.requires_grad:
            raise ValueError(
                f"The loss of the {NETWORKS[player]} does not depend on its parameters: something in `generate`, "
                "`discriminate`, `augment` or the loss has no gradient (`detach`, `no_grad`, or rounding)."
            )
        # backward repeats the types of the forward pass; under autocast it would lower those of the penalties
        autocast = torch.is_autocast_enabled(self.module.device.type)
        with torch.autocast(self.module.device.type, enabled=False) if autocast else nullcontext():
            self.module.manual_backward(total)

    def check_trainable(self, player: Player) -> None:
        """Refuse a player without trainable parameters.

        Raises:
            ValueError: if all parameters are frozen, or if there is no such player.
        """
        if player not in PLAYERS:
            raise ValueError(f"A player is 'd' or 'g', got {player!r}.")
        groups = self.optimizer(player).param_groups
        if not any(p.requires_grad for group in groups for p in group["params"]):
            raise ValueError(
                f"All parameters of the {NETWORKS[player]} are frozen (`requires_grad` is False), but it stands in "
                f"`module.plan`: {self.module.plan}. Unfreeze it, or set `module.plan` to the other player."
            )

    def set_gradients(self, player: Player, gradients: Sequence[Tensor | None]) -> None:
        """Average given gradients over ranks and store them in the ``grad`` of the player's parameters."""
        self._turns.pop(player, None)
        pairs = zip(self.trainable_parameters(player), gradients, strict=True)
        # the gradient of Σ p·g is g, and takes the way through the strategy that every loss's gradient takes
        products = [(p * g.detach()).sum() for p, g in pairs if g is not None]
        with self._toggled(player):
            self.module.manual_backward(torch.stack(products).sum())

    @contextmanager
    def _toggled(self, player: Player) -> Iterator[None]:
        """Clear the player's old gradients, and compute none for other parameters, whose gradients stay."""
        own = [p for group in self.optimizer(player).param_groups for p in group["params"]]
        mine = {id(p) for p in own}
        optimizer = self.optimizer(player).optimizer
        others = [
            p
            for other in self.module.trainer.optimizers
            if other is not optimizer
            for group in other.param_groups
            for p in group["params"]
            if id(p) not in mine
        ]
        for p in own:
            p.grad = None
        if self.module.device_mesh is not None:
            with self.module.sharding.gradients_of(own, others):
                yield
            return
        frozen = [p for p in others if p.requires_grad]
        for p in frozen:
            p.requires_grad = False
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad = True

    # ---------- the loss

    def adversarial_loss(self, player: Player, outputs: GANOutputs) -> tuple[Tensor, Terms]:
        """The sum (or mean) of a player's adversarial losses over discriminators, and their values for the log."""
        loss = self.module.loss
        losses = adversarial_losses(loss, player, outputs)
        if len(losses) == 1:
            (total,) = losses.values()
            return total, {"adversarial": total.detach()}
        stacked = torch.stack([*losses.values()])
        total = stacked.sum() if loss.reduction == "sum" else stacked.mean()
        return total, {"adversarial": total.detach()} | {f"adversarial/{k}": v.detach() for k, v in losses.items()}

    def player_loss(
        self, player: Player, outputs: GANOutputs, adversarial: Tensor | None = None
    ) -> tuple[Tensor, Terms]:
        """A player's total loss with its due penalties, and the values of its terms."""
        parts, values = self._weighed_terms(player, outputs, adversarial)
        if not parts:
            raise ValueError(f"The {NETWORKS[player]} has nothing to learn from: its loss has no term on this batch.")
        return functools.reduce(torch.add, parts.values()), values

    def _weighed_terms(
        self, player: Player, outputs: GANOutputs, adversarial: Tensor | None = None, watched: bool = True
    ) -> tuple[Terms, Terms]:
        """The terms of a player's loss with and without their factors; callbacks see the weighted ones."""
        module, terms, values, factors = self.module, {}, {}, {}
        if adversarial is not None:
            terms["adversarial"], values["adversarial"] = adversarial, adversarial.detach()
        elif outputs.fake_logits is not None:
            terms["adversarial"], values = self.adversarial_loss(player, outputs)
        if "adversarial" in terms:
            weight = module.adversarial_weight(player, outputs)
            factors["adversarial"] = _checked_factor("`adversarial_weight`", "adversarial", weight)
        terms |= self.auxiliary_losses(player, outputs)
        for name, every, term in self._penalties(player, outputs, self.due(player)):
            terms[name], values[name] = term if every == 1 else every * term, term.detach()
        values = {name: values.get(name, term.detach()) for name, term in terms.items()} | values
        for callback in self.callbacks():
            found = callback.weigh_terms(module, player, outputs, terms)
            if found:
                checked = _checked_factors(type(callback).__name__, found, terms)
                factors |= {name: factors.get(name, 1.0) * factor for name, factor in checked.items()}
        parts = {}
        for name, term in terms.items():
            factor = factors.get(name, 1.0)
            parts[name] = term if isinstance(factor, int | float) and factor == 1 else factor * term
        for callback in self.callbacks() if watched else ():
            callback.watch_terms(module, player, outputs, parts)
        return parts, values

    def auxiliary_losses(self, player: Player, outputs: GANOutputs) -> Terms:
        """The module's own terms of a player's loss, checked."""
        terms = self.module.auxiliary_losses(player, outputs)
        if not isinstance(terms, Mapping):
            raise ValueError(f"`auxiliary_losses` must return a dict of scalar tensors, got {describe(terms)}.")
        names = {*self.term_names(player).values()}
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.numel() != 1 or term.is_complex():
                raise ValueError(
                    f"`auxiliary_losses` must return a dict of scalar tensors, got {describe(term)} as {name!r}."
                )
            if not is_term_name(name) or name in names:
                raise ValueError(
                    f"`auxiliary_losses` returned {name!r}, which the log has for something else: rename it."
                )
        return {name: term.reshape(()) for name, term in terms.items()}

    def validated_terms(self, player: Player, outputs: GANOutputs) -> Terms:
        """The weighted terms of regularizers that validation also logs."""
        found = [c for c in self.callbacks() if isinstance(c, Regularizer) and c.player == player and c.validated]
        return {name: term for name, _, term in self._penalties(player, outputs, found)}

    def _penalties(
        self, player: Player, outputs: GANOutputs, due: Sequence[Regularizer]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """Weighted penalties, with their names and intervals."""
        full, names = outputs, self.term_names(player)
        if due and torch.is_autocast_enabled(self.module.device.type):
            outputs = self.widened(outputs)
            if any(regularizer.compares for regularizer in due):
                full = self._again(outputs)
        for regularizer in due:
            with self.full_precision(eager=regularizer.second_order):
                penalty = regularizer.penalty(self.module, full if regularizer.compares else outputs)
                if not isinstance(penalty, Tensor):
                    name = type(regularizer).__name__
                    raise ValueError(f"`penalty` of {name} must return a tensor, got {describe(penalty)}.")
                penalty = regularizer.weight_at(self.module.steps[player]) * penalty.mean()
            yield names[regularizer], regularizer.every, penalty

    def widened(self, outputs: GANOutputs) -> GANOutputs:
        """The outputs in the dtype of the discriminator: under autocast networks return half precision."""
        dtype = parameter_dtype(self.module.discriminator, torch.float32)

        def widen(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return outputs.replace(**{name: tree_map(widen, getattr(outputs, name)) for name in _HALVED})

    def _again(self, outputs: GANOutputs) -> GANOutputs:
        """Recompute the outputs in full precision, so that differences to others are not those of precision."""
        module = self.module
        with self.full_precision(eager=False):
            # samples without latents may be those of a pool, which nothing makes again
            again = outputs if outputs.latents is None else module.resample(outputs, outputs.latents)
            return module.judge(again)

    def joint_losses(self, batch: Any) -> tuple[dict[Player, Tensor], dict[Player, Tensor]]:
        """Both players' losses on the same outputs, total and adversarial only, with graphs to both networks."""
        module = self.module
        for player in PLAYERS:
            self.check_trainable(player)
        with self.loss_at_rest():
            outputs = module.compute_outputs("g", batch, [*self.due("d"), *self.due("g")])
            outputs = module.judge(outputs, real=outputs.real_logits is None, fake=False)
            totals, adversarial = {}, {}
            for player in PLAYERS:
                loss, values = self.adversarial_loss(player, outputs)
                parts, terms = self._weighed_terms(player, outputs, loss)
                totals[player], adversarial[player] = functools.reduce(torch.add, parts.values()), parts["adversarial"]
                self._record(player, detached(outputs), values | terms)
        return totals, adversarial

    def _loss_has_buffers(self) -> bool:
        loss = self.module.loss
        if self._stateful is None or self._stateful[0] is not loss:
            self._stateful = loss, next(loss.buffers(), None) is not None
        return self._stateful[1]

    def loss_at_rest(self) -> AbstractContextManager[None]:
        """Keep the buffers of a loss unchanged while gradients are computed."""
        return self._in_evaluation(self.module.loss) if self._loss_has_buffers() else nullcontext()

    @contextmanager
    def _in_evaluation(self, loss: AdversarialLoss) -> Iterator[None]:
        training, loss.training = loss.training, False
        try:
            yield
        finally:
            loss.training = training

    @contextmanager
    def full_precision(self, eager: bool = True) -> Iterator[None]:
        """Use full precision for second derivatives; compiled graphs and fused attention have none at all."""
        attention = sdpa_kernel(SDPBackend.MATH) if eager else nullcontext()
        stance = self._uncompiled() if eager else nullcontext()
        with torch.autocast(self.module.device.type, enabled=False), stance, attention:
            yield

    def rerunnable(self, player: Player) -> AbstractContextManager[None]:
        """Run forward passes whose graphs callbacks may use several times, if there are such callbacks."""
        eager = player == "g" and self._are_graphs_kept()
        return self._uncompiled() if eager else nullcontext()

    def _are_graphs_kept(self) -> bool:
        return any(callback.keeps_graphs for callback in self.callbacks())

    @property
    def reruns_graphs(self) -> bool:
        """Whether graphs of the generator's step allow several backward passes; those of compiled networks do not."""
        return not self._has_compiled() or self._are_graphs_kept()

    def _has_compiled(self) -> bool:
        module = self.module
        if self.compiled is None:
            self.compiled = any(map(is_compiled, chain(module.generator.modules(), module.discriminator.modules())))
        return self.compiled

    def _uncompiled(self) -> AbstractContextManager[None]:
        """Run forward passes without compiled graphs, which allow one backward pass and no second derivatives."""
        return torch.compiler.set_stance("force_eager") if self._has_compiled() else nullcontext()

    def gradients_of(self, term: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of one term of a loss, whose graph is kept."""
        if not term.requires_grad:
            return [None] * len(inputs)
        scaler = gradient_scaler(self.module.trainer)
        scale = None if scaler is None else scaler.get_scale()  # float16 has no room for small gradients
        with torch.autocast(self.module.device.type, enabled=False):
            scaled = term if scale is None else scale * term
            found = torch.autograd.grad(scaled, inputs, retain_graph=True, allow_unused=True)
        return [g if g is None or scale is None else g / scale for g in found]

    # ---------- steps

    @property
    def in_separate_step(self) -> bool:
        """Whether a penalty is taking its separate step."""
        return self._separate is not None

    def separate_steps(self, player: Player, batch: Any) -> None:
        """Take the step of each due penalty that has a separate one."""
        for regularizer in self.due(player, separate=True):

            def objective(part: Any, regularizer: Regularizer = regularizer) -> tuple[GANOutputs, Tensor, Terms]:
                outputs = self._outputs_of(regularizer, part)
                ((name, every, term),) = self._penalties(player, outputs, [regularizer])
                unjudged = outputs.replace(real_logits=None, fake_logits=None)
                return unjudged, term if every == 1 else every * term, {name: term.detach()}

            with self._as_separate(regularizer):
                self.compute_gradients(player, batch, objective)
                self.step(player, schedule=False)

    @contextmanager
    def _as_separate(self, penalty: Regularizer | None) -> Iterator[None]:
        """Enter the separate step of a penalty; None: the player's own step."""
        before, self._separate = self._separate, penalty
        try:
            yield
        finally:
            self._separate = before

    def _outputs_of(self, regularizer: Regularizer, part: Any) -> GANOutputs:
        """The outputs that a penalty needs of a (micro-)batch, and nothing else."""
        module, player = self.module, regularizer.player
        unpacked = module.unpacked(part)
        if regularizer.shrink > 1:
            rows = regularizer.rows_of(batch_size(unpacked.real))
            unpacked = Unpacked(*(take_rows(tree, 0, rows) for tree in unpacked))
        real = "real" in regularizer.reads and (player == "d" or regularizer.needs_real)
        fake = "fake" in regularizer.reads
        with self.full_precision() if regularizer.differentiates else nullcontext():
            if player == "d" and not fake:
                samples = differentiable(unpacked.real) if "real" in regularizer.differentiates else unpacked.real
                outputs = GANOutputs(samples, None, condition=unpacked.condition)
            else:
                outputs = module.compute_samples(player, unpacked, [regularizer])
            same = regularizer.same_augmentation
            return module.judge(outputs, real, fake, same) if real or fake else outputs

    def apply_gradients(self, player: Player) -> None:
        """Step a player's optimizer, and do what follows a step of the discriminator."""
        module, record = self.module, self.module.last_step
        self.step(player)
        if player == "g" or not record.pairs:
            return
        if self._loss_has_buffers():
            # in train mode a loss with a state of its own (BEGAN's k) moves it, as BatchNorm moves its statistics
            with torch.no_grad():
                for _, real, fake in record.pairs:
                    module.loss.discriminator(real, fake)
        if record.visible:
            record.add_logits(module.loss)

    def step(self, player: Player, schedule: bool = True) -> None:
        """Step a player's optimizer and scheduler; Lightning counts only the first optimizer step of a batch."""
        module, optimizer = self.module, self.optimizer(player)
        record, scaler = module.last_step, gradient_scaler(module.trainer)
        if scaler is not None and unscales_itself(optimizer.optimizer):
            scaler.unscale_(optimizer.optimizer)  # or else hooks before the step would see gradients that are scaled
        if record.moved:
            module.trainer.strategy.optimizer_step(optimizer.optimizer, _nothing)
        else:
            optimizer.step()
        record.moved.add(player)
        self._moves += 1
        module.constrain(player)
        if schedule:
            self.schedule("step", [optimizer.optimizer])

    def constrained(self, player: Player, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Apply the constraints of callbacks to a player's parameters after a step."""
        for callback in self.callbacks():
            parameters = callback.constrain(self.module, player, parameters)
        return parameters

    def schedule(self, interval: str, optimizers: Sequence[Optimizer]) -> None:
        """Step the learning rate schedulers that count steps, or those that count epochs."""
        for config in self.module.trainer.lr_scheduler_configs:
            if config.interval == interval and any(config.scheduler.optimizer is o for o in optimizers):
                self.module.lr_scheduler_step(config.scheduler, None)

    def before_step(self, optimizer: Optimizer) -> None:
        """Check and clip the gradient, after a gradient scaler has unscaled it."""
        module = self.module
        player = next((p for p, o in zip(PLAYERS, module.trainer.optimizers, strict=False) if o is optimizer), None)
        if player is None:
            return  # a further optimizer, which is the subclass's own
        module.sharding.reshard()
        moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        module.sharding.check_exchanged(moving)
        norm = total_norm([p.grad for p in moving if p.grad is not None])
        record = module.last_step
        if self._separate is None:
            record.gradient_norms[player] = record.values[f"{player}/grad_norm"] = norm
        else:
            record.values[f"{player}/grad_norm/{module.term_name(self._separate)}"] = norm
        # a gradient scaler skips the steps whose gradient overflows, and is right to
        values = record.terms[player] | ({"grad_norm": norm} if gradient_scaler(module.trainer) is None else {})
        self._unchecked.append((module.iteration, player, values))
        if record.visible or module.device.type == "cpu" or self._may_be_rescued():
            # elsewhere a look costs a synchronization: values wait until they are logged or saved
            self.check_finite()
        limit = module.clip_norm.get(player) if isinstance(module.clip_norm, Mapping) else module.clip_norm
        if limit is not None:
            nn.utils.clip_grads_with_norm_(moving, limit, norm)

    def _may_be_rescued(self) -> bool:
        return any(callback.rescues for callback in self.callbacks())

    def check_finite(self) -> None:
        """Stop the run if a term of a loss or a gradient was not finite.

        Raises:
            NotFinite: with the player, the step, the terms, and the origin of the values.
        """
        unchecked, self._unchecked = self._unchecked, []
        module = self.module
        names = [(step, player, f"`{player}/{name}`") for step, player, values in unchecked for name in values]
        looks = [x for *_, values in unchecked for x in values.values()]
        if module.device.type == "cpu" or not looks:
            finite = [math.isfinite(x.item()) for x in looks]
        else:  # the device is waited for once, not once for each value
            finite = torch.stack([x.isfinite().all().to(module.device) for x in looks]).tolist()
        bad = [name for name, fine in zip(names, finite, strict=True) if not fine]
        if self._may_be_rescued():  # all ranks go back, or none
            number = torch.tensor(float(len(bad)), device=module.device)
            if module.trainer.strategy.reduce(number, reduce_op="sum") > 0 and not bad:
                raise NotFinite("Not finite in another process's update.")
        if bad:
            step, player, _ = bad[0]
            terms = [name for s, p, name in bad if (s, p) == (step, player)]
            versions = [version(p) for p in module.parameters()]
            self._failure = Failure(step, player, terms, self._turns.get(player), versions)
            error = NotFinite(self._failure.message())
            in_batch = self._callbacks is not None
            if not (in_batch and self._may_be_rescued()):  # or else the training step asks, if nobody rescues it
                self.explain(error)
            raise error

    # ---------- not finite

    def _note_turn(self, player: Player, batch: Any, own: bool) -> None:
        """Record the inputs of a gradient's computation, until the batch is over."""
        module = self.module
        if module.noise.in_step:
            start = module.noise.randomness()
            self._turns[player] = Turn(player, batch, start, self._moves, module.adversarial, own, self._separate)

    def explain(self, error: NotFinite) -> None:
        """Add to an error the origin of a value that is not finite, as far as a second computation shows it."""
        failure, self._failure = self._failure, None
        if failure is None:
            return  # an error of somebody else's
        finding = None
        try:
            for finding in self._findings(failure):  # noqa: B007  # the last one says most
                pass
        except Exception:
            # The run is about to stop with an error that stands without this. A turn that is taken again runs
            # everybody's code, with hooks and after memory has become scarce, and whatever it raises would hide that.
            pass
        if finding is not None:
            error.args = (failure.message(finding),)

    def _findings(self, failure: Failure) -> Iterator[Finding | None]:
        """The findings of a second computation, from the quickest to the most thorough."""
        module, turn = self.module, failure.turn
        if failure.step != module.iteration:
            yield after_delay(module)
            return
        if turn is None:
            yield in_weights(module)
            return
        with isolated(module, self.callbacks(), turn), self._as_separate(turn.penalty):
            batch = turn.batch
            with module.noise.replay():
                seen = batch if isinstance(batch, GANOutputs) else module.unpacked(batch)
            found = in_data(seen.real, seen.condition) or in_weights(module)
            yield found or finite_so_far()
            moved = turn.moves != self._moves or failure.versions != [version(p) for p in module.parameters()]
            # of shards the weights are with other processes, who need not look
            data = found is not None and not is_finite((seen.real, seen.condition))
            if (found is None or data) and not moved and not turn.own and module.device_mesh is None:
                with self._uncompiled():
                    second = in_turn(module, self._replay(turn))
                if not data:
                    yield second
                elif second.of_term:  # networks that take such data have not passed it on
                    yield Finding(f"{second.text} The data hold values that are not finite, too.", second.advice)

    def _replay(self, turn: Turn) -> Replay:
        """How to repeat a turn; the random state is that at its beginning."""
        module, player = self.module, turn.player
        penalties = self.due(player) if turn.penalty is None else [turn.penalty]
        mine = {id(p) for p in self.trainable_parameters(player)}
        start = module.noise.randomness()

        def parts() -> Iterator[Any]:
            module.noise.restore(start)
            for part, _ in self._parts(turn.batch):
                yield part if isinstance(part, GANOutputs) else module.unpacked(part)

        def see(part: Any) -> GANOutputs:
            if turn.penalty is not None:
                return self._outputs_of(turn.penalty, part)
            if isinstance(part, GANOutputs):  # samples for both players, whose graph is used up
                with module.noise.replay():
                    part = module.resample(part, part.latents)
            return module.compute_outputs(player, part)

        def weigh(outputs: GANOutputs) -> tuple[Terms, Terms]:
            if turn.penalty is None:
                return self._weighed_terms(player, outputs, watched=False)
            ((name, every, term),) = self._penalties(player, outputs, [turn.penalty])
            return {name: every * term}, {name: term.detach()}

        return Replay(
            player,
            parts,
            see,
            weigh,
            {module.term_name(c): c for c in penalties},
            {name: p for name, p in module.named_parameters() if id(p) in mine},
        )


def _checked_factor(source: str, name: str, factor: Any) -> Any:
    scalar = isinstance(factor, Tensor) and factor.numel() == 1 and not factor.is_complex()
    if not scalar and not is_number(factor):
        raise ValueError(f"{source} must give a number or a scalar tensor for {name!r}, got {describe(factor)}.")
    return factor.reshape(()) if isinstance(factor, Tensor) else factor


def _checked_factors(callback: str, factors: Any, terms: Terms) -> dict[str, Any]:
    if not isinstance(factors, Mapping):
        raise ValueError(f"`weigh_terms` of {callback} must return a dict of factors, got {describe(factors)}.")
    for name in factors:
        if name not in terms:
            raise ValueError(
                f"`weigh_terms` of {callback} has a factor for {name!r}, but the terms are {', '.join(terms)}."
            )
    return {name: _checked_factor(f"`weigh_terms` of {callback}", name, factor) for name, factor in factors.items()}


def _unused(name: str, names: Iterable[str]) -> str:
    """The name, with a number appended if it is taken (two penalties of one class)."""
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in names)


def _nothing() -> None:
    """The closure of a step whose gradient is already computed."""
