"""The base module of every GAN here: two networks behind two doors, and two primitives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gan_stability import doors
from lightning_gan_stability.callbacks.base import Player, Regularizer, check_number, check_positive_int
from lightning_gan_stability.clock import Clockwork, LRSchedulerCallable, OptimizerCallable
from lightning_gan_stability.losses import AdversarialLoss, NonSaturating


class Play(NamedTuple):
    """What one player saw on one (micro-)batch.

    Attributes:
        real: (n, ...) real samples.
        fake: (n, ...) generated samples.
        real_logits: (n,) or (n, patches); None for a generator whose loss does not need them.
        fake_logits: (n,) or (n, patches).
        latents: (n, latent_dim).
        labels: what the batch gave as labels, or None.
    """

    real: Tensor
    fake: Tensor
    real_logits: Tensor | None
    fake_logits: Tensor
    latents: Tensor
    labels: Tensor | None


class GANModule(Clockwork):
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
        latent_dim: int,
        loss: AdversarialLoss | None = None,
        g_optimizer: OptimizerCallable | None = None,
        d_optimizer: OptimizerCallable | None = None,
        g_scheduler: LRSchedulerCallable | None = None,
        d_scheduler: LRSchedulerCallable | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        noise_seed: int = 0,
    ) -> None:
        super().__init__({"d": d_optimizer, "g": g_optimizer}, {"d": d_scheduler, "g": g_scheduler})
        self.clip_norm, self.accumulate, self.noise_seed = clip_norm, accumulate, noise_seed
        check_positive_int("latent_dim", latent_dim)
        check_positive_int("accumulate", accumulate)
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, positive=True)
        _check_type("noise_seed", noise_seed, int)
        _check_type("generator", generator, nn.Module)
        _check_type("discriminator", discriminator, nn.Module)
        self.loss = NonSaturating() if loss is None else loss
        _check_type("loss", self.loss, AdversarialLoss)
        self.save_hyperparameters()
        self.generator = generator
        self.discriminator = discriminator
        self.generator_ema: nn.Module | None
        self.register_module("generator_ema", None)
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
            Logits (n,), or (n, patches). With an auto-encoder as discriminator and a loss that judges reconstructions:
            the mean absolute error of each sample, (n,).

        Raises:
            ValueError: if the discriminator does not return at least one logit per sample.
        """
        samples = self.augment(samples)
        output = self._forward("discriminator", self.discriminator, samples, labels)
        if self.loss.judges_reconstructions and output.shape == samples.shape:
            output = (output - samples).abs().reshape(len(samples), -1).mean(1, keepdim=True)
        if output.dim() == 0 or len(output) != len(samples):
            raise ValueError(
                f"The discriminator must return one logit or more per sample: expected shape ({len(samples)},) or "
                f"({len(samples)}, patches), got {tuple(output.shape)}."
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
        real, labels = self.unpack(batch)
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

    # ---------- the primitives

    def compute_gradients(self, player: Player, batch: Any) -> Play:
        """Put the gradient of one player's loss on one batch into its parameters' ``grad``; nothing steps.

        Args:
            player: whose loss and whose parameters.
            batch: the whole batch; it is split into ``accumulate`` micro-batches.

        Returns:
            What the player saw on the whole batch, without graphs.
        """
        optimizer, due = self._optimizer(player), self._due(player)
        self._now.differentiate = frozenset().union(*(r.differentiates for r in due))
        self._now.terms[player] = {}
        n = 0 if self.accumulate == 1 else len(self.unpack(batch)[0])
        with self.toggled_optimizer(optimizer), self._held_loss() if self._loss_moves else nullcontext():
            optimizer.zero_grad()
            plays = [self._backward(player, part, share, due) for part, share in self._micro_batches(batch, n)]
        self._now.differentiate = frozenset()
        self._now.logs.update(self._now.terms[player])
        play = _join(plays)
        if player == "d":
            self._now.judged = _both_logits(play)
        return play

    def apply_gradients(self, player: Player) -> None:
        """Clip the player's gradient and step its optimizer and scheduler.

        Args:
            player: whose optimizer steps.

        Raises:
            FloatingPointError: if a term of the loss or the gradient is not finite; then nothing steps.
        """
        self._step(player)
        if player == "d" and self._now.judged is not None:
            real, fake = self._now.judged
            if self._loss_moves:
                # in train mode a loss with a state of its own (BEGAN's k) moves it, as BatchNorm moves its statistics
                with torch.no_grad():
                    self.loss.discriminator(real, fake)
            if self._now.shown:
                accuracy = self.loss.accuracy(real, fake)
                self._now.logs |= {"d/real_logit": real.mean(), "d/fake_logit": fake.mean(), "d/accuracy": accuracy}

    def _backward(self, player: Player, part: Any, share: float, due: list[Regularizer]) -> Play:
        with self._second_order() if self._now.differentiate else nullcontext():
            play = self.play(player, part)
        total = self._adversarial(player, play)
        terms = {f"{player}/adversarial": total.detach()}
        for regularizer in due:
            with self._second_order():
                penalty = regularizer.weight * regularizer.penalty(self, play).mean()
            terms[_unused(f"{player}/{regularizer.name}", terms)] = penalty.detach()
            total = total + regularizer.every * penalty
        autocast = torch.is_autocast_enabled(self.device.type)
        # backward repeats the types of the forward pass; under autocast it would lower those of the penalties
        with torch.autocast(self.device.type, enabled=False) if autocast else nullcontext():
            self.manual_backward(total if share == 1 else share * total)
        seen = self._now.terms[player]
        self._now.terms[player] = {k: v if share == 1 else seen.get(k, 0) + share * v for k, v in terms.items()}
        return play

    def _adversarial(self, player: Player, play: Play) -> Tensor:
        if player == "d":
            return self.loss.discriminator(*_both_logits(play)).mean()
        return self.loss.generator(play.fake_logits, play.real_logits).mean()

    @property
    def _loss_moves(self) -> bool:
        return next(self.loss.buffers(), None) is not None

    @contextmanager
    def _held_loss(self) -> Iterator[None]:
        training, self.loss.training = self.loss.training, False
        try:
            yield
        finally:
            self.loss.training = training

    @contextmanager
    def _second_order(self) -> Iterator[None]:
        """Full precision, because second derivatives lose it; eager, because compiled graphs have none."""
        layers = chain(self.generator.modules(), self.discriminator.modules())
        compiled = any(hasattr(layer, "_orig_mod") or layer._compiled_call_impl is not None for layer in layers)
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with torch.autocast(self.device.type, enabled=False), eager:
            yield

    def _leaf(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_() if name in self._now.differentiate else tensor

    def _forward(self, name: str, network: nn.Module, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Run a network on what it takes, and explain its failure before the first step."""
        labels = labels if labels is None else labels.to(self.device)
        try:
            return doors.call(network, inputs, labels)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            if self.iteration:
                raise
            raise ValueError(f"The {name} failed on an input of shape {tuple(inputs.shape)}: {error}") from error

    # ---------- what the Trainer calls

    def setup(self, stage: str) -> None:
        """Refuse what cannot work; let plain ``strategy: ddp`` work."""
        super().setup(stage)
        if stage == "fit" and self.loss.couples_batch and self.accumulate > 1:
            raise MisconfigurationException(
                f"{type(self.loss).__name__} compares each sample with the mean of its batch, which accumulate="
                f"{self.accumulate} would take over micro-batches: use accumulate=1, or the pairwise Relativistic loss."
            )

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples from given latents: ``sample(len(latents), labels, latents)``."""
        return self.sample(len(latents), labels, latents)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Both losses and the discriminator's accuracy on held-out data, as ``val/...``."""
        self._now.draw = 0 if batch_idx == 0 else self._now.draw
        play = self.play("d", batch)
        values = {
            "val/d/adversarial": self._adversarial("d", play),
            "val/g/adversarial": self._adversarial("g", play),
            "val/d/accuracy": self.loss.accuracy(*_both_logits(play)),
        }
        self.log_dict(values, batch_size=len(play.real), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As many samples as the batch has, with its labels if there are any."""
        self._now.draw = 0 if batch_idx == 0 else self._now.draw
        real, labels = self.unpack(batch)
        return self.sample(len(real), labels)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the iteration and the loss."""
        self._raise_unless_finite()
        checkpoint["gan"] = {"iteration": self.iteration, "draw": self._now.draw, "loss": doors.recipe(self.loss)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the iteration and, as far as they are not there, the loss, the parametrizations and the average."""
        if "gan" not in checkpoint:
            raise ValueError("This is no checkpoint of a GANModule: it has no entry 'gan'.")
        gan, state = checkpoint["gan"], checkpoint["state_dict"]
        self.iteration, self._now.draw = gan["iteration"], gan["draw"]
        if self._trainer is None and not self._loss_given:
            self.loss = doors.cook(AdversarialLoss, gan["loss"])  # type: ignore[type-abstract]
        if type(self.loss).__qualname__ != gan["loss"]["name"]:
            for key in [k for k in state if k.startswith("loss.")]:
                del state[key]  # a loss that is passed wins, with its own state
            state.update(self.loss.state_dict(prefix="loss."))
        doors.restore_parametrizations(self, state)
        if self.generator_ema is None and any(key.startswith("generator_ema.") for key in state):
            self.generator_ema = deepcopy(self.generator).requires_grad_(False)
        for key in [k for k in state if k.startswith("augment.") and k not in self.state_dict()]:
            del state[key]  # augmentation belongs to the callback that brought it, and acts in training alone


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be of type {kind.__name__}, got {value!r}.")


def _both_logits(play: Play) -> tuple[Tensor, Tensor]:
    assert play.real_logits is not None
    return play.real_logits, play.fake_logits


def _join(plays: list[Play]) -> Play:
    """One play of the whole batch, without graphs."""
    if len(plays) == 1:
        return Play(*(None if t is None else t.detach() for t in plays[0]))  # type: ignore[arg-type]
    columns = zip(*plays, strict=True)
    return Play(*(None if c[0] is None else torch.cat([t.detach() for t in c]) for c in columns))  # type: ignore[arg-type]


def _unused(name: str, names: Iterable[str]) -> str:
    """The name, or with a number behind it if it is taken (two penalties of one class)."""
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in names)
