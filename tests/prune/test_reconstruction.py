"""``--reconstruct``: kept weights of every block nearer to the dense block's outputs, and nothing else changed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from pst_ds.cli.main import main
from pst_ds.config.pst import PSTConfig
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune import model as pruning
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.model import prune_layers
from pst_ds.prune.rules import layer_rules, settings_for
from tests.nn.expert_families import tiny_model
from tests.pairs import every_pair

RUN_FILE = "tests/data/causal_lm.toml"
CPU, FP32 = torch.device("cpu"), torch.float32


def _prune(model, method, batches, passes, dtype=FP32, pattern=""):
    config = settings_for(model, PSTConfig(), method, pattern)
    rules = layer_rules(resolve_targets(model, config), method, 0.5)
    return prune_layers(model, rules, method, Calibration(batches, CPU, dtype), reconstruct=passes)


@torch.no_grad()
def _first_block_outputs(model, stack, batches):
    """Of real tokens, (tokens, width)."""
    block, seen, mask = model.get_submodule(stack)[0], [], None

    def take(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(hidden.flatten(0, -2) if mask is None else hidden[mask])

    hook = block.register_forward_hook(take)
    for batch in batches:
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        model(**batch)
    hook.remove()
    return torch.cat(seen)


@every_pair
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize(
    ("family", "stack"), [("llama", "model.layers"), ("gpt2", "transformer.h"), ("bert", "encoder.layer")]
)
def test_a_blocks_outputs_are_nearer_to_the_dense_ones(tiny, batches, family, stack, method):
    dense, plain, fitted = (tiny(family) for _ in range(3))
    before = _prune(plain, method, batches(family), 0, pattern="2:4")
    after = _prune(fitted, method, batches(family), 8, pattern="2:4")
    assert before == after
    wanted, one, two = (_first_block_outputs(model, stack, batches(family)) for model in (dense, plain, fitted))
    assert (two - wanted).square().mean() < 0.9 * (one - wanted).square().mean()
    pruned = {f"{layer.name}.weight" for layer in after}
    for (name, weight), of_dense in zip(fitted.named_parameters(), dense.parameters(), strict=True):
        assert weight.requires_grad
        if name not in pruned:
            assert torch.equal(weight, of_dense), name
        elif f"{stack}.0." in name:  # the blocks after it are given other inputs, and so may be pruned otherwise
            assert torch.equal(weight == 0, plain.get_parameter(name) == 0)
            assert bool((weight[weight == 0].view(torch.int32) == 0).all())  # +0.0


def test_no_blocks_error_rises_and_none_is_changed_where_it_would(tiny, batches, monkeypatch):
    fits = []

    class Watched(pruning.BlockFit):
        def fit(self, weights, *more, **options):
            held = [weight.detach().clone() for weight in weights]
            found = super().fit(weights, *more, **options)
            fits.append((self.errors, all(torch.equal(a, b) for a, b in zip(held, found, strict=True))))
            assert all(torch.equal(weight, values) for weight, values in zip(weights, found, strict=True))
            return found

    monkeypatch.setattr(pruning, "BlockFit", Watched)
    _prune(tiny("llama"), "wanda", batches("llama"), 2)
    assert all(after < before and not same for (before, after), same in fits)
    assert len(fits) == 3
    fits.clear()
    monkeypatch.setattr("pst_ds.prune.reconstruction.RATE", 1e3)
    _prune(tiny("llama"), "wanda", batches("llama"), 2)
    assert all(after == before and same for (before, after), same in fits)


def test_blocks_after_a_fit_that_was_taken_back_get_the_same_inputs(tiny, batches, monkeypatch):
    monkeypatch.setattr("pst_ds.prune.reconstruction.RATE", 0.0)
    plain, fitted = tiny("llama"), tiny("llama")
    _prune(plain, "sparsegpt", batches("llama"), 0)
    _prune(fitted, "sparsegpt", batches("llama"), 2)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), fitted.parameters(), strict=True))


def test_passes_in_half_precision_move_weights_too(tiny, batches):
    dense, plain, fitted = (tiny("llama") for _ in range(3))
    _prune(plain, "wanda", batches("llama"), 0, torch.bfloat16)
    _prune(fitted, "wanda", batches("llama"), 8, torch.bfloat16)
    wanted, one, two = (_first_block_outputs(m, "model.layers", batches("llama")) for m in (dense, plain, fitted))
    assert (two - wanted).square().mean() < 0.95 * (one - wanted).square().mean()


def test_experts_are_fitted_with_the_rest_of_their_block():
    ids = torch.randint(0, 48, (6, 9), generator=torch.Generator().manual_seed(1))
    texts = [{"input_ids": each} for each in ids.split(3)]
    dense, plain, fitted = (tiny_model("mixtral") for _ in range(3))
    before, after = _prune(plain, "wanda", texts, 0), _prune(fitted, "wanda", texts, 8)
    assert [layer.pruned for layer in before] == [layer.pruned for layer in after]
    wanted, one, two = (_first_block_outputs(model, "model.layers", texts) for model in (dense, plain, fitted))
    assert (two - wanted).square().mean() < 0.95 * (one - wanted).square().mean()
    stack = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(fitted.get_parameter(stack) == 0, plain.get_parameter(stack) == 0)
    assert not torch.equal(fitted.get_parameter(stack), plain.get_parameter(stack))


def test_what_is_done_is_in_the_record(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--method", "magnitude", "--reconstruct", "2", "--samples", "12", "--out", str(out), "--json"]
    assert main(["prune", RUN_FILE, *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = json.loads((out / "pruning.json").read_text())
    assert record["reconstruct"] == result["reconstruct"] == 2
    assert all(layer["zeros"] == layer["pruned"] for layer in record["layers"])


def test_a_block_that_returns_several_values_is_fitted_to_the_first():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x).tanh(), x

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.layers:
                x, _ = block(x)
            return x

    torch.manual_seed(0)
    model = Stack()
    layers = _prune(model, "wanda", [{"x": torch.randn(20, 8)}], 4, pattern="2:4")
    assert [layer.zeros for layer in layers] == [32, 32]


class _ChoosesTokens(nn.Module):
    """A layer whose weight decides which tokens another one sees, as an indexer of sparse attention does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.indexer = nn.Linear(inner.in_features, 1, bias=False)

    def forward(self, x):
        chosen = self.indexer(x).detach() > 0
        return self.inner(torch.where(chosen, x, 0.5 * x))


def test_a_weight_without_influence_on_the_outputs_stays_unchanged(tiny, batches):
    model = tiny("llama")
    for block in model.model.layers:
        block.mlp.up_proj = _ChoosesTokens(block.mlp.up_proj)
    model.requires_grad_(True)
    indexers = [model.model.layers[0].mlp.up_proj.indexer]  # the inputs of the next block differ
    wanda = _pruned_by_wanda(indexers, model, batches("llama"), passes=0)
    fitted = _pruned_by_wanda(indexers, model, batches("llama"), passes=2)
    assert all(torch.equal(one, two) for one, two in zip(wanda, fitted, strict=True))


def _pruned_by_wanda(layers, model, batches, passes):
    """Return the weights of ``layers`` after pruning a copy of ``model``."""
    names = {id(module): name for name, module in model.named_modules()}
    copied = copy.deepcopy(model)
    _prune(copied, "wanda", batches, passes)
    return [copied.get_submodule(names[id(layer)]).weight for layer in layers]
