"""Signals that wait until a batch is done, so that what they save is the state between two batches."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

#: Those by which people and schedulers stop a run. SIGTERM is not among them: Lightning itself waits with it.
SIGNALS = [
    number for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2") if (number := getattr(signal, name, None)) is not None
]


class SignalHold:
    """Holds signals back between two points at which a run can be stopped.

    Inside of a step, clock, players and data disagree: Lightning's handlers under SLURM save a checkpoint at once, and
    Ctrl-C raises wherever it finds the run. A handler that was there runs at the next :meth:`release`; that of Ctrl-C
    runs at once the second time.

    Args:
        say: what to do with a message for the user.

    Example:
        >>> import os
        >>> seen = []
        >>> before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("handled"))
        >>> hold = SignalHold(print)
        >>> hold.start()
        >>> os.kill(os.getpid(), signal.SIGUSR1), seen
        (None, [])
        >>> hold.release(), seen
        (None, ['handled'])
        >>> hold.stop()
        >>> _ = signal.signal(signal.SIGUSR1, before)
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._links: dict[int, _Link] = {}
        self._pending: dict[int, FrameType | None] = {}

    def start(self) -> None:
        """Hold back signals that have a handler; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and number not in self._links:
                self._links[number] = _Link(self, handler)
                signal.signal(number, self._links[number])

    def receive(self, link: _Link, number: int, frame: FrameType | None) -> None:
        """Hold a signal back, unless it is the second Ctrl-C, or nothing is held."""
        if self._links.get(number) is not link:
            # somebody has put a handler of its own before the link, and calls it still
            link.handler(number, frame)
        elif number == signal.SIGINT and number in self._pending:
            del self._pending[number]
            link.handler(number, frame)
        else:
            self._pending[number] = frame
            if number == signal.SIGINT:
                self.say("Stopping when this batch is done. Press Ctrl-C again to stop at once.")

    def release(self, agree: Callable[[list[bool]], list[bool]] = list) -> None:
        """Run the handlers of the signals that have come.

        Args:
            agree: what processes that stop together make of it, given for each of `SIGNALS` whether it has come here.
        """
        for number, has_come in zip(SIGNALS, agree([n in self._pending for n in SIGNALS]), strict=True):
            if has_come and number in self._links:
                self._links[number].handler(number, self._pending.pop(number, None))

    def stop(self, run_handlers: bool = True) -> None:
        """Give the handlers back, and run those of the signals that have come, unless the run has failed."""
        for number, link in self._links.items():
            current: Any = signal.getsignal(number)
            if current is link:
                signal.signal(number, link.handler)
        links, pending = self._links, self._pending
        self._links, self._pending = {}, {}
        if run_handlers:
            for number, frame in pending.items():
                links[number].handler(number, frame)


class _Link:
    """Stands in the place of a handler."""

    def __init__(self, hold: SignalHold, handler: Any) -> None:
        self.hold, self.handler = hold, handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.hold.receive(self, number, frame)
