"""A delayed start of the adversarial loss for generators that train on a reconstruction loss first."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_gan_stability._checks import check, check_choice, check_integer, check_share, check_type
from lightning_gan_stability.callback import Cadence, GANCallback, Regularizer, as_gan, callbacks_of, find_rule
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.outputs import GANOutputs, Player, Terms
from lightning_gan_stability.protocols import GANProtocol

When = Literal["step", "plateau"]


def refuse_without_other_terms(callback: GANCallback, trainer: Trainer, module: LightningModule) -> None:
    """Refuse to pause the generator's adversarial terms if its loss has no other term."""
    terms = callbacks_of(trainer, Regularizer)  # type: ignore[type-abstract]
    has_others = any(c.player == "g" and not c.needs_real and c.every == 1 for c in terms)
    if not has_others and not is_overridden("auxiliary_losses", module, GANModule):
        name = type(callback).__name__
        raise MisconfigurationException(
            f"{name} pauses the generator's adversarial loss, but the generator has no other loss to train on: add "
            f"Reconstruction, override `auxiliary_losses`, or remove {name}."
        )


def _batches_left(trainer: Trainer) -> float:
    """The largest number of batches left in this run, counted from its start or from the checkpoint it resumes from."""
    left = math.inf
    if trainer.max_steps >= 0:
        left = trainer.max_steps - trainer.global_step
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left = min(left, (trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches)
    return left


class AdversarialStart(GANCallback):
    """Trains the generator without its adversarial loss at first, until a given step or until a loss stops improving.

    Before the start the discriminator neither runs nor steps, so its optimizer's moments and its BatchNorm statistics
    stay as they are; with an adversarial weight of zero both would change. From the start on, the generator's loss has
    its adversarial term and all other terms that use the discriminator, such as ``FeatureMatching``. This is
    ``disc_start`` of "Taming Transformers for High-Resolution Image Synthesis", https://arxiv.org/abs/2012.09841, and
    ``discriminator_train_start_steps`` of "Parallel WaveGAN", https://arxiv.org/abs/1910.11480. Steps count batches,
    whatever the number of optimizers.

    With ``when="plateau"`` the start comes when the mean of ``monitor`` over ``window`` batches and all processes has
    not fallen below (1 - ``threshold``) times its smallest value for ``patience`` windows in a row. A validation value,
    ``val/...``, is compared at each validation. Checkpoints store the start. ``balance/adversarial_start`` in the log
    is the factor of the adversarial terms.

    Args:
        step: ``module.iteration`` of the first batch with the adversarial term.
        ramp: number of batches over which the term's factor rises linearly from 0 to 1; 0: it is 1 from the start.
        discriminator_first: number of batches by which the discriminator starts before the generator's adversarial
            term; True: it trains from the first batch on. With ``when="plateau"`` the discriminator starts at the
            plateau, and the generator's term this many batches later.
        when: ``"step"``, or ``"plateau"``, which needs ``monitor``.
        monitor: the log key of the term that must stop improving, such as ``"g/reconstruction"``; smaller is better.
        window: number of batches to average for one value.
        patience: number of windows (or validations) in a row without an improvement.
        threshold: smallest relative decrease that counts as an improvement, in [0, 1).

    Raises:
        ValueError: if an argument has a bad value, or does not go with ``when``.
        MisconfigurationException: if ``module.plan`` lacks a player, with update rules that need both players on each
            batch or differentiate through a step, if ``monitor`` is not logged, or if it is a validation value in a run
            without validation.

    Example:
        >>> AdversarialStart(step=1000, ramp=100).factor_at(1049)
        0.5
    """

    found: int | None
    best: float
    waited: int
    total: Tensor | None
    count: int

    def __init__(
        self,
        step: int | None = None,
        ramp: int = 0,
        discriminator_first: int | bool = 0,
        when: When = "step",
        monitor: str | None = None,
        window: int = 100,
        patience: int = 5,
        threshold: float = 0.01,
    ) -> None:
        super().__init__()
        self.when: When = check_choice("when", when, get_args(When))
        check((step is None) == (when == "plateau"), "step", "given with when='step', and with no other", step)
        check((monitor is None) == (when == "step"), "monitor", "given with when='plateau', and with no other", monitor)
        self.step = None if step is None else check_integer("step", step, least=0)
        self.monitor = None if monitor is None else check_type("monitor", monitor, str)
        self.ramp = check_integer("ramp", ramp, least=0)
        if not isinstance(discriminator_first, bool):
            check_integer("discriminator_first", discriminator_first, least=0)
        self.discriminator_first = discriminator_first
        self.window = check_integer("window", window)
        self.patience = check_integer("patience", patience)
        self.threshold = check_share("threshold", threshold, open_end=True)
        self.add_state("found", None)  # the start, once a plateau is found
        self.add_state("best", math.inf)
        self.add_state("waited", 0)
        self.add_state("total", None)  # of the window so far
        self.add_state("count", 0)

    @property
    def start(self) -> int | None:
        """The first batch with the generator's adversarial term; None before a plateau is found."""
        return self.found if self.when == "plateau" else self.step

    def factor_at(self, iteration: int) -> float:
        """The factor of the generator's adversarial terms on a batch; 0 before the start."""
        if self.start is None or iteration < self.start:
            return 0.0
        return min(1.0, (iteration - self.start + 1) / self.ramp) if self.ramp else 1.0

    def trains_discriminator_at(self, iteration: int) -> bool:
        """Whether the discriminator trains on a batch."""
        if self.discriminator_first is True:
            return True
        return self.start is not None and iteration >= self.start - self.discriminator_first

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse plans and update rules that cannot run without the discriminator."""
        module = as_gan(pl_module)
        if not {"d", "g"} <= {*module.plan}:
            raise MisconfigurationException(
                f"AdversarialStart starts the discriminator later, but `module.plan` is {module.plan}: put both "
                "players into the plan, or remove AdversarialStart."
            )
        rule = find_rule(trainer)
        if rule.joint or rule.whole_batch:
            name = type(rule).__name__
            raise MisconfigurationException(
                f"{name} needs the discriminator on every batch, but AdversarialStart leaves it out at first: remove "
                f"{name} or AdversarialStart."
            )
        if self.monitor is not None and self.monitor.startswith("val/") and not trainer.enable_validation:
            raise MisconfigurationException(
                f"AdversarialStart waits for `{self.monitor}` to stop improving, but this run has no validation: give "
                "`trainer.fit` a loader for it, or monitor a term of training, such as 'g/reconstruction'."
            )
        if self.step != 0:
            refuse_without_other_terms(self, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the run is known to end before the start."""
        super().on_train_start(trainer, pl_module)
        last = as_gan(pl_module).iteration + _batches_left(trainer)
        if self.start is not None and self.start >= last:
            rank_zero_warn(
                f"AdversarialStart(step={self.start}) comes after the end of this run, which has {last} batches: the "
                "generator will train without its adversarial loss. Lower `step`, or train longer."
            )

    # ---------- called by the module

    def adjust_plan(self, module: GANProtocol, plan: tuple[Player, ...]) -> tuple[Player, ...]:
        """Step the generator alone, on every batch, before the discriminator's start."""
        return plan if self.trains_discriminator_at(module.iteration) else ("g",)

    def allows_adversarial(self, module: GANProtocol) -> bool:
        """Whether the start has been reached."""
        return self.factor_at(module.iteration) > 0

    def weigh_terms(
        self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms
    ) -> dict[str, float | Tensor]:
        """The factor of the adversarial terms during the ramp."""
        factor = self.factor_at(module.iteration)
        if player == "d" or factor == 1:
            return {}
        names = [
            "adversarial",
            *(module.term_name(regularizer) for regularizer in module.due("g") if regularizer.needs_real),
        ]
        return {name: factor for name in names if name in terms}

    # ---------- the plateau

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """The factor of the adversarial terms."""
        return {"balance/adversarial_start": "step"}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the mean of the monitored term; log the factor."""
        module = as_gan(pl_module)
        if module.last_step.visible:
            module.log("balance/adversarial_start", self.factor_at(module.last_step.iteration))
        if self.monitor is None or self.start is not None or self.monitor.startswith("val/"):
            return
        value = module.last_step.values.get(self.monitor)
        if value is None:
            if module.last_step.moved:
                self._refuse_monitor([*module.last_step.values])
            return
        value = value.detach().float()
        self.total = value if self.total is None else self.total + value
        self.count += 1
        if self.count == self.window:
            assert self.total is not None
            mean = trainer.strategy.reduce(self.total / self.count, reduce_op="mean")
            self.total, self.count = None, 0
            self._look(module, float(mean))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a monitored validation value."""
        module = as_gan(pl_module)
        watching = self.monitor is not None and self.start is None and self.monitor.startswith("val/")
        if not watching or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert self.monitor is not None
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            self._refuse_monitor([*trainer.callback_metrics])
        else:
            self._look(module, float(value))

    def _look(self, module: GANProtocol, value: float) -> None:
        """Set the start if the value has not improved for ``patience`` values in a row."""
        if not math.isfinite(self.best) or value < self.best - self.threshold * abs(self.best):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited == self.patience:
            self.found = module.iteration + (0 if self.discriminator_first is True else self.discriminator_first)
            rank_zero_info(
                f"AdversarialStart: {self.monitor} has stopped improving at {self.best:.4g}; the adversarial loss "
                f"starts at step {self.found}."
            )

    def _refuse_monitor(self, keys: list[str]) -> None:
        raise MisconfigurationException(
            f"AdversarialStart waits for `{self.monitor}` to stop improving, but no such value is logged. "
            f"Logged are {', '.join(sorted(keys)) or 'no values'}."
        )
