"""``pst-ds predict``: every format, in order, in one process or two, and what it refuses."""

from __future__ import annotations

import json
import shutil

import datasets
import numpy as np
import pytest

import pst_ds
from pst_ds.cli.main import main
from pst_ds.inference.encoder.file import ROWS

from .conftest import DATA, sentences


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    assert rows_of(out) == pst_ds.load(encoders / "regressor").predict(pairs)


def test_csv_and_parquet_have_the_predictions_of_jsonl(encoders, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("\n".join(sentences(5)))
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        command = ["predict", str(encoders / "classifier"), "--data", str(data), "--out", str(tmp_path / name)]
        assert main(command) == 0
    wanted = rows_of(tmp_path / "out.jsonl")
    assert datasets.Dataset.from_parquet(str(tmp_path / "out.parquet")).to_list() == wanted
    for row, of in zip(datasets.Dataset.from_csv(str(tmp_path / "out.csv")), wanted, strict=True):
        assert row == {"label": of["label"]} | {f"probabilities.{name}": p for name, p in of["probabilities"].items()}


def test_the_columns_are_those_of_the_run(encoders, tmp_path):
    folder, data, out = shutil.copytree(encoders / "classifier", tmp_path / "model"), tmp_path / "a.jsonl", tmp_path
    (folder / "pst_manifest.json").write_text(json.dumps({"run": {"data": {"text_columns": ["review"]}}}))
    data.write_text("".join(json.dumps({"text": "bad", "review": text}) + "\n" for text in sentences(3)))
    assert main(["predict", str(folder), "--data", str(data), "--out", str(out / "out.jsonl")]) == 0
    assert rows_of(out / "out.jsonl") == pst_ds.load(folder).predict(sentences(3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("classifier", {"--text": "review"}, "has no column 'review', which --text names. Columns: text, other"),
        ("classifier", {"--text": ("text", "other", "text")}, "two of pairs"),
        ("classifier", {"--text": "other"}, "not a plain text"),
        ("classifier", {"--data": "{top}/none.csv"}, "does not exist"),
        ("classifier", {"--data": "{top}/empty.jsonl"}, "has no text in row 1"),
        ("classifier", {"--out": "{top}/out.txt"}, ".jsonl, .csv, .parquet"),
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
