"""Numbers that change over a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from lightning_gan_stability._checks import check, check_choice, check_number, is_number

Shape = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Schedule:
    r"""A number that goes from ``start`` to ``end`` over ``steps`` batches, and stays there.

    v(t) = start + ½ (1 − cos(π s)) (end − start) with s = (t − warm_up − hold) / (steps − warm_up − hold), kept in
    [0, 1]; with ``shape="linear"`` v(t) = start + s (end − start). During the warm-up it rises from ``warm_up_from`` to
    ``start`` in a line. The schedule of "The GAN is dead; long live the GAN!", https://arxiv.org/abs/2501.05441, for
    which t is the number of batches so far: a length in images is divided by the images of a batch of all processes.
    Weights of regularizers count the steps of their player, which are as many unless an UpdateRatio is there.

    Arguments of callbacks that may change in a run take one in the place of a number,
    ``R1Penalty(gamma=Schedule(2.0, 0.2, 78125))``, in YAML ``gamma: {start: 2.0, end: 0.2, steps: 78125}``: weights,
    targets, decays, radii, probabilities, not numbers of steps or what a network is built with; learning rates and
    betas do by :class:`~lightning_gan_stability.OptimizerSchedule`. It needs no state: a resumed run goes on with it.

    Args:
        start: the value at first.
        end: the value from ``steps`` on.
        steps: batches until then, warm-up and hold included; it may be a fraction.
        shape: half a cosine, or a line.
        warm_up: batches over which it rises from ``warm_up_from`` to ``start``.
        hold: batches after that for which it stays there.
        warm_up_from: where the warm-up begins.

    Raises:
        ValueError: if an argument has a bad value, or if warm-up and hold are not shorter than the whole.

    Example:
        >>> gamma = Schedule(0.05, 0.005, steps=100)
        >>> [round(gamma(step), 5) for step in (0, 25, 50, 100, 200)]
        [0.05, 0.04341, 0.0275, 0.005, 0.005]
    """

    start: float
    end: float
    steps: float
    shape: Shape = "cosine"
    warm_up: float = 0.0
    hold: float = 0.0
    warm_up_from: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("start", "end", "warm_up_from"):
            check(is_number(getattr(self, name)), name, "a finite number", getattr(self, name))
        check_number("steps", self.steps, positive=True)
        check_number("warm_up", self.warm_up)
        check_number("hold", self.hold)
        check_choice("shape", self.shape, get_args(Shape))
        if self.warm_up + self.hold >= self.steps:
            raise ValueError(f"`steps` must be more than `warm_up` and `hold` together, got {self.steps}.")

    def __call__(self, step: float) -> float:
        """The value after so many batches."""
        if step < self.warm_up:
            return self.warm_up_from + step / self.warm_up * (self.start - self.warm_up_from)
        rest = self.steps - self.warm_up - self.hold
        way = min(max((step - self.warm_up - self.hold) / rest, 0.0), 1.0)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + way * (self.end - self.start)

    def __mul__(self, factor: float) -> Schedule:
        """The schedule of all values times a factor."""
        values = {name: factor * getattr(self, name) for name in ("start", "end", "warm_up_from")}
        return dataclasses.replace(self, **values)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Schedule:
        """The schedule of all values over a divisor.

        Raises:
            ValueError: if it is 0.
        """
        check(is_number(divisor) and divisor != 0, "divisor", "a finite number other than 0", divisor)
        return self * (1 / divisor)


Scheduled: TypeAlias = float | Schedule


def value_at(value: Scheduled, step: float) -> float:
    """A number, or a schedule's after so many batches.

    Example:
        >>> value_at(3.0, 7), value_at(Schedule(0.0, 1.0, 10, "linear"), 7)
        (3.0, 0.7)
    """
    return value(step) if isinstance(value, Schedule) else value


def check_scheduled(name: str, value: Any, check_value: Callable[..., float] = check_number, **kwargs: Any) -> Any:
    """Return a number or a schedule.

    Args:
        name: of the argument.
        value: what was given.
        check_value: what a number is checked by; a schedule's first and last are, too.
        **kwargs: further arguments of ``check_value``.

    Raises:
        ValueError: if it is neither, or out of range.

    Example:
        >>> check_scheduled("gamma", Schedule(1.0, -1.0, 10))
        Traceback (most recent call last):
        ValueError: `gamma.end` must be a finite number that is not negative, got -1.0.
    """
    if not isinstance(value, Schedule):
        return check_value(name, value, **kwargs)
    for part in ("start", "end", *(("warm_up_from",) if value.warm_up else ())):
        check_value(f"{name}.{part}", getattr(value, part), **kwargs)
    return value
