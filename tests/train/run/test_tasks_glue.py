"""The eight GLUE tasks from the hub's files to a verified export: a tiny repository in the shape of nyu-mll/glue."""

from __future__ import annotations

import json
import random

import datasets
import pytest
import yaml

from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.data.tasks import task_of

pytestmark = pytest.mark.usefixtures("alone")

WORDS = ["cast", "clever", "story", "end", "fine", "plot", "film", "vague", "tired", "sharp", "scene", "warm", "the"]
COLUMNS = {
    "cola": ("sentence",), "sst2": ("sentence",), "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"), "qqp": ("question1", "question2"), "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"), "rte": ("sentence1", "sentence2"),
}  # fmt: skip
CLASSES = {
    "cola": ["unacceptable", "acceptable"], "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"], "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"], "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}  # fmt: skip
METRICS = {  # the benchmark's own, the first of them chooses the best
    "cola": ["matthews_correlation"], "sst2": ["accuracy"], "mrpc": ["f1", "accuracy"],
    "stsb": ["pearson", "spearman"], "qqp": ["f1", "accuracy"], "mnli": ["accuracy"], "qnli": ["accuracy"],
    "rte": ["accuracy"],
}  # fmt: skip
SIZES = {"train": 24, "validation": 13, "test": 5}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """The repository's files: Parquet for each configuration and split, and a README that lists them."""
    folder = tmp_path_factory.mktemp("glue")
    configs = []
    for name in COLUMNS:
        splits = [s + m for s in ("validation", "test") for m in ("_matched", "_mismatched")] if name == "mnli" else (
            ["validation", "test"]
        )  # fmt: skip
        for split in ("train", *splits):
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            _split(name, split).to_parquet(path)
        files = [{"split": split, "path": f"{name}/{split}-*"} for split in ("train", *splits)]
        configs.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n# GLUE\n")
    return folder


def _split(name, split):
    draw = random.Random(f"{name}/{split}")
    count = SIZES[split.partition("_")[0]]
    rows = {
        column: [" ".join(draw.choices(WORDS, k=draw.randint(3, 7))) for _ in range(count)] for column in COLUMNS[name]
    }
    features = {column: datasets.Value("string") for column in COLUMNS[name]}
    if name == "stsb":
        features["label"] = datasets.Value("float32")
        rows["label"] = [round(draw.uniform(0, 5), 2) for _ in range(count)]
    else:
        features["label"] = datasets.ClassLabel(names=CLASSES[name])
        rows["label"] = [i % len(CLASSES[name]) for i in range(count)]
    if split.startswith("test"):
        rows["label"] = [-1] * count
    features["idx"], rows["idx"] = datasets.Value("int32"), list(range(count))
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def _run_file(tmp_path, glue, name, data=""):
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
output_dir = "{tmp_path}/run"
[model]
path = "tests/data/tiny-bert"
[data]
preset = "glue/{name}"
dataset = "{glue}"
max_length = 32
{data}
[train]
num_steps = 4
batch_size = 8
[schedule]
final_sparsity = 0.5
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.few(3)
@pytest.mark.parametrize("name", COLUMNS)
def test_from_the_hub_s_files_to_a_verified_export(tmp_path, glue, name, verb):
    path = _run_file(tmp_path, glue, name)
    run = load_run(path)
    assert run.metric == METRICS[name][0]
    trained = verb("train", str(path), "--quiet")
    assert trained["metrics"].keys() >= set(METRICS[name])
    evaluated = verb("eval", f"{tmp_path}/run", "--split", "test")
    assert evaluated["examples"] == SIZES["validation"]
    assert all(-1.0 <= evaluated[metric] <= 1.0 for metric in METRICS[name])
    if name != "mnli":  # which has another file to test on
        assert evaluated.items() >= trained["metrics"].items()
    out = str(tmp_path / "out")
    assert main(["export", f"{tmp_path}/run", "--out", out]) == 0
    verified = verb("verify", out, "--against", f"{tmp_path}/run")
    assert verified["max_logit_difference"] == verified["differing_predictions"] == verified["differing_weights"] == 0
    assert verified["metrics"].items() <= evaluated.items()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if name == "stsb":
        assert (config["problem_type"], len(config["id2label"])) == ("regression", 1)
    else:
        assert list(config["id2label"].values()) == CLASSES[name]


def test_mnli_has_two_files_to_evaluate_on(tmp_path, glue):
    data = load_run(_run_file(tmp_path, glue, "mnli")).data
    assert (data.validation, data.test) == ("validation_matched", "validation_mismatched")


@pytest.mark.parametrize("name", ["cola", "stsb", "mnli"])
def test_a_hidden_label_is_named(tmp_path, glue, name, capsys):
    split = "test_matched" if name == "mnli" else "test"
    path = _run_file(tmp_path, glue, name, f'validation = "{split}"')
    assert main(["train", str(path), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert f"{split}: label -1 in row 0 stands for a hidden label" in said
    assert 'such as "validation"' in said


def test_a_validation_split_can_be_cut_from_the_training_split(tmp_path, glue, verb):
    path = _run_file(tmp_path, glue, "rte", 'train = "train[:16]"\nvalidation = "train[16:]"')
    assert verb("train", str(path), "--quiet")["steps"] == 4
    assert verb("eval", f"{tmp_path}/run", "--split", "validation")["examples"] == SIZES["train"] - 16


def test_f1_is_for_two_classes(tmp_path, glue):
    path = _run_file(tmp_path, glue, "mnli")
    assert load_run(path, ["eval.metric=macro_f1"]).metric == "macro_f1"
    run = load_run(path, ["eval.metric=f1"])
    with pytest.raises(ConfigError, match=r"eval\.metric = 'f1': F1 of the second class needs two classes, .* has 3"):
        task_of(run).label_names(run.data)
