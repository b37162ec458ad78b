"""The dense rival of the small files: a classifier in ONNX Runtime's int8."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tools import onnx_int8

onnx = pytest.importorskip("onnx", reason="onnx is in the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")


def test_the_int8_file_answers_as_the_classifier_does(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    labels = {"label2id": {"bad": 0, "good": 1}, "id2label": {0: "bad", 1: "good"}}
    model = AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert", **labels).eval()
    torch.nn.init.normal_(model.classifier.weight)  # clear answers, which rounding does not change
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-bert")
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    lines = Path("tests/data/validation.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    rows = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, truncation=True, max_length=16, return_tensors="pt")).logits[0]
        if abs(logits[0] - logits[1]) > 1.0:
            rows.append({"text": text, "label": model.config.id2label[int(logits.argmax())]})
    assert len(rows) > 8
    rows[0]["label"] = "good" if rows[0]["label"] == "bad" else "bad"
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = onnx_int8.write_int8(tmp_path / "dense", tmp_path / "onnx")
    assert onnx_int8.accuracy(file, tmp_path / "dense", tmp_path / "test.jsonl", 16) == 1 - 1 / len(rows)
    numbers = dict.fromkeys((onnx.TensorProto.INT8, onnx.TensorProto.FLOAT), 0)
    for tensor in onnx.load(file).graph.initializer:
        if tensor.data_type in numbers:
            numbers[tensor.data_type] += math.prod(tensor.dims)
    assert numbers[onnx.TensorProto.INT8] > 4 * numbers[onnx.TensorProto.FLOAT]  # matrices and embeddings
