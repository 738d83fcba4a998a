"""Signals wait for the end of a batch, Ctrl-C once, and are given back as they were."""

import os
import signal
import threading

import pytest

from lightning_gan_stability.signals import SIGNALS, SignalHold

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signals")

# others that end a run, or tell of a worker, are none of the package's business
ALONE = [signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGQUIT]


def send(number):
    os.kill(os.getpid(), number)


class Log(list):
    """A handler of signals that notes them."""

    def __call__(self, number, frame):
        self.append(signal.Signals(number).name)


@pytest.fixture
def log():
    """The handler of all signals here, in place of those that there were before and will be again."""
    handler = Log()
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *ALONE)}
    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@pytest.fixture
def said():
    return []


@pytest.fixture
def hold(log, said):
    return SignalHold(said.append)


def test_a_signal_waits_until_it_is_released(hold, log):
    hold.start()
    send(signal.SIGUSR1)
    assert log == []
    hold.release()
    assert log == ["SIGUSR1"]
    hold.release()
    assert log == ["SIGUSR1"]


@pytest.mark.parametrize("number", SIGNALS)
def test_which_signals_wait(hold, log, number):
    hold.start()
    send(number)
    assert log == []
    hold.release()
    assert log == [signal.Signals(number).name]


def test_signals_are_those_that_stop_a_run():
    assert {signal.Signals(number).name for number in SIGNALS} == {"SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"}


@pytest.mark.parametrize("number", ALONE)
def test_other_signals_are_left_alone(hold, log, number):
    signal.signal(number, log)
    hold.start()
    assert signal.getsignal(number) is log
    send(number)
    assert log == [signal.Signals(number).name]
    hold.stop()
    assert signal.getsignal(number) is log


def test_signals_that_come_several_times_are_handled_once(hold, log):
    hold.start()
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR1):
        send(number)
    assert log == []
    hold.release()
    assert sorted(log) == ["SIGUSR1", "SIGUSR2"]


def test_processes_agree_on_what_has_come(hold, log):
    hold.start()
    send(signal.SIGUSR1)
    hold.release(lambda come: [False for _ in come])  # it came after the others were asked
    assert log == []
    hold.release(lambda come: [number in (signal.SIGUSR1, signal.SIGUSR2) for number in SIGNALS])
    assert sorted(log) == ["SIGUSR1", "SIGUSR2"]
    hold.stop()
    hold.release(lambda come: [True for _ in come])  # nothing is held
    assert len(log) == 2


def test_a_handler_gets_number_and_frame(hold, log):
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append((number, frame.f_code.co_name)))
    hold.start()
    send(signal.SIGUSR1)
    hold.release()
    assert seen == [(signal.SIGUSR1, "send")]


def test_interrupts_are_announced_and_raise_at_the_end_of_the_batch(hold, said):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hold.start()
    send(signal.SIGINT)
    assert said == ["Stopping when this batch is done. Press Ctrl-C again to stop at once."]
    with pytest.raises(KeyboardInterrupt):
        hold.release()
    hold.stop()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_raises_at_once(hold, said):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hold.start()
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert len(said) == 1
    hold.release()  # nothing is left


def test_other_signals_are_not_announced(hold, said):
    hold.start()
    send(signal.SIGUSR1)
    assert said == []


# ---------- stopping


@pytest.mark.parametrize("run_handlers", [True, False])
def test_stopping_gives_handlers_back(hold, log, run_handlers):
    hold.start()
    assert all(signal.getsignal(number) != log for number in SIGNALS)
    send(signal.SIGUSR1)
    hold.stop(run_handlers)
    assert all(signal.getsignal(number) is log for number in SIGNALS)
    assert log == (["SIGUSR1"] if run_handlers else [])
    hold.release()
    assert len(log) == run_handlers
    send(signal.SIGUSR1)
    assert len(log) == run_handlers + 1


def test_handlers_are_back_before_those_that_wait_run(hold, log):
    seen = []
    handler = lambda *_: seen.append(signal.getsignal(signal.SIGUSR1))  # noqa: E731  # it is compared with itself
    signal.signal(signal.SIGUSR1, handler)
    hold.start()
    send(signal.SIGUSR1)
    hold.stop()
    assert seen == [handler]


def test_starting_twice_and_stopping_twice(hold, log):
    hold.start()
    hold.start()
    send(signal.SIGUSR1)
    hold.release()
    assert log == ["SIGUSR1"]
    hold.stop()
    hold.stop()
    assert signal.getsignal(signal.SIGUSR1) is log


def test_starting_again(hold, log):
    for n in (1, 2):
        hold.start()
        send(signal.SIGUSR1)
        assert len(log) == n - 1
        hold.stop()
        assert len(log) == n


def test_what_was_dropped_is_forgotten(hold, log):
    hold.start()
    send(signal.SIGUSR1)
    hold.stop(run_handlers=False)
    hold.start()
    send(signal.SIGUSR1)
    assert log == []
    hold.release()
    assert log == ["SIGUSR1"]


def test_a_hold_that_never_started(hold, log):
    hold.release()
    hold.stop()
    send(signal.SIGUSR1)
    assert log == ["SIGUSR1"]


@pytest.mark.parametrize("nobody", [signal.SIG_IGN, signal.SIG_DFL])
def test_signals_without_a_handler_are_left_alone(hold, log, nobody):
    signal.signal(signal.SIGUSR1, nobody)
    hold.start()
    assert signal.getsignal(signal.SIGUSR1) == nobody
    assert signal.getsignal(signal.SIGUSR2) is not log
    hold.stop()
    assert signal.getsignal(signal.SIGUSR1) == nobody


def test_a_handler_that_somebody_sets_meanwhile_stays(hold, log):
    hold.start()
    other = Log()
    signal.signal(signal.SIGUSR1, other)
    send(signal.SIGUSR1)
    assert other == ["SIGUSR1"]
    hold.stop()
    assert signal.getsignal(signal.SIGUSR1) is other
    assert signal.getsignal(signal.SIGUSR2) is log


def test_another_thread_holds_nothing(hold, log):
    threads = [threading.Thread(target=target) for target in (hold.start, hold.release, hold.stop)]
    for thread in threads:
        thread.start()
        thread.join()
        assert all(signal.getsignal(number) is log for number in SIGNALS)
    send(signal.SIGUSR1)
    assert log == ["SIGUSR1"]


# ---------- handlers that call the one before them


def chain(log):
    """What a library does that wants to hear of a signal, too."""
    before = signal.getsignal(signal.SIGUSR1)

    def handler(number, frame):
        log.append("library")
        if len(log) > 9:
            raise RecursionError
        before(number, frame)

    signal.signal(signal.SIGUSR1, handler)


def test_a_handler_that_calls_the_one_before_it_waits_for_its_own_part(hold, log):
    hold.start()
    chain(log)
    send(signal.SIGUSR1)
    assert log == ["library"]
    hold.release()
    assert log == ["library", "SIGUSR1"]


def test_a_handler_that_calls_the_one_before_it_reaches_it_after_the_run(hold, log):
    hold.start()
    chain(log)
    hold.stop()
    send(signal.SIGUSR1)
    assert log == ["library", "SIGUSR1"]


def test_a_handler_that_calls_the_one_before_it_reaches_it_after_a_validation(hold, log):
    hold.start()
    chain(log)
    hold.stop()
    hold.start()
    send(signal.SIGUSR1)
    hold.release()
    assert log == ["library", "SIGUSR1"]
