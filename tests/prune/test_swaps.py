"""``--swaps`` after every method: masks that leave layers nearer to their outputs, with the same counts."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pst_ds.cli.main import main
from pst_ds.config.pst import PSTConfig
from pst_ds.core.one_shot.gram import DAMPING
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.model import prune_layers
from pst_ds.prune.rules import layer_rules, settings_for
from tests.core.one_shot_references import output_error

RUN_FILE = "tests/data/causal_lm.toml"
METHODS = ["magnitude", "wanda", "sparsegpt", "alps"]


def _prune(model, method, pattern, batches, swaps):
    config = settings_for(model, PSTConfig(), method, pattern)
    rules = layer_rules(resolve_targets(model, config), method, 0.5, swaps=swaps)
    return prune_layers(model, rules, method, Calibration(batches, torch.device("cpu"), torch.float32))


def _first_block_inputs(model, batches):
    """By name of the layers whose inputs no pruned layer is before: (tokens, I)."""
    names = [target.name for target in resolve_targets(model, PSTConfig())]
    first = {name for name in names if ".0." in name and ("q_proj" in name or "c_attn" in name)}
    found = {name: [] for name in first}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0]))
        for name in first
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]) for name, inputs in found.items()}


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # which stores (I, O), with q, k and v in one weight
def test_a_layers_outputs_change_less_and_counts_stay(tiny, batches, family, method, pattern):
    base, plain, swapped = (tiny(family) for _ in range(3))
    before = _prune(plain, method, pattern, batches(family), 0)
    after = _prune(swapped, method, pattern, batches(family), 4)
    assert [(layer.pruned, layer.pattern) for layer in before] == [(layer.pruned, layer.pattern) for layer in after]
    assert all(layer.zeros == layer.pruned for layer in after)
    for name, x in _first_block_inputs(base, batches(family)).items():
        weights = (model.get_submodule(name).weight.detach() for model in (base, plain, swapped))
        weight, one, two = (w if family == "llama" else w.t() for w in weights)
        gram = (x.T @ x).double()
        gram.diagonal().add_(DAMPING * gram.diagonal().mean())
        errors = output_error(one - weight, gram), output_error(two - weight, gram)
        assert errors[1] <= errors[0] * (1 if method == "alps" else 0.97)
        if method in ("magnitude", "wanda"):
            assert torch.equal(two[two != 0], weight[two != 0])  # kept weights keep their bits
        if pattern != "2:4":
            assert torch.equal((one == 0).sum(1), (two == 0).sum(1))
        else:
            assert ((two.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_what_is_done_is_in_the_record(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prune", RUN_FILE, "--method", "magnitude", "--swaps", "2", "--samples", "12", "--out", str(out), "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = json.loads((out / "pruning.json").read_text())
    assert record["swaps"] == result["swaps"] == 2
    assert record["samples"] == 12  # text that magnitude alone does not need
    weight = AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) == int(record["sparsity_requested"] * weight.numel())
