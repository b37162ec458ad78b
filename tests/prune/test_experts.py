"""One-shot pruning of stacks of experts: every matrix of every expert loses its share."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pst_ds.cli.main import main
from tests.nn.expert_families import tiny_model

RUN_FILE = "tests/data/causal_lm.toml"


def _base(folder, family):
    tiny_model(family).save_pretrained(folder)
    AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_magnitude_prunes_the_smallest_of_every_expert(family, tmp_path, capsys):
    base = _base(tmp_path / "base", family)
    out = tmp_path / "out"
    command = ["prune", RUN_FILE, "--set", f"model.path={json.dumps(str(tmp_path / 'base'))}", "--method", "magnitude"]
    assert main([*command, "--sparsity", "0.6", "--pattern", "matrix", "--out", str(out), "--json"]) == 0
    pruned = load_file(out / "model.safetensors")
    assert pruned.keys() == base.keys()
    names = [name for name in base if "experts" in name and not name.endswith("bias")]
    assert names
    for name in names:
        experts = pruned[name] if base[name].dim() == 3 else pruned[name].unsqueeze(0)
        for expert, before in zip(experts, base[name].view(experts.shape), strict=True):
            cut = before.abs().flatten().sort().values[int(0.6 * before.numel()) - 1]
            assert torch.equal(expert, torch.where(before.abs() > cut, before, 0.0)), name
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["num_layers"] == 2 * (4 + 2)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_methods_that_need_the_inputs_of_each_expert_refuse_by_name(method, tmp_path, capsys):
    _base(tmp_path / "base", "mixtral")
    command = ["prune", RUN_FILE, "--set", f"model.path={json.dumps(str(tmp_path / 'base'))}", "--method", method]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "mlp.experts" in capsys.readouterr().err
