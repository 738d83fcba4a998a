"""The base module of every GAN here: two networks behind two doors, and two primitives."""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy, deepcopy
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_gan_stability import doors
from lightning_gan_stability.callbacks.base import NETWORKS, Player, check_number, check_positive_int
from lightning_gan_stability.clock import LRSchedulerCallable, OptimizerCallable
from lightning_gan_stability.doors import Play
from lightning_gan_stability.gradients import Primitives
from lightning_gan_stability.layers import restore_parametrizations
from lightning_gan_stability.losses import AdversarialLoss, NonSaturating
from lightning_gan_stability.processes import complete_hooks, note_hooks


class GANModule(Primitives):
    """A generator and a discriminator that train against each other, by manual optimization.

    One batch is one GAN step: every player of ``plan`` takes its gradient and steps, and ``iteration`` and the
    Trainer's ``global_step`` both rise by one, so ``max_steps`` and ``every_n_train_steps`` count batches. Callbacks
    change how: a :class:`~lightning_gan_stability.callbacks.base.Regularizer` adds to a player's loss, one
    :class:`~lightning_gan_stability.callbacks.base.UpdateRule` replaces the order of gradients and steps.

    "Generative Adversarial Networks", https://arxiv.org/abs/1406.2661

    Args:
        generator: maps latents (n, latent_dim) to samples (n, ...). If ``forward`` has a second positional parameter
            without a default, or with the default None, it also gets the labels.
        discriminator: maps samples (n, ...) to logits: (n,), (n, 1), or (n, patches...). Labels as for the generator.
        latent_dim: length of the standard normal vector that a sample is made from.
        loss: None: :class:`~lightning_gan_stability.losses.NonSaturating`.
        g_optimizer: makes the generator's optimizer from its parameters. None: Adam(lr=2e-4, betas=(0.5, 0.999)).
        d_optimizer: the same for the discriminator.
        g_scheduler: makes a learning rate scheduler from the optimizer; it steps after each of the player's steps.
        d_scheduler: the same for the discriminator.
        clip_norm: largest L2 norm of a player's gradient, clipped separately for each player. None: no limit.
        accumulate: micro-batches per update: less memory, the same gradient (unless a network has BatchNorm).
        noise_seed: seed of the module's own noise, together with the process's rank and the iteration.
        compile: compile both networks in place when a fit begins; True, or the name of a backend of ``torch.compile``.
            Plain steps run compiled; penalties and rules with second derivatives, which compiled graphs do not have,
            run in eager.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> from lightning_gan_stability import MLP
        >>> gan = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16)
        >>> gan.sample(5).shape
        torch.Size([5, 2])
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let hooks that a subclass overrides without ``super()``, as it may in Lightning, lose nothing."""
        super().__init_subclass__(**kwargs)
        complete_hooks(cls, GANModule)

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent_dim: int,
        loss: AdversarialLoss | None = None,
        g_optimizer: OptimizerCallable | None = None,
        d_optimizer: OptimizerCallable | None = None,
        g_scheduler: LRSchedulerCallable | None = None,
        d_scheduler: LRSchedulerCallable | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        noise_seed: int = 0,
        compile: bool | str = False,
    ) -> None:
        super().__init__({"d": d_optimizer, "g": g_optimizer}, {"d": d_scheduler, "g": g_scheduler})
        self.clip_norm, self.accumulate, self.noise_seed = clip_norm, accumulate, noise_seed
        check_positive_int("latent_dim", latent_dim)
        check_positive_int("accumulate", accumulate)
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, positive=True)
        _check_type("noise_seed", noise_seed, int)
        if not isinstance(compile, bool) and compile not in torch.compiler.list_backends(exclude_tags=()):
            names = ", ".join(torch.compiler.list_backends())
            raise ValueError(f"`compile` must be True, False, or a backend such as {names}, got {compile!r}.")
        makers = {"g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
        for name, make in (makers | {"g_scheduler": g_scheduler, "d_scheduler": d_scheduler}).items():
            if make is not None and not callable(make):
                what = "parameters" if name.endswith("optimizer") else "an optimizer"
                got = repr(make) if doors.is_plain(make) else f"a {type(make).__name__}"
                raise ValueError(f"`{name}` must be a function that makes one from {what}, got {got}.")
        _check_type("generator", generator, nn.Module)
        _check_type("discriminator", discriminator, nn.Module)
        if generator is discriminator:
            raise ValueError("`generator` and `discriminator` must be two modules, got the same one twice.")
        self.loss = NonSaturating() if loss is None else loss
        _check_type("loss", self.loss, AdversarialLoss)
        self.save_hyperparameters(frame=_outermost(self))
        self.generator = generator
        self.discriminator = discriminator
        self.generator_ema: nn.Module | None
        self.register_module("generator_ema", None)
        self._average_rests = False
        self._backend = "inductor" if compile is True else compile
        self.augment: nn.Module = nn.Identity()
        self.latent_dim = latent_dim
        self._loss_given = loss is not None
        self._plan: tuple[Player, ...] = ("d", "g")

    @property
    def plan(self) -> tuple[Player, ...]:
        """The players that move on one batch, in order; a knob that callbacks may turn between batches."""
        return self._plan

    @plan.setter
    def plan(self, plan: Sequence[Player]) -> None:
        if not plan or not set(plan) <= {"d", "g"}:
            raise ValueError(f"`plan` must be a sequence of 'd' and 'g' with at least one entry, got {plan!r}.")
        self._plan = tuple(plan)

    # ---------- the doors

    def sample(self, n: int, labels: Tensor | None = None, latents: Tensor | None = None) -> Tensor:
        """Draw samples from the generator, or from its moving average in eval mode when there is one.

        Args:
            n: number of samples.
            labels: (n, ...) labels for a generator that takes them.
            latents: (n, latent_dim); None: drawn from the module's own noise.

        Returns:
            (n, ...) samples.

        Raises:
            ValueError: if latents or labels do not fit ``n`` and ``latent_dim``.

        Example:
            >>> from lightning_gan_stability import MLP
            >>> gan = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16)
            >>> gan.sample(3, latents=torch.zeros(3, 16)).shape
            torch.Size([3, 2])
        """
        check_positive_int("n", n)
        latents = self.randn(n, self.latent_dim) if latents is None else latents.to(self.device)
        if latents.shape != (n, self.latent_dim):
            raise ValueError(f"`latents` must have shape {(n, self.latent_dim)}, got {tuple(latents.shape)}.")
        average = None if self.training else self.generator_ema
        return self._forward("generator", self.generator if average is None else average, latents, labels)

    def discriminate(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Judge samples: augment them, then the discriminator's logits.

        Args:
            samples: (n, ...).
            labels: (n, ...) labels for a discriminator that takes them.

        Returns:
            Logits (n,), or (n, patches), or (n // m,) of packs of m samples. With an auto-encoder as discriminator and
            a loss that judges reconstructions: the mean absolute error of each sample, (n,).

        Raises:
            ValueError: if the discriminator does not return at least one logit per sample (or pack of samples).
        """
        samples = self.augment(samples)
        output = self._forward("discriminator", self.discriminator, samples, labels)
        if self.loss.judges_reconstructions and output.shape == samples.shape:
            output = (output - samples).abs().reshape(len(samples), -1).mean(1, keepdim=True)
        n = len(samples) // self._pack
        if output.dim() == 0 or len(output) != n:
            per = "sample" if self._pack == 1 else f"pack of {self._pack} samples"
            raise ValueError(
                f"The discriminator must return one logit or more per {per}: expected shape ({n},) or "
                f"({n}, patches), got {tuple(output.shape)}."
            )
        logits = output.reshape(len(output), -1)
        return logits.squeeze(1) if logits.shape[1] == 1 else logits

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Take a batch apart into real samples (n, ...) and labels or None; override it for batches of your own.

        It knows a tensor, ``(x,)``, ``(x, labels)`` and ``{"image": x, "label": labels}`` (label optional).

        Raises:
            ValueError: if the batch has another form, or samples that are not floating point.
        """
        return doors.unpack(batch)

    def play(self, player: Player, batch: Any) -> Play:
        """Let both networks look at one (micro-)batch, as far as the player's loss needs it.

        Args:
            player: ``"d"``: the fake samples carry no gradient to the generator; ``"g"``: they do.
            batch: anything that :meth:`unpack` knows.

        Returns:
            The play. Tensors that a due penalty differentiates by require grad.

        Raises:
            ValueError: if the generator's samples do not have the shape of the data.
        """
        real, labels = self._whole_packs(*self._unpacked(batch))
        real = self._leaf("real", real)
        latents = self.randn(len(real), self.latent_dim)
        if player == "d":
            with torch.no_grad():
                fake = self.sample(len(real), labels, latents)
            fake = self._leaf("fake", fake)
        else:
            latents = self._leaf("latents", latents)
            fake = self.sample(len(real), labels, latents)
        if fake.shape != real.shape:
            raise ValueError(
                f"The generator made samples of shape {tuple(fake.shape[1:])}, but the data have shape "
                f"{tuple(real.shape[1:])}."
            )
        needs_real = player == "d" or self.loss.needs_real
        real_logits = self.discriminate(real, labels) if needs_real else None
        return Play(real, fake, real_logits, self.discriminate(fake, labels), latents, labels)

    def _unpacked(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """What `unpack` says, which a subclass may have got wrong."""
        found = self.unpack(batch)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
            got = f"a tuple of {len(found)}" if isinstance(found, tuple) else f"a {type(found).__name__}"
            raise ValueError(f"`unpack` must return samples and labels (or None) of a batch, got {got}.")
        return found

    def _whole_packs(self, real: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The samples that a discriminator of packs can judge: all but the rest that fills no pack."""
        n = len(real) - len(real) % self._pack
        if n == 0:
            raise ValueError(
                f"The discriminator judges {self._pack} samples together, but the batch has {len(real)}: use a larger "
                "batch size, and drop_last=True in the loader."
            )
        return (real, labels) if n == len(real) else (real[:n], None if labels is None else labels[:n])

    def _leaf(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_() if name in self._now.differentiate else tensor

    def _forward(self, name: str, network: nn.Module, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Run a network on what it takes, and explain its failure before the first step."""
        if labels is not None and not isinstance(labels, Tensor):
            raise ValueError(f"`labels` must be a tensor or None, got a {type(labels).__name__}.")
        labels = labels if labels is None else labels.to(self.device)
        if network._compiled_call_impl is not None:
            # one graph for all batch sizes: Dynamo gives up after eight of one class of network
            torch._dynamo.maybe_mark_dynamic(inputs, 0)
        try:
            return doors.call(network, inputs, labels)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            if self.iteration:
                raise
            dtype = doors.dtype_of(network, inputs.dtype)
            hint = "" if dtype == inputs.dtype else f" (the input is {inputs.dtype}, the network {dtype})"
            raise ValueError(f"The {name} failed on an input of shape {tuple(inputs.shape)}{hint}: {error}") from error

    # ---------- what the Trainer calls

    def setup(self, stage: str) -> None:
        """Refuse what cannot work; let plain ``strategy: ddp`` work."""
        super().setup(stage)
        if self.loss.judges_reconstructions and self._pack > 1:
            raise MisconfigurationException(
                f"{type(self.loss).__name__} judges each sample by its reconstruction, and Packed judges {self._pack} "
                "together: use another loss, or the discriminator without Packed."
            )
        if stage == "fit" and self.loss.couples_batch and self.accumulate > 1:
            raise MisconfigurationException(
                f"{type(self.loss).__name__} compares each sample with the mean of its batch, which accumulate="
                f"{self.accumulate} would take over micro-batches: use accumulate=1, or the pairwise Relativistic loss."
            )

    def on_fit_start(self) -> None:
        """Refuse networks in eval mode and optimizers that cannot be right; compile."""
        if not self.training:
            raise MisconfigurationException(
                "The module is in eval mode, in which BatchNorm, dropout and spectral norm do not train: call "
                "`module.train()` before `fit`."
            )
        self._check_optimizers()
        for player in self.plan:
            if not self._moving(player):
                raise MisconfigurationException(
                    f"All parameters of the {NETWORKS[player]} are frozen, but it stands in `module.plan`: "
                    f"{self.plan}. Unfreeze it, or set `module.plan` to the other player."
                )
        if self._average_rests and self.generator_ema is not None:
            rank_zero_warn(
                "The module has an average of its generator from an earlier run, which `sample` draws from in eval "
                "mode, but no GeneratorEMA moves it: add one, or set `module.generator_ema = None`."
            )
        if isinstance([*self.discriminator.modules()][-1], nn.Sigmoid) and not self.loss.judges_reconstructions:
            rank_zero_warn("The discriminator ends in a Sigmoid, but losses take logits: remove it.")
        for network in (self.generator, self.discriminator):
            if self._backend and network._compiled_call_impl is None:
                network.compile(backend=self._backend)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples from given latents: ``sample(len(latents), labels, latents)``."""
        return self.sample(len(latents), labels, latents)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Both losses and the discriminator's accuracy on held-out data, as ``val/...``."""
        self._now.draw = 0 if batch_idx == 0 else self._now.draw
        if len(self.unpack(batch)[0]) < self._pack:
            return  # the rest of a data set that fills no pack
        play = self.play("d", batch)
        values = {
            "val/d/adversarial": self._adversarial("d", play),
            "val/g/adversarial": self._adversarial("g", play),
            "val/d/accuracy": self.loss.accuracy(*play.both_logits),
        }
        self.log_dict(values, batch_size=len(play.real), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As many samples as the batch has, with its labels if there are any."""
        self._now.draw = 0 if batch_idx == 0 else self._now.draw
        real, labels = self.unpack(batch)
        return self.sample(len(real), labels)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, and with them the average and the spectral norm that callbacks brought into the state."""
        state = copy(state_dict)
        self._make_room(state)  # type: ignore[arg-type]
        return super().load_state_dict(state, strict, assign)

    def _make_room(self, state: MutableMapping[str, Any]) -> None:
        if self.generator_ema is None and _has_average(state):
            self.generator_ema = deepcopy(self.generator).requires_grad_(False)
            self._average_rests = True  # until GeneratorEMA sees it
        restore_parametrizations(self, state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the iteration and the loss."""
        self._raise_unless_finite()
        gan = {"iteration": self.iteration, "steps": dict(self._steps), "draw": self._now.draw}
        checkpoint["gan"] = gan | {"loss": doors.recipe(self.loss)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the iteration and, as far as they are not there, the loss, the parametrizations and the average."""
        if "gan" not in checkpoint:
            raise ValueError("This is no checkpoint of a GANModule: it has no entry 'gan'.")
        gan = checkpoint["gan"]
        self.iteration, self._steps, self._now.draw = gan["iteration"], dict(gan["steps"]), gan["draw"]
        if "state_dict" not in checkpoint:
            return  # a distributed checkpoint, which the strategy has read into the shards
        state = checkpoint["state_dict"]
        if self._trainer is None and not self._loss_given:
            self.loss = doors.cook(AdversarialLoss, gan["loss"])  # type: ignore[type-abstract]
        if type(self.loss).__qualname__ != gan["loss"]["name"]:
            for key in [k for k in state if k.startswith("loss.")]:
                del state[key]  # a loss that is passed wins, with its own state
            state.update(self.loss.state_dict(prefix="loss."))
        if self.generator_ema is not None and not _has_average(state):
            # a run goes on with an average that it did not have before
            state |= {f"generator_ema.{k[10:]}": v.clone() for k, v in state.items() if k.startswith("generator.")}
        self._make_room(state)
        if self._trainer is not None and isinstance(self._trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does so after it has read the checkpoint, which would be rounded
        for key in [k for k in state if k.startswith("augment.") and k not in self.state_dict()]:
            del state[key]  # augmentation belongs to the callback that brought it, and acts in training alone


note_hooks(GANModule)


def _has_average(state: Mapping[str, Any]) -> bool:
    return any(key.startswith("generator_ema.") for key in state)


def _outermost(module: GANModule) -> FrameType | None:
    """The call of the most derived ``__init__``: its arguments make the module again, not those of its bases."""
    frame = sys._getframe(1)
    while (outer := frame.f_back) and outer.f_code.co_name == "__init__" and outer.f_locals.get("self") is module:
        frame = outer
    return frame


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be of type {kind.__name__}, got {value!r}.")
