"""GANModule: two networks, the methods that users override, and those that callbacks and update rules call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gan_stability._checks import (
    check,
    check_choice,
    check_finite,
    check_integer,
    check_number,
    check_type,
    describe,
    is_plain,
)
from lightning_gan_stability._compat import fused_devices, given_hyperparameters, is_compiled, original_module
from lightning_gan_stability.augment import augment_pairs
from lightning_gan_stability.callback import GANCallback, Regularizer, callbacks_of, find_rule
from lightning_gan_stability.engine import Engine, Objective
from lightning_gan_stability.finite import NotFinite
from lightning_gan_stability.guard import Guard, check_run, find_guard
from lightning_gan_stability.layers import (
    Packed,
    condition_parameter,
    copy_network,
    restore_parametrizations,
    truncated,
)
from lightning_gan_stability.losses import AdversarialLoss, NonSaturating, loss_from_recipe, loss_recipe
from lightning_gan_stability.networks import (
    NetworkRunner,
    call_network,
    check_condition,
    check_samples,
    logits_and_features,
)
from lightning_gan_stability.noise import Noise, Randomness
from lightning_gan_stability.outputs import (
    NETWORKS,
    PLAYERS,
    Condition,
    Extras,
    Features,
    GANOutputs,
    Logits,
    Player,
    Sample,
    StepRecord,
    Terms,
    Unpacked,
    batch_size,
    detach,
    differentiable,
    same_structure,
    shapes,
    take_rows,
    tree_leaves,
)
from lightning_gan_stability.rejection import Rejection
from lightning_gan_stability.sharding import Sharding
from lightning_gan_stability.substitution import FrozenBuffers, Substitution

# as in lightning.pytorch.cli, which takes long to import
OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]


class GANModule(LightningModule):
    """A generator and a discriminator that train against each other, by manual optimization.

    One batch is one GAN step: each player of ``plan`` computes its gradient and steps. ``iteration`` and the Trainer's
    ``global_step`` both increase by one, so ``max_steps`` and ``every_n_train_steps`` count batches. A
    :class:`~lightning_gan_stability.callback.Regularizer` adds a penalty to a player's loss, and an
    :class:`~lightning_gan_stability.callback.UpdateRule` changes how gradients and steps follow each other.

    A subclass may override :meth:`unpack`, :meth:`generate`, :meth:`discriminate`, :meth:`auxiliary_losses` and
    :meth:`adversarial_weight`, and any hook of Lightning; only ``configure_callbacks`` must call ``super()``. Samples,
    conditions and logits are tensors or trees (dicts, lists, named tuples) of tensors with the batch first; logits in a
    dict or a list are those of several discriminators.

    "Generative Adversarial Networks", https://arxiv.org/abs/1406.2661

    Args:
        generator: maps latents (n, latent_dim) to samples (n, ...), or, without latents, a condition to samples. If its
            ``forward`` has a second positional parameter without a default, or with the default None, it also gets the
            condition. It may return ``(samples, extras)``. A ``ModuleDict`` of networks needs an overridden
            :meth:`generate`.
        discriminator: maps samples (n, ...) to logits: (n,), (n, 1), or (n, patches...), or to ``(logits, features)``.
            It gets conditions like the generator. A ``ModuleDict`` or ``ModuleList`` holds several discriminators, each
            of which judges every sample.
        latent_dim: length of the standard normal latent vector of a sample; None: the generator takes no latents.
        loss: None: :class:`~lightning_gan_stability.losses.NonSaturating`.
        g_optimizer: function from the generator's parameters to its optimizer. None: Adam(lr=2e-4, betas=(0.5, 0.999)),
            fused where the device supports it.
        d_optimizer: the same for the discriminator.
        g_scheduler: function from the generator's optimizer to a learning rate scheduler.
        d_scheduler: the same for the discriminator.
        scheduler_interval: ``"step"``: a scheduler steps after each step of its player; ``"epoch"``: after each epoch.
        clip_norm: largest L2 norm of a player's gradient, clipped separately for each player; a number for both, or
            ``{"d": 10.0, "g": 1000.0}``. None: no limit.
        accumulate: micro-batches per update: less memory, the same gradient (unless a network has BatchNorm).
        plan: the players that step on each batch, in order; ``("g", "d")``: the generator first.
        augment: module applied to every sample before the discriminator, in training only. Like networks it is not
            stored in checkpoints of Python runs: pass it again to resume a run.
        noise_seed: seed of the module's own noise, together with the process's rank and the iteration.
        compile: compile both networks in place when a fit begins; True, or a dict of arguments of ``torch.compile``.
            Plain steps run compiled. Penalties and rules with second derivatives, which compiled graphs do not have,
            run in eager mode. There are graphs for each batch size, so an incomplete last batch doubles their number.
            ``{"dynamic": True}`` compiles one graph for all sizes, also for samples of varying length. ``{"mode":
            "reduce-overhead"}`` replays CUDA graphs, whose outputs are overwritten by the next batch.

    Attributes:
        iteration: batches trained on so far.
        steps: number of batches on which each player has stepped, ``{"d": ..., "g": ...}``.
        turn: the player whose forward pass is running in a training step, ``"d"`` or ``"g"``; None elsewhere: in
            validation, and in separate steps of penalties. A pass for both players at once, as with ``share_fake``, is
            ``"g"``.
        last_step: a :class:`~lightning_gan_stability.outputs.StepRecord` of the last batch: logits, terms, norms.
        noise: the module's own random numbers, a :class:`~lightning_gan_stability.noise.Noise`.
        generator_ema: the average of the generator's weights that ``GeneratorEMA`` keeps, or None.
        adversarial: whether the generator's loss includes its adversarial term; callbacks may set it between batches.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> from lightning_gan_stability import MLP
        >>> gan = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16)
        >>> gan.sample(5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent_dim: int | None = None,
        loss: AdversarialLoss | None = None,
        g_optimizer: OptimizerCallable | None = None,
        d_optimizer: OptimizerCallable | None = None,
        g_scheduler: LRSchedulerCallable | None = None,
        d_scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "step",
        clip_norm: float | Mapping[Player, float] | None = None,
        accumulate: int = 1,
        plan: Sequence[Player] = ("d", "g"),
        augment: nn.Module | None = None,
        noise_seed: int = 0,
        compile: bool | dict[str, Any] = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim = latent_dim if latent_dim is None else check_integer("latent_dim", latent_dim)
        self.clip_norm = _checked_clip_norm(clip_norm)
        self.accumulate = check_integer("accumulate", accumulate)
        self.scheduler_interval = check_choice("scheduler_interval", scheduler_interval, ("step", "epoch"))
        self.compile_options = options = _checked_compile(compile)
        #: Compiled networks have graphs of their own for each size of the batches of training steps.
        self.has_static_shapes = options is not None and options["dynamic"] is False
        #: Compiled networks replay CUDA graphs, which write into the same memory each time.
        self.replays_graphs = options is not None and _has_cuda_graphs(options)
        self.make_optimizer = {"d": d_optimizer, "g": g_optimizer}
        self.make_scheduler = {"d": d_scheduler, "g": g_scheduler}
        for player in PLAYERS:
            _check_maker(f"{player}_optimizer", self.make_optimizer[player], "parameters")
            _check_maker(f"{player}_scheduler", self.make_scheduler[player], "an optimizer")
        if check_type("generator", generator, nn.Module) is check_type("discriminator", discriminator, nn.Module):
            raise ValueError("`generator` and `discriminator` must be two modules, got the same one twice.")
        self.loss_given = loss is not None
        self.save_hyperparameters(frame=inspect.currentframe())
        self.generator = generator
        self.discriminator = discriminator
        self.generator_ema: nn.Module | None
        self.register_module("generator_ema", None)
        self.average_rests = False  # there is an average that no callback updates
        self.loss: AdversarialLoss = check_type("loss", NonSaturating() if loss is None else loss, AdversarialLoss)
        self.augment: nn.Module = check_type("augment", nn.Identity() if augment is None else augment, nn.Module)
        self.iteration = 0
        self.steps: dict[Player, int] = {"d": 0, "g": 0}
        self._first_val_size = 0
        self.last_step = StepRecord()
        self.adversarial = True
        self.noise = Noise(check_type("noise_seed", noise_seed, int), self)
        self.networks = NetworkRunner(self)
        self.engine = Engine(self)
        self.sharding = Sharding(self)
        self.guard: Guard | None = None
        self.plan = plan

    @property
    def plan(self) -> tuple[Player, ...]:
        """The players that step on one batch, in order; callbacks may set it between batches."""
        return self._plan

    @plan.setter
    def plan(self, plan: Sequence[Player]) -> None:
        if not isinstance(plan, Sequence) or not plan or not all(player in PLAYERS for player in plan):
            raise ValueError(f"`plan` must be a sequence of 'd' and 'g' with at least one entry, got {plan!r}.")
        self._plan: tuple[Player, ...] = tuple(plan)

    @property
    def noise_seed(self) -> int:
        """The seed of ``noise``."""
        return self.noise.seed

    @noise_seed.setter
    def noise_seed(self, seed: int) -> None:
        self.noise.seed = check_type("noise_seed", seed, int)

    @property
    def turn(self) -> Player | None:
        """The player whose forward pass is running in a training step."""
        return self.engine.turn

    @property
    def moved(self) -> frozenset[Player]:
        """The players that stepped on the last batch, or so far on the current one."""
        return frozenset(self.last_step.moved)

    @property
    def current_generator(self) -> nn.Module:
        """The generator, or in eval mode its moving average when there is one."""
        return self.generator if self.training or self.generator_ema is None else self.generator_ema

    @property
    def packing(self) -> int:
        """The number of samples that the discriminator judges together."""
        discriminator = original_module(self.discriminator)
        return discriminator.packing if isinstance(discriminator, Packed) else 1

    @property
    def reruns_graphs(self) -> bool:
        """Whether :meth:`gradients_of` may compute gradients of the generator's terms; compiled graphs allow only one.

        Compiled networks run compiled unless a callback has ``keeps_graphs``.
        """
        return self.engine.reruns_graphs

    # ---------- override these

    def unpack(self, batch: Any) -> tuple[Sample, Condition]:
        """Split a batch into real samples (n, ...) and a condition or None; override it for other batches.

        It accepts a tensor, ``(x,)``, ``(x, condition)`` and ``{"image": x, "label": condition}`` (label optional).

        Raises:
            ValueError: if the batch has another form.
        """
        real, condition = batch, None
        if isinstance(batch, Sequence) and len(batch) in (1, 2):
            real, condition = batch[0], batch[1] if len(batch) == 2 else None
        elif isinstance(batch, Mapping):
            real, condition = batch.get("image"), batch.get("label")
        if not isinstance(real, Tensor) or not isinstance(condition, Tensor | None):
            raise ValueError(
                "A batch must be a tensor, (x,), (x, condition) or {'image': x, 'label': condition}, got "
                f"{describe(batch)}: override `GANModule.unpack` for another form."
            )
        return real, condition

    def generate(
        self, network: nn.Module, n: int, condition: Condition, latents: Tensor | None
    ) -> Sample | tuple[Sample, Extras]:
        """Generate samples.

        Args:
            network: the generator, its average, or the generator with temporary weights; use it instead of
                ``self.generator``.
            n: number of samples.
            condition: the condition of the batch, or the result of :meth:`draw_condition`; or None.
            latents: (n, latent_dim); None for a generator without latents.

        Returns:
            (n, ...) samples, or ``(samples, extras)`` with a dict of further values that losses need.
        """
        if latents is not None:
            return call_network(network, latents, condition)
        if condition is None:
            raise ValueError("The generator takes no latents, and there is no condition to make samples from.")
        return network(condition)

    def discriminate(
        self, network: nn.Module, sample: Sample, condition: Condition
    ) -> Logits | tuple[Logits, Features]:
        """Compute the logits of samples, which are already augmented.

        Args:
            network: the discriminator, perhaps with temporary weights; use it instead of ``self.discriminator``.
            sample: (n, ...).
            condition: the condition of the batch, or None.

        Returns:
            Logits (n,) or (n, patches...), (n / m,) for packs of m samples, or a dict or list of them for several
            discriminators; or ``(logits, features)`` with features of real and fake samples that losses compare.
        """
        if isinstance(network, nn.ModuleDict):
            return logits_and_features({name: call_network(part, sample, condition) for name, part in network.items()})
        if isinstance(network, nn.ModuleList):
            return logits_and_features([call_network(part, sample, condition) for part in network])
        return call_network(network, sample, condition)

    def draw_condition(self, n: int, condition: Condition) -> Condition:
        """The condition of generated samples in training and validation; by default that of the batch.

        StyleGAN2 draws new labels each time that it generates samples. Drawn from the module's noise, such labels are
        the same in a resumed run. To draw them from the labels of a data set::

            def draw_condition(self, n, condition):
                return self.labels[(self.noise.rand(n, dtype=torch.float64) * len(self.labels)).long()]

        Args:
            n: number of samples.
            condition: the condition of the batch, or None.

        Returns:
            (n, ...), or None; it becomes ``outputs.fake_condition``.
        """
        return condition

    def auxiliary_losses(self, player: Player, outputs: GANOutputs) -> Terms:
        """Additional terms of a player's loss, added without a weight and logged as ``<player>/<name>``.

        Args:
            player: ``"d"`` or ``"g"``.
            outputs: samples and logits of a (micro-)batch.

        Returns:
            Scalar tensors by name.
        """
        return {}

    def adversarial_weight(self, player: Player, outputs: GANOutputs) -> float | Tensor:
        """The factor of a player's adversarial loss.

        Args:
            player: ``"d"`` or ``"g"``.
            outputs: samples and logits of a (micro-)batch.
        """
        return 1.0

    # ---------- samples and logits

    def sample(
        self,
        n: int | None = None,
        condition: Condition = None,
        latents: Tensor | None = None,
        truncation: float = 1.0,
        reject: Rejection | None = None,
    ) -> Sample:
        """Generate samples, with the generator's moving average in eval mode if there is one.

        Args:
            n: number of samples; None: the number of latents or conditions.
            condition: (n, ...), for a generator that takes one.
            latents: (n, latent_dim); None: drawn from the module's own noise.
            truncation: ψ of StyleGAN, w̄ + ψ (w − w̄): values below 1 give better samples with less variety. It sets
                the attribute ``truncation`` of the generator or of its parts for this call; see
                :class:`~lightning_gan_stability.StyleGenerator`.
            reject: selects samples with the discriminator, so that their distribution is closer to that of the data:
                :class:`~lightning_gan_stability.DiscriminatorRejection` or
                :class:`~lightning_gan_stability.MetropolisHastings`. None: no selection.

        Returns:
            (n, ...) samples.

        Raises:
            ValueError: if latents or condition do not match ``n`` and ``latent_dim``, or if all three are missing; if
                no part of the generator has an attribute ``truncation``; or if ``reject`` is combined with latents or
                truncation.

        Example:
            >>> from lightning_gan_stability import MLP
            >>> gan = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16)
            >>> gan.sample(latents=torch.zeros(3, 16)).shape
            torch.Size([3, 2])
        """
        condition = move_data_to_device(condition, self.device)
        if n is None:
            given = latents if latents is not None else condition
            if given is None:
                raise ValueError("`n` is needed where neither `latents` nor `condition` says how many samples to draw.")
            n = batch_size(given)
        check_condition(condition, check_integer("n", n))
        if reject is not None:
            if latents is not None or truncation != 1:
                raise ValueError(
                    "`reject` draws the latents itself, and its odds do not hold for truncated samples: remove "
                    "`latents` and `truncation`, or `reject`."
                )
            return check_type("reject", reject, Rejection).sample(self, n, condition)
        if self.latent_dim is None:
            if latents is not None:
                raise ValueError("`latents` must be None: the generator takes none (`latent_dim` is None).")
        elif latents is None:
            latents = self.draw_latents(n)
        else:
            latents = latents.to(self.device)
            if latents.shape != (n, self.latent_dim):
                raise ValueError(f"`latents` must have shape {(n, self.latent_dim)}, got {tuple(latents.shape)}.")
        check_finite("truncation", truncation)
        with nullcontext() if truncation == 1 else truncated(self.current_generator, truncation):
            return self.networks.generate(n, condition, latents)[0]

    def forward(self, inputs: Any, condition: Condition = None) -> Sample:
        """Generate samples from latents and a condition, or from a condition alone for a generator without latents."""
        if self.latent_dim is None:
            return self.sample(condition=inputs)
        return self.sample(batch_size(inputs), condition, inputs)

    def logits(self, sample: Sample, condition: Condition = None) -> Logits:
        """Compute the discriminator's logits of samples, which are augmented first in train mode.

        Args:
            sample: (n, ...).
            condition: (n, ...), for a discriminator that takes one.

        Returns:
            Logits (n,), or (n, patches), or (n // m,) of packs of m samples; a dict or list of these for several
            discriminators. If the discriminator is an auto-encoder and the loss judges reconstructions: the mean
            absolute error of each sample, (n,).

        Raises:
            ValueError: if the discriminator does not return at least one logit per sample (or pack of samples).
        """
        return self.networks.discriminate(sample, condition)[0]

    def draw_latents(self, n: int) -> Tensor:
        """Draw latents (n, latent_dim) from the module's own noise, in the dtype that the generator computes in."""
        if self.latent_dim is None:
            raise ValueError("There are no latents to draw: the generator takes none (`latent_dim` is None).")
        return self.noise.randn(n, self.latent_dim, dtype=self.engine.latent_dtype())

    def unpacked(self, batch: Any) -> Unpacked:
        """Real samples and condition of a batch, checked; samples that do not fill a pack are dropped."""
        if isinstance(batch, Unpacked):
            return batch
        real, condition = self.taken_apart(batch)
        n, pack = batch_size(real), self.packing
        rows = n - n % pack
        if rows == n:
            return Unpacked(real, condition)
        if rows == 0:
            raise ValueError(
                f"The discriminator judges {pack} samples together, but the batch has {n}: use a larger batch size, "
                "and drop_last=True in the loader."
            )
        return Unpacked(take_rows(real, 0, rows), take_rows(condition, 0, rows))

    def taken_apart(self, batch: Any) -> Unpacked:
        """Real samples and condition that :meth:`unpack` returns for a batch, checked; incomplete packs are kept."""
        found = self.unpack(batch)
        if not (isinstance(found, tuple | list) and len(found) == 2 and found[0] is not None):
            got = f"a {type(found).__name__} of {len(found)}" if isinstance(found, tuple | list) else describe(found)
            raise ValueError(f"`unpack` must return samples and a condition (or None) of a batch, got {got}.")
        real, condition = found
        check_condition(condition, check_samples("Real samples", real))
        return Unpacked(real, condition)

    def compute_samples(
        self, player: Player, batch: Any, regularizers: Sequence[Regularizer] | None = None
    ) -> GANOutputs:
        """Real and generated samples of a (micro-)batch, without logits.

        Args:
            player: ``"d"``: generated samples are detached from the generator; ``"g"``: they are not.
            batch: a batch for :meth:`unpack`; or outputs computed earlier for the generator's step, whose samples are
                detached for the discriminator.
            regularizers: regularizers that the outputs are for: tensors that they differentiate by require grad. None:
                those that are due.

        Returns:
            Outputs without logits.

        Raises:
            ValueError: if the generator's samples do not have the shape of the data.
        """
        regularizers = self.due(player) if regularizers is None else regularizers
        with self.engine.turn_of(player):
            return self._samples(player, batch, regularizers)

    def _samples(self, player: Player, batch: Any, regularizers: Sequence[Regularizer]) -> GANOutputs:
        names = {name for regularizer in regularizers for name in regularizer.differentiates}
        if isinstance(batch, GANOutputs):  # made once for both players
            shared = _for_player(player, batch, names)
            return self.engine.widened(shared) if names else shared
        with self.full_precision() if names else self.engine.rerunnable(player):
            real, condition = self.unpacked(batch)
            n = batch_size(real)
            latents = None if self.latent_dim is None else self.draw_latents(n)
            given = self._drawn_condition(n, condition)
            if "real" in names:
                real = differentiable(real)
            if player == "g":
                if "latents" in names and latents is not None:
                    latents = latents.requires_grad_()
                fake, extras = self.networks.generate(n, given, latents)
            else:
                with torch.no_grad():
                    fake, extras = self.networks.generate(n, given, latents)
                if "fake" in names:
                    fake = differentiable(fake)
        if isinstance(fake, Tensor) and isinstance(real, Tensor):
            fits = fake.shape == real.shape
        else:
            fits = same_structure(fake, real) and shapes(fake) == shapes(real)
        if not fits:
            raise ValueError(
                f"The generator made samples of shape {shapes(fake)}, but the data have shape {shapes(real)}."
            )
        return GANOutputs(real, fake, latents=latents, condition=condition, extras=extras, fake_condition=given)

    def _drawn_condition(self, n: int, condition: Condition) -> Condition:
        """The result of `draw_condition`, checked."""
        given = self.draw_condition(n, condition)
        if given is not condition:
            check_condition(given, n)
        return given

    def compute_outputs(
        self, player: Player, batch: Any, regularizers: Sequence[Regularizer] | None = None
    ) -> GANOutputs:
        """Run both networks on a (micro-)batch, as far as the player's loss needs it.

        Args:
            player: ``"d"``: generated samples are detached from the generator; ``"g"``: they are not.
            batch: a batch for :meth:`unpack`.
            regularizers: regularizers that the outputs are for: tensors that they differentiate by require grad. None:
                those that are due.

        Returns:
            Outputs for the player's loss.

        Raises:
            ValueError: if samples or logits have a wrong shape.
        """
        regularizers = self.due(player) if regularizers is None else regularizers
        precise = any(regularizer.differentiates for regularizer in regularizers)
        with self.engine.turn_of(player), self.full_precision() if precise else nullcontext():
            outputs = self.compute_samples(player, batch, regularizers)
            if self.noise.in_step:
                for callback in self.engine.callbacks():
                    outputs = callback.change_samples(self, player, outputs)
            if player == "d":
                return self.judge(outputs)
            real = self.loss.needs_real or any(regularizer.needs_real for regularizer in regularizers)
            same = any(regularizer.same_augmentation for regularizer in regularizers)
            return self.judge(outputs, real=real, same_augmentation=same) if self.adversarial else outputs

    def judge(
        self, outputs: GANOutputs, real: bool = True, fake: bool = True, same_augmentation: bool = False
    ) -> GANOutputs:
        """Compute the discriminator's current logits and features for outputs.

        Args:
            outputs: samples, with or without logits.
            real: judge the real samples.
            fake: judge the generated samples.
            same_augmentation: augment the generated samples with the same random draws as the real ones.
        """
        changes: dict[str, Any] = {}
        start = self.noise.randomness() if same_augmentation else None
        for side, wanted in (("real", real), ("fake", fake)):
            if not wanted:
                continue
            sample = getattr(outputs, side)
            condition = outputs.condition if side == "real" else outputs.fake_condition
            found = self.networks.discriminate(sample, condition, start if side == "fake" else None)
            kinds = ("logits", "features", "activations", "augmented")
            changes |= {f"{side}_{kind}": value for kind, value in zip(kinds, found, strict=True)}
        return outputs.replace(**changes)

    def augment_samples(self, sample: Sample, condition: Condition) -> tuple[Sample, Condition]:
        """Augment samples as in training, by ``augment`` and by callbacks.

        Images in the condition of a discriminator are transformed with their samples; see
        :class:`~lightning_gan_stability.Augmentation`. A condition that no discriminator takes is left unchanged.

        Args:
            sample: (n, ...).
            condition: the discriminator's condition, or None.
        """
        told = condition if condition is not None and self._tells_condition() else None
        with self.noise.of_samples():
            sample, told = augment_pairs(self.augment, sample, told)
            if self.noise.in_step:
                for callback in self.engine.callbacks():
                    sample, told = callback.augment(self, sample, told)
        return sample, condition if told is None else told

    def _tells_condition(self) -> bool:
        """Whether a discriminator may get the condition."""
        network = self.discriminator
        parts = network.children() if isinstance(network, nn.ModuleDict | nn.ModuleList) else [network]
        overridden = type(self).discriminate is not GANModule.discriminate
        return overridden or any(condition_parameter(part)[0] for part in parts)

    def watch_layers(self, layers: Sequence[str]) -> Callable[[], None]:
        """Record outputs of the discriminator's layers, as ``real_activations`` and ``fake_activations`` of outputs.

        Args:
            layers: names as in ``discriminator.named_modules()``, or patterns such as ``"convs.*"``. Patterns skip mere
                containers, such as a ``ModuleList``.

        Returns:
            A function that ends the recording.

        Raises:
            MisconfigurationException: if the discriminator has no such layer, or if it is a mere container.

        Example:
            >>> from lightning_gan_stability import MLP
            >>> gan = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16)
            >>> stop = gan.watch_layers(["layers.0"])
            >>> outputs = gan.judge(GANOutputs(torch.zeros(4, 2), torch.ones(4, 2)))
            >>> {name: tuple(x.shape) for name, x in outputs.fake_activations.items()}
            {'layers.0': (4, 32)}
            >>> stop()
        """
        return self.networks.watch(layers)

    def resample(self, outputs: GANOutputs, latents: Tensor | None) -> GANOutputs:
        """Regenerate the samples of outputs from other latents, attached to the generator if the old ones are."""
        graph = any(leaf.grad_fn is not None for leaf in tree_leaves(outputs.fake))
        with torch.set_grad_enabled(graph):
            fake, extras = self.networks.generate(batch_size(outputs.fake), outputs.fake_condition, latents)
        return outputs.replace(fake=fake, extras=extras, latents=latents)

    # ---------- gradients and steps

    def compute_gradients(self, player: Player, batch: Any, objective: Objective | None = None) -> GANOutputs:
        """Compute the gradient of a player's loss on a batch and store it in its parameters' ``grad``, without a step.

        Args:
            player: the player.
            batch: the full batch; it is split into ``accumulate`` micro-batches.
            objective: function of a (micro-)batch that returns outputs, the player's total loss, and the terms for the
                log. None: :meth:`compute_outputs` and :meth:`player_loss`.

        Returns:
            The outputs of the full batch, detached.
        """
        return self.engine.compute_gradients(player, batch, objective)

    def separate_steps(self, player: Player, batch: Any) -> None:
        """Take the separate steps of a player's due penalties, on their own samples.

        Args:
            player: the player.
            batch: the full batch.
        """
        self.engine.separate_steps(player, batch)

    def apply_gradients(self, player: Player) -> None:
        """Clip the player's gradient and step its optimizer and scheduler.

        Args:
            player: the player.

        Raises:
            FloatingPointError: if a term of the loss or the gradient is not finite; then no step is taken.
        """
        self.engine.apply_gradients(player)

    def due(self, player: Player) -> list[Regularizer]:
        """The regularizers that are part of a player's loss on this batch."""
        return self.engine.due(player)

    def term_name(self, regularizer: Regularizer) -> str:
        """The unique name of a regularizer's term in the loss and the log.

        The first regularizer of a name keeps it, the next one gets ``<name>_2``, in the order of ``trainer.callbacks``.
        """
        return self.engine.term_names(regularizer.player).get(regularizer, regularizer.name)

    def gradients_of(self, term: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Compute gradients of a term before the backward pass, in :meth:`GANCallback.weigh_terms` or ``watch_terms``.

        Args:
            term: a scalar; its graph is kept.
            inputs: tensors to differentiate by.

        Returns:
            One detached gradient for each input, of this process only; None if the term does not depend on an input.
        """
        return self.engine.gradients_of(term, inputs)

    def adversarial_loss(self, player: Player, outputs: GANOutputs) -> tuple[Tensor, Terms]:
        """A player's adversarial loss, without its weight, and its values for the log."""
        return self.engine.adversarial_loss(player, outputs)

    def player_loss(
        self, player: Player, outputs: GANOutputs, adversarial: Tensor | None = None
    ) -> tuple[Tensor, Terms]:
        """A player's total loss (adversarial, auxiliary and due penalties), and the values of its terms for the log.

        Args:
            player: the player.
            outputs: the player's outputs.
            adversarial: another adversarial loss, before its weight. None: that of ``loss``.
        """
        return self.engine.player_loss(player, outputs, adversarial)

    def joint_losses(self, batch: Any) -> tuple[dict[Player, Tensor], dict[Player, Tensor]]:
        """Both players' losses on one batch, total and adversarial only, each with a graph to both networks."""
        return self.engine.joint_losses(batch)

    def set_gradients(self, player: Player, gradients: Sequence[Tensor | None]) -> None:
        """Average given gradients over processes and store them in the ``grad`` of a player's trainable parameters."""
        self.engine.set_gradients(player, gradients)

    def step(self, player: Player, schedule: bool = True) -> None:
        """Step a player's optimizer with the present gradients, and its scheduler."""
        self.engine.step(player, schedule)

    @torch.no_grad()
    def constrain(self, player: Player, parameters: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """Apply the constraints of callbacks, such as clipping, to a player's parameters after a step.

        Args:
            player: the player.
            parameters: tensors that replace the parameters; new ones are returned, differentiably. None: change the
                parameters themselves in place.
        """
        if parameters is not None:
            with torch.enable_grad():
                return self.engine.constrained(player, parameters)
        live = self.trainable_parameters(player)
        for parameter, value in zip(live, self.engine.constrained(player, live), strict=True):
            if value is not parameter:
                parameter.copy_(value)
        return live

    def optimizer(self, player: Player) -> LightningOptimizer:
        """A player's optimizer."""
        return self.engine.optimizer(player)

    def trainable_parameters(self, player: Player) -> list[nn.Parameter]:
        """The parameters of a player's optimizer, in its order."""
        return self.engine.trainable_parameters(player)

    # ---------- contexts

    def full_precision(self, eager: bool = True) -> AbstractContextManager[None]:
        """Run forward passes without autocast and, if ``eager``, uncompiled, as second derivatives require."""
        return self.engine.full_precision(eager)

    def loss_at_rest(self) -> AbstractContextManager[None]:
        """Evaluate ``loss`` without changing its buffers (BEGAN's k)."""
        return self.engine.loss_at_rest()

    def frozen_buffers(self) -> AbstractContextManager[None]:
        """Run the networks without changing BatchNorm's statistics and spectral norm's vectors."""
        return FrozenBuffers(self)()

    def replay_randomness(self, start: Randomness | None = None) -> AbstractContextManager[None]:
        """Start all random draws within from a given state (None: the present one), and restore it afterwards."""
        return self.noise.replay(start)

    def substitute(self, parameters: Sequence[Tensor], frozen: nn.Module | None = None) -> Substitution:
        """Return a function that runs others with tensors substituted for parameters, and with fixed buffers.

        Args:
            parameters: the parameters to replace.
            frozen: the part of the module whose buffers must not change; None: the whole module.

        Returns:
            ``run(tensors, function, *arguments)``.
        """
        return Substitution(self, parameters, frozen)

    # ---------- called by the Trainer

    def configure_callbacks(self) -> list[Callback]:
        """The module's guard, and the companions of callbacks; a subclass that overrides this returns them too."""
        check_run(self.trainer, self)
        self.guard = Guard(self)
        brought = [c.companions(self.trainer, self) for c in callbacks_of(self.trainer, GANCallback)]
        return [*(companion for companions in brought for companion in companions), self.guard]

    def configure_optimizers(self) -> Any:
        """The two optimizers, discriminator first, and the schedulers; keep the order if you override it.

        Step a further optimizer yourself in ``training_step`` after ``super()``, as
        ``self.trainer.optimizers[2].step()``: a step of one of ``self.optimizers()`` would count as another batch.
        """
        optimizers, schedulers = [], []
        for player, network in NETWORKS.items():
            make_optimizer = self.make_optimizer[player] or _adam
            parameters = [*self.get_submodule(network).parameters()]
            if not parameters:
                raise MisconfigurationException(f"The {network} has no parameters, and nothing to train.")
            optimizers.append(make_optimizer(parameters))
            if make := self.make_scheduler[player]:
                scheduler = make(optimizers[-1])
                if not hasattr(scheduler, "step") or not hasattr(scheduler, "optimizer"):
                    raise MisconfigurationException(
                        f"`{player}_scheduler` must make a scheduler, got {describe(scheduler)}: set "
                        "`scheduler_interval` to say what it counts, or override `configure_optimizers`."
                    )
                schedulers.append({"scheduler": scheduler, "interval": self.scheduler_interval})
        return optimizers, schedulers

    def configure_model(self) -> None:
        """Shard both networks over the processes of a ModelParallelStrategy.

        To shard single layers too, override it: ``fully_shard`` them if there is a ``device_mesh``, then call
        ``super()``.
        """
        self.sharding.shard()

    def compile_networks(self) -> None:
        """Compile the networks in place if ``compile`` is set; several discriminators are compiled separately."""
        if self.compile_options is not None:
            for network in self.sharding.networks:
                if network is not self.generator_ema and not is_compiled(network):
                    network.compile(**self.compile_options)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One GAN step on a batch by the run's update rule; increases ``iteration`` and ``global_step`` by one."""
        guard, trainer = find_guard(self), self.trainer
        rule, rescued, visible, values = find_rule(trainer), False, guard.is_visible(trainer), self.last_step.values
        try:
            with self.engine.adjusted_for_batch(rule), self.noise.of_step():
                self.last_step = step = StepRecord(self.iteration, visible, finished=False, values=values)
                if self.replays_graphs:
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                rule(self, batch)
        except NotFinite as error:
            self.engine.explain(error)  # while the weights are there with which it happened
            rescued = any(callback.rescue(trainer, self) for callback in self.engine.callbacks())
            if not rescued:
                raise
            logging.getLogger("lightning.pytorch").info(f"Put back after: {error}")  # of the rank that knows where
        if not step.moved:
            # one batch is one global_step, also when a rule leaves both players where they are
            progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()
        if not rescued:
            self.iteration += 1
            for player in step.moved:
                self.steps[player] += 1
        if trainer.is_last_batch:
            started = [player for player in PLAYERS if self.steps[player]]
            self.engine.schedule("epoch", [self.engine.optimizer(player).optimizer for player in started])
        if rescued:
            self.last_step = StepRecord()
            self.engine.start()
            return
        step.finished = True
        if step.visible:
            self.engine.check_finite()
            for name, value in step.values.items():
                self.log(name, value, prog_bar=name.endswith("/adversarial"), sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Both losses and the discriminator's accuracy on held-out data, as ``val/...``."""
        self._evaluate(batch, batch_idx, dataloader_idx, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same on test data, as ``test/...``."""
        self._evaluate(batch, batch_idx, dataloader_idx, "test")

    def _evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        n = batch_size(self.taken_apart(batch).real)
        if n < self.packing:
            return  # the rest of a data set that fills no pack
        with self.noise.of("validation", dataloader_idx, batch_idx), self._naming_incomplete(batch_idx, n):
            outputs = self.compute_outputs("d", batch, ())
        values: dict[str, Tensor] = {}
        for player in PLAYERS:
            _, terms = self.adversarial_loss(player, outputs)
            terms |= self.engine.auxiliary_losses(player, outputs)
            terms |= self.engine.validated_terms(player, outputs)
            values |= {f"{stage}/{player}/{name}": value for name, value in terms.items()}
        accuracies = [self.loss.accuracy(real, fake) for _, real, fake in outputs.pairs()]
        values[f"{stage}/d/accuracy"] = torch.stack(accuracies).mean()
        self.log_dict(values, batch_size=batch_size(outputs.real), sync_dist=True)

    @contextmanager
    def _naming_incomplete(self, batch_idx: int, n: int) -> Iterator[None]:
        """Explain what to do if the networks fail in a validation batch that is smaller than the first one."""
        if batch_idx == 0:
            self._first_val_size = n
        try:
            yield
        except (RuntimeError, ValueError, AssertionError) as error:
            if n >= self._first_val_size:
                raise
            raise MisconfigurationException(
                f"The networks cannot take the incomplete last validation batch, of {n} samples instead of "
                f"{self._first_val_size}, as statistics over groups of samples may not: leave it out, by "
                "`drop_last=True` of a DataLoader or of `Images`, or hold out whole batches."
            ) from error

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Sample:
        """As many samples as there are in the batch, with its conditions if there are any.

        For a generator without latents, a tensor or a tuple of one is its input.
        """
        alone = batch[0] if isinstance(batch, list | tuple) and len(batch) == 1 else batch
        with self.noise.of("prediction", dataloader_idx, batch_idx):
            if self.latent_dim is None and isinstance(alone, Tensor):
                return self.sample(condition=alone)
            real, condition = self.unpack(batch)
            return self.sample(batch_size(real), condition)

    # ---------- checkpoints

    def get_extra_state(self) -> dict[str, Any]:
        """The state of a checkpoint besides weights: counters, the state of the noise, and how the loss was made."""
        return {
            "iteration": self.iteration,
            "steps": dict(self.steps),
            "draw": self.noise.draw,
            "loss": loss_recipe(self.loss),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load the extra state of a checkpoint."""
        self.iteration, self.steps, self.noise.draw = state["iteration"], dict(state["steps"]), state["draw"]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, including the average and the spectral norm that callbacks add to the state, and the counters.

        A loss that was passed to the module takes precedence over that of the state.

        Raises:
            ValueError: if ``strict``, and the state is not that of a GANModule.
        """
        state: Any = copy(state_dict)
        extra = state.get("_extra_state")
        if extra is None and strict:
            raise ValueError(
                "This is no state of a GANModule: it has no entry '_extra_state'. Load bare weights with strict=False."
            )
        if extra is not None:
            self._take_loss(extra["loss"], state)
        averaged = any(key.startswith("generator_ema.") for key in state)
        if self.generator_ema is None and averaged:
            self.generator_ema = copy_network(self.generator)
            self.average_rests = True  # until GeneratorEMA sees it
        elif self.generator_ema is not None and not averaged:
            # a run goes on with an average that it did not have before
            own = {k: v for k, v in state.items() if k.startswith("generator.")}
            state |= {f"generator_ema.{k[10:]}": v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}
        restore_parametrizations(self, state)
        # augmentation acts in training alone, and may come from a callback
        own = {f"augment.{key}": value for key, value in self.augment.state_dict().items()}
        for key in [k for k in state if k.startswith("augment.") and k not in own]:
            del state[key]
        for key, value in own.items():
            state.setdefault(key, value)
        return super().load_state_dict(state, strict, assign)

    def _take_loss(self, recipe: Mapping[str, Any], state: dict[str, Any]) -> None:
        """Use the same loss in the module and in a state."""
        if not self.loss_given and loss_recipe(self.loss) != recipe:
            self.loss = loss_from_recipe(recipe).to(self.device)
        if type(self.loss).__qualname__ != recipe["name"]:
            for key in [k for k in state if k.startswith("loss.")]:
                del state[key]
            state.update(self.loss.state_dict(prefix="loss."))

    def save_hyperparameters(
        self, *args: Any, ignore: Any = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """Save the arguments of the most derived class that are plain data, for checkpoints and loggers.

        Networks are left out, because they would be copied, pickled and logged. Under LightningCLI this saves the
        config, from which they can be made again. A subclass may call it but need not.
        """
        current = inspect.currentframe()
        frame = frame or (current and current.f_back)
        if args or given_hyperparameters() is not None or frame is None:
            super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
            return
        *_, arguments = collect_init_args(frame, [], classes=(type(self),))
        every = {name for level in collect_init_args(frame, [], classes=(HyperparametersMixin,)) for name in level}
        plain = {name for name, value in arguments.items() if is_plain(value)}
        dropped = {ignore} if isinstance(ignore, str) else set(ignore or ())
        lost = [
            n
            for n, v in arguments.items()
            if n not in plain | dropped and not (isinstance(v, nn.Module) or callable(v))
        ]
        if lost:
            rank_zero_warn(
                "Of a module's arguments checkpoints keep numbers, strings, lists and dicts, and not "
                f"{', '.join(lost)}: give what is left out to `load_from_checkpoint` again."
            )
        super().save_hyperparameters(ignore=[*(every - plain) | dropped], frame=frame, logger=logger)


def _for_player(player: Player, outputs: GANOutputs, names: set[str]) -> GANOutputs:
    """Samples that both players share, as outputs for one of them."""
    if player == "g":
        return outputs
    real, fake = (differentiable if name in names else detach for name in ("real", "fake"))
    return outputs.replace(
        real=real(outputs.real),
        fake=fake(outputs.fake),
        latents=detach(outputs.latents),
        extras=detach(outputs.extras),
    )


def _checked_clip_norm(clip_norm: Any) -> float | dict[Player, float] | None:
    if isinstance(clip_norm, Mapping):
        check(
            bool(clip_norm) and set(clip_norm) <= {"d", "g"},
            "clip_norm",
            "a number, or a dict of 'd' and 'g'",
            clip_norm,
        )
        return {player: check_number(f"clip_norm[{player!r}]", v, positive=True) for player, v in clip_norm.items()}
    return None if clip_norm is None else check_number("clip_norm", clip_norm, positive=True)


def _checked_compile(options: Any) -> dict[str, Any] | None:
    check(
        isinstance(options, bool | dict), "compile", "True, False, or a dict of arguments of `torch.compile`", options
    )
    if options is False:
        return None
    given = options if isinstance(options, dict) else {}
    allowed = set(inspect.signature(torch.compile).parameters) - {"model"}
    defaults = {"dynamic": False, "isolate_recompiles": True}  # or else networks of one class share eight graphs
    found: dict[str, Any] = {name: value for name, value in defaults.items() if name in allowed} | given
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise ValueError(
            f"`compile` must hold arguments of `torch.compile` ({', '.join(sorted(allowed))}), got {unknown[0]!r}."
        )
    backend = given.get("backend", "inductor")
    if isinstance(backend, str):
        check_choice("compile['backend']", backend, torch.compiler.list_backends(exclude_tags=()))
    return found


def _has_cuda_graphs(options: Mapping[str, Any]) -> bool:
    modes, own = ("reduce-overhead", "max-autotune"), options.get("options") or {}
    return options.get("mode") in modes or options.get("backend") == "cudagraphs" or bool(own.get("triton.cudagraphs"))


def _check_maker(name: str, make: Any, source: str) -> None:
    if make is not None and not callable(make):
        got = repr(make) if is_plain(make) else f"a {type(make).__name__}"
        raise ValueError(f"`{name}` must be a function that makes one from {source}, got {got}.")


def _adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    parameters, devices = list(parameters), fused_devices()
    fused = all(p.is_floating_point() and p.device.type in devices for p in parameters)
    return torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), fused=fused or None)
