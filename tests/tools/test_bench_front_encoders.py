"""The front of classifiers: what each model becomes, and a row for every file."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")

from tests.lazy_module import lazy_module
from tools.bench.front import figure
from tools.quality.cells import Lines
from tools.verbs import verb

program = lazy_module("tools.bench.front.__main__")
encoders = lazy_module("tools.bench.front.encoders")
ENCODER = "tests/data/tiny-bert"


@pytest.fixture
def models(tmp_path):
    """A dense classifier whose labels are its own answers, the same with half of its weights, and texts."""
    torch.manual_seed(0)
    labels = {"label2id": {"bad": 0, "good": 1}, "id2label": {0: "bad", 1: "good"}}
    model = AutoModelForSequenceClassification.from_pretrained(ENCODER, **labels).eval()
    torch.nn.init.normal_(model.classifier.weight)
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    rows = []
    for row in map(json.loads, Path("tests/data/validation.jsonl").read_text(encoding="utf-8").splitlines()):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")).logits[0]
        if abs(logits[0] - logits[1]) > 1.0:  # quantisation does not change these answers
            rows.append({"text": row["text"], "label": model.config.id2label[int(logits.argmax())]})
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("dense", "sparse"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight.data[::2] = 0
    verb("export", str(tmp_path / "sparse"), "--format", "bitmask", "--out", str(tmp_path / "packed"))
    return tmp_path


def test_every_file_has_a_row_with_its_accuracy_size_and_times(models, monkeypatch, capsys):
    monkeypatch.setattr("tools.bench.front.encoders.seconds_in_turn", in_this_process)
    monkeypatch.setattr("tools.bench.front.encoders.quantize", lambda fp32, out, texts, model: written(out, fp32))
    monkeypatch.setattr(
        "tools.bench.front.encoders.run_openvino", lambda file, threads: encoders.run_onnx(file, threads)
    )
    words = ["--models", f"dense={models / 'dense'}", f"half={models / 'packed'}", "--shapes", "1x4", "2x8"]
    words += ["--texts", str(models), "--encoder", ENCODER, "--folder", str(models / "files"), "--max-length", "16"]
    args, lines = program.make_parser().parse_args(["encoders", *words]), Lines(models / "front.jsonl")
    args.run(args, lines)
    rows = {(line["model"], line["engine"]): line for line in lines.by_id.values()}
    assert list(rows) == [
        ("dense", "ONNX Runtime int8"),
        ("dense", "OpenVINO int8"),
        ("half", "pst-ds int8"),
        ("half", "pst-ds int8, int8 activations"),
        ("bag of words", "CPU"),
        ("static embeddings", "CPU"),
    ]
    assert rows["dense", "ONNX Runtime int8"]["accuracy"] == rows["dense", "OpenVINO int8"]["accuracy"] == 1.0
    assert all(set(row["ms"]) == {"1x4", "2x8"} and row["file_bytes"] > 0 for row in rows.values())
    assert rows["half", "pst-ds int8"]["file_bytes"] < rows["dense", "ONNX Runtime int8"]["file_bytes"]
    assert capsys.readouterr().out.count("| 2.00 | 2.00 |\n") == 6
    before = {path: path.stat().st_mtime_ns for path in (models / "files").rglob("*") if path.is_file()}
    args.run(args, lines)
    assert len(lines.by_id) == 6
    assert before == {path: path.stat().st_mtime_ns for path in (models / "files").rglob("*") if path.is_file()}


def test_the_figure_names_every_engine_once_and_every_file_in_both_panels(tmp_path):
    engines = ("OpenVINO int8", "ONNX Runtime int8", "pst-ds int8, int8 activations")
    rows = [
        {
            "engine": engine,
            "model": f"model {number}",
            "accuracy": 0.8 + 0.001 * number,
            "ms": {"1x32": 4.0 + 0.2 * number, "8x128": 90.0 + number},
        }
        for engine in engines
        for number in range(3)
    ]
    figure.draw_encoders(rows, tmp_path / "figure.svg")
    texts = [node.text for node in ElementTree.parse(tmp_path / "figure.svg").iter() if node.text]
    assert sum(text == "OpenVINO int8" for text in texts) == 1
    assert all(texts.count(f"model {number}") == 2 * len(engines) for number in range(3))


def in_this_process(openers, threads, feeds, repeats):
    """Run every contestant once on each feed; workers have tests of their own."""
    opened = {name: opener(threads) for name, opener in openers.items()}
    for shape, feed in feeds.items():
        assert {len(run(feed)) for run in opened.values()} == {shape[0]}
        yield shape, dict.fromkeys(openers, 0.002)


def written(out, fp32):
    out.parent.mkdir(parents=True)
    out.write_bytes(fp32.read_bytes())
    out.with_suffix(".bin").write_bytes(b"weights")
