"""Random numbers as functions of a key: of a seed, a rank, an iteration and the number of the draw."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_gan_stability._checks import check_integer
from lightning_gan_stability.distributed import world_size
from lightning_gan_stability.layers import parameter_dtype
from lightning_gan_stability.outputs import tree_map


def seed_of(*key: object) -> int:
    """A seed that depends only on a key.

    Example:
        >>> seed_of(0, "train", 1) == seed_of(0, "train", 1), seed_of(0) == seed_of(1)
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator whose state depends only on a key.

    Example:
        >>> generator(0, "train", 1).initial_seed() == generator(0, "train", 1).initial_seed()
        True
    """
    return torch.Generator(device).manual_seed(seed_of(*key))


_OF_BATCH: ContextVar[Noise | None] = ContextVar("noise of the batch", default=None)


def batch_rand(n: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
    r"""Values (n, \*shape) in float32, uniform in [0, 1), for the n samples of a batch.

    When a GANModule augments samples, the values come from its noise, as rows of a draw for all processes together: N
    processes draw the same values as one process for the full batch, and so do micro-batches. Otherwise they come from
    torch's default generator.

    Example:
        >>> batch_rand(2, 3).shape
        torch.Size([2, 3])
    """
    noise = _OF_BATCH.get()
    return torch.rand(n, *shape, device=device) if noise is None else noise.of_batch(torch.rand, n, *shape).to(device)


def batch_randn(n: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
    r"""Standard normal values (n, \*shape) in float32; see :func:`batch_rand`.

    Example:
        >>> batch_randn(2, 3).shape
        torch.Size([2, 3])
    """
    noise = _OF_BATCH.get()
    return torch.randn(n, *shape, device=device) if noise is None else noise.of_batch(torch.randn, n, *shape).to(device)


class Clock(Protocol):
    """What noise depends on besides its seed: a GANModule."""

    @property
    def global_rank(self) -> int: ...

    @property
    def iteration(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Randomness(NamedTuple):
    """The state of all randomness: the module's own draws, and torch's default generators."""

    draw: int
    cpu: Tensor
    device: Tensor | None

    def equals(self, other: Randomness) -> bool:
        """Whether nothing was drawn between two states."""
        same = self.draw == other.draw and torch.equal(self.cpu, other.cpu)
        return same and (self.device is None or other.device is None or torch.equal(self.device, other.device))


class Noise:
    r"""The random numbers of a GANModule.

    A draw is a function of (``seed``, rank, iteration, whether it is part of a training step, number of the draw). A
    resumed run therefore draws the same numbers as the uninterrupted one, each rank draws its own, and torch's default
    generators are neither used nor changed. A micro-batch draws its rows of the full batch's noise.

    Args:
        seed: any integer.
        clock: the module, which has rank, iteration and device.

    Example:
        >>> from lightning_gan_stability import MLP, GANModule
        >>> noise = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16).noise
        >>> noise.randn(2, 3).shape, noise.rand(2).shape
        (torch.Size([2, 3]), torch.Size([2]))
    """

    def __init__(self, seed: int, clock: Clock) -> None:
        self.seed, self.clock = seed, clock
        self.draw = 0
        self._generator: torch.Generator | None = None
        self._key: tuple[object, ...] = (False,)  # (True,) inside of a training step
        self._fixed: int | None = None  # an iteration in the place of the clock's
        self._rows: tuple[int, int, int] | None = None  # start, stop and size of the batch that a micro-batch is of

    def randn(self, n: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        r"""Standard normal values (n, \*shape) on the module's device.

        Args:
            n: number of samples.
            shape: shape of one sample's noise.
            dtype: dtype of the values. None: that of the module's parameters.

        Raises:
            ValueError: if ``n`` is not a positive integer.
        """
        # normal values are the same in every precision, which not every version of torch sees to; uniform ones, rounded
        # from float32, could be 1
        dtype = self._dtype() if dtype is None else dtype
        return self._sample(torch.randn, n, shape, torch.promote_types(dtype, torch.float32)).to(dtype)

    def rand(self, n: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        r"""Values (n, \*shape), uniform in [0, 1); see :meth:`randn`."""
        return self._sample(torch.rand, n, shape, self._dtype() if dtype is None else dtype)

    def randn_like(self, sample: Any) -> Any:
        """Standard normal values of the shape and dtype of a sample, which may be a tree."""
        return tree_map(lambda leaf: self.randn(len(leaf), *leaf.shape[1:], dtype=leaf.dtype), sample)

    def rand_like(self, sample: Any) -> Any:
        """Values uniform in [0, 1) of the shape and dtype of a sample, which may be a tree."""
        return tree_map(lambda leaf: self.rand(len(leaf), *leaf.shape[1:], dtype=leaf.dtype), sample)

    def _dtype(self) -> torch.dtype:
        return parameter_dtype(self.clock, torch.get_default_dtype())

    def _sample(self, function: Callable[..., Tensor], n: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        check_integer("n", n)
        start, stop, total = self._rows_of(n)
        key = (self.seed, self.clock.global_rank, self._iteration, *self._key, self.draw)
        self.draw += 1
        values = self._drawn(function, (total, *shape), dtype, *key)
        return values if total == n else values[start:stop]

    def of_batch(self, function: Callable[..., Tensor], n: int, *shape: int) -> Tensor:
        """The rows of n samples in a draw for the batch of all processes together; see :func:`batch_rand`."""
        start, _, total = self._rows_of(n)
        start += self.clock.global_rank * total
        key = (self.seed, "batch", self._iteration, *self._key, self.draw)
        self.draw += 1
        if prod(shape) <= 64:
            whole = (max(world_size() * total, start + n), *shape)
            return self._drawn(function, whole, torch.float32, *key)[start : start + n]
        # of values as many as pixels nothing is drawn for the samples of others
        rows = [self._drawn(function, shape, torch.float32, *key, row) for row in range(start, start + n)]
        return torch.stack(rows)

    def _rows_of(self, n: int) -> tuple[int, int, int]:
        """Start, stop and size of the batch that n samples are rows of."""
        rows = self._rows
        return rows if rows and rows[1] - rows[0] == n else (0, n, n)

    def _drawn(
        self, function: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, *key: object
    ) -> Tensor:
        device = self.clock.device
        # not every version of XLA and MPS has generators of its own
        source = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        if self._generator is None or self._generator.device != source:
            self._generator = torch.Generator(source)
        drawn = self._generator.manual_seed(seed_of(*key))
        return function(*shape, generator=drawn, device=source, dtype=dtype).to(device)

    # ---------- contexts

    @property
    def _iteration(self) -> int:
        return self.clock.iteration if self._fixed is None else self._fixed

    @property
    def in_step(self) -> bool:
        """Whether a training step is running."""
        return self._key == (True,)

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Make all random draws within a function of (seed, rank, iteration), including those of other code.

        Networks and augmentations draw from torch's default generators, of the CPU and of the module's device. These
        are seeded, and restored at the end.
        """
        with self._seeded(True):
            yield
            draw = self.draw
        self.draw = draw  # what is drawn before the next step goes on from here

    @contextmanager
    def of(self, *key: object, iteration: int | None = None) -> Iterator[None]:
        """Like :meth:`of_step` outside of training steps: draws also depend on a key, and the noise is restored.

        Args:
            key: tells the draws of different users apart.
            iteration: iteration to use instead of the module's, for the same draws each time; None: the module's.
        """
        with self._seeded(*key, iteration=iteration):
            yield

    @contextmanager
    def _seeded(self, *key: object, iteration: int | None = None) -> Iterator[None]:
        clock = self.clock
        before, outer = self.randomness(), (self._key, self._rows, self._fixed)
        self.draw, self._key, self._rows, self._fixed = 0, key, None, iteration
        _seed(seed_of(self.seed, clock.global_rank, self._iteration, *key), clock.device)
        try:
            yield
        finally:
            self._key, self._rows, self._fixed = outer
            self.restore(before)

    @contextmanager
    def of_samples(self) -> Iterator[None]:
        """Let :func:`batch_rand` and :func:`batch_randn` draw from this noise."""
        token = _OF_BATCH.set(self)
        try:
            yield
        finally:
            _OF_BATCH.reset(token)

    @contextmanager
    def rows(self, start: int, stop: int, total: int, draw: int) -> Iterator[None]:
        """Let a micro-batch draw its rows of the full batch's noise, starting at a given draw."""
        self._rows, self.draw = (start, stop, total), draw
        try:
            yield
        finally:
            self._rows = None

    @contextmanager
    def replay(self, start: Randomness | None = None) -> Iterator[None]:
        """Start all random draws within from a given state (None: the present one), and restore it afterwards."""
        before = self.randomness()
        self.restore(start or before)
        try:
            yield
        finally:
            self.restore(before)

    def randomness(self) -> Randomness:
        """The state of all randomness."""
        device = _device_generator(self.clock.device)
        state = None if device is None else device.get_state()
        return Randomness(self.draw, torch.default_generator.get_state(), state)

    def restore(self, randomness: Randomness) -> None:
        """Restore a state of all randomness."""
        self.draw = randomness.draw
        torch.default_generator.set_state(randomness.cpu)
        device = _device_generator(self.clock.device)
        if device is not None and randomness.device is not None:
            device.set_state(randomness.device)


def _seed(seed: int, device: torch.device) -> None:
    # `torch.manual_seed` takes a hundred times as long: it asks every backend that there could be
    torch.default_generator.manual_seed(seed)
    generator = _device_generator(device)
    if generator is not None:
        generator.manual_seed(seed)


def _device_generator(device: torch.device) -> torch.Generator | None:
    """The default generator of a GPU; other devices have none, or none that is known here."""
    if device.type != "cuda":
        return None
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
