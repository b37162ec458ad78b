"""Tables of results and settings: what is in them, and what is left out."""

from __future__ import annotations

from pst_ds.report.run_data import read_runs
from pst_ds.report.tables import number, result_table, setting_tables


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
    assert texts["tokens a second, median"] == ["500", "100"]
    assert texts["peak memory of a rank"] == ["1.07 GB", "–"]
    assert texts["time"] == ["1h02m", "–"]
    assert "ranks" not in texts
    assert table.is_numeric == [False, True, True]


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
