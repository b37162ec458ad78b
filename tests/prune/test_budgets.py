"""``--budgets saliency``: the norms of a plain backward pass, and zeros where the loss loses least."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pst_ds.cli.main import main
from pst_ds.config.pst import Override, PSTConfig
from pst_ds.core.one_shot.shares import ALONE
from pst_ds.errors import InputError
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune.blocks import BlockSource, Calibration, block_of, find_blocks
from pst_ds.prune.budgets import rules_by_saliency
from pst_ds.prune.model import prune_layers
from pst_ds.prune.output_gradients import layer_norms
from pst_ds.prune.rules import layer_rules, settings_for
from tests.nn.expert_families import tiny_model
from tests.pairs import every_pair

RUN_FILE = "tests/data/causal_lm.toml"
CPU, FP32 = torch.device("cpu"), torch.float32


def _rules(model, method="wanda", pattern="row", share=0.6, **settings):
    config = settings_for(model, PSTConfig(**settings), method, pattern)
    return layer_rules(resolve_targets(model, config), method, share)


def _norms(model, batches):
    targets = resolve_targets(model, PSTConfig())
    stack, blocks = find_blocks(model, [target.name for target in targets])
    of_blocks = [{t.name: t for t in targets if block_of(t.name, stack) == index} for index in range(len(blocks))]
    return layer_norms(model, BlockSource("", blocks), of_blocks, Calibration(batches, CPU, FP32))


@pytest.mark.parametrize("number", [1, 7, 8, 9, 30])
def test_ranks_share_a_limited_number_of_pieces_from_all_parts(number):
    batches = [{"input_ids": torch.full((1, 512), i)} for i in range(number)]
    found = []
    for ranks in (1, 2, 3):
        shares = [Calibration(batches, CPU, FP32, replace(ALONE, own=own, number=ranks)) for own in range(ranks)]
        found.append(sorted(batch for share in shares for batch, _ in share.own_pieces(8)))
    assert found[0] == found[1] == found[2]
    assert min(number, 4) <= len(found[0]) <= 8
    assert found[0][-1] >= number - number // 4 - 1


def _plain_norms(model, batches):
    """The same of torch's own backward pass through the whole model."""
    inputs, outputs, handles = {}, {}, []

    def hook(name):
        def take(module, args, output):
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            inputs[name] = inputs.get(name, 0.0) + rows.square().sum(0)

            def add(gradient):
                outputs[name] = outputs.get(name, 0.0) + gradient.reshape(-1, gradient.shape[-1]).square().sum(0)

            output.register_hook(add)

        return take

    for target in resolve_targets(model, PSTConfig()):
        handles.append(target.module.register_forward_hook(hook(target.name)))
    for batch in batches:
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: (inputs[name].sqrt(), outputs[name].sqrt()) for name in inputs}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma3", "bamba"])
def test_norms_are_those_of_a_plain_backward_pass(tiny, batches, family):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, expected = _norms(model, batches(family)), _plain_norms(model, batches(family))
    assert found.keys() == expected.keys()
    for name, (inputs, outputs) in expected.items():
        torch.testing.assert_close(found[name].inputs, inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].outputs, outputs, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in block.__dict__ for block in find_blocks(model, list(found))[1])


def test_norms_keep_no_batch_in_memory(tiny, batches):
    for name, norms in _norms(tiny("llama"), batches("llama")).items():
        assert norms.inputs.grad_fn is None, f"{name}: the graphs of all batches hang on a sum"
        assert norms.outputs.grad_fn is None, name


def test_padding_and_the_first_tokens_of_documents_are_not_predicted(tiny):
    model, ids = tiny("llama"), torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = _norms(model, [{"input_ids": ids, "attention_mask": mask}])
    plain = _norms(model, [{"input_ids": ids[:, :6]}])
    for name, norms in plain.items():
        torch.testing.assert_close(padded[name].inputs, norms.inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded[name].outputs, norms.outputs, rtol=1e-3, atol=1e-5)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    apart = _norms(model, [{"input_ids": ids, "position_ids": places}])
    other = ids.clone()
    other[:, 4] = 5  # no loss is about this token, and what follows it is
    assert not torch.equal(
        apart["model.layers.2.mlp.down_proj"].outputs,
        _norms(model, [{"input_ids": other, "position_ids": places}])["model.layers.2.mlp.down_proj"].outputs,
    )


def _uneven(tiny, family):
    """A model whose block 1 does next to nothing, and of which one output is hardly looked at."""
    model = tiny(family)
    with torch.no_grad():
        for target in resolve_targets(model, PSTConfig()):
            if ".1." in target.name:
                target.module.weight.mul_(1e-3)
    return model


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("method", "pattern"),
    [("magnitude", "matrix"), ("wanda", "row"), ("wanda", "4x2"), ("sparsegpt", "matrix"), ("alps", "matrix")],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_go_where_the_loss_loses_least(tiny, batches, family, method, pattern):
    text, model, other = batches(family), _uneven(tiny, family), _uneven(tiny, family)
    equal = prune_layers(other, _rules(other, method, pattern), method, Calibration(text, CPU, FP32))
    moved = rules_by_saliency(model, _rules(model, method, pattern), Calibration(text, CPU, FP32))
    layers = prune_layers(model, moved, method, Calibration(text, CPU, FP32))
    pruned, expected = (sum(layer.pruned for layer in each) for each in (layers, equal))
    assert expected - 128 < pruned <= expected  # less than a weight of every row of a layer, or a few of its blocks
    shares = {layer.name: layer.pruned / (layer.shape[0] * layer.shape[1]) for layer in layers}
    idle = [share for name, share in shares.items() if ".1." in name]
    assert min(idle) > max(share for name, share in shares.items() if ".1." not in name)
    assert max(idle) <= 0.95


@every_pair
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_count_by_what_the_loss_makes_of_them(tiny, batches, family, method):
    model, text = tiny(family), batches(family)
    before = {t.name: t.module.weight.detach().clone() for t in resolve_targets(model, PSTConfig())}
    rules = rules_by_saliency(model, _rules(model, method, "matrix"), Calibration(text, CPU, FP32))
    prune_layers(model, rules, method, Calibration(text, CPU, FP32))
    for rule in rules:
        layout, after = rule.target.layout, rule.target.module.weight.detach()
        kept = after != 0
        assert torch.equal(after[kept], before[rule.target.name][kept])  # to the bit
        if method == "magnitude" and layout.num_matrices == 1:
            factors = rule.output_factors if layout.transposed else rule.output_factors.unsqueeze(1)
            scores = before[rule.target.name].abs() * factors
            assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_methods_that_change_weights_are_as_exact_with_factors(tiny, batches, method):
    text = batches("llama")
    plain, weighed = tiny("llama"), tiny("llama")
    alike = [replace(rule, output_factors=torch.full((rule.target.layout.out_features,), 4.0))
             for rule in _rules(weighed, method, "matrix")]  # fmt: skip
    prune_layers(plain, _rules(plain, method, "matrix"), method, Calibration(text, CPU, FP32))
    prune_layers(weighed, alike, method, Calibration(text, CPU, FP32))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, weighed.state_dict()[name]), name


def test_layers_with_a_share_of_their_own_keep_it(tiny, batches):
    model = tiny("llama")
    rules = _rules(model, overrides=(Override(modules=("down_proj",), final_sparsity=0.3),))
    found = rules_by_saliency(model, rules, Calibration(batches("llama"), CPU, FP32))
    for before, after in zip(rules, found, strict=True):
        assert before.target.name == after.target.name
        assert (before == after) == before.target.name.endswith("down_proj")


def test_what_cannot_be_done_is_refused(tiny, batches):
    for family in ("bert", "deberta_v2"):
        encoder = tiny(family)
        with pytest.raises(InputError, match="no logits for every token"):
            rules_by_saliency(encoder, _rules(encoder), Calibration(batches(family), CPU, FP32))
    llama = tiny("llama")
    with pytest.raises(InputError, match=r"leaves every layer 0.05 of its weights"):
        rules_by_saliency(llama, _rules(llama, share=0.97), Calibration(batches("llama"), CPU, FP32))
    experts = tiny_model("mixtral")
    with pytest.raises(InputError, match="is a stack of experts"):
        rules_by_saliency(experts, _rules(experts), Calibration(batches("llama"), CPU, FP32))


@pytest.mark.parametrize(("share", "pattern", "near"), [("0.6", "matrix", 1e-3), ("0.7", "row", 1 / 32)])
def test_what_is_done_is_in_the_record(tmp_path, capsys, share, pattern, near):
    out = tmp_path / "out"
    words = ["--method", "wanda", "--budgets", "saliency", "--samples", "12", "--sparsity", share, "--out", str(out)]
    assert main(["prune", RUN_FILE, *words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = json.loads((out / "pruning.json").read_text())
    assert (record["budgets"], record["pattern"]) == ("saliency", pattern)
    assert result["sparsity_measured"] == pytest.approx(float(share), abs=near)  # a row of 32 loses whole weights
    assert len({layer["sparsity_requested"] for layer in record["layers"]}) > 4
