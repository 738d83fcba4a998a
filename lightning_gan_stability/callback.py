"""What a callback of this package is: regularizers and update rules, and what all of them share."""

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
#: When a value is new: after so many steps of ``trainer.global_step``, in every validation, or on every step.
Cadence: TypeAlias = int | Literal["validation", "step"]


def as_gan(pl_module: LightningModule) -> GANProtocol:
    """The module of a hook, which :meth:`GANCallback.setup` has seen to be a GANModule."""
    return cast("GANProtocol", pl_module)


def callbacks_of(trainer: Trainer, kind: type[C]) -> list[C]:
    """A run's callbacks of one kind, in their order.

    Example:
        >>> [type(callback).__name__ for callback in callbacks_of(Trainer(callbacks=[Alternating()]), UpdateRule)]
        ['Alternating']
    """
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def find_rule(trainer: Trainer) -> UpdateRule:
    """A run's update rule: the one that it names, or `Alternating`.

    Raises:
        MisconfigurationException: if it names several.
    """
    rules = callbacks_of(trainer, UpdateRule)  # type: ignore[type-abstract]
    if len(rules) > 1:
        names = " and ".join(type(rule).__name__ for rule in rules)
        raise MisconfigurationException(f"{names} are update rules, and a run has one: remove all but one.")
    return rules[0] if rules else _ALTERNATING


def gradient_scaler(trainer: Trainer) -> Any:
    """What scales the gradients of a run in float16, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def refuse_after_weight_averaging(callback: Callback, trainer: Trainer) -> None:
    """Refuse Lightning's average of a whole module before a callback that adds to the module: it would lack that."""
    callbacks = callbacks_of(trainer, Callback)
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
    #: :meth:`weigh_terms` takes gradients of terms, which leaves their graphs to be run again, as compiled ones cannot:
    #: networks run uncompiled in the generator's turn.
    keeps_graphs: ClassVar[bool] = False
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
        if name == "iteration" or (isinstance(self, Regularizer) and hasattr(Regularizer, name)):
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

    def companions(self, trainer: Trainer, module: GANProtocol) -> Sequence[Callback]:
        """Callbacks that it brings into a run, of classes that the run does not have yet; asked before `setup`."""
        return ()

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

    def logged(self, trainer: Trainer) -> Mapping[str, Cadence]:
        """The keys of its values in ``trainer.callback_metrics``, and when these are new.

        ``EarlyStopping`` counts a value under such a key once, and ``ModelCheckpoint`` saves it with the weights of its
        own step; a run in which that cannot be is refused.

        Args:
            trainer: of the run, which may be about to begin.

        Returns:
            By key ``"validation"``, ``"step"`` (Lightning may read it at any time), or how many steps lie between two
            measurements, which are at multiples of that.
        """
        return {}

    def outcome(self, trainer: Trainer) -> Outcome:
        """What it knows of the run, which has ended or been stopped, for the table that is printed then.

        Asked on the first rank alone: it must not communicate.
        """
        return Outcome()

    def rescue(self, trainer: Trainer, module: GANProtocol) -> bool:
        """Put the module back to where it was good; say whether that was done. Called on all ranks, or on none."""
        return False

    def adjust_plan(self, module: GANProtocol, plan: tuple[Player, ...]) -> tuple[Player, ...]:
        """The players that move on a batch, of those that ``module.plan`` names."""
        return plan

    def allows_adversarial(self, module: GANProtocol) -> bool:
        """Whether the generator's loss has its adversarial terms on a batch; one callback that says no is enough."""
        return True

    def change_samples(self, module: GANProtocol, player: Player, outputs: GANOutputs) -> GANOutputs:
        """What a player sees, before the discriminator has judged it; in a training step alone.

        Outputs with other generated samples than those of the latents have ``latents=None``: under autocast, samples
        are made again from the latents that are there.

        Args:
            module: whose samples.
            player: whose turn it is.
            outputs: samples without logits.
        """
        return outputs

    def augment(self, module: GANProtocol, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
        """What the discriminator sees of real and of generated samples, after ``module.augment``; in a step alone.

        Draw what each sample needs with :func:`~lightning_gan_stability.noise.batch_rand`, so that many processes are
        one.

        Args:
            module: whose samples.
            sample: (n, ...), with a graph in the generator's turn, and where a penalty differentiates by it.
            condition: what the discriminator is told; return it as it is unless samples are moved in their images.
        """
        return sample, condition

    def weigh_terms(
        self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms
    ) -> dict[str, float | Tensor]:
        """Factors for the terms of a player's loss, before its backward pass; those of several callbacks multiply.

        Args:
            module: whose loss.
            player: whose turn it is.
            outputs: what the player sees.
            terms: the terms by their names, with graphs: ``"adversarial"`` without ``adversarial_weight``, what
                ``auxiliary_losses`` returns, and penalties with their weight and, if they are lazy, times ``every``.

        Returns:
            Factors of some of the terms.
        """
        return {}

    def watch_terms(self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms) -> None:
        """A look at what a player's loss is the sum of, before its backward pass: each term times all its factors.

        With :meth:`GANModule.gradients_of` it tells what each term asks of samples or parameters, where
        ``module.reruns_graphs`` says that graphs may run more than once. It is called for each micro-batch, and as
        often as an update rule evaluates the loss.

        Args:
            module: whose loss.
            player: whose turn it is.
            outputs: what the player sees.
            terms: the weighed terms by their names, with graphs; leave them as they are.
        """

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


def _can_be_saved(value: object) -> bool:
    """Whether a checkpoint can be read again with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return all(map(_can_be_saved, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set):
        return all(map(_can_be_saved, value))
    return value is None or isinstance(value, bool | int | float | str | Tensor)


class Regularizer(GANCallback, abc.ABC):
    """Adds ``weight · penalty`` to one player's loss every ``every``-th step, times ``every``.

    A lazy penalty joins the main step and is scaled by ``every``, so that its mean over steps does not depend on
    ``every``. Steps are the batches on which its player moves, whatever ``module.plan`` says of the others. Subclasses
    implement :meth:`penalty`.

    Args:
        weight: coefficient of the penalty, not negative; a number, or a :class:`~lightning_gan_stability.Schedule` over
            the steps of its player.
        every: the penalty is due on every so many steps of its player, the first one included.
        separate: it takes a step of the optimizer for itself, after the player's own, as in StyleGAN2;
            :func:`~lightning_gan_stability.optim.lazy_correction` has the rates that belong to that.

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
    #: It is never due meanwhile; a callback may set it between batches.
    rests: bool = False
    #: The penalty takes one n-th of the batch: of itself, or in a separate step, whose batch is made smaller for it.
    shrink: int = 1
    #: What must require grad before the forward pass because the penalty differentiates by it: ``"real"``, ``"fake"``,
    #: ``"latents"``. Such a forward pass runs in full precision and uncompiled: second derivatives need both.
    differentiates: ClassVar[tuple[str, ...]] = ("real", "fake", "latents")
    #: In the generator's turn the penalty needs the logits or features of real samples. It is a part of the adversarial
    #: game: it rests while the generator's adversarial loss does.
    needs_real: ClassVar[bool] = False
    #: The samples whose logits or features the penalty reads; a separate step makes and judges no others.
    reads: ClassVar[tuple[str, ...]] = ("real", "fake")
    #: The penalty compares real samples with generated ones one by one: both are augmented by the same draws.
    same_augmentation: ClassVar[bool] = False
    #: Validation logs the term too.
    validated: ClassVar[bool] = False
    #: The penalty takes each sample's own gradient from a batch, which BatchNorm in train mode makes impossible.
    per_sample: ClassVar[bool] = False
    #: The penalty is differentiated twice, which compiled networks cannot be: they run uncompiled meanwhile.
    second_order: ClassVar[bool] = True
    #: The penalty compares samples or logits with others that it makes itself: under mixed precision it gets outputs in
    #: full precision, for which samples are made from their latents again, if they have any, and all are judged again.
    compares: ClassVar[bool] = False

    def __init__(self, weight: Scheduled | None = None, every: int | None = None, separate: bool = False) -> None:
        super().__init__()
        self.weight = check_scheduled("weight", self.weight if weight is None else weight)
        self.every = check_integer("every", self.every if every is None else every)
        self.separate = check_bool("separate", separate)

    def rows_of(self, n: int) -> int:
        """How many of a batch's samples the penalty takes, at least one."""
        return max(n // self.shrink, 1)

    def weight_at(self, step: int) -> float:
        """The weight after so many steps of the player."""
        return value_at(self.weight, step)

    @property
    def name(self) -> str:
        """The key ``<player>/<name>`` in the log: the class name in snake case, without "penalty".

        :meth:`GANModule.term_name` has the key in a run with several of one name.
        """
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower().removesuffix("penalty").strip("_")

    @abc.abstractmethod
    def penalty(self, module: GANProtocol, outputs: GANOutputs) -> Tensor:
        """The penalty of what the player sees, without weight: one value per sample, or a scalar."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the penalty cannot be right with."""
        if self.player not in PLAYERS:
            name = type(self).__name__
            raise MisconfigurationException(f"`player` of {name} must be 'd' or 'g', got {self.player!r}.")
        if not is_term_name(self.name):
            raise MisconfigurationException(
                f"The name {self.name!r} of {type(self).__name__} is one that the log has for something else: rename "
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
    #: It calls ``module.separate_steps(player, batch)`` after a player's step.
    separate_steps: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, module: GANProtocol, batch: Any) -> None:
        """Train the players on one batch."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a gradient scaler, a plan, shared parameters or micro-batches where they would be wrong."""
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
    for network in (module.generator, module.discriminator):
        for name, p in network.named_parameters():
            if p.is_complex() and p.requires_grad:
                raise MisconfigurationException(
                    f"{rule} differentiates gradients of real parameters, and `{name}` is complex: remove {rule}."
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

    Args:
        share_fake: the generator makes its samples once for both players, before either steps, as vocoders, codecs,
            pix2pix and super-resolution do; the discriminator sees them without their graph. It saves a forward pass of
            the generator; its BatchNorm moves once on a batch instead of twice.
        real_batches: ``"same"``: both players see the whole batch; ``"split"``: the discriminator sees its first half
            and the generator the second, as in R3GAN, whose players see different real samples. Of an odd number of
            samples (or packs) the discriminator has one more.

    Raises:
        ValueError: if an argument has a bad value, or both are set, because shared samples belong to one batch.
        MisconfigurationException: for ``share_fake`` with ``accumulate``, with networks that share parameters, or with
            a plan in which a player stands twice.

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
            raise ValueError("`share_fake` makes samples for one batch, and real_batches='split' has two: drop one.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what needs samples for each player alone."""
        super().on_fit_start(trainer, pl_module)
        module = as_gan(pl_module)
        if self.share_fake and module.accumulate > 1:
            raise MisconfigurationException(
                f"Alternating(share_fake=True) keeps the samples of a whole batch, which accumulate="
                f"{module.accumulate} would take apart: drop one of them."
            )
        if self.share_fake and {*module.generator.parameters()} & {*module.discriminator.parameters()}:
            raise MisconfigurationException(
                "The networks share parameters, so that the discriminator's step would change those that the "
                "generator's samples were made with: set share_fake=False."
            )

    def check_plan(self, module: GANProtocol) -> None:
        """With ``share_fake``, refuse a plan in which a player stands twice."""
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
