"""Parts of a step in a trace."""

from __future__ import annotations

import pytest

from tools.bench.plan_parts import parts_of_step


def _event(name, first, last, thread=1):
    return {"ph": "X", "name": name, "ts": first, "dur": last - first, "tid": thread}


def test_time_counts_once_and_a_collective_before_an_operator():
    events = [
        _event("step 7", 0, 1000),
        _event("step 8", 1000, 2000),
        _event("gloo:all_gather", 1100, 1300, thread=2),
        _event("gloo:all_gather", 1200, 1400, thread=3),  # 300 us with the one before
        _event("aten::linear", 1350, 1600),
        _event("aten::mm", 1360, 1590),  # inside the one before
        _event("aten::mul", 1700, 1750, thread=2),  # of another thread
        _event("aten::mm", 100, 200),  # of another step
        _event("forward", 1000, 1900),
        {"ph": "M", "name": "process_name"},
    ]
    found = parts_of_step(events, "step 8")
    assert found == pytest.approx({"network": 300e-6, "products": 200e-6, "host": 500e-6, "step": 1000e-6})
