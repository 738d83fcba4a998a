"""Callbacks that set which player steps on which batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_gan_stability._checks import check_bool, check_choice, check_finite, check_integer, check_number
from lightning_gan_stability.callback import Cadence, GANCallback, as_gan, callbacks_of, find_rule
from lightning_gan_stability.callbacks.adversarial_start import refuse_without_other_terms
from lightning_gan_stability.engine import adversarial_losses
from lightning_gan_stability.outputs import PLAYERS, GANOutputs, Pair, Player
from lightning_gan_stability.protocols import GANProtocol

Rule = Literal["accuracy", "loss_change", "logit_gap", "gradient_norm"]
Rests = Literal["player", "adversarial"]


class PlanCallback(GANCallback):
    """Base of callbacks that set ``module.plan`` on each batch and restore it after ``fit``.

    The order of the players is that of the plan at the start of ``fit``.
    """

    moves_twice: bool = False  # a player may step several times on a batch
    _found: tuple[Player, ...] | None = None  # the plan at the start of `fit`

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a second callback that sets the plan, and update rules that need both players on every batch."""
        module = as_gan(pl_module)
        name = type(self).__name__
        owners = [type(callback).__name__ for callback in callbacks_of(trainer, PlanCallback)]
        if len(owners) > 1:
            raise MisconfigurationException(f"{' and '.join(owners)} both set which player steps: remove all but one.")
        if sorted(module.plan) != ["d", "g"]:
            raise MisconfigurationException(
                f"{name} sets which players of the plan step, but `module.plan` is {module.plan}, which does not "
                f"contain both players exactly once: keep the default plan, or remove {name}."
            )
        rule = find_rule(trainer)
        if rule.joint or (self.moves_twice and rule.holds_gradients):
            raise MisconfigurationException(
                f"{type(rule).__name__} steps both players once on every batch, which {name} would change: remove "
                "one of them."
            )
        self._found = module.plan

    def moving(self, players: Collection[Player], times: int = 1) -> tuple[Player, ...]:
        """The plan with some of the players, in the original order; the generator steps ``times`` times."""
        found: tuple[Player, ...] = self._found or ("d", "g")
        return tuple(p for player in found if player in players for p in [player] * (times if player == "g" else 1))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the plan back."""
        self._give_back(as_gan(pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the plan back."""
        self._give_back(as_gan(pl_module))

    def _give_back(self, module: GANProtocol) -> None:
        if self._found is not None:
            module.plan, self._found = self._found, None


class UpdateRatio(PlanCallback):
    """The discriminator steps ``d_steps`` times for every ``g_steps`` steps of the generator.

    Each step of the discriminator uses a new batch. A cycle takes ``d_steps`` batches, and the generator steps on the
    last of them, with new latents for each of its steps. ``max_steps`` still counts batches. "Wasserstein GAN",
    https://arxiv.org/abs/1701.07875, uses 5 to 1. It costs nothing beyond the steps.

    Args:
        d_steps: discriminator steps in a cycle.
        g_steps: generator steps in a cycle.
        warm_up: take 100 discriminator steps in each of the first 25 cycles and in every 500th, as in the code of the
            Wasserstein GAN, so that the generator starts with a well-trained critic.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if ``module.plan`` does not contain both players exactly once, if another callback
            sets the plan, or with an update rule that steps both players once on every batch.

    Example:
        >>> UpdateRatio(d_steps=5).plan_at(cycle=0, step=4)
        ('d', 'g')
    """

    cycle: int
    position: int

    def __init__(self, d_steps: int = 1, g_steps: int = 1, warm_up: bool = False) -> None:
        super().__init__()
        self.d_steps = check_integer("d_steps", d_steps)
        self.g_steps = check_integer("g_steps", g_steps)
        self.warm_up = check_bool("warm_up", warm_up)
        if warm_up and d_steps > 100:
            raise ValueError(f"`warm_up` means 100 discriminator steps at first, but `d_steps` is {d_steps}.")
        self.moves_twice = g_steps > 1
        self.add_state("cycle", 0)
        self.add_state("position", 0)  # in the cycle

    def plan_at(self, cycle: int, step: int) -> tuple[Player, ...]:
        """The players that step on a batch of a cycle."""
        warm = self.warm_up and (cycle < 25 or cycle % 500 == 0)
        last = step >= (100 if warm else self.d_steps) - 1
        return self.moving(PLAYERS, self.g_steps) if last else self.moving(["d"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the players that step."""
        as_gan(pl_module).plan = self.plan_at(self.cycle, self.position)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance in the cycle."""
        module = as_gan(pl_module)
        if "d" in module.plan and "d" not in module.moved:
            return  # another callback paused the discriminator
        last = "g" in module.plan
        self.cycle, self.position = (self.cycle + 1, 0) if last else (self.cycle, self.position + 1)


def gap_of_losses(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """log r_g / r_d of the losses' relative changes r = |Lₜ − Lₜ₋₁| / |Lₜ₋₁|; 0 before there are two of each.

    "Accelerated WGAN update strategy with loss change rate balancing", https://arxiv.org/abs/2008.12463: the
    discriminator steps while its loss changes faster than λ times the generator's, that is, while the value is below
    log 1/λ.

    Example:
        >>> round(gap_of_losses({"d": 1.1, "g": 4.0}, {"d": 1.0, "g": 2.0}), 6)  # log 10
        2.302585
    """
    if not before:
        return 0.0
    r_d, r_g = (abs(now[p] - before[p]) / (abs(before[p]) + 1e-12) for p in PLAYERS)
    return math.log((r_g + 1e-12) / (r_d + 1e-12))


def gap_of_norms(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """log ‖∇L_G‖ / ‖∇L_D‖ of the norms, each over √(number of parameters). Above 0, the discriminator is ahead.

    Example:
        >>> gap_of_norms({"d_norm": 1.0, "g_norm": 1.0}, {})
        0.0
    """
    return math.log((now["g_norm"] + 1e-12) / (now["d_norm"] + 1e-12))


# For each rule: its value, which grows as the discriminator gets ahead; `low`, below which the generator pauses;
# `high`, above which the discriminator pauses; and `hysteresis`, how far back inside the value must be to end a pause.
RULES: dict[Rule, tuple[Callable[[Mapping[str, float], Mapping[str, float]], float], float, float, float]] = {
    "accuracy": (lambda now, before: now["accuracy"], 0.4, 0.8, 0.05),
    "loss_change": (gap_of_losses, 0.0, 0.0, 0.0),
    "logit_gap": (lambda now, before: now["logit_gap"], 0.1, 0.1, 0.0),
    "gradient_norm": (gap_of_norms, -math.log(10), math.log(10), math.log(2)),
}


def who_rests(value: float, resting: Player | None, low: float, high: float, hysteresis: float) -> Player | None:
    """Decide which player pauses on the next batch.

    Args:
        value: value of the rule.
        resting: the player that is paused now.
        low: the generator pauses below it.
        high: the discriminator pauses above it.
        hysteresis: how far inside the band the value must be before a paused player steps again.

    Returns:
        ``"d"``, ``"g"``, or None if both step.

    Example:
        >>> [who_rests(x, "d", low=0.4, high=0.8, hysteresis=0.05) for x in (0.81, 0.78, 0.74)]
        ['d', 'd', None]
    """
    if (resting == "d" and value > high - hysteresis) or (resting == "g" and value < low + hysteresis):
        return resting
    return "d" if value > high else "g" if value < low else None


class AdaptiveUpdateRatio(PlanCallback):
    """Pauses the player that is ahead until the other one has caught up.

    A rule computes one number from statistics of a batch, averaged over ranks. It grows as the discriminator gets
    ahead:

    * ``"accuracy"``: the share of logits that it classifies correctly. The band 0.4 to 0.8 is common practice.
    * ``"loss_change"``: log r_g / r_d with the relative changes r of both losses since the last batch; exactly one
      player steps. "Accelerated WGAN update strategy with loss change rate balancing",
      https://arxiv.org/abs/2008.12463, with λ = e^(−high).
    * ``"logit_gap"``: E l(x) − E l(G(z)); exactly one player steps: the discriminator below 0.1, else the generator, as
      in HyperGAN.
    * ``"gradient_norm"``: log of the ratio of the generator's gradient norm to the discriminator's, each divided by
      √(number of parameters). The band is a factor of 10 either way. This is a heuristic. A paused player keeps its
      last norm.

    Above ``high`` the discriminator pauses, below ``low`` the generator. With ``generator_rests="adversarial"`` only
    the adversarial terms of the generator's loss pause, and it keeps training on reconstruction and other terms. A
    pause ends when the value is back inside the band by ``hysteresis``, or after ``max_rest`` batches, whatever the
    rule says. The log has the rule's value as ``balance/<rule>``, and as ``balance/d_share`` and ``balance/g_share``
    the share of batches so far on which each player stepped. Costs one reduction over ranks per batch, and a forward
    pass of both networks on each batch on which the discriminator pauses (on the full batch at once, even with
    ``accumulate``).

    Args:
        rule: name of the rule.
        low: lower end of the band, in units of the rule; None: the rule's default.
        high: upper end of the band, in units of the rule; None: the rule's default.
        hysteresis: in units of the rule, not negative; None: the rule's default.
        max_rest: largest number of batches in a row on which a player pauses.
        generator_rests: what pauses below ``low``: ``"player"``, all of the generator's training, or ``"adversarial"``,
            only its adversarial loss and feature matching.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if ``module.plan`` does not contain both players exactly once, if another callback
            sets the plan, or with an update rule that steps both players on every batch.

    Example:
        >>> AdaptiveUpdateRatio("accuracy", high=0.7).low
        0.4
    """

    resting: Player | None
    rested: int
    batches: int
    moves: dict[Player, int]
    before: dict[str, float]
    norms: dict[str, float]

    def __init__(
        self,
        rule: Rule = "accuracy",
        low: float | None = None,
        high: float | None = None,
        hysteresis: float | None = None,
        max_rest: int = 5,
        generator_rests: Rests = "player",
    ) -> None:
        super().__init__()
        self.rule: Rule = check_choice("rule", rule, get_args(Rule))
        _, *defaults = RULES[rule]
        given = zip((low, high, hysteresis), defaults, strict=True)
        self.low, self.high, self.hysteresis = (default if value is None else value for value, default in given)
        check_finite("low", self.low)
        check_finite("high", self.high)
        check_number("hysteresis", self.hysteresis)
        if self.low > self.high:
            raise ValueError(f"`low` must not be above `high`, got {self.low!r} and {self.high!r}.")
        self.max_rest = check_integer("max_rest", max_rest)
        self.generator_rests: Rests = check_choice("generator_rests", generator_rests, get_args(Rests))
        self.add_state("resting", None)
        self.add_state("rested", 0)  # batches in a row
        self.add_state("batches", 0)
        self.add_state("moves", {"d": 0, "g": 0})
        self.add_state("before", {})  # the statistics of the last batch
        self.add_state("norms", {"d_norm": 0.0, "g_norm": 0.0})
        self._judged: list[Pair] = []  # of a batch on which the discriminator pauses

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a second callback that sets the plan, and to pause the adversarial loss if there is no other."""
        super().on_fit_start(trainer, pl_module)
        if self.generator_rests == "adversarial":
            refuse_without_other_terms(self, trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the players that step; compute the logits of the batch here if the discriminator is paused."""
        module = as_gan(pl_module)
        resting = None if self.resting == "g" and self.generator_rests == "adversarial" else self.resting
        module.plan = self.moving([player for player in PLAYERS if player != resting])
        self._judged = []
        if self.resting == "d":
            with torch.no_grad(), module.frozen_buffers(), module.noise.of("balance"):
                self._judged = module.compute_outputs("d", batch, ()).pairs()

    def allows_adversarial(self, module: GANProtocol) -> bool:
        """Whether the generator's adversarial terms are not paused."""
        return self.resting != "g" or self.generator_rests == "player"

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """The rule's value, and the players' shares of the batches."""
        return {f"balance/{name}": "step" for name in (self.rule, "d_share", "g_share")}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide which player pauses on the next batch."""
        module = as_gan(pl_module)
        pairs = self._judged or module.last_step.pairs
        if not pairs:
            return  # an update rule that does not run the discriminator
        now = self._statistics(module, pairs)
        value = RULES[self.rule][0](now, self.before)
        self.batches += 1
        for player in module.moved - ({"g"} if not self.allows_adversarial(module) else set()):
            self.moves[player] += 1
        if module.last_step.visible:
            shares = {f"balance/{player}_share": n / self.batches for player, n in self.moves.items()}
            module.log_dict({f"balance/{self.rule}": value} | shares)
        resting = who_rests(value, self.resting, self.low, self.high, self.hysteresis)
        self.rested = self.rested + 1 if resting is not None and resting == self.resting else 1
        self.resting = None if self.rested > self.max_rest else resting
        self.before = now

    @torch.no_grad()
    def _statistics(self, module: GANProtocol, pairs: list[Pair]) -> dict[str, float]:
        """Statistics of the batch before its steps, averaged over ranks and discriminators."""
        loss = module.loss
        real, fake = ({name: logits for name, *both in pairs for logits in [both[i]]} for i in (0, 1))
        outputs = GANOutputs(None, None, real, fake)
        with module.loss_at_rest():
            values = {
                "accuracy": torch.stack([loss.accuracy(real, fake) for _, real, fake in pairs]).mean(),
                "logit_gap": loss.direction
                * torch.stack([real.mean() - fake.mean() for _, real, fake in pairs]).mean(),
            } | {player: torch.stack([*adversarial_losses(loss, player, outputs).values()]).sum() for player in PLAYERS}
        for player in module.moved:
            size = sum(p.numel() for p in module.trainable_parameters(player))
            norm = float(module.last_step.gradient_norms[player]) / math.sqrt(size)
            if math.isfinite(norm):  # a gradient scaler skips steps whose gradient overflows
                self.norms[f"{player}_norm"] = norm
        reduced = module.trainer.strategy.reduce(torch.stack(list(values.values())), reduce_op="mean")
        return dict(zip(values, reduced.tolist(), strict=True)) | self.norms
