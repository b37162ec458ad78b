"""Signals that ask a run to stop are noted, and do not outlive the test that sent them."""

import os
import signal
import threading

import pytest

from pst_ds.parallel import stop_signals


@pytest.mark.parametrize("time", ["first", "second"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_is_noted_until_the_test_ends(number, time):
    assert stop_signals.asked_by() == 0
    assert signal.getsignal(number) == signal.SIG_DFL
    stop_signals.install()
    signal.raise_signal(number)
    assert stop_signals.asked_by() == number
    assert stop_signals.name_of(stop_signals.asked_by()) == number.name


def test_a_thread_hears_of_a_signal_before_the_main_thread_handles_it():
    heard = []
    stop_signals.install()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as if the main thread were inside a library
        signal.signal(number, lambda number, frame: None)
    thread = threading.Thread(target=lambda: heard.append(stop_signals.wait(60)))
    thread.start()
    os.kill(os.getpid(), signal.SIGUSR1)
    thread.join()
    assert heard == [signal.SIGUSR1]
    assert stop_signals.wait(60) == signal.SIGUSR1


def test_a_thread_waits_no_longer_than_it_is_told():
    assert stop_signals.wait(0.0) == 0
    stop_signals.install()
    stop_signals.install()
    assert stop_signals.wait(0.0) == 0
