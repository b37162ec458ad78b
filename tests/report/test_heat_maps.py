"""Heat maps of experts: what a run has counted of them, and nothing of a run without."""

from __future__ import annotations

import base64
import json

import numpy as np

from pst_ds.report.heat_maps import expert_maps
from pst_ds.report.page import page
from pst_ds.report.run_data import read_runs

STACKS = {"model.layers.0.mlp.experts.gate_up_proj": 800, "model.layers.1.mlp.experts.down_proj": 400}
TOKENS = {"model.layers.0.mlp.experts": [0, 10, 30, 0], "model.layers.1.mlp.experts": [7, 7, 7, 7]}
ZEROS = dict(zip(STACKS, ([200, 0, 100, 100], [50, 50, 100, 0]), strict=True))


def run_of(write_run, **result):
    head = {"layers": list(STACKS), "weights": list(STACKS.values())}
    return read_runs([write_run(layers=[head], result={"steps": 4, **result})])[0]


def values(heat_map):
    cells = np.frombuffer(base64.b64decode(heat_map.values), "<f4")
    return cells.reshape(len(heat_map.layers), len(heat_map.columns))


def test_tokens_are_told_by_the_mean_of_their_module_and_zeros_by_their_expert(write_run):
    tokens, zeros = expert_maps(run_of(write_run, expert_tokens=TOKENS, expert_zeros=ZEROS))
    assert (tokens.layers, zeros.layers) == (list(TOKENS), list(STACKS))
    assert tokens.columns == zeros.columns == ["0", "1", "2", "3"]
    assert [tick.text for tick in tokens.ticks] == ["0", "2", "3"]
    assert np.array_equal(values(tokens), [[0.0, 1.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert np.array_equal(values(zeros), [[1.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 0.0]])


def test_modules_of_other_numbers_of_experts_have_a_map_of_their_own(write_run):
    run = run_of(write_run, expert_tokens={**TOKENS, "other": [1, 3]}, expert_zeros={"not a layer": [1, 2]})
    four, two = expert_maps(run)
    assert (values(four).shape, values(two).tolist()) == ((2, 4), [[0.5, 1.5]])


def test_the_page_has_the_maps_of_a_run_that_counted(write_run):
    run = run_of(write_run, expert_tokens=TOKENS, expert_zeros=ZEROS)
    text = page([run], [], [])
    assert "Tokens of experts of mine: 2 layers, the first on top, by experts" in text
    data = [json.loads(part.split("</script>")[0]) for part in text.split('<script type="application/json">')[1:]]
    assert [(found["column"], found["columns"]) for found in data] == [("expert", ["0", "1", "2", "3"])] * 2


def test_a_run_without_experts_or_without_a_result_has_no_map(a_run, write_run):
    runs = read_runs([a_run("plain"), write_run("going")])
    assert [list(expert_maps(run)) for run in runs] == [[], []]
    assert "of experts" not in page(runs, [], [])
