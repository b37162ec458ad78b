"""``--budgets owl`` with every method: zeros go where weights stand out least, as many in all as without."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pst_ds.cli.main import main
from pst_ds.config.pst import Override, PSTConfig
from pst_ds.core.one_shot.budgets import zeros_by_outliers
from pst_ds.errors import InputError
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.budgets import require_room, rules_by_outliers
from pst_ds.prune.model import prune_layers
from pst_ds.prune.rules import layer_rules, settings_for
from tests.nn.expert_families import tiny_model

RUN_FILE = "tests/data/causal_lm.toml"
CPU, FP32 = torch.device("cpu"), torch.float32
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "encoder.layer"}


def _rules(model, method="wanda", pattern="row", share=0.6, **settings):
    config = settings_for(model, PSTConfig(**settings), method, pattern)
    return layer_rules(resolve_targets(model, config), method, share)


def _uneven(tiny, family):
    """A model of which block 1 has a few inputs that are much larger than the others."""
    model = tiny(family)
    for target in resolve_targets(model, PSTConfig()):
        if target.name.startswith(f"{BLOCKS[family]}.1."):
            inputs = 0 if target.layout.transposed else 1
            target.module.weight.data.index_fill_(inputs, torch.tensor([3]), 4.0)
    return model


@torch.no_grad()
def _outliers_of_whole_passes(model, family, batches):
    """By block: the share of weights whose |w| times the norm of their input is above 5 times the block's mean."""
    layers = {target.name: target for target in resolve_targets(model, PSTConfig())}
    given = {name: [] for name in layers}
    mask = [None]

    def hook(name):
        def take(module, args):
            x = args[0].reshape(-1, args[0].shape[-1])
            given[name].append(x if mask[0] is None else x[mask[0]])

        return take

    hooks = [target.module.register_forward_pre_hook(hook(name)) for name, target in layers.items()]
    for batch in batches:
        mask[0] = batch["attention_mask"].bool().flatten() if "attention_mask" in batch else None
        model(**batch)
    for handle in hooks:
        handle.remove()
    scores = {}
    for name, target in layers.items():
        weight = target.module.weight.t() if target.layout.transposed else target.module.weight
        block = int(name.removeprefix(BLOCKS[family] + ".").partition(".")[0])
        scores.setdefault(block, []).append((weight.abs() * torch.cat(given[name]).norm(dim=0)).flatten().double())
    joined = [torch.cat(scores[block]) for block in sorted(scores)]
    return [float((one > 5 * one.mean()).double().mean()) for one in joined]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_outliers_are_those_of_the_dense_model_and_the_model_stays_as_it_was(tiny, batches, family):
    model = _uneven(tiny, family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rules, outliers = rules_by_outliers(model, _rules(model), Calibration(batches(family), CPU, FP32), spread=0.08)
    assert outliers == pytest.approx(_outliers_of_whole_passes(model, family, batches(family)), abs=2e-4)
    assert outliers[1] == max(outliers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for rule in rules:
        same = [r for r in rules if r.target.layout == rule.target.layout]
        size = rule.target.layout.in_features
        counts = zeros_by_outliers(
            [outliers[int(r.target.name.removeprefix(BLOCKS[family] + ".").partition(".")[0])] for r in same],
            int(0.6 * size), size, 0.08,
        )  # fmt: skip
        assert int(rule.sparsity * size) == counts[same.index(rule)]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("method", "pattern"),
    [("magnitude", "matrix"), ("wanda", "row"), ("wanda", "4x2"), ("sparsegpt", "row"), ("sparsegpt", "matrix"),
     ("alps", "row"), ("alps", "4x2")],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_as_many_weights_go_in_all_as_with_equal_shares(tiny, batches, family, method, pattern):
    even, uneven = _uneven(tiny, family), _uneven(tiny, family)
    layers = prune_layers(
        even, _rules(even, method, pattern), method, Calibration(batches(family), CPU, FP32)
    )  # fmt: skip
    rules, _ = rules_by_outliers(
        uneven, _rules(uneven, method, pattern), Calibration(batches(family), CPU, FP32), spread=0.1
    )
    moved = prune_layers(uneven, rules, method, Calibration(batches(family), CPU, FP32))
    assert sum(layer.pruned for layer in moved) == sum(layer.pruned for layer in layers)
    assert [layer.pruned for layer in moved] != [layer.pruned for layer in layers]
    for shape in {layer.shape for layer in layers}:
        one, two = (sum(layer.pruned for layer in each if layer.shape == shape) for each in (layers, moved))
        assert one == two
    for layer, other in zip(layers, moved, strict=True):
        assert abs(layer.pruned - other.pruned) <= 0.1 * layer.shape[0] * layer.shape[1]
        assert other.pruned < layer.pruned or f"{BLOCKS[family]}.1." not in layer.name


def test_experts_count_by_their_own_tokens():
    model = tiny_model("mixtral")
    ids = torch.randint(0, 48, (6, 9), generator=torch.Generator().manual_seed(1))
    rules = _rules(model)
    found, outliers = rules_by_outliers(model, rules, Calibration([{"input_ids": ids}], CPU, FP32), spread=0.2)
    assert len(outliers) == 2
    names = [rule.target.name for rule in found if rule.target.is_stack]
    assert len(names) == 4
    for first, second in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        size = first.target.layout.in_features
        assert int(first.sparsity * size) + int(second.sparsity * size) == 2 * int(0.6 * size)


def test_layers_with_a_share_of_their_own_or_a_fixed_one_keep_it(tiny, batches):
    model = _uneven(tiny, "llama")
    overrides = (
        Override(modules=("down_proj",), final_sparsity=0.3),
        Override(modules=("up_proj",), pattern="2:4", final_sparsity=0.5),
    )
    rules = _rules(model, overrides=overrides)
    found, _ = rules_by_outliers(model, rules, Calibration(batches("llama"), CPU, FP32), spread=0.08)
    for before, after in zip(rules, found, strict=True):
        keeps = before.target.name.endswith(("down_proj", "up_proj"))
        assert (before == after) or not keeps
    assert [rule.sparsity for rule in rules] != [rule.sparsity for rule in found]


@pytest.mark.parametrize(
    ("pattern", "share", "spread", "said"),
    [("2:4", 0.5, 0.08, "pattern 2:4 has a sparsity of 0.5 in every layer"), ("row", 0.95, 0.08, "at most 0.05"),
     ("row", 0.05, 0.08, "at most 0.05"), ("row", 0.5, 0.0, "above 0"), ("row", 0.5, float("nan"), "above 0"),
     ("row", 0.0, 0.08, "at most 0")],
)  # fmt: skip
def test_shares_that_cannot_move_are_refused(tiny, pattern, share, spread, said):
    with pytest.raises(InputError, match=said):
        require_room(_rules(tiny("llama"), pattern=pattern, share=share), spread)


def test_what_is_done_is_in_the_record(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--method", "magnitude", "--budgets", "owl", "--spread", "0.1", "--samples", "12"]
    assert main(["prune", RUN_FILE, *words, "--sparsity", "0.6", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = json.loads((out / "pruning.json").read_text())
    assert (record["budgets"], record["spread"], record["samples"]) == ("owl", 0.1, 12)
    assert record["outliers"] == result["outliers"]
    assert len(record["outliers"]) == 2
    of_layers = {layer["name"]: layer for layer in record["layers"]}
    model = AutoModelForCausalLM.from_pretrained(out)
    total = 0
    for name, layer in of_layers.items():
        weight = model.get_submodule(name).weight
        zeros = int((weight == 0).sum())
        assert zeros == layer["pruned"] == int(layer["sparsity_requested"] * weight.numel())
        total += zeros - int(0.6 * weight.numel())
    assert total == 0
