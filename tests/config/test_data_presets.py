"""``data.preset``: what it fills in, and what wins over it."""

from __future__ import annotations

import json

import pytest

from pst_ds.config.data import DATA_PRESETS
from pst_ds.config.run import ConfigError
from pst_ds.config.tasks import TASKS
from pst_ds.config.toml import dump_run, load_run, run_from_table
from pst_ds.data.dataset import read_rows
from pst_ds.data.tasks import task_of

GLUE = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}


def _table(preset, **more):
    table = {"output_dir": "runs/a", "model": {"path": "m"}, "data": {"preset": preset}, "train": {"num_steps": 1}}
    for key, value in more.items():
        table[key] = {**table[key], **value} if isinstance(table.get(key), dict) else value
    return table


def test_there_is_one_for_each_benchmark():
    assert set(DATA_PRESETS) == {f"glue/{name}" for name in GLUE} | {"e2e", "dart", "webnlg"}


@pytest.mark.parametrize("name", DATA_PRESETS)
def test_every_preset_makes_a_run_that_is_written_out_and_read_back(tmp_path, name):
    run = run_from_table(_table(name))
    assert run.data.dataset
    assert run.data.subset
    assert all([run.data.train, run.data.validation, run.data.test])
    assert run.metric == TASKS[run.task].metrics[0] or run.eval.metric
    (tmp_path / "run.toml").write_text(dump_run(run), encoding="utf-8")
    assert load_run(tmp_path / "run.toml") == run


def test_settings_in_the_file_win():
    run = run_from_table(
        _table(
            "glue/mrpc",
            data={"validation": "train[90%:]", "max_length": 64},
            eval={"metric": "accuracy", "interval": 5},
        )
    )
    assert (run.task, run.data.dataset, run.data.subset) == ("classification", "nyu-mll/glue", "mrpc")
    assert run.data.text_columns == ("sentence1", "sentence2")
    assert (run.data.train, run.data.validation, run.data.test) == ("train", "train[90%:]", "validation")
    assert (run.metric, run.eval.interval, run.data.max_length) == ("accuracy", 5, 64)
    run = run_from_table(_table("glue/mnli"))
    assert (run.data.validation, run.data.test) == ("validation_matched", "validation_mismatched")
    run = run_from_table(_table("dart", eval={"num_beams": 2}))
    assert (run.eval.num_beams, run.eval.length_penalty, run.eval.no_repeat_ngram_size) == (2, 0.8, 4)
    assert run_from_table(_table("glue/sst2", task="regression", eval={"metric": "mse"})).task == "regression"


def test_local_files_take_the_columns_and_the_metric_alone():
    run = run_from_table(_table("webnlg", data={"dataset": "", "train": "a.jsonl", "validation": "b.jsonl"}))
    assert (run.data.train, run.data.validation, run.data.test) == ("a.jsonl", "b.jsonl", "")
    assert (run.data.dataset, run.data.subset, run.data.revision, run.data.test_rows) == ("", "", "", ())
    assert (run.data.text_columns, run.data.label_column) == (("modified_triple_sets.mtriple_set",), "lex.text")
    with pytest.raises(ConfigError, match=r"data\.train is missing"):
        run_from_table(_table("webnlg", data={"dataset": ""}))


CLASSES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}
"""The ClassLabel names of nyu-mll/glue, by id."""


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_of_local_files_have_the_order_of_the_hub_s(tmp_path, name):
    """F1 is that of the second, "equivalent" or "duplicate", though it comes first in the alphabet."""
    path = tmp_path / "train.jsonl"
    texts = dict.fromkeys(DATA_PRESETS[f"glue/{name}"]["data"]["text_columns"], "a")
    path.write_text("".join(json.dumps({**texts, "label": label}) + "\n" for label in sorted(CLASSES[name])))
    run = run_from_table(_table(f"glue/{name}", data={"dataset": "", "train": str(path)}))
    assert task_of(run).label_names(run.data) == CLASSES[name]


@pytest.mark.parametrize("name", ["glue/wnli", "cola", 3, ["e2e"]])
def test_an_unknown_preset_lists_the_known(name):
    with pytest.raises(
        ConfigError, match=r"data\.preset = .* must be one of glue/cola, glue/sst2, .*e2e, dart, webnlg"
    ):
        run_from_table(_table(name))


def test_a_misspelt_preset_key_is_named():
    with pytest.raises(ConfigError, match=r"unknown key 'data\.presett'\. Did you mean 'preset'\?"):
        run_from_table(_table("e2e", data={"presett": "dart"}))
    with pytest.raises(ConfigError, match=r"data\.test_rows = \['a'\] must be a column and a value"):
        run_from_table(_table("e2e", data={"test_rows": ["a"]}))
    with pytest.raises(ConfigError, match=r"eval\.num_beams = 0 must be at least 1"):
        run_from_table(_table("e2e", eval={"num_beams": 0}))
    with pytest.raises(ConfigError, match=r"eval\.length_penalty = inf must be a finite number"):
        run_from_table(_table("e2e", eval={"length_penalty": float("inf")}))
    with pytest.raises(ConfigError, match=r"must name one column for task 'data-to-text'"):
        run_from_table(_table("e2e", data={"text_columns": ["a", "b"]}))


@pytest.mark.parametrize(
    ("preset", "asked"),
    [
        ("glue/cola", {"path": "nyu-mll/glue", "name": "cola", "revision": None}),
        ("e2e", {"path": "tuetschek/e2e_nlg", "data_dir": "default", "revision": "refs/convert/parquet"}),
        (
            "webnlg",
            {"path": "webnlg-challenge/web_nlg", "data_dir": "release_v3.0_en", "revision": "refs/convert/parquet"},
        ),
    ],
)
def test_what_the_hub_is_asked_for(monkeypatch, preset, asked):
    import datasets

    seen = []

    def load_dataset(path, **options):
        seen.append({"path": path, **options})
        raise RuntimeError("Dataset scripts are no longer supported, but found glue.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run = run_from_table(_table(preset))
    with pytest.raises(ConfigError) as caught:
        read_rows(run.data, "validation", {})
    assert seen == [{**asked, "split": "validation"}]
    assert f"data.dataset = '{asked['path']}', split 'validation', cannot be loaded: Dataset scripts" in str(
        caught.value
    )
    assert 'Try data.revision = "refs/convert/parquet"' in str(caught.value)
