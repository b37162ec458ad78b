"""Matrices of a pruned model that have lost their zeros count towards the sparsity, and are named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pst_ds.cli.main import main
from pst_ds.file_names import MANIFEST_FILE
from tests.writing.conftest import tiny_llama

NAMES = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A Llama at 50 % sparsity in whose q_proj and v_proj an adapter was merged; its sparsity over all 14 matrices."""
    path = tmp_path_factory.mktemp("merged")
    torch.manual_seed(0)
    model = tiny_llama()
    zeros = weights = 0
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".layers." in name and param.dim() == 2:
                if not any(part in name for part in NAMES):
                    param.view(-1)[::2] = 0.0
                zeros += int((param == 0).sum())
                weights += param.numel()
    model.save_pretrained(path)
    return path, zeros / weights


def _json_of(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]), printed


def test_export_verify_and_inspect_count_and_name_refilled_matrices(merged, tmp_path, capsys):
    source, sparsity = merged
    wanted = sorted(f"model.layers.{i}.self_attn.{name}.weight" for i in range(2) for name in NAMES)
    out = tmp_path / "packed"
    for words in (
        ["export", source, "--format", "bitmask", "--out", out],
        ["verify", out],
        ["inspect", out],
        ["inspect", source],
    ):
        facts, printed = _json_of(capsys, *words)
        assert facts["sparsity_measured"] == pytest.approx(sparsity), words
        assert sorted(facts["refilled"]) == wanted, words
        assert "without pruned weights, although others are pruned: 4 matrices" in printed


def test_a_record_of_pruning_tells_refilled_matrices_exactly(tmp_path, capsys):
    """Half of a matrix filled again is not dense, and still has fewer zeros than recorded."""
    root = Path(__file__).resolve().parents[2]
    pruned = tmp_path / "pruned"
    words = ["prune", root / "tests/data/causal_lm.toml", "--method", "magnitude", "--sparsity", "0.5", "--out", pruned]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*map(str, words), "--quiet"]) == 0
    facts, _ = _json_of(capsys, "inspect", pruned)
    assert facts.get("refilled") is None
    tensors = load_file(pruned / "model.safetensors")
    name = next(name for name in tensors if name.endswith("0.mlp.up_proj.weight"))
    weight = tensors[name]
    weight[: len(weight) // 2] += 1.0
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    facts, _ = _json_of(capsys, "inspect", pruned)
    assert facts["refilled"] == [name.removesuffix(".weight")]
    assert facts["sparsity_measured"] < 0.5
    facts, _ = _json_of(capsys, "export", pruned, "--format", "bitmask", "--out", tmp_path / "packed")
    assert facts["refilled"] == [name]
    shutil.copy(tmp_path / "packed" / MANIFEST_FILE, tmp_path)
