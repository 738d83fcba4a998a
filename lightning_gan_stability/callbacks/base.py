"""What every regularizer and every update rule is."""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule, Play

Player = Literal["d", "g"]
NETWORKS: dict[Player, str] = {"d": "discriminator", "g": "generator"}


def check_positive_int(name: str, value: object) -> None:
    """Raise ``ValueError`` unless the value is an integer above zero.

    Example:
        >>> check_positive_int("every", 0)
        Traceback (most recent call last):
        ValueError: `every` must be a positive integer, got 0.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_number(name: str, value: object, *, positive: bool = False) -> None:
    """Raise ``ValueError`` unless the value is a finite number that is not negative (or, on wish, above zero).

    Example:
        >>> check_number("weight", -1)
        Traceback (most recent call last):
        ValueError: `weight` must be a finite number that is not negative, got -1.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):  # type: ignore[operator]
        kind = "a positive finite number" if positive else "a finite number that is not negative"
        raise ValueError(f"`{name}` must be {kind}, got {value!r}.")


def check_bool(name: str, value: object) -> None:
    """Raise ``ValueError`` unless the value is True or False.

    Example:
        >>> check_bool("adaptive", "false")
        Traceback (most recent call last):
        ValueError: `adaptive` must be True or False, got 'false'.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_schedule(name: str, final: object, steps: object) -> None:
    """Raise ``ValueError`` unless a final value and the steps until then are both given, and good, or both None.

    Example:
        >>> check_schedule("gamma", 0.1, None)
        Traceback (most recent call last):
        ValueError: `final_gamma` and `steps` go together, got 0.1 and None.
    """
    if (final is None) != (steps is None):
        raise ValueError(f"`final_{name}` and `steps` go together, got {final!r} and {steps!r}.")
    if steps is not None:
        check_number(f"final_{name}", final)
        check_positive_int("steps", steps)


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule is in the mode that it was in.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluation(net):
        ...     net.training
        False
        >>> net[0].training, net[1].training
        (True, False)
    """
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


class GANCallback(Callback):
    """A callback that acts on a ``GANModule``, and refuses other modules: there it would do nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that is no ``GANModule``."""
        if not hasattr(pl_module, "compute_gradients"):
            name = type(self).__name__
            raise MisconfigurationException(
                f"{name} acts on a GANModule, but the module is a {type(pl_module).__name__}: subclass GANModule, or "
                f"remove {name}."
            )

    #: It may put right, in :meth:`rescue`, a step whose loss or gradient is not finite.
    rescues: bool = False

    def rescue(self, trainer: Trainer, module: GANModule) -> bool:
        """Put the module back to where it was good; say whether that was done. Called on all ranks, or on none."""
        return False


class Remembering(GANCallback):
    """A callback whose memory belongs to one module: with another one, or after steps without it, it begins anew.

    A checkpoint's memory is taken over. Subclasses implement :meth:`_forget`, and say at the end of each batch that
    they were there: ``self._iteration = module.iteration``.
    """

    #: It looks at a run without being part of it: a rollback leaves its memory alone.
    watches: ClassVar[bool] = False
    _iteration = 0
    _owner: object = None
    _loaded = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the checkpoint is read, nothing is."""
        super().setup(trainer, pl_module, stage)
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """The module's iteration at the end of the last batch."""
        return {"iteration": self._iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._iteration, self._loaded = state_dict["iteration"], True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what belongs to another module."""
        module: GANModule = pl_module  # type: ignore[assignment]
        if not self._loaded and (self._owner is not module._identity or self._iteration != module.iteration):
            self._forget(module)
        self._owner, self._loaded, self._iteration = module._identity, False, module.iteration

    def _forget(self, module: GANModule) -> None:
        raise NotImplementedError


class Regularizer(GANCallback, abc.ABC):
    """Adds ``weight · penalty`` to one player's loss every ``every``-th step, times ``every``.

    A lazy penalty joins the main step and is scaled by ``every``, so that its mean over steps does not depend on
    ``every``. Steps are the batches on which its player moves, whatever ``module.plan`` says of the others. Subclasses
    implement :meth:`penalty`.

    Args:
        weight: coefficient of the penalty, not negative.
        every: the penalty is due on every so many steps of its player, the first one included.
        final_weight: what the weight becomes along half a cosine over ``steps`` steps, and then stays. None: constant.
        steps: how many steps that takes.

    Raises:
        ValueError: if an argument has a bad value, or one of ``final_weight`` and ``steps`` comes without the other.

    Example:
        >>> class MeanMatching(Regularizer):
        ...     player = "g"
        ...     def penalty(self, module, play):
        ...         return (play.fake.mean(0) - play.real.mean(0)).square().sum()
        >>> MeanMatching(weight=0.1, every=4).name
        'mean_matching'
    """

    player: Player = "d"
    weight: float = 1.0
    every: int = 1
    final_weight: float | None = None
    steps: int | None = None
    #: What of a play must require grad before the forward pass because the penalty differentiates by it. Such a forward
    #: pass runs in full precision and uncompiled: second derivatives need both.
    differentiates: ClassVar[tuple[str, ...]] = ("real", "fake", "latents")
    #: The penalty takes each sample's own gradient from a batch, which BatchNorm in train mode makes impossible.
    per_sample: ClassVar[bool] = False
    #: The penalty is differentiated twice, which compiled networks cannot be: they run uncompiled meanwhile.
    second_order: ClassVar[bool] = True
    #: The penalty compares samples or logits of the play with others that it makes itself: under mixed precision it
    #: gets a play in full precision.
    compares: ClassVar[bool] = False

    def __init__(
        self,
        weight: float | None = None,
        every: int | None = None,
        final_weight: float | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = self.weight if weight is None else weight
        self.every = self.every if every is None else every
        self.final_weight = final_weight
        self.steps = steps
        check_number("weight", self.weight)
        check_positive_int("every", self.every)
        check_schedule("weight", final_weight, steps)

    def weight_at(self, step: int) -> float:
        """The weight at a step: w(t) = w₀ + ½ (1 − cos(π t/steps)) (final_weight − w₀), and constant from ``steps`` on.

        The schedule of "The GAN is dead; long live the GAN!", https://arxiv.org/abs/2501.05441.
        """
        if self.final_weight is None or self.steps is None:
            return self.weight
        progress = (1 - math.cos(math.pi * min(step / self.steps, 1))) / 2
        return self.weight + progress * (self.final_weight - self.weight)

    @property
    def name(self) -> str:
        """The key ``<player>/<name>`` in the log: the class name in snake case, without "penalty"."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower().removesuffix("penalty").strip("_")

    @abc.abstractmethod
    def penalty(self, module: GANModule, play: Play) -> Tensor:
        """The penalty of what the player saw, without weight: one value per sample, or a scalar."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the penalty cannot be right with."""
        if self.per_sample:
            network = NETWORKS[self.player]
            _refuse_batch_norm(self, network, pl_module.get_submodule(network))


def _refuse_batch_norm(regularizer: Regularizer, network: str, module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            raise MisconfigurationException(
                f"{type(regularizer).__name__} needs each sample's own gradient, but the BatchNorm layer "
                f"`{network}.{name}` mixes the samples of a batch: remove the layer, replace it by GroupNorm, "
                "LayerNorm or InstanceNorm, or remove the penalty."
            )


class UpdateRule(GANCallback, abc.ABC):
    """How the players move on one batch; at most one in a run.

    Subclasses implement ``__call__`` from the two primitives ``module.compute_gradients(player, batch)`` and
    ``module.apply_gradients(player)``.

    Example:
        >>> class GeneratorFirst(UpdateRule):
        ...     def __call__(self, module, batch):
        ...         for player in ("g", "d"):
        ...             module.compute_gradients(player, batch)
        ...             module.apply_gradients(player)
    """

    #: Both players' gradients are taken before either steps. A gradient scaler changes its scale at each step, so the
    #: second player's gradient would be unscaled by the wrong number: refused.
    holds_gradients: bool = False
    #: Every batch moves both players, once each.
    joint: ClassVar[bool] = False
    #: Gradients are taken inside of the step, for which the graph of the whole batch is needed at once.
    whole_batch: ClassVar[bool] = False
    #: These gradients are differentiated again.
    second_order: bool = True

    @abc.abstractmethod
    def __call__(self, module: GANModule, batch: Any) -> None:
        """Move the players on one batch."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a gradient scaler, a plan, shared parameters or micro-batches where they would be wrong."""
        module: GANModule = pl_module  # type: ignore[assignment]
        name = type(self).__name__
        self.check_plan(module)
        if self.holds_gradients and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"{name} takes both gradients before either step, but precision='16-mixed' changes its "
                "gradient scale at each step: use precision='bf16-mixed' or '32-true', or remove the rule."
            )
        shared = {p for p in module.generator.parameters() if p.requires_grad} & {*module.discriminator.parameters()}
        if self.holds_gradients and shared:
            raise MisconfigurationException(
                f"The networks share parameters, and {name} holds both players' gradients at once, for which a "
                "parameter has no room: use Alternating, or give each network its own."
            )
        if self.whole_batch and self.second_order:
            _refuse_layers(name, module)
        if self.whole_batch and self.joint and module._sharded():
            raise MisconfigurationException(
                f"{name} differentiates by both players' whole parameters, which ModelParallelStrategy shards: use "
                f"strategy='ddp', or Unrolling or Extragradient instead of {name}."
            )
        if self.whole_batch and module.accumulate > 1:
            raise MisconfigurationException(
                f"{name} differentiates gradients of the whole batch, which accumulate={module.accumulate} would take "
                f"apart: use accumulate=1 and smaller batches, or remove {name}."
            )

    def check_plan(self, module: GANModule) -> None:
        """Refuse a plan that the rule does not follow; before the fit and before every batch, for plans may change."""
        if self.joint and sorted(module.plan) != ["d", "g"]:
            name = type(self).__name__
            raise MisconfigurationException(
                f"{name} moves both players on every batch, but the plan is {module.plan}: remove {name} or what sets "
                "`module.plan`."
            )


def _refuse_layers(rule: str, module: GANModule) -> None:
    layers = [m for network in (module.generator, module.discriminator) for m in network.modules()]
    if any(isinstance(m, nn.SyncBatchNorm) for m in layers):
        raise MisconfigurationException(
            f"{rule} differentiates gradients, which SyncBatchNorm cannot: set sync_batchnorm=False, replace the "
            f"layer, or remove {rule}."
        )
    if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse for m in layers):
        raise MisconfigurationException(
            f"{rule} differentiates gradients, which an embedding with sparse=True cannot: use sparse=False, or remove "
            f"{rule}."
        )


def check_once(rule: UpdateRule, module: GANModule) -> None:
    """Refuse a plan in which a player stands twice, under a rule whose players move at the same time."""
    if len(set(module.plan)) < len(module.plan):
        name = type(rule).__name__
        raise MisconfigurationException(
            f"{name} moves every player once, but the plan is {module.plan}: remove {name} or the callback that sets "
            "the plan."
        )


class Alternating(UpdateRule):
    """Each player of the plan in turn: takes its gradient, then steps; the next one sees the result. The default.

    "Generative Adversarial Networks", https://arxiv.org/abs/1406.2661, Algorithm 1. Costs one forward and backward pass
    for each entry of ``module.plan``.

    Example:
        >>> isinstance(Alternating(), UpdateRule)
        True
    """

    def __call__(self, module: GANModule, batch: Any) -> None:
        """Move the players on one batch."""
        for player in module.plan:
            module.compute_gradients(player, batch)
            module.apply_gradients(player)
