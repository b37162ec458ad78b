"""The benchmark of figures adds up what it metered."""

import pytest

from tools.bench import metrics
from tools.bench.metrics import PARTS, Meter, clock_seconds, figures, summary


def test_what_a_metered_call_calls_counts_once():
    meter, ended = Meter(), []
    inner = meter.timed("inner", lambda: ended.append(1))
    meter.timed("outer", inner)()
    inner()
    assert (len(meter.seconds["outer"]), len(meter.seconds["inner"]), len(ended)) == (1, 1, 2)
    with pytest.raises(ZeroDivisionError):
        meter.timed("outer", lambda: 1 / 0)()
    inner()
    assert (len(meter.seconds["outer"]), len(meter.seconds["inner"])) == (2, 2)


def test_medians_are_of_calls_that_did_something_and_of_steps_after_the_first(monkeypatch):
    monkeypatch.setattr(metrics, "FIRST", 1)
    meter = Meter({"report": [1e-6, 3.0, 1e-6, 5.0, 1e-6], "pace": [1.0, 2.0, 9.0]})
    found = figures(meter, [(0.0, 0), (10.0, 100), (12.0, 130), (15.0, 160)])
    assert found == {"report": 4.0, "pace": 2.0, "whole step": 2.5, "clocks": 30}


def test_shares_are_of_a_step_as_often_as_a_run_has_each_by_default():
    seconds = {name: 1e-4 for names in PARTS.values() for name in names}
    seconds |= {"whole step": 0.2, "clocks": 100, "clock": 1e-6, "exchange": 1e-4}
    found = summary({}, seconds, num_steps=1000)
    assert found["seconds_a_call"] == pytest.approx(
        {"step": 6e-4, "report": 1e-4, "mask update": 2e-4, "picture": 1e-4}
    )
    each = 6e-4 + 1e-4 / 10 + 2e-4 / 4 + 1e-4 / 50
    assert found["share"] == pytest.approx(each / 0.2)
    assert found["within_bar"]
    assert not summary({}, {**seconds, "whole step": 0.1}, num_steps=1000)["within_bar"]


def test_clocks_take_some_time(monkeypatch):
    monkeypatch.setattr(metrics, "LOOPS", 50)
    assert all(seconds > 0 for seconds in clock_seconds().values())
