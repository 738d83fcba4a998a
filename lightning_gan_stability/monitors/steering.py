"""Settings that can be changed during training: how to read and set them, and which ones to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_gan_stability.callback import Regularizer, callbacks_of, find_rule
from lightning_gan_stability.callbacks.optimizer_schedule import set_number
from lightning_gan_stability.callbacks.update_ratio import PlanCallback
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.rollback import ScaleLearningRate
from lightning_gan_stability.outputs import PLAYERS, Player
from lightning_gan_stability.regularizers.gradient import R1Penalty, R2Penalty

Settings: TypeAlias = dict[str, float]

#: Settings that can be changed, and their default limits.
LIMITS: dict[str, tuple[float, float]] = {
    "g_lr": (1e-7, 1.0),
    "d_lr": (1e-7, 1.0),
    "beta1": (0.0, 0.9),
    "beta2": (0.9, 0.999),
    "gamma": (0.0, 10.0),
    "d_steps": (1, 2),
}

# (g_lr, d_lr, beta1, beta2, gamma), found on random recipes for points in the plane: see docs/measured.md
PORTFOLIO = (
    (1e-2, 1e-2, 0.0, 0.99, 0.3),
    (1e-2, 1e-2, 0.0, 0.99, 0.1),
    (3e-3, 1e-2, 0.0, 0.99, 0.3),
    (1e-3, 4e-3, 0.0, 0.99, 0.1),
    (3e-4, 1e-3, 0.5, 0.99, 0.03),
)
D_STEPS = 2  # discriminator steps on a batch, with these settings
# (g_lr and d_lr in geometric means of the user's, gamma), for optimizers that are not like Adam: one cannot know which
# rates suit them, and those of the user may be far from each other
AROUND = (
    (1.0, 3.0, 0.1),
    (10.0, 10.0, 0.1),
    (10.0, 30.0, 0.1),
    (0.1, 0.1, 0.1),
    (1.0, 1.0, 0.1),
    (100.0, 100.0, 0.1),
    (100.0, 300.0, 0.1),
    (1000.0, 1000.0, 0.1),
)
# (factor of g_lr, factor of d_lr, factor of gamma), when a run that had learned goes wrong
CALMER = (
    (0.3, 0.3, 1.0),
    (0.3, 1.0, 1.0),
    (1.0, 0.3, 1.0),
    (0.1, 0.1, 1.0),
    (1.0, 1.0, 4.0),
)


class Steering:
    """Reads and sets learning rates, momentum and penalty of a run.

    Args:
        trainer: the run's Trainer.
        module: the GAN.
        brought: R1 and R2 penalties that belong to the caller and have γ = 0 at first.
        limits: limits of the settings that may be changed, by name.

    Attributes:
        shares: learning rates of each player's parameter groups, relative to that of the first group.
        adaptive: both optimizers are variants of Adam, with ``betas``, so that rates mean the same for all networks.
        may_repeat: the discriminator may step several times on a batch.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: GANModule,
        brought: Sequence[Regularizer],
        limits: Mapping[str, tuple[float, float]],
    ) -> None:
        self.trainer, self.module, self.limits = trainer, module, limits
        self.shares: dict[Player, list[float]] = {}
        optimizers = [module.optimizer(player).optimizer for player in PLAYERS]
        self.adaptive = all("betas" in group for optimizer in optimizers for group in optimizer.param_groups)
        self.may_repeat = "d_steps" in limits and may_repeat(trainer, module)
        self.penalties = penalties_of(trainer)
        self.brought = [penalty for penalty in brought if penalty in self.penalties.values()]

    def scheduled(self, player: Player) -> bool:
        """Whether a scheduler of the user sets a player's rate."""
        optimizer = self.module.optimizer(player).optimizer
        return any(config.scheduler.optimizer is optimizer for config in self.trainer.lr_scheduler_configs)

    def read(self) -> Settings:
        """The current settings: those of the first parameter group, and for a scheduled rate its base."""
        found: Settings = {}
        for player in PLAYERS:
            group = self.module.optimizer(player).param_groups[0]
            base = group.get("max_lr", group.get("initial_lr", group["lr"])) if self.scheduled(player) else group["lr"]
            found[f"{player}_lr"] = float(base)
            if self.adaptive:
                found[f"{player}_beta1"], found[f"{player}_beta2"] = map(float, group["betas"])
        for name, penalty in self.penalties.items():
            found[name] = 0.0 if penalty.rests else 2 * penalty.weight_at(0)
        if self.may_repeat:
            found["d_steps"] = 1
        return found

    def apply(self, new: Mapping[str, float], old: Mapping[str, float], fall: float) -> None:
        """Set the numbers.

        Args:
            new: the new settings.
            old: the settings that rates of schedulers and further parameter groups correspond to now.
            fall: decay factor of the rates that no scheduler sets.
        """
        for player in PLAYERS:
            name = f"{player}_lr"
            if name not in self.limits:
                pass
            elif self.scheduled(player):
                if new[name] != old[name] and min(new[name], old[name]) > 0:
                    ScaleLearningRate(new[name] / old[name], player)(self.trainer, self.module)
            else:
                self.set_rates(player, new[name], fall)
            for group in self.module.optimizer(player).param_groups if self.adaptive else ():
                for i, beta in enumerate(("beta1", "beta2")):
                    if beta not in self.limits or (i == 0 and self._cycles_momentum(player)):
                        continue
                    set_number(group, f"betas.{i}", new[f"{player}_{beta}"])
        for name, penalty in self.penalties.items():
            penalty.weight = new[name] / 2
            if penalty in self.brought:
                penalty.rests = new[name] == 0
                # a penalty on every step of every batch would double its cost
                penalty.every = int(new.get("d_steps", 1))

    def _cycles_momentum(self, player: Player) -> bool:
        """Whether a scheduler sets β₁ on each step, as OneCycleLR does."""
        optimizer = self.module.optimizer(player).optimizer
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return any(s.optimizer is optimizer and getattr(s, "cycle_momentum", False) for s in schedulers)

    def note_rates(self) -> None:
        """Store the ratios of rates between a player's parameter groups."""
        self.shares = {
            player: [float(g["lr"]) / float(groups[0]["lr"] or 1.0) for g in groups]
            for player in PLAYERS
            for groups in (self.module.optimizer(player).param_groups,)
        }

    def set_rates(self, player: Player, rate: float, fall: float) -> None:
        """Set a player's rates."""
        for group, share in zip(self.module.optimizer(player).param_groups, self.shares[player], strict=True):
            set_number(group, "lr", rate * share * fall)

    # ---------- what to try

    def candidates(self, own: Settings) -> list[Settings]:
        """The user's own settings and alternatives to try, without duplicates."""
        found = [own]
        if self.adaptive:
            for g_lr, d_lr, beta1, beta2, gamma in PORTFOLIO:
                betas = {f"{player}_{k}": v for player in PLAYERS for k, v in (("beta1", beta1), ("beta2", beta2))}
                steps = {"d_steps": D_STEPS} if self.may_repeat else {}
                found.append(own | {"g_lr": g_lr, "d_lr": d_lr} | betas | self._penalized(gamma) | steps)
        else:
            mean = math.sqrt(own["g_lr"] * own["d_lr"])
            for g, d, gamma in AROUND:
                found.append(own | {"g_lr": g * mean, "d_lr": d * mean} | self._penalized(gamma))
        return distinct(within(settings, own, self.limits) for settings in found)

    def calmer(self, now: Settings) -> list[Settings]:
        """The current settings, and more cautious ones."""
        found = [now]
        for g, d, gamma in CALMER:
            stronger = {name: max(gamma * now[name], 0.1) for name in self.penalties}
            found.append(now | {"g_lr": g * now["g_lr"], "d_lr": d * now["d_lr"]} | stronger)
        return distinct(within(settings, now, self.limits) for settings in found)

    def _penalized(self, gamma: float) -> Settings:
        return dict.fromkeys(self.penalties, gamma)


def penalties_of(trainer: Trainer) -> dict[str, Regularizer]:
    """R1 and R2 of a run by name, if their weights are numbers and nothing else regularizes the discriminator."""
    found: dict[str, Regularizer] = {}
    kinds: dict[type[Regularizer], str] = {R1Penalty: "r1", R2Penalty: "r2"}
    for penalty in callbacks_of(trainer, Regularizer):  # type: ignore[type-abstract]
        if penalty.player != "d":
            continue
        name = kinds.get(type(penalty))
        if name is None or name in found or not isinstance(penalty.weight, int | float):
            return {}
        found[name] = penalty
    return found


def repeated(plan: tuple[Player, ...], d_steps: int) -> tuple[Player, ...]:
    """A plan whose discriminator steps several times.

    Example:
        >>> repeated(("d", "g"), 2)
        ('d', 'd', 'g')
    """
    return tuple(p for player in plan for p in [player] * (d_steps if player == "d" else 1))


def may_repeat(trainer: Trainer, module: GANModule) -> bool:
    """Whether the discriminator may step several times on a batch: no callback sets the plan, and its rule allows it.

    The rule is asked, because only it knows which plans it supports.
    """
    plan = module.plan
    if sorted(plan) != ["d", "g"] or callbacks_of(trainer, PlanCallback):
        return False
    module.plan = repeated(plan, 2)
    try:
        find_rule(trainer).check_plan(module)
    except MisconfigurationException:
        return False
    finally:
        module.plan = plan
    return True


def within(settings: Settings, own: Settings, limits: Mapping[str, tuple[float, float]]) -> Settings:
    """Settings clipped to their limits; settings without limits are unchanged.

    Example:
        >>> within({"g_lr": 1.0, "d_lr": 1.0}, {"g_lr": 1e-4, "d_lr": 1e-4}, {"g_lr": (1e-5, 1e-2)})
        {'g_lr': 0.01, 'd_lr': 0.0001}
    """
    found = {}
    for name, value in settings.items():
        key = limit_of(name)
        if value == own[name] or key not in limits:
            found[name] = own[name]
        else:
            low, high = limits[key]
            found[name] = min(max(value, low), high)
    return found


def limit_of(name: str) -> str:
    """The key of a setting's limits.

    Example:
        >>> limit_of("g_beta1"), limit_of("r2"), limit_of("d_lr")
        ('beta1', 'gamma', 'd_lr')
    """
    return {"r1": "gamma", "r2": "gamma"}.get(name, name[2:] if "beta" in name else name)


def distinct(settings: Any) -> list[Settings]:
    """Settings without duplicates, in their order.

    Example:
        >>> distinct([{"g_lr": 1.0}, {"g_lr": 1.0}])
        [{'g_lr': 1.0}]
    """
    found: list[Settings] = []
    for one in settings:
        if one not in found:
            found.append(one)
    return found


def in_words(new: Mapping[str, float], old: Mapping[str, float]) -> str:
    """A text that describes a change of settings.

    Example:
        >>> in_words({"g_lr": 1e-3, "d_lr": 2e-3}, {"g_lr": 1e-4, "d_lr": 2e-3})
        'g_lr 0.0001 → 0.001'
    """
    changes = [f"{name} {old[name]:.3g} → {value:.3g}" for name, value in new.items() if value != old[name]]
    return ", ".join(changes) or "nothing changes"
