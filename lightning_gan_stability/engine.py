"""Gradients and steps of a player: micro-batches, the terms of a loss, backward passes, clipping, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, count
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from lightning_gan_stability._checks import describe
from lightning_gan_stability._compat import is_compiled
from lightning_gan_stability.callback import Alternating, GANCallback, Regularizer, UpdateRule
from lightning_gan_stability.layers import parameter_dtype
from lightning_gan_stability.losses import AdversarialLoss
from lightning_gan_stability.outputs import (
    NETWORKS,
    PLAYERS,
    GANOutputs,
    Player,
    Terms,
    concatenate,
    detached,
    entries,
    micro_batches,
    tree_map,
)
from lightning_gan_stability.sharding import total_norm, without_exchange

if TYPE_CHECKING:
    from lightning_gan_stability.protocols import GANProtocol

#: Of a (micro-)batch: what the player sees, its total loss, and the terms of the loss for the log.
Objective: TypeAlias = Callable[[Any], tuple[GANOutputs, Tensor, Terms]]

_ALTERNATING = Alternating()


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


class Engine:
    """Takes the gradients and the steps of a GANModule's players.

    Args:
        module: whose players.
    """

    def __init__(self, module: GANProtocol) -> None:
        self.module = module
        self.compiled: bool | None = None  # whether a network is; None: nobody has looked yet
        # iterations, players and values that may not be finite
        self._unchecked: list[tuple[int, Player, dict[str, Tensor]]] = []

    def start(self) -> None:
        """Begin a fit, without a trace of the one before."""
        self.compiled, self._unchecked = None, []

    # ---------- the run

    def callbacks(self) -> list[GANCallback]:
        """The run's callbacks that act on a GANModule."""
        return [c for c in self.module.trainer.callbacks if isinstance(c, GANCallback)]  # type: ignore[attr-defined]

    def rule(self) -> UpdateRule:
        """The run's update rule."""
        rules = [callback for callback in self.callbacks() if isinstance(callback, UpdateRule)]
        if len(rules) > 1:
            names = " and ".join(type(rule).__name__ for rule in rules)
            raise MisconfigurationException(f"{names} are update rules, and a run has one: remove all but one.")
        return rules[0] if rules else _ALTERNATING

    def due(self, player: Player) -> list[Regularizer]:
        """The regularizers of a player's loss on this batch."""
        step = self.module.steps[player]
        found = (c for c in self.callbacks() if isinstance(c, Regularizer))
        return [c for c in found if c.player == player and step % c.every == 0]

    def optimizer(self, player: Player) -> LightningOptimizer:
        """A player's optimizer."""
        optimizers: Any = self.module.optimizers()
        return optimizers[PLAYERS.index(player)]  # type: ignore[no-any-return]

    def trainable_parameters(self, player: Player) -> list[nn.Parameter]:
        """The parameters that a player's optimizer moves."""
        groups = self.optimizer(player).param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    # ---------- gradients

    def compute_gradients(self, player: Player, batch: Any, objective: Objective) -> GANOutputs:
        """Put the gradient of an objective, of a batch in micro-batches, into the player's ``grad``."""
        parts: list[GANOutputs] = []
        shares: list[float] = []
        terms: Terms = {}
        with self._toggled(player), self.loss_at_rest():
            for part, share in self._parts(batch):
                outputs, total, seen = objective(part)
                self._backward(player, total if share == 1 else share * total)
                terms = {k: v if share == 1 else terms.get(k, 0) + share * v for k, v in seen.items()}
                parts.append(detached(outputs))
                shares.append(share)
        whole = parts[0] if len(parts) == 1 else concatenate(parts, shares)
        self.module.last_step.add(player, whole, terms)
        return whole

    def _parts(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """The micro-batches of a batch and their shares of it; gradients are exchanged on the last one alone."""
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
            network = NETWORKS[player]
            if not self.trainable_parameters(player):
                raise ValueError(
                    f"All parameters of the {network} are frozen (`requires_grad` is False), but it stands in "
                    f"`module.plan`: {self.module.plan}. Unfreeze it, or set `module.plan` to the other player."
                )
            raise ValueError(
                f"The loss of the {network} does not depend on its parameters: something in `generate`, "
                "`discriminate`, `augment` or the loss has no gradient (`detach`, `no_grad`, or rounding)."
            )
        # backward repeats the types of the forward pass; under autocast it would lower those of the penalties
        autocast = torch.is_autocast_enabled(self.module.device.type)
        with torch.autocast(self.module.device.type, enabled=False) if autocast else nullcontext():
            self.module.manual_backward(total)

    def set_gradients(self, player: Player, gradients: Sequence[Tensor | None]) -> None:
        """Put given gradients, averaged over ranks, into the ``grad`` of the player's parameters."""
        pairs = zip(self.trainable_parameters(player), gradients, strict=True)
        # the gradient of Σ p·g is g, and takes the way through the strategy that every loss's gradient takes
        products = [(p * g.detach()).sum() for p, g in pairs if g is not None]
        with self._toggled(player):
            self.module.manual_backward(torch.stack(products).sum())

    @contextmanager
    def _toggled(self, player: Player) -> Iterator[None]:
        """Without old gradients of the player, and without gradients for anybody else, whose own ones stay."""
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
        module, terms, values, factors = self.module, {}, {}, {}
        if adversarial is not None:
            terms["adversarial"], values["adversarial"] = adversarial, adversarial.detach()
        elif outputs.fake_logits is not None:
            terms["adversarial"], values = self.adversarial_loss(player, outputs)
        if "adversarial" in terms:
            factors["adversarial"] = module.adversarial_weight(player, outputs)
        terms |= self.auxiliary_losses(player, outputs)
        for name, every, term in self._penalties(player, outputs, terms):
            terms[name], factors[name] = term, every
        values |= {name: term.detach() for name, term in terms.items() if name not in values}
        for callback in self.callbacks():
            for name, factor in callback.weigh_terms(module, player, outputs, terms).items():
                factors[name] = factors.get(name, 1.0) * factor
        total: Any = None
        for name, term in terms.items():
            factor = factors.get(name, 1.0)
            part = term if isinstance(factor, int | float) and factor == 1 else factor * term
            total = part if total is None else total + part
        if total is None:
            raise ValueError(f"The {NETWORKS[player]} has nothing to learn from: its loss has no term on this batch.")
        return total, values

    def auxiliary_losses(self, player: Player, outputs: GANOutputs) -> Terms:
        """What the module itself adds to a player's loss, checked."""
        terms = self.module.auxiliary_losses(player, outputs)
        if not isinstance(terms, Mapping):
            raise ValueError(f"`auxiliary_losses` must return a dict of scalar tensors, got {describe(terms)}.")
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.numel() != 1:
                raise ValueError(
                    f"`auxiliary_losses` must return a dict of scalar tensors, got {describe(term)} as {name!r}."
                )
            if name == "adversarial":
                raise ValueError("`auxiliary_losses` returned 'adversarial', the name of the loss itself: rename it.")
        return {name: term.reshape(()) for name, term in terms.items()}

    def _penalties(self, player: Player, outputs: GANOutputs, terms: Terms) -> Iterator[tuple[str, int, Tensor]]:
        """The due penalties times their weight, with their names and intervals."""
        due = self.due(player)
        full = outputs
        if due and torch.is_autocast_enabled(self.module.device.type):
            # networks ran in half precision, penalties do not
            halved = ("real", "fake", "real_logits", "fake_logits", "real_features", "fake_features")
            outputs = outputs.replace(**{name: self._widened(getattr(outputs, name)) for name in halved})
            if any(regularizer.compares for regularizer in due):
                full = self._again(outputs)
        for regularizer in due:
            with self.full_precision(eager=regularizer.second_order):
                penalty = regularizer.penalty(self.module, full if regularizer.compares else outputs).mean()
                penalty = regularizer.weight_at(self.module.steps[player]) * penalty
            yield _unused(regularizer.name, terms), regularizer.every, penalty

    def _widened(self, tree: Any) -> Any:
        dtype = parameter_dtype(self.module.discriminator, torch.float32)
        return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)

    def _again(self, outputs: GANOutputs) -> GANOutputs:
        """The outputs in full precision: differences to others would be those between half and full precision."""
        with self.full_precision(eager=False):
            return self.module.judge(self.module.resample(outputs, outputs.latents))

    def joint_losses(self, batch: Any) -> tuple[dict[Player, Tensor], dict[Player, Tensor]]:
        """Both players' losses on the same outputs, in total and adversarial alone, with graphs to both networks."""
        module = self.module
        with self.loss_at_rest():
            outputs = module.compute_outputs("g", batch, [*self.due("d"), *self.due("g")])
            outputs = module.judge(outputs, real=outputs.real_logits is None, fake=False)
            totals, adversarial = {}, {}
            for player in PLAYERS:
                loss, values = self.adversarial_loss(player, outputs)
                totals[player], terms = self.player_loss(player, outputs, loss)
                adversarial[player] = module.adversarial_weight(player, outputs) * loss
                module.last_step.add(player, detached(outputs), values | terms)
        return totals, adversarial

    @contextmanager
    def loss_at_rest(self) -> Iterator[None]:
        """Keep the buffers of a loss where they are while gradients are taken."""
        loss = self.module.loss
        if not _has_buffers(loss):
            yield
            return
        training, loss.training = loss.training, False
        try:
            yield
        finally:
            loss.training = training

    @contextmanager
    def full_precision(self, eager: bool = True) -> Iterator[None]:
        """Full precision, because second derivatives lose it; compiled graphs and fused attention have none at all."""
        module = self.module
        if eager and self.compiled is None:
            self.compiled = any(map(is_compiled, chain(module.generator.modules(), module.discriminator.modules())))
        stance = torch.compiler.set_stance("force_eager") if eager and self.compiled else nullcontext()
        attention = sdpa_kernel(SDPBackend.MATH) if eager else nullcontext()
        with torch.autocast(module.device.type, enabled=False), stance, attention:
            yield

    # ---------- steps

    def apply_gradients(self, player: Player) -> None:
        """Step a player's optimizer, and what follows a step of the discriminator."""
        module, record = self.module, self.module.last_step
        self.step(player)
        if player == "g" or not record.pairs:
            return
        if _has_buffers(module.loss):
            # in train mode a loss with a state of its own (BEGAN's k) moves it, as BatchNorm moves its statistics
            with torch.no_grad():
                for _, real, fake in record.pairs:
                    module.loss.discriminator(real, fake)
        if record.visible:
            record.add_logits(module.loss)

    def step(self, player: Player, schedule: bool = True) -> None:
        """Step a player's optimizer and scheduler; Lightning counts the first optimizer step of a batch alone."""
        module, optimizer = self.module, self.optimizer(player)
        record = module.last_step
        if record.moved:
            module.trainer.strategy.optimizer_step(optimizer.optimizer, _nothing)
        else:
            optimizer.step()
        record.moved.add(player)
        module.constrain(player)
        if schedule:
            self.schedule("step", [optimizer.optimizer])

    def constrained(self, player: Player, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """What callbacks make of a player's parameters after a step."""
        for callback in self.callbacks():
            parameters = callback.constrain(self.module, player, parameters)
        return parameters

    def schedule(self, interval: str, optimizers: Sequence[Optimizer]) -> None:
        """Step the learning rate schedulers that count in steps, or in epochs."""
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
        norm = total_norm([p.grad for p in moving if p.grad is not None])
        record = module.last_step
        record.gradient_norms[player] = record.values[f"{player}/grad_norm"] = norm
        # a gradient scaler skips the steps whose gradient overflows, and is right to
        scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
        values = record.terms[player] | ({} if scaled else {"grad_norm": norm})
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
            FloatingPointError: with the player, the step and the terms.
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
                raise FloatingPointError("Not finite in another process's update.")
        if bad:
            step, player, _ = bad[0]
            terms = ", ".join(name for s, p, name in bad if (s, p) == (step, player))
            raise FloatingPointError(
                f"Not finite in the {NETWORKS[player]}'s update at step {step}: {terms}. If the data are finite, "
                f"lower the learning rate of `{player}_optimizer`, or of the other player's, set `clip_norm`, or add "
                "R1Penalty."
            )


def _has_buffers(module: nn.Module) -> bool:
    return next(module.buffers(), None) is not None


def _unused(name: str, names: Iterable[str]) -> str:
    """The name, or with a number behind it if it is taken (two penalties of one class)."""
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in names)


def _nothing() -> None:
    """The closure of a step whose gradient is there already."""
