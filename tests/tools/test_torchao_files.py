"""The dense rival in torch's own integers: bytes of its file, and answers of its weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tools import torchao_files
from tools.quality.run_cell import PEERS

TEXTS = Path("tests/data/validation.jsonl")


@pytest.fixture
def dense(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    labels = {"label2id": {"bad": 0, "good": 1}, "id2label": {0: "bad", 1: "good"}}
    AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert", **labels).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained("tests/data/tiny-bert").save_pretrained(tmp_path)
    rows = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    known = [{"text": row["text"], "label": "good"} for row in rows[:8]]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known), encoding="utf-8")
    return tmp_path


class _Codes:
    """What stands for a tensor of codes where torchao is not installed."""

    def __init__(self, weight):
        self.weight = weight

    def dequantize(self):
        return self.weight.detach()


def test_bytes_are_those_of_the_file_and_of_one_with_packed_codes(dense, monkeypatch):
    kept = []

    def rounded(folder, bits):
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(folder)
        kept.append(model)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                codes = _Codes(module.weight)
                del module._parameters["weight"]
                module.weight = codes
        return model, 1000

    monkeypatch.setattr(torchao_files, "rounded", rounded)
    found = torchao_files.measure(dense, dense / "out", dense / "test.jsonl", 16, 4)
    assert found["file_bytes"] == (dense / "out" / "model.pt").stat().st_size
    assert found["file_bytes"] - found["file_bytes_packed"] == 500
    assert 0.0 <= found["accuracy"] <= 1.0
    of_8 = PEERS["torchao int8"](dense, dense / "peer", {"one": str(dense / "test.jsonl")}, 16)
    assert of_8["tests"]["one"]["accuracy"] == found["accuracy"]
    assert isinstance(PEERS["torchao int4"], partial)


@pytest.mark.parametrize(("bits", "group"), [(8, torchao_files.GROUP), (4, 4)])
def test_torchao_keeps_embeddings_within_half_a_step(dense, bits, group, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is in the extra 'peers'")
    from transformers import AutoModelForSequenceClassification

    monkeypatch.setattr(torchao_files, "GROUP", group)
    plain = AutoModelForSequenceClassification.from_pretrained(dense, dtype=torch.bfloat16)
    model, num_codes = torchao_files.rounded(dense, bits)
    before = plain.get_input_embeddings().weight.detach().float()
    after = model.get_input_embeddings().weight.dequantize().float()
    step = 2 * before.abs().amax(1, keepdim=True) / (2**bits - 1)
    assert num_codes > before.numel()
    assert ((after - before).abs() <= 0.51 * step + 0.01 * before.abs()).all()
    assert not torch.equal(after, before)
