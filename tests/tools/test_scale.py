"""The scale benchmark's own arithmetic; its runs are tools/bench/scale.py's business."""

from __future__ import annotations

import argparse

import pytest

from tools.bench import scale

ARGUMENTS = argparse.Namespace(ranks=2, sequence=128, batch=1, no_checkpointing=False)
RATES = {"flops": 1e11, "memory_bytes": 1e10, "network_bytes": 1e9, "latency": 1e-4}


def test_the_fit_is_of_least_squares():
    sizes = {str(n): {"pruned_weights": n, "seconds": {"step": 3 + 2 * n}} for n in (1, 2, 5)}
    fit = scale.linear_fit(sizes, "step")
    assert fit == {
        "seconds_per_weight": pytest.approx(2), "seconds": pytest.approx(3), "r_squared": pytest.approx(1),
    }  # fmt: skip
    sizes["5"]["seconds"]["step"] = 40
    assert scale.linear_fit(sizes, "step")["r_squared"] < 0.98


def test_a_prediction_grows_with_the_model_and_is_of_the_named_size():
    small, large = (scale.predict(ARGUMENTS, size, RATES) for size in ("0.1B", "0.5B"))
    assert small["parameters"] == pytest.approx(0.106e9, rel=0.03)
    assert large["parameters"] == pytest.approx(0.48e9, rel=0.03)
    assert large["memory"]["peak"] > 2 * small["memory"]["peak"] > 2e8
    assert large["seconds"]["step"] > 4 * small["seconds"]["step"] > 0


def test_half_of_olmoe_is_planned_with_its_stacks():
    found = scale.predict(ARGUMENTS, "olmoe-8", RATES)
    assert found["parameters"] == pytest.approx(3.6e9, rel=0.02)
    assert found["memory"]["gathers"] >= 64 * 2048 * 2048 * 2  # a stack whole
    assert found["memory"]["peak"] < 9e9


def test_a_run_ends_before_the_machines_memory_does(monkeypatch):
    monkeypatch.setattr(scale, "MIN_AVAILABLE", 1 << 62)
    with pytest.raises(SystemExit, match="memory are left on this machine: stopped"):
        scale._run_guarded(["sleep", "600"], {"PATH": "/usr/bin:/bin"})
    monkeypatch.setattr(scale, "MIN_AVAILABLE", 0)
    assert scale._run_guarded(["true"], {"PATH": "/usr/bin:/bin"}) == 0
    assert scale._run_guarded(["false"], {"PATH": "/usr/bin:/bin"}) == 1
