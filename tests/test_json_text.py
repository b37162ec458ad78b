"""What we write as JSON is JSON: no NaN, no Infinity."""

from __future__ import annotations

import json
import math

import pytest

from pst_ds.json_text import json_of
from pst_ds.train.monitor.json_lines import JsonLines, lines_until


def strictly(text):
    """``text`` as a reader takes it that knows no more than JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_not_finite_is_null_and_all_else_stays():
    held = {"a": [math.nan, 1.5, {"b": (math.inf, -math.inf, "NaN", True, None)}], "c": 0, "d": -0.1, "e": []}
    wanted = {"a": [None, 1.5, {"b": [None, None, "NaN", True, None]}], "c": 0, "d": -0.1, "e": []}
    assert strictly(json_of(held)) == wanted
    finite = {"x": [1, 2.5, "\u00e9"], "y": {}}
    assert json_of(finite) == json.dumps(finite)
    assert json_of(finite, indent=1) == json.dumps(finite, indent=1)


def test_lines_of_a_run_are_read_by_any_reader_and_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')  # of an earlier version
    lines = JsonLines(path, 1)
    lines.write({"step": 2, "loss": math.inf})
    lines.close()
    wanted = [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert [strictly(line) for line in path.read_text().splitlines()] == wanted
    assert list(lines_until(path, 2)) == wanted
