"""Tables of results, settings and layers: what is in them, and what is left out."""

from __future__ import annotations

import html
import json
import re

from pst_ds.report.run_data import read_runs
from pst_ds.report.tables import layer_table, result_table, rows_table, setting_tables, table


def _texts(found):
    """Cells by row, headings included."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found.html.split("<tr")[1:]]
    return {html.unescape(row[0]): [html.unescape(cell) for cell in row[1:]] for row in rows if row[0]}


def test_results_have_a_column_a_run_and_no_row_that_nobody_has(a_run, write_run):
    metrics = [
        {"step": 7, "event": "step", "loss": 1.0, "tokens_per_second": 100.0},
        {"step": 7, "event": "evaluation", "eval/accuracy": 0.5, "eval/f1": 0.25},
    ]
    path = a_run("done", steps=40) / "result.json"
    tokens = {"first": [0, 5, 6, 100, 400, 10], "second": [9, 9, 9, 9]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "expert_tokens": tokens}))
    (found,) = result_table(read_runs([path.parent, write_run("going", metrics=metrics)]))
    texts = _texts(found)
    assert texts["state"] == ["finished, 40 steps", "not finished, at step 7"]
    assert texts["accuracy"] == ["0.8", "0.5"]
    assert texts["f1"] == ["–", "0.25"]
    assert texts["sparsity in the masks"] == ["0.9", "–"]
    assert texts["tokens per second, median"] == ["500", "100"]
    assert texts["peak memory per rank"] == ["1.07 GB", "–"]
    assert texts["experts hardly used"] == ["3", "–"]
    assert texts["time"] == ["1h02m", "–"]
    assert "ranks" not in texts


def test_cells_are_escaped_and_keep_their_digits():
    cells = {"<b>": "<script>&", "large": 123_456_789, "with gaps": None, "exact": float("inf"), "list": ["ä", 1]}
    (found,) = table("any", {"<i>": cells, "other": {"with gaps": 2.0, "only here": "x" * 300}})
    assert "<script>" not in found.html
    assert "<i>" not in found.html
    texts = _texts(found)
    assert texts["large"] == ["123,456,789", "–"]
    assert texts["with gaps"] == ["–", "2"]
    assert texts["exact"] == ["inf", "–"]
    assert texts["list"] == ['["ä", 1]', "–"]
    assert texts["only here"] == ["–", "x" * 300]
    assert list(table("none", {"a": {"b": None}})) == list(rows_table("none", {})) == []


def test_settings_that_differ_come_first_and_empty_is_as_good_as_not_there(write_run):
    shared = 'method = "pst"\noutput_dir = "{}"\n[data]\ntrain = "t.jsonl"\n'
    one = write_run("one", run_file=shared.format("a") + 'revision = ""\n[schedule]\nfinal_sparsity = 0.9\n')
    two = write_run("two", run_file=shared.format("b") + "[schedule]\nfinal_sparsity = 0.5\n")
    differ, common = setting_tables(read_runs([one, two]))
    assert (differ.caption, _texts(differ)) == ("Settings that differ", {"schedule.final_sparsity": ["0.9", "0.5"]})
    assert _texts(common) == {"method": ["pst"], "data.train": ["t.jsonl"]}
    (alone,) = setting_tables(read_runs([one]))
    assert _texts(alone)["schedule.final_sparsity"] == ["0.9"]


def test_layers_of_several_runs_stand_beside_one_another(a_run, write_run):
    head = [{"layers": ["model.layers.0.proj", "model.layers.9.proj"], "weights": [1000, 5]}]
    runs = read_runs([a_run("one", layers=2), write_run("bare", layers=head), write_run("none")])
    (alone,) = layer_table(runs[:1])
    assert _texts(alone)["model.layers.1.proj"][:4] == ["1,000", "0.811", "189", "0.89"]
    (found,) = layer_table(runs)
    assert found.html.index(">weights<") < found.html.index(">sparsity<")
    texts = _texts(found)
    assert list(texts) == ["model.layers.0.proj", "model.layers.1.proj", "model.layers.9.proj"]
    assert texts["model.layers.9.proj"] == ["–", "5", *["–"] * 6]
    assert list(layer_table(runs[2:])) == []
