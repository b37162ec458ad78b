"""Signals that ask a run to stop are noted, and do not outlive the test that sent them."""

import signal

import pytest

from pst_ds.parallel import stop_signals
from tests.pairs import every_pair


@every_pair
@pytest.mark.parametrize("time", ["first", "second"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_is_noted_until_the_test_ends(number, time):
    assert stop_signals.asked_by() == 0
    assert signal.getsignal(number) == signal.SIG_DFL
    stop_signals.install()
    signal.raise_signal(number)
    assert stop_signals.asked_by() == number
    assert stop_signals.name_of(stop_signals.asked_by()) == number.name
