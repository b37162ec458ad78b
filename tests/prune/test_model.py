"""Pruning block by block, against whole forward passes of the model with the blocks before already pruned."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from pst_ds.config.pst import Override, PSTConfig
from pst_ds.core.one_shot.shares import ALONE
from pst_ds.errors import InputError
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune import model as pruning
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.layer import LayerPruning, inputs_of, prune_together
from pst_ds.prune.model import prune_layers
from pst_ds.prune.rules import layer_rules, settings_for
from tests.pairs import every_pair

FAMILIES = [
    "llama", "qwen2", "gemma3", "gpt2", "opt", "gpt_neox", "bert", "roberta", "distilbert", "deberta_v2"
]  # fmt: skip
CPU, FP32 = torch.device("cpu"), torch.float32


def _rules(model, method, pattern="", share=0.5, **settings):
    config = settings_for(model, PSTConfig(**settings), method, pattern)
    return layer_rules(resolve_targets(model, config), method, share)


def _prune(model, rules, method, batches, dtype=FP32):
    return prune_layers(model, rules, method, Calibration(batches, CPU, dtype))


def _block(name):
    return next(int(part) for part in name.split(".") if part.isdigit())


def _inputs_of_whole_passes(model, rules, batches):
    """By name of each layer: its inputs (tokens, I) in forward passes of the whole model, padding taken out."""
    found = {rule.target.name: [] for rule in rules}
    hooks, mask = [], None

    def hook(name):
        def take(module, args):
            x = args[0].detach()
            whole = mask is None or x.shape[:2] != mask.shape  # DeBERTa's embeddings of relative positions
            found[name] += [x.reshape(-1, x.shape[-1]) if whole else x[mask]]

        return take

    for rule in rules:
        hooks.append(rule.target.module.register_forward_pre_hook(hook(rule.target.name)))
    for batch in batches:
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        with torch.no_grad():
            model(**batch)
    for handle in hooks:
        handle.remove()
    return {name: torch.cat(inputs) for name, inputs in found.items()}


def _pruned_by_whole_passes(model, rules, method, batches, sums):
    """Prunes ``model`` in place, a whole forward pass for every block; the inputs by name, in double precision.

    Each layer is pruned by ``sums``: its own inputs' are summed in another order, which decides between near-ties.
    """
    expected = {}
    for _, block in itertools.groupby(rules, lambda rule: _block(rule.target.name)):
        block = list(block)
        for name, x in _inputs_of_whole_passes(model, block, batches).items():
            expected[name] = x.double()
        for rule in block:
            total = sums[rule.target.name]
            prune_together([LayerPruning(rule, ALONE)], inputs_of(method, total))
    return expected


def _assert_same_sums(found, wanted, msg=None):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()), msg=msg)


def _prune_both(monkeypatch, one, two, method, batches, other_batches):
    """Prunes two models, each on its batches: the sums must agree within rounding, and then the results to the bit.

    The second is pruned by the first's sums, since the order of a sum decides between near-ties.
    """
    seen = {}

    def recording(gatherer, name):
        seen[name] = gatherer.sums[name]
        return gatherer.sums[name]

    def comparing(gatherer, name):
        wanted = seen.pop(name)
        assert gatherer.sums[name].num_tokens == wanted.num_tokens
        _assert_same_sums(gatherer.sums[name].total, wanted.total, name)
        return wanted

    for model, given, function in ((one, batches, recording), (two, other_batches, comparing)):
        monkeypatch.setattr(pruning, "required", function)
        _prune(model, _rules(model, method), method, given)
    assert not seen
    for (name, left), right in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right), name


@every_pair
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_pass_block_by_block_is_a_whole_pass_for_each(tiny, batches, monkeypatch, family, method):
    model, seen = tiny(family), {}
    other = copy.deepcopy(model)

    def recording(gatherer, name):
        seen[name] = gatherer.sums[name].num_tokens, gatherer.sums[name].total.clone()
        return gatherer.sums[name]

    monkeypatch.setattr(pruning, "required", recording)
    layers = _prune(model, _rules(model, method), method, batches(family))
    sums = {name: total for name, (_, total) in seen.items()}
    expected = _pruned_by_whole_passes(other, _rules(other, method), method, batches(family), sums)

    assert list(seen) == list(expected) == [layer.name for layer in layers]
    for name, x in expected.items():
        total = x.square().sum(0) if method == "wanda" else x.T @ x
        assert seen[name][0] == len(x)
        _assert_same_sums(sums[name], total, name)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_what_several_layers_are_given_is_summed_and_factored_once(tiny, batches, monkeypatch, method):
    calls = []

    def counting(name, function):
        def count(*arguments, **more):
            calls.append((name, arguments[-1].shape[1]))
            return function(*arguments, **more)

        monkeypatch.setattr(pruning, name, count)

    counting("products", pruning.products)
    counting("inputs_of", pruning.inputs_of)
    model = tiny("llama")
    _prune(model, _rules(model, method), method, batches("llama")[:1])
    widths = (32, 32, 32, 48)  # q, k, v; o; gate, up; down
    of_block = [(name, width) for name in ("products", "inputs_of") for width in widths]
    assert calls == of_block * 3


def test_padding_changes_nothing(tiny, batches, monkeypatch):
    padded, alone = tiny("bert"), tiny("bert")
    texts = batches("bert")
    single = [
        {"input_ids": ids[: int(mask.sum())].unsqueeze(0), "attention_mask": mask[mask > 0].unsqueeze(0)}
        for batch in texts
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    _prune_both(monkeypatch, padded, alone, "sparsegpt", texts, single)


@every_pair
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_as_it_was_but_for_the_pruned_weights(tiny, batches, method, dtype):
    model = tiny("gpt2")
    before, config = {name: t.clone() for name, t in model.state_dict().items()}, model.config.to_dict()
    rules = _rules(model, method, "2:4")
    layers = _prune(model, rules, method, batches("gpt2"), dtype)
    pruned = {f"{rule.target.name}.weight" for rule in rules}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        if name in pruned and method in ("magnitude", "wanda"):  # kept weights keep their bits
            assert torch.equal(tensor, before[name] * (tensor != 0))
        elif name in pruned:
            assert not torch.equal(tensor, before[name] * (tensor != 0))
        else:
            assert torch.equal(tensor, before[name]), name
    assert all(layer.zeros == layer.pruned == layer.shape[0] * layer.shape[1] // 2 for layer in layers)
    assert [layer.matrices for layer in layers] == [3, 1, 1, 1] * 3  # c_attn is q, k and v
    assert model.config.to_dict() == config
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__, name
        assert not module._forward_pre_hooks


def test_each_matrix_of_a_fused_layer_has_its_own_count(tiny, batches):
    model = tiny("gpt2")
    for method in ("magnitude", "sparsegpt", "alps"):
        _prune(model, _rules(model, method, "matrix", 0.37), method, batches("gpt2"))
        for block in model.transformer.h:
            weight = block.attn.c_attn.weight.view(32, 3, 32)  # (I, 3, O)
            assert ((weight == 0).sum((0, 2)) == int(0.37 * 32 * 32)).all()
        model = tiny("gpt2")


def test_overrides_and_exclusions_are_those_of_the_run(tiny, batches):
    model = tiny("llama")
    rules = _rules(
        model, "wanda", "2:4", 0.5, exclude_modules=("o_proj", r"layers.1.mlp.up_proj"),
        overrides=(Override(modules=("down_proj",), pattern="matrix", final_sparsity=0.7),),
    )  # fmt: skip
    layers = {layer.name: layer for layer in _prune(model, rules, "wanda", batches("llama"))}
    assert len(layers) == 3 * 6 - 1
    down = layers["model.layers.2.mlp.down_proj"]
    assert (down.pattern, down.sparsity_requested, down.pruned) == ("matrix", 0.7, int(0.7 * 32 * 48))
    assert layers["model.layers.2.mlp.up_proj"].pattern == "2:4"
    assert not (model.model.layers[1].mlp.up_proj.weight == 0).any()


def test_the_result_does_not_depend_on_how_texts_are_batched(tiny, batches, monkeypatch):
    whole, pieces = tiny("llama"), tiny("llama")
    texts = torch.cat([batch["input_ids"] for batch in batches("llama")])
    split = [{"input_ids": ids} for ids in texts.split(5)]
    _prune_both(monkeypatch, whole, pieces, "wanda", [{"input_ids": texts}], split)


@every_pair
@pytest.mark.gpu
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_gpu_prunes_as_the_cpu_does(tiny, batches, method, family):
    """The model stays where it is: a block visits the GPU, and its values come back."""
    here, there = tiny(family), tiny(family)
    _prune(here, _rules(here, method), method, batches(family))
    prune_layers(there, _rules(there, method), method, Calibration(batches(family), torch.device("cuda"), FP32))
    for one, two in zip(here.parameters(), there.parameters(), strict=True):
        assert two.device == CPU
        assert ((one == 0) == (two == 0)).float().mean() > 0.98
        assert (one - two).abs().mean() < 0.02 * one.abs().mean() + 1e-6


# what is refused


def test_layers_outside_blocks_can_be_pruned_by_magnitude_alone(tiny, batches):
    model = tiny("bert")
    targets = {"target_modules": ("query", "pooler.dense")}
    with pytest.raises(InputError, match=r"pooler\.dense is not in a block"):
        _prune(model, _rules(model, "wanda", **targets), "wanda", batches("bert"))
    assert len(_prune(model, _rules(model, "magnitude", **targets), "magnitude", [])) == 4


def test_blocks_that_run_more_than_once_are_refused():
    from transformers import AlbertConfig, AlbertModel

    model = AlbertModel(AlbertConfig(vocab_size=60, embedding_size=16, hidden_size=32, num_hidden_layers=4,
                                     num_attention_heads=4, intermediate_size=48))  # fmt: skip
    with pytest.raises(InputError, match="1 distinct blocks for 4 layers"):
        _prune(model, _rules(model, "wanda"), "wanda", [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


def test_two_stacks_of_blocks_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=60, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(InputError, match=r"2 stacks of blocks \(encoder\.block, decoder\.block\)"):
        _prune(model, _rules(model, "wanda"), "wanda", [])


class _Skips(nn.Module):
    """Two blocks, of which the second never runs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])

    def forward(self, x):
        return self.layers[0](x)


def test_a_block_that_never_runs_is_named():
    model = _Skips()
    with pytest.raises(InputError, match="does not run its block 1 of 2, a Sequential"):
        _prune(model, _rules(model, "wanda"), "wanda", [{"x": torch.randn(3, 8)}])
    assert "forward" not in model.layers[0].__dict__


class _Expert(nn.Module):
    def __init__(self, reached):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reached = reached

    def forward(self, x):
        return self.used(x) + (self.unused(x[:0]).sum() if self.reached else 0.0)


@pytest.mark.parametrize("reached", [True, False])
def test_a_layer_that_is_given_nothing_is_named(reached):
    model = nn.Module()
    model.layers = nn.ModuleList([_Expert(reached)])
    model.forward = lambda x: model.layers[0](x)
    with pytest.raises(InputError, match=r"layers\.0\.unused had no input"):
        _prune(model, _rules(model, "sparsegpt"), "sparsegpt", [{"x": torch.randn(3, 8)}])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_not_finite_are_named(tiny, batches, method):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.self_attn\.q_proj: .* not finite"):
        _prune(model, _rules(model, method), method, batches("llama"))
