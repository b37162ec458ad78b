"""Tables of results and settings: what is in them, and what is left out."""

from __future__ import annotations

import json

from pst_ds.report.charts import charts
from pst_ds.report.run_data import read_runs
from pst_ds.report.tables import common_prefix, layer_table, number, result_table, setting_tables, straggler_table


def _texts(table):
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def test_results_have_a_column_a_run_and_no_row_that_nobody_has(a_run, write_run):
    metrics = [
        {"step": 7, "event": "step", "loss": 1.0, "tokens_per_second": 100.0},
        {"step": 7, "event": "evaluation", "eval/accuracy": 0.5, "eval/f1": 0.25},
    ]
    table = result_table(read_runs([a_run("done", steps=40), write_run("going", metrics=metrics)]))
    assert table.head == ["", "done", "going"]
    texts = _texts(table)
    assert texts["state"] == ["finished, 40 steps", "not finished, at step 7"]
    assert texts["accuracy"] == ["0.8", "0.5"]
    assert texts["f1"] == ["–", "0.25"]
    assert texts["sparsity in the masks"] == ["0.900000", "–"]
    assert texts["tokens per second, median"] == ["500", "100"]
    assert texts["peak memory per rank"] == ["1.07 GB", "–"]
    assert texts["time"] == ["1h02m", "–"]
    assert "ranks" not in texts
    assert table.is_numeric == [False, True, True]


def test_experts_of_a_tenth_of_the_mean_tokens_are_hardly_used(a_run):
    path = a_run("done") / "result.json"
    tokens = {"first": [0, 5, 6, 100, 400, 10], "second": [9, 9, 9, 9]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "expert_tokens": tokens}))
    assert _texts(result_table(read_runs([path.parent])))["experts hardly used"] == ["3"]


def test_a_result_that_is_no_number_is_written_as_it_is():
    assert number(float("inf")).text == "inf"
    assert number(True).is_missing
    assert number("3").is_missing


def test_settings_that_differ_come_first_and_empty_is_as_good_as_not_there(write_run):
    shared = 'method = "pst"\noutput_dir = "{}"\n[data]\ntrain = "t.jsonl"\n'
    one = write_run("one", run_file=shared.format("a") + 'revision = ""\n[schedule]\nfinal_sparsity = 0.9\n')
    two = write_run("two", run_file=shared.format("b") + "[schedule]\nfinal_sparsity = 0.5\n")
    differ, common = setting_tables(read_runs([one, two]))
    assert (differ.caption, _texts(differ)) == ("Settings that differ", {"schedule.final_sparsity": ["0.9", "0.5"]})
    assert _texts(common) == {"method": ["pst"], "data.train": ["t.jsonl"]}
    (alone,) = setting_tables(read_runs([one]))
    assert _texts(alone)["schedule.final_sparsity"] == ["0.9"]


def test_ranks_that_the_others_waited_for_are_listed_and_drawn(write_run):
    named = {"rank": 3, "host": "node1", "step_seconds": 1.5, "median_step_seconds": 1.0, "memory_bytes": 10**9}
    metrics = [
        {"step": 11, "event": "straggler", **named, "others": 0},
        {"step": 20, "event": "step", "loss": 1.0, "ranks/most_seconds": 1.5, "ranks/median_seconds": 1.0},
    ]
    (run,) = read_runs([write_run("slow", metrics=metrics)])
    table = straggler_table([run])
    assert [[cell.text for cell in row] for row in table.rows] == [["node1", "3", "11", "1.5", "1", "1.00 GB", "0"]]
    assert "rank" not in run.curves
    (chart,) = [chart for chart in charts([run]) if chart.title == "Seconds per step"]
    assert [series.label for series in chart.series] == ["slowest", "median"]


def test_a_run_without_stragglers_has_no_table_of_them(write_run):
    assert straggler_table(read_runs([write_run("even", metrics=[{"step": 1, "event": "step", "loss": 1.0}])])) is None


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


def test_sizes_that_differ_between_runs_are_all_listed(write_run):
    def layers(*weights):
        return [{"layers": ["a.up", "a.down", "a.only"][: len(weights)], "weights": list(weights)}]

    runs = read_runs(
        [write_run("small", layers=layers(6, 6, 3)), write_run("large", layers=layers(8, 6)), write_run("bare")]
    )
    table = layer_table(runs, {})
    assert (table.groups, table.head) == ([("", 2)], ["layer", "weights"])
    assert [[cell.text for cell in row] for row in table.rows] == [["up", "6 or 8"], ["down", "6"], ["only", "3"]]
    shapes = {("a.up", 8): [2, 4], ("a.up", 6): [2, 3], ("a.down", 6): [2, 3]}
    table = layer_table(runs, shapes)
    assert table.head == ["layer", "shape"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["up", "2 × 3 or 2 × 4"], ["down", "2 × 3"], ["only", "3"]
    ]  # fmt: skip
    assert layer_table(runs[:1], shapes).head == ["layer", "shape"]


def test_a_prefix_is_of_whole_parts_and_not_the_whole_name():
    assert common_prefix(["bert.layer.1.key", "bert.layer.10.key"]) == "bert.layer."
    assert common_prefix(["a.b", "a.b"]) == "a."
    assert common_prefix(["a.b"]) == ""
    assert common_prefix(["a", "b.c"]) == ""
