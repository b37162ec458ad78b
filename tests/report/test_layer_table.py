"""The table of layers: figures or dashes, runs beside one another, short names."""

from __future__ import annotations

from pst_ds.report.layer_table import common_prefix, layer_table
from pst_ds.report.run_data import read_runs


def test_layers_have_their_figures_or_a_dash(a_run):
    (run,) = read_runs([a_run("one", layers=3)])
    table = layer_table([run], {"model.layers.1.proj": [40, 25]})
    assert table.caption == "Layers of model.layers"
    figures = ["sparsity", "flips in total", "correlation of S, |W|", "score norm", "update norm", "update / W0 norm"]
    assert table.head == ["layer", "shape", *figures]
    assert [cell.text for cell in table.rows[0]] == ["0.proj", "1,000", "0.8100", "180", "–", "0.1", "0.1", "1"]
    assert [cell.text for cell in table.rows[1]][:3] == ["1.proj", "40 × 25", "0.8110"]
    assert table.rows[1][1].value == 1000


def test_layers_of_several_runs_stand_beside_one_another(a_run, write_run):
    head = [{"layers": ["model.layers.0.proj", "model.layers.9.proj"], "weights": [1000, 5]}]
    runs = read_runs([a_run("one", layers=2), write_run("bare", layers=head), write_run("none")])
    table = layer_table(runs, {})
    assert table.groups[:2] == [("", 2), ("sparsity", 2)]
    assert table.head[:4] == ["layer", "weights", "one", "bare"]
    assert [row[0].text for row in table.rows] == ["0.proj", "1.proj", "9.proj"]
    assert [cell.text for cell in table.rows[2]][:4] == ["9.proj", "5", "–", "–"]
    assert layer_table(runs[2:], {}) is None


def test_a_prefix_is_of_whole_parts_and_not_the_whole_name():
    assert common_prefix(["bert.layer.1.key", "bert.layer.10.key"]) == "bert.layer."
    assert common_prefix(["a.b", "a.b"]) == "a."
    assert common_prefix(["a.b"]) == ""
    assert common_prefix(["a", "b.c"]) == ""
