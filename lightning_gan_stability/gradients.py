"""The two primitives that every update rule is made of, and what rules with second derivatives need besides."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, count
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_gan_stability.callbacks.base import NETWORKS, Player, Regularizer
from lightning_gan_stability.clock import PLAYERS, Clockwork
from lightning_gan_stability.doors import Play, Substitution, dtype_of, join
from lightning_gan_stability.losses import AdversarialLoss

Terms: TypeAlias = dict[str, Tensor]
# of a (micro-)batch and due penalties: what the player saw, its whole loss, and the loss's terms for the log
Objective: TypeAlias = Callable[[Any, list[Regularizer]], tuple[Play, Tensor, Terms]]


class Primitives(Clockwork):
    """The part of :class:`~lightning_gan_stability.module.GANModule` that takes gradients and steps."""

    generator: nn.Module
    discriminator: nn.Module
    generator_ema: nn.Module | None
    loss: AdversarialLoss

    @abc.abstractmethod
    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]: ...

    @abc.abstractmethod
    def sample(self, n: int, labels: Tensor | None = None, latents: Tensor | None = None) -> Tensor: ...

    @abc.abstractmethod
    def discriminate(self, samples: Tensor, labels: Tensor | None = None) -> Tensor: ...

    @abc.abstractmethod
    def play(self, player: Player, batch: Any) -> Play: ...

    # ---------- the primitives

    def compute_gradients(self, player: Player, batch: Any) -> Play:
        """Put the gradient of one player's loss on one batch into its parameters' ``grad``; nothing steps.

        Args:
            player: whose loss and whose parameters.
            batch: the whole batch; it is split into ``accumulate`` micro-batches.

        Returns:
            What the player saw on the whole batch, without graphs.
        """
        return self._compute(player, batch, lambda part, due: self._plain(player, part, due))

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

    # ---------- what they are made of

    def _compute(self, player: Player, batch: Any, objective: Objective) -> Play:
        """Put the gradient of an objective of (micro-)batches and of due penalties into the player's ``grad``."""
        optimizer, due = self._optimizer(player), self._due(player)
        self._now.differentiate = _differentiated(due)
        self._now.terms[player] = {}
        n = 0 if self.accumulate == 1 else len(self.unpack(batch)[0])
        with self._toggled(optimizer), self._held_loss():
            optimizer.zero_grad()
            parts = self._micro_batches(batch, n, self._pack)
            play = join([self._backward(player, part, share, due, objective) for part, share in parts])
        self._now.differentiate = frozenset()
        self._record(player, play)
        return play

    def _plain(self, player: Player, part: Any, due: list[Regularizer]) -> tuple[Play, Tensor, Terms]:
        with self._precise() if self._now.differentiate else nullcontext():
            play = self.play(player, part)
        return play, *self._total(player, play, self._adversarial(player, play), due)

    def _backward(self, player: Player, part: Any, share: float, due: list[Regularizer], objective: Objective) -> Play:
        play, total, terms = objective(part, due)
        if not total.requires_grad:
            raise ValueError(
                f"The loss of the {NETWORKS[player]} does not depend on its parameters: something in `sample`, "
                "`discriminate`, `augment` or the loss has no gradient (`detach`, `no_grad`, or rounding)."
            )
        autocast = torch.is_autocast_enabled(self.device.type)
        # backward repeats the types of the forward pass; under autocast it would lower those of the penalties
        with torch.autocast(self.device.type, enabled=False) if autocast else nullcontext():
            self.manual_backward(total if share == 1 else share * total)
        seen = self._now.terms[player]
        self._now.terms[player] = {k: v if share == 1 else seen.get(k, 0) + share * v for k, v in terms.items()}
        return play

    def _total(self, player: Player, play: Play, adversarial: Tensor, due: list[Regularizer]) -> tuple[Tensor, Terms]:
        """A player's whole loss, and its terms by their names in the log."""
        total, terms = adversarial, {f"{player}/adversarial": adversarial.detach()}
        whole = play
        if due and torch.is_autocast_enabled(self.device.type):
            # networks ran in half precision, penalties do not
            halved = ("real", "fake", "real_logits", "fake_logits")
            play = play._replace(**{name: self._widened(getattr(play, name)) for name in halved})
            if any(regularizer.compares for regularizer in due):
                whole = self._again(play)
        for regularizer in due:
            with self._precise(eager=regularizer.second_order):
                penalty = regularizer.penalty(self, whole if regularizer.compares else play).mean()  # type: ignore[arg-type]
                penalty = regularizer.weight_at(self._steps[player]) * penalty
            terms[_unused(f"{player}/{regularizer.name}", terms)] = penalty.detach()
            total = total + regularizer.every * penalty
        return total, terms

    def _widened(self, x: Any) -> Any:
        return x if x is None else x.to(dtype_of(self.discriminator, x.dtype))

    def _again(self, play: Play) -> Play:
        """The play in full precision: differences to it would be those between half and full precision."""
        with self._precise(eager=False):
            return self._judge(play._replace(fake=self._fake(play, play.latents)))

    def _fake(self, play: Play, latents: Tensor) -> Tensor:
        """Samples of a play from given latents, with a graph to the generator if it is the generator's turn."""
        with torch.set_grad_enabled(play.fake.grad_fn is not None):
            return self.sample(len(latents), play.labels, latents)

    # ---------- for rules that differentiate gradients

    def _meet(self, batch: Any) -> tuple[dict[Player, Tensor], dict[Player, Tensor]]:
        """Both players' losses on one play, whole and adversarial alone, each with its graph to both networks."""
        due: dict[Player, list[Regularizer]] = {player: self._due(player) for player in PLAYERS}
        self._now.differentiate = _differentiated([*due["d"], *due["g"]])
        with self._held_loss():
            play = self._judge(self.play("g", batch), only_missing=True)
            adversarial = {player: self._adversarial(player, play) for player in PLAYERS}
            losses = {}
            for player in PLAYERS:
                losses[player], terms = self._total(player, play, adversarial[player], due[player])
                self._now.terms[player] = terms
                self._record(player, join([play]))
        self._now.differentiate = frozenset()
        return losses, adversarial

    def _judge(self, play: Play, only_missing: bool = False) -> Play:
        """The play with the logits that the discriminator gives now."""
        if not only_missing or play.real_logits is None:
            play = play._replace(real_logits=self.discriminate(play.real, play.labels))
        return play if only_missing else play._replace(fake_logits=self.discriminate(play.fake, play.labels))

    def _deposit(self, player: Player, gradients: Sequence[Tensor | None]) -> None:
        """Put given gradients, averaged over ranks, into the ``grad`` of the player's parameters."""
        optimizer, parameters = self._optimizer(player), self._moving(player)
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        with self._toggled(optimizer):
            optimizer.zero_grad()
            # the gradient of Σ p·g is g, and takes the way through the strategy that every loss's gradient takes
            self.manual_backward(torch.stack([(p * g.detach()).sum() for p, g in pairs]).sum())

    def _record(self, player: Player, play: Play) -> None:
        self._now.logs.update(self._now.terms[player])
        if player == "d":
            self._now.judged = play.both_logits

    def _adversarial(self, player: Player, play: Play) -> Tensor:
        if player == "d":
            return self.loss.discriminator(*play.both_logits).mean()
        return self.loss.generator(play.fake_logits, play.real_logits).mean()

    @property
    def _pack(self) -> int:
        """Samples that the discriminator judges together."""
        return int(getattr(getattr(self.discriminator, "_orig_mod", self.discriminator), "packing", 1))

    @property
    def _loss_moves(self) -> bool:
        return next(self.loss.buffers(), None) is not None

    @contextmanager
    def _held_loss(self) -> Iterator[None]:
        """Keep a loss's state where it is while gradients are taken."""
        if not self._loss_moves:
            yield
            return
        training, self.loss.training = self.loss.training, False
        try:
            yield
        finally:
            self.loss.training = training

    def _still(self) -> AbstractContextManager[None]:
        """A look at the networks that leaves BatchNorm's statistics and spectral norm's vectors where they are."""
        return Substitution(self, [])([])

    def _randomness(self) -> tuple[int, Tensor, Tensor | None]:
        """Where all randomness stands: the module's own noise, and the global generators that dropout draws from."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return self._now.draw, torch.get_rng_state(), cuda

    @contextmanager
    def _rewound(self, start: tuple[int, Tensor, Tensor | None] | None = None) -> Iterator[None]:
        """Randomness within that starts from a given point (None: from here), and is not used up."""
        draw, device = self._now.draw, self.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if start is not None:
                self._now.draw = start[0]
                torch.set_rng_state(start[1])
                if start[2] is not None:
                    torch.cuda.set_rng_state(start[2], device)
            yield
        self._now.draw = draw

    @contextmanager
    def _without_average(self) -> Iterator[None]:
        """Let ``sample`` draw from the generator in eval mode too, for who judges the players and not the result."""
        average, self.generator_ema = self.generator_ema, None
        try:
            yield
        finally:
            self.generator_ema = average

    @contextmanager
    def _precise(self, eager: bool = True) -> Iterator[None]:
        """Full precision, because second derivatives lose it; compiled graphs and fused attention have none at all."""
        if eager and self._now.compiled is None:
            layers = chain(self.generator.modules(), self.discriminator.modules())
            self._now.compiled = any(hasattr(x, "_orig_mod") or x._compiled_call_impl is not None for x in layers)
        stance = torch.compiler.set_stance("force_eager") if eager and self._now.compiled else nullcontext()
        attention = sdpa_kernel(SDPBackend.MATH) if eager else nullcontext()
        with torch.autocast(self.device.type, enabled=False), stance, attention:
            yield


def same(a: tuple[int, Tensor, Tensor | None], b: tuple[int, Tensor, Tensor | None]) -> bool:
    """Whether nobody has drawn between two looks at where all randomness stands.

    Example:
        >>> start = 0, torch.get_rng_state(), None
        >>> same(start, (1, torch.get_rng_state(), None))
        False
    """
    states = zip(a[1:], b[1:], strict=True)
    return a[0] == b[0] and all(x is y or torch.equal(x, y) for x, y in states)  # type: ignore[arg-type]


def _differentiated(due: Iterable[Regularizer]) -> frozenset[str]:
    return frozenset().union(*(regularizer.differentiates for regularizer in due))


def _unused(name: str, names: Iterable[str]) -> str:
    """The name, or with a number behind it if it is taken (two penalties of one class)."""
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in names)
