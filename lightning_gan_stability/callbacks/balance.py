"""Who moves on which batch: callbacks that turn the knob ``plan``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gan_stability.callbacks.base import Player, Remembering, check_bool, check_number, check_positive_int

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule

Rule = Literal["accuracy", "loss_change", "logit_gap", "gradient_norm"]
BOTH: tuple[Player, Player] = ("d", "g")


class _Balance(Remembering):
    """A callback that owns the plan during a fit, and leaves it as it was."""

    _moves_twice = False
    _owns = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse another owner of the plan, and rules that need every player on every batch."""
        module = _gan(pl_module)
        name, rule = type(self).__name__, module._rule()
        owners = [type(callback).__name__ for callback in module._callbacks() if isinstance(callback, _Balance)]
        if len(owners) > 1:
            raise MisconfigurationException(f"{' and '.join(owners)} both say who moves: remove all but one.")
        if module.plan != BOTH:
            raise MisconfigurationException(
                f"{name} sets `module.plan`, but it is {module.plan} already: leave it alone, or remove {name}."
            )
        if rule.joint or (self._moves_twice and rule.holds_gradients):
            raise MisconfigurationException(
                f"{type(rule).__name__} moves both players once on every batch, which {name} would change: remove one "
                "of them."
            )
        self._owns = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the plan back."""
        self._give_back(_gan(pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the plan back."""
        self._give_back(_gan(pl_module))

    def _give_back(self, module: GANModule) -> None:
        if self._owns:
            module.plan, self._owns = BOTH, False


@final
class UpdateRatio(_Balance):
    """The discriminator steps ``d_steps`` times for every ``g_steps`` steps of the generator.

    Each of the discriminator's steps sees a batch of its own: a cycle takes ``d_steps`` batches, and the generator
    steps on the last of them, with fresh latents each time. ``max_steps`` goes on counting batches. "Wasserstein GAN",
    https://arxiv.org/abs/1701.07875, has 5 to 1. Costs what the steps cost.

    Args:
        d_steps: discriminator steps in a cycle.
        g_steps: generator steps in a cycle.
        warm_up: 100 discriminator steps in a cycle for the first 25 cycles and every 500th, as in the code of the
            Wasserstein GAN, so that the generator starts against a good critic.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if something else sets ``module.plan``, or with an update rule that moves both
            players once on every batch.

    Example:
        >>> UpdateRatio(d_steps=5).plan_at(cycle=0, step=4)
        ('d', 'g')
    """

    def __init__(self, d_steps: int = 1, g_steps: int = 1, warm_up: bool = False) -> None:
        super().__init__()
        check_positive_int("d_steps", d_steps)
        check_positive_int("g_steps", g_steps)
        check_bool("warm_up", warm_up)
        if warm_up and d_steps > 100:
            raise ValueError(f"`warm_up` means 100 discriminator steps at first, but `d_steps` is {d_steps}.")
        self.d_steps = d_steps
        self.g_steps = g_steps
        self.warm_up = warm_up
        self._moves_twice = g_steps > 1
        self._cycle = 0
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Where in which cycle the run is."""
        return super().state_dict() | {"cycle": self._cycle, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._cycle, self._step = state_dict["cycle"], state_dict["step"]

    def plan_at(self, cycle: int, step: int) -> tuple[Player, ...]:
        """Who moves on a batch of a cycle."""
        warm = self.warm_up and (cycle < 25 or cycle % 500 == 0)
        last = step >= (100 if warm else self.d_steps) - 1
        generator: list[Player] = ["g"] * self.g_steps
        return ("d", *generator) if last else ("d",)

    def _forget(self, module: GANModule) -> None:
        self._cycle = self._step = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say who moves."""
        _gan(pl_module).plan = self.plan_at(self._cycle, self._step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go on in the cycle."""
        module = _gan(pl_module)
        self._cycle, self._step = (self._cycle + 1, 0) if "g" in module.plan else (self._cycle, self._step + 1)
        self._iteration = module.iteration


def _gan(pl_module: LightningModule) -> GANModule:
    return pl_module  # type: ignore[return-value]


def gap_of_losses(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """log r_g / r_d of the losses' relative changes r = |Lₜ − Lₜ₋₁| / |Lₜ₋₁|; 0 before there are two of each.

    "Accelerated WGAN update strategy with loss change rate balancing", https://arxiv.org/abs/2008.12463: the
    discriminator moves while its loss changes faster than λ times the generator's, that is, below log 1/λ.

    Example:
        >>> round(gap_of_losses({"d": 1.1, "g": 4.0}, {"d": 1.0, "g": 2.0}), 6)  # log 10
        2.302585
    """
    if not before:
        return 0.0
    r_d, r_g = (abs(now[p] - before[p]) / (abs(before[p]) + 1e-12) for p in BOTH)
    return math.log((r_g + 1e-12) / (r_d + 1e-12))


def gap_of_norms(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """log ‖∇L_G‖ / ‖∇L_D‖ of the norms per root of a parameter: above 0, the discriminator has less left to learn.

    Example:
        >>> gap_of_norms({"d_norm": 1.0, "g_norm": 1.0}, {})
        0.0
    """
    return math.log((now["g_norm"] + 1e-12) / (now["d_norm"] + 1e-12))


# What a rule looks at, which grows as the discriminator gets ahead; below `low` the generator rests, above `high` the
# discriminator; and how far back the value must come before a player that rests moves again.
RULES: dict[Rule, tuple[Callable[[Mapping[str, float], Mapping[str, float]], float], float, float, float]] = {
    "accuracy": (lambda now, before: now["accuracy"], 0.4, 0.8, 0.05),
    "loss_change": (gap_of_losses, 0.0, 0.0, 0.0),
    "logit_gap": (lambda now, before: now["logit_gap"], 0.1, 0.1, 0.0),
    "gradient_norm": (gap_of_norms, -math.log(10), math.log(10), math.log(2)),
}


def who_rests(value: float, resting: Player | None, low: float, high: float, hysteresis: float) -> Player | None:
    """Decide who rests on the next batch.

    Args:
        value: what the rule looks at.
        resting: who rests now.
        low: the generator rests below it.
        high: the discriminator rests above it.
        hysteresis: how far inside the band the value must be before a player that rests moves again.

    Returns:
        ``"d"``, ``"g"``, or None if both move.

    Example:
        >>> [who_rests(x, "d", low=0.4, high=0.8, hysteresis=0.05) for x in (0.81, 0.78, 0.74)]
        ['d', 'd', None]
    """
    if (resting == "d" and value > high - hysteresis) or (resting == "g" and value < low + hysteresis):
        return resting
    return "d" if value > high else "g" if value < low else None


@final
class AdaptiveUpdateRatio(_Balance):
    """Lets the player that is ahead rest, on the next batch, until the other one has caught up.

    A rule turns statistics of a batch, averaged over ranks, into one number that grows as the discriminator gets ahead:

    * ``"accuracy"``: the share of logits that it judges right. The band 0.4 to 0.8 is common practice.
    * ``"loss_change"``: log r_g / r_d with the relative changes r of both losses since the batch before; exactly one
      player moves. "Accelerated WGAN update strategy with loss change rate balancing",
      https://arxiv.org/abs/2008.12463, with λ = e^(−high).
    * ``"logit_gap"``: E l(x) − E l(G(z)); exactly one player moves, the discriminator below 0.1, as in HyperGAN.
    * ``"gradient_norm"``: log of the generator's gradient norm per root of a parameter over the discriminator's; the
      band is a factor of 10 either way. A heuristic. A player that rests keeps its last norm.

    Above ``high`` the discriminator rests, below ``low`` the generator; one that rests moves again when the value has
    come back by ``hysteresis``, or after ``max_rest`` batches, whatever the rule says, so that nobody starves. The log
    has the rule's value, ``balance/<rule>``, and ``balance/d_share`` and ``balance/g_share``, the shares of batches so
    far on which a player moved. Statistics cost one exchange between ranks per batch, and one forward pass on a batch
    on which the discriminator rests (on the whole batch at once, also with ``accumulate``).

    Args:
        rule: what to look at.
        low: in units of the rule; None: the rule's own.
        high: the same.
        hysteresis: the same, not negative.
        max_rest: batches in a row that a player may rest.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: if something else sets ``module.plan``, or with an update rule that moves both
            players on every batch.

    Example:
        >>> AdaptiveUpdateRatio("accuracy", high=0.7).low
        0.4
    """

    def __init__(
        self,
        rule: Rule = "accuracy",
        low: float | None = None,
        high: float | None = None,
        hysteresis: float | None = None,
        max_rest: int = 5,
    ) -> None:
        super().__init__()
        if rule not in get_args(Rule):
            raise ValueError(f"`rule` must be one of {', '.join(get_args(Rule))}, got {rule!r}.")
        self.rule: Rule = rule
        _, *defaults = RULES[rule]
        given = zip((low, high, hysteresis), defaults, strict=True)
        self.low, self.high, self.hysteresis = (default if value is None else value for value, default in given)
        for name, value in (("low", self.low), ("high", self.high)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        check_number("hysteresis", self.hysteresis)
        if self.low > self.high:
            raise ValueError(f"`low` must not be above `high`, got {self.low!r} and {self.high!r}.")
        check_positive_int("max_rest", max_rest)
        self.max_rest = max_rest
        self._resting: Player | None = None
        self._rested = 0
        self._batches = 0
        self._moves = {"d": 0, "g": 0}
        self._before: dict[str, float] = {}
        self._norms = {"d_norm": 0.0, "g_norm": 0.0}
        self._seen: tuple[Tensor, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Who rests and for how long, and the statistics of the last batch."""
        return super().state_dict() | {
            "resting": self._resting,
            "rested": self._rested,
            "batches": self._batches,
            "moves": self._moves,
            "before": self._before,
            "norms": self._norms,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._resting, self._rested = state_dict["resting"], state_dict["rested"]
        self._batches, self._moves = state_dict["batches"], dict(state_dict["moves"])
        self._before, self._norms = dict(state_dict["before"]), dict(state_dict["norms"])

    def _forget(self, module: GANModule) -> None:
        """Begin with both players."""
        self._resting, self._rested, self._before = None, 0, {}
        self._batches, self._moves = 0, {"d": 0, "g": 0}
        self._norms = {"d_norm": 0.0, "g_norm": 0.0}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say who moves; judge the batch if the discriminator will not."""
        module = _gan(pl_module)
        module.plan = tuple(player for player in BOTH if player != self._resting)
        self._seen = None
        if self._resting == "d":
            module._now.draw = 0  # whatever was drawn since the last batch
            with torch.no_grad(), module._still():
                self._seen = module.play("d", batch).both_logits

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide who rests on the next batch."""
        module = _gan(pl_module)
        now = self._statistics(module)
        value = RULES[self.rule][0](now, self._before)
        self._batches += 1
        for player in module.moved:
            self._moves[player] += 1
        if module._now.shown:
            shares = {f"balance/{player}_share": n / self._batches for player, n in self._moves.items()}
            module.log_dict({f"balance/{self.rule}": value} | shares)
        resting = who_rests(value, self._resting, self.low, self.high, self.hysteresis)
        self._rested = self._rested + 1 if resting is not None and resting == self._resting else 1
        self._resting = None if self._rested > self.max_rest else resting
        self._before = now
        self._iteration = module.iteration

    @torch.no_grad()
    def _statistics(self, module: GANModule) -> dict[str, float]:
        """Of the batch before anybody moved on it, averaged over ranks."""
        logits = module._now.judged if self._seen is None else self._seen
        assert logits is not None
        real, fake = logits
        with module._held_loss():
            values = {
                "accuracy": module.loss.accuracy(real, fake),
                "logit_gap": module.loss._direction * (real.mean() - fake.mean()),
                "d": module.loss.discriminator(real, fake).mean(),
                "g": module.loss.generator(fake, real).mean(),
            }
        for player in module.moved:
            size = sum(p.numel() for p in module._moving(player))
            norm = float(module._now.logs[f"{player}/grad_norm"]) / math.sqrt(size)
            if math.isfinite(norm):  # a gradient scaler skips steps whose gradient overflows
                self._norms[f"{player}_norm"] = norm
        reduced = module.trainer.strategy.reduce(torch.stack(list(values.values())), reduce_op="mean")
        return dict(zip(values, reduced.tolist(), strict=True)) | self._norms
