"""The benchmark at Llama shapes: its object on two small layers, random values, and files for llama.cpp."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tools.bench import shapes
from tools.bench.peers.random_models import OURS, SHAPES, gguf_bytes, gguf_tensors, random_codes, write_gguf

TINY = replace(SHAPES["1.2B"], hidden=256, inner=512, layers=8, heads=4, key_value_heads=2, head=64, vocabulary=300)


@pytest.mark.parametrize("kind", OURS)
def test_codes_have_the_sparsity_of_their_kind(kind):
    weights = OURS[kind]
    codes = random_codes(1000, 256, weights, torch.Generator().manual_seed(0))
    assert codes.shape == (1000, 256)
    assert int(codes.abs().max()) == (1 << (weights.bits - 1)) - 1
    kept = (codes != 0).float()
    if weights.pattern == "8:16":
        assert bool((kept.view(1000, 16, 16).sum(dim=2) == 8).all())
    assert float(kept.mean()) == pytest.approx(1.0 if weights.pattern == "dense" else 0.5, abs=0.01)


def test_its_object_has_a_row_per_task_and_the_share_of_the_bandwidth(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(SHAPES, "1.2B", TINY)
    arguments = ["--layers", "2", "--only", "50 % int4", "Q4_0", "--threads", "1", "--repeats", "1", "--json"]
    arguments += ["--prompt-tokens", "5", "--new-tokens", "2", "--buffer-megabytes", "2"]
    monkeypatch.setattr(sys, "argv", ["shapes", *arguments])
    shapes.main()
    printed = capsys.readouterr()
    assert "only pst-ds is measured: llama.cpp needs" in printed.err
    report = json.loads(printed.out.splitlines()[-1])
    assert {"hardware", "instructions", "prompt_tokens"} <= set(report["conditions"])
    assert report["memory"][0]["copy_gb_per_second"] > 0
    rows = {row["task"]: row for row in report["rows"]}
    assert list(rows) == ["prompt", "decode", "decode8"]
    assert {(row["contestant"], row["layers"]) for row in rows.values()} == {("pst-ds 50 % int4", 2)}
    assert "gb_per_second" not in rows["prompt"]
    assert rows["decode8"]["megabytes_per_pass"] > rows["decode"]["megabytes_per_pass"]
    assert rows["decode"]["share_of_read"] > 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_files_hold_the_tensors_that_llama_cpp_expects(kind, is_tied, tmp_path):
    gguf = pytest.importorskip("gguf")
    shape = replace(TINY, is_tied=is_tied)
    write_gguf(shape, kind, tmp_path / "random.gguf", context=64)
    reader = gguf.GGUFReader(tmp_path / "random.gguf")
    read = {tensor.name: tensor for tensor in reader.tensors}
    expected = list(gguf_tensors(shape, kind))
    assert list(read) == [tensor.name for tensor in expected]
    total, per_token = gguf_bytes(shape, kind)
    assert sum(int(tensor.n_bytes) for tensor in read.values()) == total
    assert (per_token == total) == is_tied
    for tensor in expected:
        values = gguf.dequantize(read[tensor.name].data, read[tensor.name].tensor_type)
        assert values.shape == ((tensor.rows, tensor.columns) if tensor.rows else (tensor.columns,))
        assert bool(np.isfinite(values).all())
    finer = [name for name, tensor in read.items() if "ffn_down" in name and tensor.tensor_type.name == "Q6_K"]
    # use_more_bits of 8 layers: the first, the last, and each third between them
    numbers = [0, 3, 6, 7] if kind == "Q4_K_M" else []
    assert finer == [f"blk.{number}.ffn_down.weight" for number in numbers]
