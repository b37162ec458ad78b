"""The benchmark of decoding and the model it is of: pruning, ratios, and its object on a tiny model."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tools.bench import decode
from tools.fetch_smollm2 import magnitude_pruned, prune, pruned_folder

ROOT = Path(__file__).resolve().parents[2]


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_the_smallest_weights_become_zero(rows, columns, sparsity, seed):
    weight = np.random.default_rng(seed).integers(-4, 5, (rows, columns)).astype(np.float32)  # with ties
    pruned = magnitude_pruned(torch.from_numpy(weight), sparsity).numpy()
    order = sorted(range(weight.size), key=lambda i: (abs(weight.flat[i]), i))
    expected = weight.copy()
    expected.flat[order[: round(sparsity * weight.size)]] = 0.0
    assert np.array_equal(pruned, expected)


def test_tied_embeddings_are_not_pruned():
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tests/data/tiny-llama")
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight = embedding
    whole = embedding.detach().clone()
    prune(model, 0.75)
    assert torch.equal(embedding, whole)
    assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == round(0.75 * 60 * 32)


def test_rates_are_also_relative_to_both_dense_variants():
    def rates(decoded):
        return {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": decoded}

    measured = {"dense": rates(10.0), "prepacked": rates(20.0), "bitmask-50": rates(25.0), "bitmask-80": rates(28.9)}
    rows = {row["model"]: row for row in decode.speed_rows(measured, 2)}
    assert rows["bitmask-50"]["decode_over_prepacked"] == pytest.approx(1.25)
    assert rows["bitmask-80"]["decode_over_dense"] == pytest.approx(2.89)
    assert all(row["threads"] == 2 for row in rows.values())


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """The folder of the models with a tiny one in the place of the real."""
    top = tmp_path_factory.mktemp("models")
    shutil.copytree(ROOT / "tests/data/tiny-llama", top / "dense")
    return top


def test_packed_folder_holds_the_pruned_weights(top):
    packed = decode.packed_folder(top, 0.5)
    assert (packed.path, packed.format) == (top / "bitmask-50", "bitmask")
    zeros = load_file(pruned_folder(top, 0.5) / "model.safetensors")
    loaded = packed.load("dense").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in zeros.items())


def test_it_prints_its_object(top, monkeypatch, capsys):
    arguments = ["--json", "--sparsity", "0.5", "--threads", "1", "--repeats", "1"]
    arguments += ["--prompt-tokens", "5", "--new-tokens", "3", "--folder", str(top)]
    monkeypatch.setattr(sys, "argv", ["decode", *arguments])
    decode.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"hardware", "threads_per_rank", "versions", "sparse_kernel"} <= set(found["conditions"])
    assert [row["model"] for row in found["rows"]][-1] == "bitmask-50"
