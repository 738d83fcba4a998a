"""What a callback of this package is: regularizers and update rules, and what all of them share."""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from lightning_gan_stability._checks import check_integer, check_number, check_schedule
from lightning_gan_stability.layers import has_batch_norm
from lightning_gan_stability.outputs import NETWORKS, GANOutputs, Player, Terms

if TYPE_CHECKING:
    from lightning_gan_stability.protocols import GANProtocol


def as_gan(pl_module: LightningModule) -> GANProtocol:
    """The module of a hook, which :meth:`GANCallback.setup` has seen to be a GANModule."""
    return cast("GANProtocol", pl_module)


def refuse_after_weight_averaging(callback: Callback, trainer: Trainer) -> None:
    """Refuse Lightning's average of a whole module before a callback that adds to the module: it would lack that."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    before = callbacks[: callbacks.index(callback)]
    averaging = next((c for c in before if isinstance(c, WeightAveraging)), None)
    if averaging is not None:
        name, other = type(callback).__name__, type(averaging).__name__
        raise MisconfigurationException(
            f"{other} copies the module before {name} adds to it, and the two would not fit: put {name} before {other} "
            "in the list of callbacks."
        )


class _DeclaredState:
    """The method ``state_dict`` of a callback: what it has declared.

    Lightning tells by an overridden method which callbacks have a state, and wants a key of its own for each. There may
    be several of one class that declare nothing, and these have Lightning's own method.
    """

    def __get__(self, callback: GANCallback | None, kind: type) -> Callable[[], dict[str, Any]]:
        if callback is None or not callback._states():
            return cast("Callable[[], dict[str, Any]]", Callback.state_dict.__get__(callback, kind))
        return callback._declared_state


class GANCallback(Callback):
    """A callback that acts on a GANModule.

    It refuses other modules, on which it would do nothing. What it remembers from batch to batch is declared by
    :meth:`add_state`: checkpoints, device moves, rollbacks and the reset for another module follow from that. A
    subclass that overrides ``setup`` or ``on_train_start`` calls ``super()``.

    Attributes:
        iteration: the module's iteration at the end of the last batch that the callback was there for.

    Example:
        >>> class CountBatches(GANCallback):
        ...     def __init__(self):
        ...         self.add_state("batches", 0)
        ...     def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ...         self.batches += 1
        >>> CountBatches().state_dict()
        {'batches': 0}
    """

    #: A rollback puts its state back too. Monitors set it to False: they remember what was, whatever is put back.
    rolled_back: ClassVar[bool] = True
    #: It may put right, in :meth:`rescue`, a step whose loss or gradient is not finite.
    rescues: bool = False
    iteration: int = 0
    _module: object = None
    _loaded: bool = False

    # ---------- state

    def add_state(self, name: str, default: Any, on_device: bool = True) -> None:
        """Declare an attribute that belongs to a run, as ``torchmetrics.Metric.add_state`` does.

        Args:
            name: of the attribute.
            default: what it is at first: numbers, strings, tensors, None, or lists and dicts of these.
            on_device: its tensors lie on the module's device; False: they stay where they are.
        """
        self._states()[name] = (deepcopy(default), on_device)
        setattr(self, name, deepcopy(default))

    def _declared_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._states()}

    state_dict = _DeclaredState()

    def _states(self) -> dict[str, tuple[Any, bool]]:
        return self.__dict__.setdefault("_declared", {})  # type: ignore[no-any-return]  # without a call of `__init__`

    def reset(self, module: GANProtocol) -> None:
        """Begin anew, with another module, or with one that has trained without this callback."""
        for name, (default, _) in self._states().items():
            setattr(self, name, deepcopy(default))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: if it lacks what was declared.
        """
        missing = [name for name in self._states() if name not in state_dict]
        if missing:
            raise ValueError(
                f"The checkpoint holds a {type(self).__name__} without {', '.join(missing)}: it is another."
            )
        for name in self._states():
            setattr(self, name, state_dict[name])
        self._loaded = True

    # ---------- what the Trainer calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that is no GANModule."""
        self._loaded = False  # a checkpoint is read after this
        if not hasattr(pl_module, "compute_gradients"):
            name = type(self).__name__
            raise MisconfigurationException(
                f"{name} acts on a GANModule, but the module is a {type(pl_module).__name__}: subclass GANModule, or "
                f"remove {name}."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew if the state belongs to another module; bring it to the module's device."""
        module = as_gan(pl_module)
        goes_on = self._loaded or (self._module is module and self.iteration == module.iteration)
        if not goes_on:
            self.reset(module)
        self.go_on(module)

    def go_on(self, module: GANProtocol) -> None:
        """Take the state that is there as that of a module, on its device."""
        self._module, self._loaded, self.iteration = module, False, module.iteration
        for name, (_, on_device) in self._states().items():
            if on_device:
                setattr(self, name, move_data_to_device(getattr(self, name), module.device))

    # ---------- what the module asks

    def rescue(self, trainer: Trainer, module: GANProtocol) -> bool:
        """Put the module back to where it was good; say whether that was done. Called on all ranks, or on none."""
        return False

    def weigh_terms(
        self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms
    ) -> dict[str, float | Tensor]:
        """Factors for the terms of a player's loss, before its backward pass; those of several callbacks multiply.

        Args:
            module: whose loss.
            player: whose turn it is.
            outputs: what the player sees.
            terms: the terms by their names, with graphs: ``"adversarial"``, what ``auxiliary_losses`` returns, and
                penalties with their weight.

        Returns:
            Factors of some of the terms.
        """
        return {}

    def constrain(self, module: GANProtocol, player: Player, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """What a player's parameters become after a step of its optimizer, by differentiable operations.

        Args:
            module: whose player.
            player: who has stepped.
            parameters: its trainable parameters, or what an update rule has in their place.

        Returns:
            As many tensors; the same ones if there is nothing to do.
        """
        return parameters


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
        ...     def penalty(self, module, outputs):
        ...         return (outputs.fake.mean(0) - outputs.real.mean(0)).square().sum()
        >>> MeanMatching(weight=0.1, every=4).name
        'mean_matching'
    """

    player: Player = "d"
    weight: float = 1.0
    every: int = 1
    final_weight: float | None = None
    steps: int | None = None
    #: What must require grad before the forward pass because the penalty differentiates by it: ``"real"``, ``"fake"``,
    #: ``"latents"``. Such a forward pass runs in full precision and uncompiled: second derivatives need both.
    differentiates: ClassVar[tuple[str, ...]] = ("real", "fake", "latents")
    #: In the generator's turn the penalty needs the logits or features of real samples.
    needs_real: ClassVar[bool] = False
    #: The penalty takes each sample's own gradient from a batch, which BatchNorm in train mode makes impossible.
    per_sample: ClassVar[bool] = False
    #: The penalty is differentiated twice, which compiled networks cannot be: they run uncompiled meanwhile.
    second_order: ClassVar[bool] = True
    #: The penalty compares samples or logits with others that it makes itself: under mixed precision it gets outputs in
    #: full precision.
    compares: ClassVar[bool] = False

    def __init__(
        self,
        weight: float | None = None,
        every: int | None = None,
        final_weight: float | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = check_number("weight", self.weight if weight is None else weight)
        self.every = check_integer("every", self.every if every is None else every)
        check_schedule("weight", final_weight, steps)
        self.final_weight, self.steps = final_weight, steps

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
    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The penalty of what the player sees, without weight: one value per sample, or a scalar."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the penalty cannot be right with."""
        if self.per_sample:
            network = NETWORKS[self.player]
            _refuse_batch_norm(self, network, pl_module.get_submodule(network))


def _refuse_batch_norm(regularizer: Regularizer, network: str, module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if has_batch_norm(layer):
            raise MisconfigurationException(
                f"{type(regularizer).__name__} needs each sample's own gradient, but the BatchNorm layer "
                f"`{network}.{name}` mixes the samples of a batch: remove the layer, replace it by GroupNorm, "
                "LayerNorm or InstanceNorm, or remove the penalty."
            )


class UpdateRule(GANCallback, abc.ABC):
    """How the players move on one batch; at most one in a run.

    Subclasses implement ``__call__``, most of them from ``module.compute_gradients(player, batch)`` and
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
    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Move the players on one batch."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a gradient scaler, a plan, shared parameters or micro-batches where they would be wrong."""
        module = as_gan(pl_module)
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
        if self.whole_batch and self.joint and module.device_mesh is not None:
            raise MisconfigurationException(
                f"{name} differentiates by both players' whole parameters, which ModelParallelStrategy shards: use "
                f"strategy='ddp', or Unrolling or Extragradient instead of {name}."
            )
        if self.whole_batch and module.accumulate > 1:
            raise MisconfigurationException(
                f"{name} differentiates gradients of the whole batch, which accumulate={module.accumulate} would take "
                f"apart: use accumulate=1 and smaller batches, or remove {name}."
            )

    def check_plan(self, module: GANProtocol) -> None:
        """Refuse a plan that the rule does not follow; before the fit and before every batch, for plans may change."""
        if self.joint and sorted(module.plan) != ["d", "g"]:
            name = type(self).__name__
            raise MisconfigurationException(
                f"{name} moves both players on every batch, but the plan is {module.plan}: remove {name} or what sets "
                "`module.plan`."
            )


def _refuse_layers(rule: str, module: GANProtocol) -> None:
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


def check_once(rule: UpdateRule, module: GANProtocol) -> None:
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

    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Move the players on one batch."""
        for player in module.plan:
            module.compute_gradients(player, batch)
            module.apply_gradients(player)
