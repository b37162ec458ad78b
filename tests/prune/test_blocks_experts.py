"""One-shot pruning of stacks of experts: every matrix of every expert loses its share."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds.cli.main import main
from pst_ds.config.pst import PSTConfig
from pst_ds.core.one_shot.alps import alps
from pst_ds.core.one_shot.gram import DAMPING, unit_gram
from pst_ds.core.one_shot.sparsegpt import inverse_factor
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.quantization import Grid
from pst_ds.nn.model_structure import stack_names
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune.blocks import BlockReplay, Calibration
from pst_ds.prune.model import prune_layers
from pst_ds.prune.rules import layer_rules, settings_for
from tests.core.one_shot_references import counter, output_error, ranked_together, sparsegpt, without_smallest
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


IDS = torch.randint(0, 48, (6, 9), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": ids} for ids in IDS.split(4)]


def _prune(model, method, pattern="", batches=BATCHES, grid=None, **more):
    config = settings_for(model, PSTConfig(), method, pattern)
    rules = layer_rules(resolve_targets(model, config), method, 0.5, grid=grid)
    layers = prune_layers(model, rules, method, Calibration(batches, torch.device("cpu"), torch.float32), **more)
    return {layer.name: layer for layer in layers}


@torch.no_grad()
def _inputs_of_experts(model, index, batches):
    """By stack, then expert: its inputs in whole passes, (tokens, I) double, as the family's own code makes them."""
    experts = model.model.layers[index].mlp.experts
    first, last = stack_names(experts)
    seen, hook = [], experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    for batch in batches:
        model(**batch)
    hook.remove()
    hidden, chosen, _ = (torch.cat(parts) for parts in zip(*seen, strict=True))
    name, found = f"model.layers.{index}.mlp.experts", {}
    for expert in range(experts.num_experts):
        token, _ = (chosen == expert).nonzero(as_tuple=True)
        x, weight = hidden[token], getattr(experts, first)[expert]
        y = x @ (weight if experts.is_transposed else weight.t())
        inner = experts._apply_gate(y + getattr(experts, f"{first}_bias")[expert] if experts.has_bias else y)
        found.setdefault(f"{name}.{first}", []).append(x.double())
        found.setdefault(f"{name}.{last}", []).append(inner.double())
    return found


def _alone(weight, x, method, pattern, transposed):
    """One expert's matrix as a linear layer of its own, (O, I), pruned on its inputs; by its size without any."""
    weight = weight.t() if transposed else weight
    if method == "alps" and len(x):
        return alps(weight, unit_gram(x.T @ x), parse_pattern(pattern), 0.5).weight
    if method == "sparsegpt" and len(x):
        return sparsegpt(weight, inverse_factor(x.T @ x), parse_pattern(pattern), 0.5).weight
    scores = (weight.double().abs() * (x.square().sum(0).sqrt() if len(x) else 1.0)).numpy()
    counts = counter(pattern, 0.5)
    return weight * torch.from_numpy(without_smallest(scores, ranked_together(scores.shape, pattern), counts))


@pytest.mark.parametrize(
    ("family", "method", "pattern"),
    [("qwen3_moe", "wanda", "row"), ("mixtral", "wanda", "2:4"), ("gpt_oss", "wanda", "row"),
     ("gpt_oss", "sparsegpt", "2:4"), ("qwen3_moe", "sparsegpt", "row"), ("gpt_oss", "alps", "2:4")],
)  # fmt: skip
def test_every_expert_is_pruned_as_a_linear_layer_of_its_own_on_its_tokens(family, method, pattern):
    model = tiny_model(family)
    other = copy.deepcopy(model)
    layers = _prune(model, method, pattern)
    for index, (block, twin) in enumerate(zip(model.model.layers, other.model.layers, strict=True)):
        twin.self_attn.load_state_dict(block.self_attn.state_dict())  # linear layers have tests of their own
        inputs = _inputs_before(other, twin, index)
        for name, of_experts in inputs.items():
            experts, attribute = other.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            found = model.get_parameter(name).detach()
            for expert, x in enumerate(of_experts):
                assert len(x) == layers[name].expert_tokens[expert]
                before = getattr(experts, attribute).detach()[expert]
                wanted = _alone(before, x, method, pattern, experts.is_transposed)
                got = found[expert].t() if experts.is_transposed else found[expert]
                assert torch.equal(got == 0, wanted == 0), (name, expert)
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
        twin.load_state_dict(block.state_dict())
    assert {len(layer.expert_tokens) for layer in layers.values()} == {0, 4}
    assert model.config._experts_implementation == "eager"


def _inputs_before(model, block, index):
    """What the experts of a block are given while its attention is as it was."""
    pruned = copy.deepcopy(block.self_attn.state_dict())
    block.self_attn.load_state_dict(tiny_model(model.config.model_type).model.layers[index].self_attn.state_dict())
    found = _inputs_of_experts(model, index, BATCHES)
    block.self_attn.load_state_dict(pruned)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # which stores (I, O)
def test_alps_lowers_the_error_of_every_expert_by_its_own_tokens(family):
    plain, better, base = (tiny_model(family) for _ in range(3))
    before, after = _prune(plain, "magnitude", "row"), _prune(better, "alps", "row")
    assert [layer.pruned for layer in before.values()] == [layer.pruned for layer in after.values()]
    for name, of_experts in _inputs_of_experts(base, 0, BATCHES).items():
        transposed = base.get_submodule(name.rpartition(".")[0]).is_transposed
        for expert, x in enumerate(of_experts):
            weights = (model.get_parameter(name).detach()[expert] for model in (base, plain, better))
            weight, one, two = (w.t() if transposed else w for w in weights)
            gram = x.T @ x + DAMPING * x.square().sum(0).mean() * torch.eye(x.shape[1])
            assert output_error(two - weight, gram) < output_error(one - weight, gram) or not x.any()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_groups_of_experts_change_no_bit(family, monkeypatch):
    """One expert's Gram matrices at a time: 8 bytes of 16 x 16 and 12 x 12, so as many passes as experts."""
    together, apart, runs = tiny_model(family), tiny_model(family), []
    _prune(together, "sparsegpt")
    run = BlockReplay.run
    monkeypatch.setattr(BlockReplay, "run", lambda self, index, **more: (runs.append(index), run(self, index, **more)))
    monkeypatch.setattr("pst_ds.prune.model.STATISTICS_BYTES", 2 * 8 * (16**2 + 12**2) - 1)
    layers = _prune(apart, "sparsegpt")
    assert runs == [0] * (4 + 1) + [1] * 4
    assert all(torch.equal(one, two) for one, two in zip(together.parameters(), apart.parameters(), strict=True))
    of_experts = [layer.expert_tokens for layer in layers.values() if layer.expert_tokens]
    assert [sum(tokens) for tokens in of_experts] == [2 * IDS.numel()] * 4


@pytest.mark.parametrize(("method", "grid"), [("wanda", None), ("sparsegpt", None), ("sparsegpt", Grid(8))], ids=str)
def test_an_expert_without_a_token_is_pruned_by_the_size_of_its_weights(method, grid):
    model, base = tiny_model("mixtral"), tiny_model("mixtral")
    layers = _prune(model, method, batches=[{"input_ids": IDS[:1, :1]}], grid=grid)
    unseen = [i for i, count in enumerate(layers["model.layers.0.mlp.experts.down_proj"].expert_tokens) if not count]
    assert len(unseen) == 2
    for name in ("gate_up_proj", "down_proj"):
        for expert in unseen:
            found, before = (getattr(m.model.layers[0].mlp.experts, name)[expert].detach() for m in (model, base))
            smallest = before.abs() <= before.abs().sort(1).values[:, before.shape[1] // 2 - 1, None]
            assert torch.equal(found == 0, smallest)
            error = (found - before)[~smallest].abs().max() / before.abs().max()
            assert error == 0 if grid is None else 0 < error < 1 / 127


def test_padding_is_no_token_of_an_expert():
    """Texts that are padded behind, against the same without padding: causal attention sees no later token."""
    padded, alone = tiny_model("olmoe"), tiny_model("olmoe")
    mask = torch.ones_like(IDS[:2]).index_fill(1, torch.arange(5, 9), 0)
    found = _prune(padded, "wanda", batches=[{"input_ids": IDS[:2], "attention_mask": mask}])
    expected = _prune(alone, "wanda", batches=[{"input_ids": IDS[:2, :5]}])
    assert found == expected
    assert all(torch.equal(one, two) for one, two in zip(padded.parameters(), alone.parameters(), strict=True))


def test_unused_experts_are_named_in_one_line_and_the_record_has_the_tokens(tmp_path, capsys):
    _base(tmp_path / "base", "mixtral")
    sets = [f"model.path={json.dumps(str(tmp_path / 'base'))}", "data.max_length=2"]
    command = ["prune", RUN_FILE, "--method", "wanda", "--samples", "1", "--out", str(tmp_path / "out"), "--json"]
    capsys.readouterr()  # a bar of transformers, until the first verb of the process turns bars off
    assert main([*command, *(word for each in sets for word in ("--set", each))]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert "of 8 experts were given no token (model.layers." in line
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    stacks = {layer["name"]: layer for layer in record["layers"] if "expert_tokens" in layer}
    assert len(stacks) == 4
    assert all(sum(layer["expert_tokens"]) == 2 * 2 for layer in stacks.values())  # two tokens, two experts each
    _assert_inspected(tmp_path / "out", stacks, capsys)


def _assert_inspected(folder, stacks, capsys):
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(layers) == len(stacks) + 8
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, layer in stacks.items():
        zeros = [int((expert == 0).sum()) for expert in model.get_parameter(name)]
        assert (layers[name]["expert_zeros"], layers[name]["zeros"]) == (zeros, sum(zeros))
        assert layers[name]["expert_tokens"] == layer["expert_tokens"]
        assert layers[name]["weights"] == model.get_parameter(name).numel()
