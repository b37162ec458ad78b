"""Whole experts dropped by what their outputs weigh, against sums over the tokens of each written out."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds.cli.main import main
from pst_ds.errors import InputError
from pst_ds.nn.model_structure import stack_names
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.whole_experts import drop_experts
from tests.nn.expert_families import tiny_model

IDS = torch.randint(0, 48, (4, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([7, 8]), 0)
BATCHES = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS.split(3), MASK.split(3), strict=True)]


def _dropped(model, share):
    return {m.name: m for m in drop_experts(model, share, Calibration(BATCHES, torch.device("cpu"), torch.float32))}


@torch.no_grad()
def _scores(model, name):
    """The mean of gate times the norm of the output over the tokens of each expert, by the family's own functions."""
    experts, seen = model.get_submodule(name), []
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    for batch in BATCHES:
        model(**batch)
    hook.remove()
    hidden, chosen, gates = (torch.cat(parts) for parts in zip(*seen, strict=True))
    real, found = torch.cat([batch["attention_mask"].flatten().bool() for batch in BATCHES]), []
    for expert in range(experts.num_experts):
        x, weighed = hidden, []
        for attribute in stack_names(experts):
            weight = getattr(experts, attribute)[expert]
            x = x @ (weight if experts.is_transposed else weight.t())
            x = x + getattr(experts, f"{attribute}_bias")[expert] if experts.has_bias else x
            x = experts._apply_gate(x) if attribute == "gate_up_proj" else x
        for token, slot in (chosen == expert).nonzero().tolist():
            weighed += [float(gates[token, slot] * x[token].norm())] if real[token] else []
        found.append(sum(weighed) / max(1, len(weighed)))
    return torch.tensor(found)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_experts_that_weigh_least_go_with_their_rows_of_the_router(family, tmp_path):
    model = tiny_model(family)
    before, base = copy.deepcopy(model), dict(tiny_model(family).state_dict())
    dropped = _dropped(model, 0.3)
    assert len(dropped) == (1 if family == "deepseek_v3" else 2)
    for name, module in dropped.items():
        expected = _scores(before, name)
        torch.testing.assert_close(torch.tensor(module.scores), expected, rtol=1e-4, atol=1e-6)
        assert list(module.kept) == expected.argsort(stable=True)[1:].sort().values.tolist()
    kept = {name.rpartition(".")[0]: list(module.kept) for name, module in dropped.items()}
    for name, tensor in model.state_dict().items():
        of_block = next((numbers for parent, numbers in kept.items() if name.startswith(parent + ".")), None)
        is_cut = of_block is not None and base[name].shape[:1] == (4,) and "shared" not in name
        assert torch.equal(tensor, base[name][of_block] if is_cut else base[name]), name
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_what_cannot_be_dropped_is_refused():
    with pytest.raises(InputError, match="leaves 1 experts, and the router gives a token to 2"):
        _dropped(tiny_model("mixtral"), 0.75)
    model = tiny_model("deepseek_v3")
    model.config.n_group = 2
    with pytest.raises(InputError, match="2 groups of experts"):
        _dropped(model, 0.25)
    with pytest.raises(InputError, match="no stacks of experts"):
        _dropped(torch.nn.Linear(2, 2), 0.25)


def test_the_verb_writes_a_folder_that_is_trained_from(tmp_path, capsys):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(tmp_path / "base")
    place = ["--set", f"model.path={json.dumps(str(tmp_path / 'base'))}"]
    command = ["prune", "tests/data/causal_lm.toml", *place, "--method", "reap", "--out", str(tmp_path / "out")]
    assert main([*command, "--samples", "4", "--sparsity", "0.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["experts"], said["experts_before"]) == (2, 4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 2
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name, module in record["modules"].items():
        for new, old in enumerate(module["kept"]):
            file = name.replace("mlp", "block_sparse_moe")
            assert torch.equal(weights[f"{file}.{new}.w2.weight"], base[f"{file}.{old}.w2.weight"])
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert main([*command, "--pattern", "2:4"]) == 2
    assert "--pattern" in capsys.readouterr().err
