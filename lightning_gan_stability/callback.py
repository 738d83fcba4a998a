"""Base classes of the package's callbacks: GANCallback, Regularizer and UpdateRule."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar, cast, get_args

from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from lightning_gan_stability._checks import (
    check_bool,
    check_choice,
    check_integer,
    describe,
    is_term_name,
)
from lightning_gan_stability.layers import has_batch_norm
from lightning_gan_stability.outcome import Outcome
from lightning_gan_stability.outputs import (
    NETWORKS,
    PLAYERS,
    Condition,
    GANOutputs,
    Player,
    Sample,
    Terms,
    micro_batches,
)
from lightning_gan_stability.schedules import Scheduled, check_scheduled, value_at

if TYPE_CHECKING:
    from lightning_gan_stability.protocols import GANProtocol


C = TypeVar("C", bound=Callback)

RealBatches = Literal["same", "split"]
#: When a value is updated: every so many steps of ``trainer.global_step``, in every validation, or on every step.
Cadence: TypeAlias = int | Literal["validation", "step"]


def as_gan(pl_module: LightningModule) -> GANProtocol:
    """The module of a hook as a GANModule, which :meth:`GANCallback.setup` has checked."""
    return cast("GANProtocol", pl_module)


def callbacks_of(trainer: Trainer, kind: type[C]) -> list[C]:
    """A run's callbacks of one kind, in their order.

    Example:
        >>> [type(callback).__name__ for callback in callbacks_of(Trainer(callbacks=[Alternating()]), UpdateRule)]
        ['Alternating']
    """
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def find_rule(trainer: Trainer) -> UpdateRule:
    """The update rule among a run's callbacks, or `Alternating`.

    Raises:
        MisconfigurationException: if there are several.
    """
    rules = callbacks_of(trainer, UpdateRule)  # type: ignore[type-abstract]
    if len(rules) > 1:
        names = " and ".join(type(rule).__name__ for rule in rules)
        raise MisconfigurationException(f"{names} are update rules, but a run has only one: remove all but one.")
    return rules[0] if rules else _ALTERNATING


def gradient_scaler(trainer: Trainer) -> Any:
    """The gradient scaler of a run in float16, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def refuse_after_weight_averaging(callback: Callback, trainer: Trainer) -> None:
    """Refuse Lightning's ``WeightAveraging`` before a callback that adds to the module, which its copy would lack."""
    callbacks = callbacks_of(trainer, Callback)
    before = callbacks[: callbacks.index(callback)]
    averaging = next((c for c in before if isinstance(c, WeightAveraging)), None)
    if averaging is not None:
        name, other = type(callback).__name__, type(averaging).__name__
        raise MisconfigurationException(
            f"{other} copies the module before {name} adds to it, so its copy would not match: put {name} before "
            f"{other} in the list of callbacks."
        )


class _DeclaredState:
    """The method ``state_dict`` of a callback, which returns the declared state.

    Lightning detects callbacks with a state by an overridden ``state_dict`` and requires a unique key for each of them.
    A run may have several callbacks of one class that declare no state; these keep Lightning's own method.
    """

    def __get__(self, callback: GANCallback | None, kind: type) -> Callable[[], dict[str, Any]]:
        if callback is None or not callback._states():
            return cast("Callable[[], dict[str, Any]]", Callback.state_dict.__get__(callback, kind))
        return callback._declared_state


class GANCallback(Callback):
    """A callback that acts on a GANModule.

    It raises an error with other modules. State that it keeps from batch to batch is declared by :meth:`add_state`,
    which takes care of checkpoints, device moves, rollbacks and the reset for another module. A subclass that overrides
    ``setup`` or ``on_train_start`` calls ``super()``.

    In a second fit of the same module, declared state is kept if the module has not trained without the callback.
    Monitors reset theirs under a new Trainer, which counts its steps from zero unless it resumes from a checkpoint, so
    that steps in their records never go backwards.

    Attributes:
        iteration: the module's iteration at the end of the last batch on which the callback was in use.
        global_step: the Trainer's global step at that time.

    Example:
        >>> class CountBatches(GANCallback):
        ...     def __init__(self):
        ...         self.add_state("batches", 0)
        ...     def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ...         self.batches += 1
        >>> CountBatches().state_dict()
        {'batches': 0}
    """

    #: A rollback also restores its state. Monitors set it to False, because they keep their record.
    rolled_back: ClassVar[bool] = True
    #: It may recover, in :meth:`rescue`, from a step whose loss or gradient is not finite.
    rescues: bool = False
    #: :meth:`weigh_terms` takes gradients of terms and keeps their graphs, which compiled networks do not allow:
    #: networks run uncompiled in the generator's step.
    keeps_graphs: ClassVar[bool] = False
    #: It is trying settings out and may discard the weights: EarlyStopping does not count measurements of that time.
    tries: bool = False
    iteration: int = 0
    global_step: int = 0
    _module: object = None
    _loaded: bool = False

    # ---------- state

    def add_state(self, name: str, default: Any, on_device: bool = True) -> None:
        """Declare an attribute that belongs to a run, as ``torchmetrics.Metric.add_state`` does.

        Args:
            name: name of the attribute.
            default: initial value: a number, a string, a tensor, None, or lists and dicts of these.
            on_device: move its tensors to the module's device; False: do not move them.
        """
        if name in ("iteration", "global_step") or (isinstance(self, Regularizer) and hasattr(Regularizer, name)):
            raise ValueError(f"`{name}` is an attribute of every callback of its kind: give the state another name.")
        if not _can_be_saved(default):
            raise ValueError(
                f"The default of `{name}` must be a number, a string, a tensor, None, or lists and dicts of these, got "
                f"{describe(default)}."
            )
        self._states()[name] = (deepcopy(default), on_device)
        setattr(self, name, deepcopy(default))

    def _declared_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._states()}

    state_dict = _DeclaredState()

    def _states(self) -> dict[str, tuple[Any, bool]]:
        return self.__dict__.setdefault("_declared", {})  # type: ignore[no-any-return]  # without a call of `__init__`

    def reset(self, module: GANProtocol) -> None:
        """Reset the state, for another module or one that has trained without this callback."""
        for name, (default, _) in self._states().items():
            setattr(self, name, deepcopy(default))

    def count_anew(self, module: GANProtocol) -> None:
        """Go on with the same module, under a Trainer that begins to count its steps anew.

        Monitors, which remember what was at which step, begin anew.
        """
        if not self.rolled_back:
            self.reset(module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state from a checkpoint.

        Raises:
            ValueError: if it lacks a declared attribute.
        """
        missing = [name for name in self._states() if name not in state_dict]
        if missing:
            raise ValueError(
                f"The checkpoint has a {type(self).__name__} without {', '.join(missing)}: its class has changed."
            )
        for name in self._states():
            setattr(self, name, state_dict[name])
        self._loaded = True

    # ---------- called by the Trainer

    def companions(self, trainer: Trainer, module: GANProtocol) -> Sequence[Callback]:
        """Callbacks to add to the run if it has none of their classes yet; called before `setup`."""
        return ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that is not a GANModule."""
        self._loaded = False  # a checkpoint is read after this
        if not hasattr(pl_module, "compute_gradients"):
            name = type(self).__name__
            raise MisconfigurationException(
                f"{name} acts on a GANModule, but the module is a {type(pl_module).__name__}: subclass GANModule, or "
                f"remove {name}."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state if it belongs to another module; move it to the module's device."""
        module = as_gan(pl_module)
        goes_on = self._loaded or (self._module is module and self.iteration == module.iteration)
        if not goes_on:
            self.reset(module)
        elif not self._loaded and trainer.global_step < self.global_step:
            self.count_anew(module)
        self.global_step = trainer.global_step
        self.go_on(module)

    def go_on(self, module: GANProtocol) -> None:
        """Use the present state for a module, on its device."""
        self._module, self._loaded, self.iteration = module, False, module.iteration
        for name, (_, on_device) in self._states().items():
            if on_device:
                setattr(self, name, move_data_to_device(getattr(self, name), module.device))

    # ---------- called by the module

    def logged(self, trainer: Trainer) -> Mapping[str, Cadence]:
        """The keys of its values in ``trainer.callback_metrics``, and when they are updated.

        ``EarlyStopping`` counts each value under such a key once, and ``ModelCheckpoint`` saves it with the weights of
        its own step. A run in which this is impossible is refused.

        Args:
            trainer: the run's Trainer; the run may not have started yet.

        Returns:
            For each key ``"validation"``, ``"step"`` (Lightning may read it at any time), or the number of steps
            between two measurements, which take place at multiples of it.
        """
        return {}

    def outcome(self, trainer: Trainer) -> Outcome:
        """Its findings on a run that has ended or been stopped, for the table that is then printed.

        It is called on the first rank only and must not communicate.
        """
        return Outcome()

    def rescue(self, trainer: Trainer, module: GANProtocol) -> bool:
        """Restore the module to an earlier good state; return whether that was done. Called on all ranks or on none."""
        return False

    def adjust_plan(self, module: GANProtocol, plan: tuple[Player, ...]) -> tuple[Player, ...]:
        """The players that step on a batch, chosen from ``module.plan``."""
        return plan

    def allows_adversarial(self, module: GANProtocol) -> bool:
        """Whether the generator's loss has its adversarial terms on a batch; any callback can leave them out."""
        return True

    def change_samples(self, module: GANProtocol, player: Player, outputs: GANOutputs) -> GANOutputs:
        """Change a player's samples before the discriminator judges them; called in training steps only.

        If you replace generated samples, set ``latents=None``: under autocast, samples are regenerated from the
        latents.

        Args:
            module: the GAN.
            player: the player that is about to step.
            outputs: samples without logits.
        """
        return outputs

    def augment(self, module: GANProtocol, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
        """Augment real and generated samples after ``module.augment``; called in training steps only.

        Draw random numbers with :func:`~lightning_gan_stability.noise.batch_rand`, so that several processes draw the
        same ones as a single process.

        Args:
            module: the GAN.
            sample: (n, ...), with a graph in the generator's step, and where a penalty differentiates with respect to
                it.
            condition: the discriminator's condition; return it unchanged unless images in it must move with the
                samples.
        """
        return sample, condition

    def weigh_terms(
        self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms
    ) -> dict[str, float | Tensor]:
        """Factors for the terms of a player's loss, before its backward pass; those of several callbacks multiply.

        Args:
            module: the GAN.
            player: the player that is about to step.
            outputs: samples and logits of the player's step.
            terms: the terms by their names, with graphs: ``"adversarial"`` without ``adversarial_weight``, what
                ``auxiliary_losses`` returns, and penalties with their weight, multiplied by ``every``.

        Returns:
            Factors of some of the terms.
        """
        return {}

    def watch_terms(self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms) -> None:
        """Observe the terms of a player's loss before its backward pass, each multiplied by all its factors.

        If ``module.reruns_graphs``, :meth:`GANModule.gradients_of` returns the gradients of a term with respect to
        samples or parameters. The method is called for each micro-batch, and each time an update rule evaluates the
        loss.

        Args:
            module: the GAN.
            player: the player that is about to step.
            outputs: samples and logits of the player's step.
            terms: the weighted terms by their names, with graphs; do not change them.
        """

    def constrain(self, module: GANProtocol, player: Player, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Constrain a player's parameters after a step of its optimizer, with differentiable operations.

        Args:
            module: the GAN.
            player: the player that has stepped.
            parameters: its trainable parameters, or the tensors that an update rule uses instead.

        Returns:
            The same number of tensors; the same tensors if there is nothing to do.
        """
        return parameters


def _can_be_saved(value: object) -> bool:
    """Whether a checkpoint can be read again with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return all(map(_can_be_saved, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set):
        return all(map(_can_be_saved, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


class Regularizer(GANCallback, abc.ABC):
    """Adds ``weight · penalty`` to one player's loss every ``every``-th step, times ``every``.

    A lazy penalty is added in the player's own step and multiplied by ``every``, so its mean over steps does not depend
    on ``every``. Steps count the batches on which its player steps. Subclasses implement :meth:`penalty`.

    Args:
        weight: coefficient of the penalty, not negative; a number, or a :class:`~lightning_gan_stability.Schedule` over
            the steps of its player.
        every: n: compute the penalty on every n-th step of its player only, starting with the first, and multiply it by
            n.
        separate: take an optimizer step for this penalty alone, after the player's own, as in StyleGAN2;
            :func:`~lightning_gan_stability.optim.lazy_correction` gives the matching learning rate and betas.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> class MeanMatching(Regularizer):
        ...     player = "g"
        ...     def penalty(self, module, outputs):
        ...         return (outputs.fake.mean(0) - outputs.real.mean(0)).square().sum()
        >>> MeanMatching(weight=0.1, every=4).name
        'mean_matching'
    """

    player: Player = "d"
    weight: Scheduled = 1.0
    every: int = 1
    separate: bool = False
    #: While True the penalty is not computed; a callback may set it between batches.
    rests: bool = False
    #: n: the penalty uses one n-th of the batch. A separate step gets a batch of that size.
    shrink: int = 1
    #: The tensors that the penalty differentiates with respect to: ``"real"``, ``"fake"``, ``"latents"``. They require
    #: grad before the forward pass, which then runs in full precision and uncompiled, as second derivatives need.
    differentiates: ClassVar[tuple[str, ...]] = ("real", "fake", "latents")
    #: In the generator's step the penalty needs the logits or features of real samples. It counts as an adversarial
    #: term and is left out together with the generator's adversarial loss.
    needs_real: ClassVar[bool] = False
    #: The samples whose logits or features the penalty reads; a separate step computes no others.
    reads: ClassVar[tuple[str, ...]] = ("real", "fake")
    #: The penalty compares real and generated samples one by one: augmentations draw the same random numbers for both.
    same_augmentation: ClassVar[bool] = False
    #: Validation also logs the term.
    validated: ClassVar[bool] = False
    #: The penalty needs the gradient of each single sample, which BatchNorm in train mode makes impossible.
    per_sample: ClassVar[bool] = False
    #: The penalty needs second derivatives, which compiled networks do not have: they run uncompiled for it.
    second_order: ClassVar[bool] = True
    #: The penalty compares samples or logits with others that it computes itself. Under mixed precision it gets outputs
    #: in full precision: samples are regenerated from their latents, if there are any, and all are judged again.
    compares: ClassVar[bool] = False

    def __init__(self, weight: Scheduled | None = None, every: int | None = None, separate: bool = False) -> None:
        super().__init__()
        self.weight = check_scheduled("weight", self.weight if weight is None else weight)
        self.every = check_integer("every", self.every if every is None else every)
        self.separate = check_bool("separate", separate)

    def rows_of(self, n: int) -> int:
        """The number of a batch's samples that the penalty uses, at least one."""
        return max(n // self.shrink, 1)

    def weight_at(self, step: int) -> float:
        """The weight after so many steps of the player."""
        return value_at(self.weight, step)

    @property
    def name(self) -> str:
        """The key ``<player>/<name>`` in the log: the class name in snake case, without "penalty".

        :meth:`GANModule.term_name` returns the key in a run with several penalties of one name.
        """
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower().removesuffix("penalty").strip("_")

    @abc.abstractmethod
    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The penalty without its weight: one value per sample, or a scalar."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse settings with which the penalty would be wrong."""
        if self.player not in PLAYERS:
            name = type(self).__name__
            raise MisconfigurationException(f"`player` of {name} must be 'd' or 'g', got {self.player!r}.")
        if not is_term_name(self.name):
            raise MisconfigurationException(
                f"The name {self.name!r} of {type(self).__name__} is used for another value in the log: rename "
                "it, by the property `name`."
            )
        if self.separate:
            _refuse_other_rules(self, trainer)
        if self.per_sample:
            network = NETWORKS[self.player]
            _refuse_batch_norm(self, network, pl_module.get_submodule(network))


def _refuse_other_rules(regularizer: Regularizer, trainer: Trainer) -> None:
    rule = find_rule(trainer)
    if not rule.separate_steps:
        name, other = type(regularizer).__name__, type(rule).__name__
        raise MisconfigurationException(
            f"{name}(separate=True) takes a step of its own, which {other} does not take: use separate=False, or "
            f"remove {other}."
        )


def _refuse_batch_norm(regularizer: Regularizer, network: str, module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if has_batch_norm(layer):
            raise MisconfigurationException(
                f"{type(regularizer).__name__} needs each sample's own gradient, but the BatchNorm layer "
                f"`{network}.{name}` mixes the samples of a batch: remove the layer, replace it by GroupNorm, "
                "LayerNorm or InstanceNorm, or remove the penalty."
            )


class UpdateRule(GANCallback, abc.ABC):
    """Defines how the players step on one batch; a run has at most one.

    Subclasses implement ``__call__``, most of them from ``module.compute_gradients(player, batch)`` and
    ``module.apply_gradients(player)``.

    Example:
        >>> class GeneratorFirst(UpdateRule):
        ...     def __call__(self, module, batch):
        ...         for player in ("g", "d"):
        ...             module.compute_gradients(player, batch)
        ...             module.apply_gradients(player)
    """

    #: Both players' gradients are computed before either steps. It is refused with a gradient scaler, which changes its
    #: scale at each step, so that the second player's gradient would be unscaled by the wrong number.
    holds_gradients: bool = False
    #: Both players step exactly once on every batch.
    joint: ClassVar[bool] = False
    #: The step differentiates gradients, which needs the graph of the full batch at once.
    whole_batch: ClassVar[bool] = False
    #: These gradients are differentiated again.
    second_order: bool = True
    #: It calls ``module.separate_steps(player, batch)`` after a player's step.
    separate_steps: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Train the players on one batch."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse gradient scalers, plans, shared parameters and micro-batches with which the rule would be wrong."""
        module = as_gan(pl_module)
        name = type(self).__name__
        self.check_plan(module)
        if self.holds_gradients and gradient_scaler(trainer) is not None:
            raise MisconfigurationException(
                f"{name} takes both gradients before either step, but precision='16-mixed' changes its "
                "gradient scale at each step: use precision='bf16-mixed' or '32-true', or remove the rule."
            )
        shared = {p for p in module.generator.parameters() if p.requires_grad} & {*module.discriminator.parameters()}
        if self.holds_gradients and shared:
            raise MisconfigurationException(
                f"The networks share parameters, and {name} holds the gradients of both players at once, "
                "of which a parameter can have only one: use Alternating, or give each network its own."
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
        """Refuse a plan that the rule does not support; called before the fit and before every batch."""
        if self.joint and sorted(module.plan) != ["d", "g"]:
            name = type(self).__name__
            raise MisconfigurationException(
                f"{name} steps both players on every batch, but the plan is {module.plan}: remove {name} or the "
                "callback that sets `module.plan`."
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
    for network in (module.generator, module.discriminator):
        for name, p in network.named_parameters():
            if p.is_complex() and p.requires_grad:
                raise MisconfigurationException(
                    f"{rule} differentiates gradients of real parameters, and `{name}` is complex: remove {rule}."
                )


def check_once(rule: UpdateRule, module: GANProtocol) -> None:
    """Refuse a plan that contains a player twice, for a rule whose players step at the same time."""
    if len(set(module.plan)) < len(module.plan):
        name = type(rule).__name__
        raise MisconfigurationException(
            f"{name} steps every player once, but the plan is {module.plan}: remove {name} or the callback that sets "
            "the plan."
        )


class Alternating(UpdateRule):
    """Steps the players of the plan one after the other, each on the result of the step before. The default.

    "Generative Adversarial Networks", https://arxiv.org/abs/1406.2661, Algorithm 1. Costs one forward and backward pass
    for each entry of ``module.plan``.

    Args:
        share_fake: generate the samples once for both players, before either steps, as in vocoders, codecs, pix2pix and
            super-resolution; the discriminator gets them detached. This saves a forward pass of the generator, and its
            BatchNorm is updated once per batch instead of twice.
        real_batches: ``"same"``: both players use the full batch; ``"split"``: the discriminator uses its first half
            and the generator the second, as in R3GAN, so that the players see different real samples. With an odd
            number of samples (or packs) the discriminator gets one more.

    Raises:
        ValueError: if an argument has a bad value, or both are set, because shared samples belong to one batch.
        MisconfigurationException: for ``share_fake`` with ``accumulate``, with networks that share parameters, or with
            a plan that contains a player twice.

    Example:
        >>> Alternating(share_fake=True).share_fake
        True
    """

    separate_steps = True

    def __init__(self, share_fake: bool = False, real_batches: RealBatches = "same") -> None:
        super().__init__()
        self.share_fake = check_bool("share_fake", share_fake)
        self.real_batches: RealBatches = check_choice("real_batches", real_batches, get_args(RealBatches))
        if share_fake and real_batches != "same":
            raise ValueError("`share_fake` makes samples for one batch, and real_batches='split' has two: remove one.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse settings that need separate samples for each player."""
        super().on_fit_start(trainer, pl_module)
        module = as_gan(pl_module)
        if self.share_fake and module.accumulate > 1:
            raise MisconfigurationException(
                f"Alternating(share_fake=True) keeps the samples of the full batch, which accumulate="
                f"{module.accumulate} would split: remove one of them."
            )
        if self.share_fake and {*module.generator.parameters()} & {*module.discriminator.parameters()}:
            raise MisconfigurationException(
                "The networks share parameters, so that the discriminator's step would change those that the "
                "generator's samples were made with: set share_fake=False."
            )

    def check_plan(self, module: GANProtocol) -> None:
        """With ``share_fake``, refuse a plan that contains a player twice."""
        super().check_plan(module)
        if self.share_fake:
            check_once(self, module)

    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Train the players on one batch."""
        batches = self._batches(module, batch)
        shared = module.compute_samples("g" if "g" in module.plan else "d", batch) if self.share_fake else None
        for player in module.plan:
            module.compute_gradients(player, batches[player] if shared is None else shared)
            module.apply_gradients(player)
            module.separate_steps(player, batches[player])

    def _batches(self, module: GANProtocol, batch: Any) -> dict[Player, Any]:
        if self.real_batches == "same":
            return {"d": batch, "g": batch}
        halves = [part for part, *_ in micro_batches(module.unpacked(batch), 2, module.packing)]
        if len(halves) < 2:
            raise ValueError(
                "Alternating(real_batches='split') takes a batch apart for the two players, and this one has too few "
                "samples for both: use a larger batch size, and drop_last=True in the loader."
            )
        return {"d": halves[0], "g": halves[1]}


_ALTERNATING = Alternating()
