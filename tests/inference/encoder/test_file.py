"""``pst-ds predict``: every format, in order, in one process or two, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil

import datasets
import numpy as np
import pyarrow.parquet
import pytest

import pst_ds
from pst_ds.cli.main import main
from pst_ds.inference.encoder.file import ROWS

from .conftest import DATA, sentences


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbered(predictions, first=0):
    return [{"row": row, **prediction} for row, prediction in enumerate(predictions, first)]


def test_two_processes_write_the_file_of_one(encoders, tmp_path):
    texts = sentences(2 * ROWS + 3)
    data, one, two = (tmp_path / name for name in ("data.txt", "one.jsonl", "two.jsonl"))
    data.write_text("\n".join(texts))
    command = ["predict", str(encoders / "classifier"), "--data", str(data), "--threads", "1", "--out"]
    assert main([*command, str(one)]) == 0
    assert main([*command, str(two), "--processes", "2"]) == 0
    assert one.read_bytes() == two.read_bytes()
    wanted = pst_ds.load(encoders / "classifier").outputs(texts)
    assert np.allclose([list(row["probabilities"].values()) for row in rows_of(one)], wanted, atol=1e-5)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_pairs_are_read_from_every_format(suffix, encoders, tmp_path):
    pairs = list(zip(sentences(5), sentences(5, 1), strict=True))
    table = datasets.Dataset.from_dict({"one": [pair[0] for pair in pairs], "two": [pair[1] for pair in pairs]})
    data = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        table.to_json(data)
    elif suffix == ".parquet":
        table.to_parquet(data)
    else:
        table.to_csv(data, sep="\t" if suffix == ".tsv" else ",")
    out = tmp_path / "out.jsonl"
    command = ["predict", str(encoders / "regressor"), "--data", str(data), "--text", "one", "two"]
    assert main([*command, "--out", str(out)]) == 0
    assert rows_of(out) == numbered(pst_ds.load(encoders / "regressor").predict(pairs))


def test_csv_and_parquet_have_the_predictions_of_jsonl(encoders, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("\n".join(sentences(5)))
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        command = ["predict", str(encoders / "classifier"), "--data", str(data), "--out", str(tmp_path / name)]
        assert main(command) == 0
    wanted = rows_of(tmp_path / "out.jsonl")
    assert datasets.Dataset.from_parquet(str(tmp_path / "out.parquet")).to_list() == wanted
    for row, of in zip(datasets.Dataset.from_csv(str(tmp_path / "out.csv")), wanted, strict=True):
        assert row == {"row": of["row"], "label": of["label"]} | {
            f"probabilities.{name}": p for name, p in of["probabilities"].items()
        }


def test_the_columns_are_those_of_the_run(encoders, tmp_path):
    folder, data, out = shutil.copytree(encoders / "classifier", tmp_path / "model"), tmp_path / "a.jsonl", tmp_path
    (folder / "pst_manifest.json").write_text(json.dumps({"run": {"data": {"text_columns": ["review"]}}}))
    data.write_text("".join(json.dumps({"text": "bad", "review": text}) + "\n" for text in sentences(3)))
    assert main(["predict", str(folder), "--data", str(data), "--out", str(out / "out.jsonl")]) == 0
    assert rows_of(out / "out.jsonl") == numbered(pst_ds.load(folder).predict(sentences(3)))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_predictions_have_the_number_of_their_row_also_of_a_slice(suffix, encoders, tmp_path):
    texts = ["the film", "", "plot\nand cast", "", "007", "fine"]  # blank lines of one column are rows
    data = tmp_path / "data.csv"
    data.write_text('text\nthe film\n\n"plot\nand cast"\n\n007\nfine\n')
    command = ["predict", str(encoders / "classifier"), "--data"]
    for piece, first in (("", 0), ("[2:]", 2), ("[50%:]", 3)):
        out = tmp_path / f"out{suffix}"
        assert main([*command, f"{data}{piece}", "--out", str(out)]) == 0
        wanted = numbered(pst_ds.load(encoders / "classifier").predict(texts[first:]), first)
        if suffix == ".csv":
            rows = list(csv.DictReader(out.open(newline="")))
            assert [(int(row["row"]), row["label"]) for row in rows] == [(row["row"], row["label"]) for row in wanted]
        else:
            rows = rows_of(out) if suffix == ".jsonl" else pyarrow.parquet.read_table(out).to_pylist()
            assert [(row["row"], row["label"]) for row in rows] == [(row["row"], row["label"]) for row in wanted]
        assert len(rows) == len(texts) - first


def _relabelled(folder, labels, to):
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    names = dict(list(config["id2label"].items())) | {str(i): label for i, label in enumerate(labels)}
    (to / "config.json").write_text(json.dumps(config | {"id2label": names}))
    return to


def test_labels_that_look_like_times_stay_texts(encoders, tmp_path):
    model = _relabelled(encoders / "classifier", [f"2020-01-{i:02}" for i in range(1, 13)], tmp_path / "model")
    (tmp_path / "data.txt").write_text("the film\n")
    for suffix in (".csv", ".parquet"):
        out = tmp_path / f"out{suffix}"
        assert main(["predict", str(model), "--data", str(tmp_path / "data.txt"), "--out", str(out)]) == 0
    label = pyarrow.parquet.read_table(out).to_pylist()[0]["label"]
    assert label.startswith("2020-01-")
    assert next(csv.DictReader((tmp_path / "out.csv").open(newline="")))["label"] == label


@pytest.mark.parametrize("label", ["=cmd|'/C calc'!A0", "@SUM(A1)", "+1+cmd", "-x", "\t=1"])
def test_a_label_that_a_spreadsheet_computes_is_not_written_to_csv(label, encoders, tmp_path, capsys):
    model = _relabelled(encoders / "classifier", [label], tmp_path / "model")
    (tmp_path / "data.txt").write_text("the film\n")
    command = ["predict", str(model), "--data", str(tmp_path / "data.txt"), "--out"]
    assert main([*command, str(tmp_path / "out.csv")]) == 2
    assert "would be a formula in a spreadsheet. Write .jsonl or .parquet" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out.jsonl")]) == 0
    fine = _relabelled(encoders / "classifier", ["-1", "+0.5", "a=b"], tmp_path / "fine")
    assert main(["predict", str(fine), *command[2:], str(tmp_path / "out.csv")]) == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("classifier", {"--text": "review"}, "has no column 'review', which --text review names. Columns: text, other"),
        ("classifier", {"--text": ("text", "other", "text")}, "two of pairs"),
        ("classifier", {"--text": "other"}, "not a plain text"),
        ("classifier", {"--data": "{top}/none.csv"}, "does not exist"),
        ("classifier", {"--data": "{top}/empty.jsonl"}, "has no text in line 2"),
        ("classifier", {"--out": "{top}/out.txt"}, ".jsonl, .csv, .parquet"),
        ("classifier", {"--out": "{top}/nowhere/out.csv"}, "nowhere does not exist. Create it"),
        ("classifier", {"--max-length": "4000"}, "48 positions"),
        ("embedder", {"--out": "{top}/out.csv"}, ".jsonl, .parquet"),
        ("tiny-llama", {}, "predicts neither"),
    ],
)
def test_wrong_arguments_are_named(name, options, message, encoders, tmp_path, capsys):
    folder = DATA / name if name == "tiny-llama" else encoders / name
    (tmp_path / "data.jsonl").write_text('{"text": "a film", "other": ["a"]}\n')
    (tmp_path / "empty.jsonl").write_text('{"text": "a film"}\n{"text": null}\n')
    given = {"--data": "{top}/data.jsonl", "--out": "{top}/out.jsonl"} | options
    words = [word for key, value in given.items() for word in (key, *([value] if isinstance(value, str) else value))]
    assert main(["predict", str(folder), *(word.format(top=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))
