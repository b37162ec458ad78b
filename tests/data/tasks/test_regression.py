"""Texts with a number: reading them, the metrics, and runs from local files to a verified export."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
import warnings

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.cli.main import main
from pst_ds.config.data import DataConfig, EvalConfig
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.data.labelled import Examples
from pst_ds.data.tasks import task_of
from pst_ds.data.tasks.regression import Regression, regression_metrics
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.model import build_model
from pst_ds.train.resolved import load_tokenizer
from pst_ds.train.run import prepare, train_prepared

pytestmark = pytest.mark.usefixtures("alone")

WORDS = ["cast", "clever", "story", "end", "fine", "plot", "film", "vague", "tired", "sharp", "scene", "warm", "dull"]
_values = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=2, max_size=20)


def _ranks(values):
    """From 1, with the mean rank for equals."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def _correlation(xs, ys):
    xs, ys = np.array(xs, dtype=float), np.array(ys, dtype=float)
    xs, ys = xs - xs.mean(), ys - ys.mean()
    return float(xs @ ys / np.sqrt((xs @ xs) * (ys @ ys)))


@given(_values)
def test_metrics_are_those_of_their_definitions(pairs):
    found, wanted = [x for x, _ in pairs], [float(y) for _, y in pairs]
    metrics = regression_metrics(np.array(found, dtype=np.float32), wanted)
    assert metrics["mse"] == pytest.approx(sum((x - y) ** 2 for x, y in pairs) / len(pairs))
    assert metrics["rmse"] == pytest.approx(metrics["mse"] ** 0.5)
    assert metrics["mae"] == pytest.approx(sum(abs(x - y) for x, y in pairs) / len(pairs))
    if len(set(found)) > 1 and len(set(wanted)) > 1:
        assert metrics["pearson"] == pytest.approx(_correlation(found, wanted), abs=1e-9)
        assert metrics["spearman"] == pytest.approx(_correlation(_ranks(found), _ranks(wanted)), abs=1e-9)
    else:  # not defined
        assert metrics["pearson"] == metrics["spearman"] == 0.0


def test_one_example_has_no_correlation():
    assert regression_metrics(np.array([2.0]), [5.0]) == {
        "pearson": 0.0, "spearman": 0.0, "mse": 9.0, "rmse": 3.0, "mae": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite_have_no_correlation(bad):
    """Not 0.0, by which such a model would be better than one whose correlation is negative."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = regression_metrics(np.array([bad, 1.0, 2.0], dtype=np.float32), [1.0, 2.0, 3.0])
    assert math.isnan(metrics["pearson"])
    assert math.isnan(metrics["spearman"])
    assert not math.isfinite(metrics["mse"])
    assert math.isnan(regression_metrics(np.array([bad]), [1.0])["pearson"])


def _rows(count, seed, classes=False):
    draw = random.Random(seed)
    for _ in range(count):
        one, other = (" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(2))
        number = len(set(one.split()) & set(other.split())) + draw.random()
        yield one, other, (["far", "near"][number > 1] if classes else round(number, 3))


def _write(path, rows, columns=("one", "other", "score")):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        values = zip(*rows, strict=True)
        datasets.Dataset.from_dict(dict(zip(columns, map(list, values), strict=True))).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    return path


def _run_file(tmp_path, ending, task, columns, **eval_settings):
    for split, count in (("train", 48), ("validation", 17)):
        _write(tmp_path / f"{split}.{ending}", list(_rows(count, split, task == "classification")))
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in eval_settings.items())
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
output_dir = "{tmp_path}/run"
task = "{task}"
[model]
path = "tests/data/tiny-bert"
[data]
train = "{tmp_path}/train.{ending}"
validation = "{tmp_path}/validation.{ending}"
test = "{tmp_path}/validation.{ending}"
text_columns = {json.dumps(columns)}
label_column = "score"
max_length = 32
[eval]
{settings}
[train]
num_steps = 6
batch_size = 8
[schedule]
final_sparsity = 0.5
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.few(2)
@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize(
    ("ending", "columns"),
    [("jsonl", ["one", "other"]), ("csv", ["one", "other"]), ("tsv", ["one"]), ("parquet", ["one", "other"])],
)
def test_from_local_files_to_a_verified_export(tmp_path, task, ending, columns, capsys, verb):
    path = _run_file(tmp_path, ending, task, columns)
    metrics = {
        "regression": {"pearson", "spearman", "mse", "rmse", "mae"},
        "classification": {"accuracy", "f1", "matthews_correlation"},
    }
    trained = verb("train", str(path), "--quiet")
    assert trained["metrics"].keys() >= metrics[task]
    assert main(["eval", f"{tmp_path}/run", "--texts", "texts.jsonl"]) == 2
    assert f"task '{task}' does not generate text" in capsys.readouterr().err
    evaluated = verb("eval", f"{tmp_path}/run")
    assert evaluated.items() >= trained["metrics"].items()
    out = str(tmp_path / "out")
    packing = "bitmask" if ending == "parquet" else "dense"
    assert main(["export", f"{tmp_path}/run", "--format", packing, "--out", out]) == 0
    verified = verb("verify", out, "--against", f"{tmp_path}/run")
    assert verified["max_logit_difference"] == verified["differing_predictions"] == verified["differing_weights"] == 0
    assert verified["metrics"].items() <= evaluated.items()


def test_every_format_reads_the_same_numbers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer, rows = AutoTokenizer.from_pretrained("tests/data/tiny-bert"), list(_rows(5, 0))
    for ending in ("jsonl", "csv", "tsv", "parquet"):
        path = _write(tmp_path / f"rows.{ending}", rows)
        data = DataConfig(train=str(path), text_columns=("one", "other"), label_column="score")
        examples = Regression(EvalConfig()).load(data, "train", tokenizer, [])
        assert examples.labels == [number for _, _, number in rows]
        assert examples.features[0]["input_ids"] == tokenizer(rows[0][0], rows[0][1])["input_ids"]
    whole = _write(tmp_path / "whole.csv", [("film", "plot", n) for n in (3, 1, 2)])  # whole numbers are numbers too
    data = DataConfig(train=str(whole), text_columns=("one",), label_column="score")
    whole_numbers = Regression(EvalConfig()).load(data, "train", tokenizer, [])
    assert whole_numbers.labels == [3.0, 1.0, 2.0]
    path = _write(tmp_path / "other.csv", [("film", "plot", n) for n in (3, 1, 2.5)])
    other = DataConfig(train=str(path), text_columns=("one",), label_column="score")
    assert whole_numbers.digest != Regression(EvalConfig()).load(other, "train", tokenizer, []).digest


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["0.5", "much"], "has 'much' in line 2. Give every example a finite number"),
        ([0.5, None], "has None in line 2"),
        ([1.0, float("nan")], "has None in line 2"),
        ([-1.0, -1.0], "label -1 in line 1 stands for a hidden label"),
    ],
)
def test_labels_that_are_no_numbers_are_refused(tmp_path, labels, reason):
    path = _write(tmp_path / "rows.jsonl", [("film", "plot", label) for label in labels])
    data = DataConfig(train=str(path), text_columns=("one",), label_column="score")
    with pytest.raises(ConfigError) as caught:
        Regression(EvalConfig()).load(data, "train", None, [])
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


def test_classes_are_refused_and_minus_one_among_others_is_a_number(tmp_path):
    features = datasets.Features({"one": datasets.Value("string"), "score": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"one": ["x", "y"], "score": [0, 1]}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    data = DataConfig(train=str(tmp_path / "a.parquet"), text_columns=("one",), label_column="score")
    with pytest.raises(ConfigError, match=r'holds classes. Set task = "classification"'):
        Regression(EvalConfig()).load(data, "train", None, [])
    from transformers import AutoTokenizer

    path = _write(tmp_path / "rows.jsonl", [("film", "plot", -1.0), ("film", "plot", 2.0)])
    data = DataConfig(train=str(path), text_columns=("one",), label_column="score")
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-bert")
    assert Regression(EvalConfig()).load(data, "train", tokenizer, []).labels == [-1.0, 2.0]


def test_the_best_checkpoint_has_the_lowest_error_or_the_highest_correlation(tmp_path, monkeypatch):
    path = _run_file(tmp_path, "jsonl", "regression", ["one"])
    assert not task_of(load_run(path)).lower_is_better
    assert task_of(load_run(path, ["eval.metric=mse"])).lower_is_better
    assert load_run(path).metric == "pearson"
    with pytest.raises(ConfigError, match=r"eval\.metric = 'accuracy' is not a metric of task 'regression'"):
        load_run(path, ["eval.metric=accuracy"])


@pytest.mark.parametrize(("labels", "slower"), [([0.0, 1.0, 1.0, 0.0], True), ([0.0, 0.5, 1.0, 1.5], False)])
def test_numbers_of_few_values_are_learned_by_heart_as_classes_are(tmp_path, labels, slower):
    run = load_run(_run_file(tmp_path, "jsonl", "regression", ["one", "other"]), ["train.num_steps=600"])
    prepared = prepare(run, launch_environment())
    train = prepared.with_rates(Examples([{}] * 2400, labels * 600)).run.train
    once = run.with_rates(width=prepared.width, num_steps=600, num_examples=10**6, num_labels=2).train
    assert (train.embedding_learning_rate < once.embedding_learning_rate) == slower
    assert train.head_learning_rate == once.head_learning_rate


def test_the_error_falls(tmp_path, capsys):
    path = _run_file(tmp_path, "jsonl", "regression", ["one", "other"], metric="mse", interval=10)
    arguments = ["--set", "train.num_steps=40", "--set", "method=dense", "--set", "train.log_interval=1", "--quiet"]
    assert main(["train", str(path), *arguments, "--set", "train.head_learning_rate=2e-3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert sum(losses[-5:]) / 5 < losses[0] / 2
    errors = {line["step"]: line["eval/mse"] for line in lines if line["event"] == "evaluation"}
    best = json.loads((tmp_path / "run" / "result.json").read_text())["best_step"]
    assert errors[best] == min(errors.values())


@pytest.mark.few(1)
@pytest.mark.parametrize(("mean", "unit"), [(400.0, 1.0), (-3.0, 0.01), (0.0, 1e4)])
def test_labels_on_any_scale_are_learned_as_those_of_mean_0_and_unit_1(tmp_path, mean, unit):
    losses = {}
    for name, (offset, factor) in {"given": (mean, unit), "standard": (0.0, 1.0)}.items():
        (tmp_path / name).mkdir()
        path = _run_file(tmp_path / name, "jsonl", "regression", ["one", "other"], metric="mse")
        rows = list(_rows(48, "far"))
        scores = np.array([score for *_, score in rows])
        scores = offset + factor * (scores - scores.mean()) / scores.std()
        _write(
            tmp_path / name / "train.jsonl", [(*texts, score) for (*texts, _), score in zip(rows, scores, strict=True)]
        )
        settings = ["train.log_interval=1", "train.precision=fp32", "train.gradient_clipping=0.0", "train.num_steps=12"]
        _train(path, *settings, "train.head_learning_rate=1e-2", "train.update_learning_rate=1e-2")
        lines = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] / factor**2 for line in lines if line["event"] == "step"]
        rates = next(line for line in lines if line["event"] == "step")
        assert rates["lr/outputs"] == pytest.approx(rates["lr/head"] * factor)
    assert losses["standard"][0] == pytest.approx(1.0, abs=0.5)
    assert losses["given"] == pytest.approx(losses["standard"], rel=0.02)


def test_a_head_that_was_trained_keeps_its_values_and_its_rate(tmp_path):
    path = _run_file(tmp_path, "jsonl", "regression", ["one", "other"])
    _train(path)
    out = str(tmp_path / "out")
    assert main(["export", f"{tmp_path}/run", "--format", "dense", "--out", out]) == 0
    tokenizer = load_tokenizer(load_run(path))
    new, trained = (
        build_model(load_run(path, [f"model.path={model}"]), [], tokenizer, zero3_config=None, label_scale=(7.5, 2.0))
        for model in ("tests/data/tiny-bert", out)
    )
    assert new.module.classifier.bias.item() == 7.5
    assert list(map(id, new.outputs)) == list(map(id, new.module.classifier.parameters()))
    assert 0 < trained.module.classifier.bias.item() < 4
    assert trained.outputs == []


def test_a_stopped_run_goes_on_with_the_rate_of_its_outputs(tmp_path):
    path = _run_file(tmp_path, "jsonl", "regression", ["one", "other"])
    same = ["train.log_interval=1", "checkpoint.interval=2", "train.precision=fp32"]
    _train(path, *same, f"output_dir={tmp_path}/whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for checkpoint in (tmp_path / "resumed" / "checkpoints").iterdir():
        if checkpoint.name != "step-00000004":
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    run = load_run(path, [*same, f"output_dir={tmp_path}/resumed"])
    train_prepared(prepare(run, launch_environment()), quiet=True, resume=True)
    steps = []
    for name in ("whole", "resumed"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        steps.append({x["step"]: (x["loss"], x["lr/outputs"]) for x in lines if x["event"] == "step"})
    assert steps[0] == steps[1]


def _train(path, *overrides):
    train_prepared(prepare(load_run(path, overrides), launch_environment()), quiet=True)


@pytest.mark.thorough
@pytest.mark.zero3
def test_losses_do_not_depend_on_the_world_size(run_ranks, tmp_path):
    path, losses = _run_file(tmp_path, "jsonl", "regression", ["one", "other"]), []
    same = ["train.precision=fp32", "train.log_interval=1", "model.dropout=0.0"]
    _train(path, *same, f"output_dir={tmp_path}/1")
    run_ranks(_train, 2, path, *same, f"output_dir={tmp_path}/2", "deepspeed_config=ds_configs/zero3_cpu.json")
    for ranks in (1, 2):
        lines = [json.loads(line) for line in (tmp_path / str(ranks) / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
        losses.append([line["eval/mse"] for line in lines if line["event"] == "evaluation"])
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[1] == pytest.approx(losses[3], rel=1e-4)


def test_plan_knows_the_task(tmp_path, verb):
    planned = verb("plan", str(_run_file(tmp_path, "jsonl", "regression", ["one"])))
    assert planned["num_examples"] == 48
    assert "classifier" in planned["trained_in_full"]
