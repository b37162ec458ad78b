"""The table of layers: figures or dashes, runs beside one another, short names."""

from __future__ import annotations

from pst_ds.report.run_data import read_runs
from pst_ds.report.tables import common_prefix, layer_table


def test_layers_have_their_figures_or_a_dash(a_run):
    (run,) = read_runs([a_run("one", layers=3)])
    table = layer_table([run], {("model.layers.1.proj", 1000): [40, 25], ("model.layers.2.proj", 1040): [40, 26]})
    assert table.caption == "Layers of model.layers"
    figures = ["sparsity", "flips in total", "correlation of S, |W|", "score norm", "update norm", "update / W0 norm"]
    assert table.head == ["layer", "shape", *figures]
    assert [cell.text for cell in table.rows[0]] == ["0.proj", "1,000", "0.8100", "180", "–", "0.1", "0.1", "1"]
    assert [cell.text for cell in table.rows[1]][:3] == ["1.proj", "40 × 25", "0.8110"]
    assert table.rows[1][1].value == 1000
    assert table.rows[2][1].text == "1,000"  # a shape of 1,040 weights is another model's


def test_layers_of_several_runs_stand_beside_one_another(a_run, write_run):
    head = [{"layers": ["model.layers.0.proj", "model.layers.9.proj"], "weights": [1000, 5]}]
    runs = read_runs([a_run("one", layers=2), write_run("bare", layers=head), write_run("none")])
    table = layer_table(runs, {})
    assert table.groups[:2] == [("", 2), ("sparsity", 2)]
    assert table.head[:4] == ["layer", "weights", "one", "bare"]
    assert [row[0].text for row in table.rows] == ["0.proj", "1.proj", "9.proj"]
    assert [cell.text for cell in table.rows[2]][:4] == ["9.proj", "5", "–", "–"]
    assert layer_table(runs[2:], {}) is None


def test_runs_whose_layers_differ_have_a_size_each(write_run):
    def layers(*weights):
        return [{"layers": ["a.up", "a.down", "a.only"][: len(weights)], "weights": list(weights)}]

    runs = read_runs(
        [write_run("small", layers=layers(6, 6, 3)), write_run("large", layers=layers(8, 6)), write_run("bare")]
    )
    table = layer_table(runs, {})
    assert table.groups == [("", 1), ("weights", 2)]
    assert table.head == ["layer", "small", "large"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["up", "6", "8"], ["down", "6", "6"], ["only", "3", "–"]
    ]  # fmt: skip
    shapes = {("a.up", 8): [2, 4], ("a.up", 6): [2, 3], ("a.down", 6): [2, 3]}
    table = layer_table(runs, shapes)
    assert table.groups == [("", 1), ("shape", 2)]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["up", "2 × 3", "2 × 4"], ["down", "2 × 3", "2 × 3"], ["only", "3", "–"]
    ]  # fmt: skip
    assert layer_table(runs[:1], shapes).head == ["layer", "shape"]


def test_a_prefix_is_of_whole_parts_and_not_the_whole_name():
    assert common_prefix(["bert.layer.1.key", "bert.layer.10.key"]) == "bert.layer."
    assert common_prefix(["a.b", "a.b"]) == "a."
    assert common_prefix(["a.b"]) == ""
    assert common_prefix(["a", "b.c"]) == ""
