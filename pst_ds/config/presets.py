"""``data.preset``: the settings of known benchmarks, as the hub has them and their authors score them.

GLUE is arXiv 1804.07461. The three data-to-text sets are E2E (arXiv 1706.09254), DART (arXiv 2007.02871) and WebNLG
(release 3.0, English); their beam search is the one that the LoRA paper (arXiv 2106.09685) gives for GPT-2.
"""

from __future__ import annotations

from typing import Any

from pst_ds.config.data import PARQUET_BRANCH
from pst_ds.config.settings import ConfigError

Table = dict[str, Any]
_PLACES = ("dataset", "subset", "revision", "train", "validation", "test", "test_rows")
"""Settings of a preset that say where the data is; the others say how to read it."""


def _glue(subset: str, *text_columns: str, metric: str, labels: str = "", splits: str = "") -> Table:
    """The labels of GLUE's test sets are hidden, so what is tested on is the validation split; of MNLI, which has two,
    the matched one chooses the best checkpoint and the mismatched one is tested on. ``labels`` are the classes in the
    hub's order; without them the task is regression."""
    validation, test = splits.split() if splits else ("validation", "validation")
    places = {"train": "train", "validation": validation, "test": test}
    columns = {"text_columns": list(text_columns), "label_column": "label", "label_names": labels.split()}
    task = "classification" if labels else "regression"
    data = {"dataset": "nyu-mll/glue", "subset": subset, **places, **columns}
    return {"task": task, "data": data, "eval": {"metric": metric}}


def _data_to_text(dataset: str, subset: str, text_column: str, label_column: str, penalty: float, **more: Any) -> Table:
    """Name the hub's own conversion to files: on the hub these are scripts, which ``datasets`` no longer runs."""
    splits = {"train": "train", "validation": "validation", "test": "test"}
    places = {"dataset": dataset, "subset": subset, "revision": PARQUET_BRANCH, **splits}
    columns = {"text_columns": [text_column], "label_column": label_column}
    beams = {"num_beams": 10, "length_penalty": penalty, "no_repeat_ngram_size": 4}
    return {"task": "data-to-text", "data": {**places, **columns, "max_length": 512, **more}, "eval": beams}


DATA_PRESETS: dict[str, Table] = {
    "glue/cola": _glue("cola", "sentence", metric="matthews_correlation", labels="unacceptable acceptable"),
    "glue/sst2": _glue("sst2", "sentence", metric="accuracy", labels="negative positive"),
    "glue/mrpc": _glue("mrpc", "sentence1", "sentence2", metric="f1", labels="not_equivalent equivalent"),
    "glue/stsb": _glue("stsb", "sentence1", "sentence2", metric="pearson"),
    "glue/qqp": _glue("qqp", "question1", "question2", metric="f1", labels="not_duplicate duplicate"),
    "glue/mnli": _glue(
        "mnli", "premise", "hypothesis", metric="accuracy", labels="entailment neutral contradiction",
        splits="validation_matched validation_mismatched",
    ),
    "glue/qnli": _glue("qnli", "question", "sentence", metric="accuracy", labels="entailment not_entailment"),
    "glue/rte": _glue("rte", "sentence1", "sentence2", metric="accuracy", labels="entailment not_entailment"),
    "e2e": _data_to_text("tuetschek/e2e_nlg", "default", "meaning_representation", "human_reference", 0.9),
    "dart": _data_to_text("Yale-LILY/dart", "default", "tripleset", "annotations.text", 0.8),
    "webnlg": _data_to_text(
        "webnlg-challenge/web_nlg", "release_v3.0_en", "modified_triple_sets.mtriple_set", "lex.text", 0.8,
        test_rows=["test_category", "rdf-to-text-generation-test-data-with-refs-en"],
    ),
}  # fmt: skip


def with_data_preset(table: Table) -> Table:
    """Replace ``data.preset`` of a run's ``table`` by the settings it stands for; the table's own win.

    With ``data.dataset = ""`` the data is in local files that the run file names, in the shape of the preset's. Raises
    ConfigError for an unknown preset.
    """
    data = table.get("data")
    if not isinstance(data, dict) or "preset" not in data:
        return table
    name = data["preset"]
    if not isinstance(name, str) or name not in DATA_PRESETS:
        raise ConfigError(f"data.preset = {name!r} must be one of {', '.join(DATA_PRESETS)}")
    preset = DATA_PRESETS[name]
    own = {key: value for key, value in data.items() if key != "preset"}
    local = own.get("dataset") == ""
    filled = {key: value for key, value in preset["data"].items() if not (local and key in _PLACES)}
    evaluation = table.get("eval", {})
    if isinstance(evaluation, dict):
        evaluation = {**preset["eval"], **evaluation}
    return {"task": preset["task"], **table, "data": {**filled, **own}, "eval": evaluation}
