"""Stacks of experts inside models of every family: what they compute, their gradients and masks, and the way back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import pack_mask, unpack_range
from pst_ds.core.forms.form import Tile
from pst_ds.core.quantization import Grid
from pst_ds.masks.update import update_masks
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.inject import bypassed, inject_pst, pst_layers
from pst_ds.nn.input_sums import InputGatherer, squares
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.merge import merge_and_unload
from pst_ds.nn.model_structure import router_names
from pst_ds.nn.targets import InjectionError, resolve_targets
from tests.pairs import every_pair
from tests.update_forms import install_forms

from .expert_families import FAMILIES, tiny_model

IDS = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(1))
LEFT_DENSE = {"jamba": ("mamba",)}
each_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def injected(family: str = "mixtral", **settings) -> nn.Module:
    """Injected, with random factors and random masks."""
    excluded = LEFT_DENSE.get(family, ())
    model = inject_pst(tiny_model(family), PSTConfig(exclude_modules=excluded, **settings))
    generator = torch.Generator().manual_seed(2)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.1
        layer.pst_mask.data = pack_mask(torch.rand(layer.layout.numel, generator=generator) > 0.5, layer.num_shards)
    return model


def stacks(model: nn.Module) -> dict[str, PSTExpertStack]:
    return {name: layer for name, layer in pst_layers(model).items() if isinstance(layer, PSTExpertStack)}


def straight_through(layer: PSTLayer, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """M . W in storage shape, in float64, with the mask's gradient as the scores': the formulas, matrix by matrix."""
    experts, (height, width) = layer.layout.num_experts, layer.layout.expert.shape
    weight = layer.weight.detach().double().view(experts, height, width)
    keep = unpack_range(layer.pst_mask, layer.layout.numel, layer.num_shards, 0, layer.layout.numel)
    keep = keep.view(weight.shape).double()
    if layer.layout.transposed:
        weight, keep = weight.transpose(1, 2), keep.transpose(1, 2)
    outputs = layer.layout.out_features // layer.layout.num_matrices
    of_matrices = [
        (w, k) for e in range(experts) for w, k in zip(weight[e].split(outputs), keep[e].split(outputs), strict=True)
    ]
    found = []
    for i, (own, mask) in enumerate(of_matrices):
        A, U, R = (leaves[n][i * outputs : (i + 1) * outputs] for n in "AUR")
        B, V = (leaves[n].chunk(len(of_matrices))[i] for n in "BV")
        merged = own + U @ V
        scores = merged.abs() / layer.magnitude_scales[i] + A @ B + R.unsqueeze(1) + leaves["C"][i]
        found.append((mask + scores - scores.detach()) * merged)
    stack = torch.stack(found).view(experts, -1, layer.layout.in_features)
    return (stack.transpose(1, 2) if layer.layout.transposed else stack).reshape(layer.weight_shape)


@each_family
def test_gradients_of_a_family_are_those_of_autograd_on_its_own_loop(family):
    model, dense = injected(family), tiny_model(family).double()
    leaves = {
        f"{name}.{factor}": param.detach().double().requires_grad_()
        for name, layer in pst_layers(model).items()
        for factor, param in layer.factor_parameters()
    }
    weights = {
        name if isinstance(layer, PSTExpertStack) else f"{name}.weight": straight_through(
            layer, {factor: leaves[f"{name}.{factor}"] for factor in "ABRCUV"}
        )
        for name, layer in pst_layers(model).items()
    }
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.func.functional_call(dense, weights, kwargs={"input_ids": IDS, "labels": IDS}).loss.backward()
    for name, layer in pst_layers(model).items():
        for factor, param in layer.factor_parameters():
            expected = leaves[f"{name}.{factor}"].grad
            error = (param.grad.double() - expected).norm() / expected.norm()
            assert expected.norm() > 0, (name, factor)
            assert error <= 1e-5, (name, factor, float(error))


@each_family
def test_a_family_computes_as_its_own_loop_does(family):
    """Untouched weights, then M . W in a dense model: the same products, so the same bits on one machine, but where
    a family adds biases in the product."""
    dense = tiny_model(family)
    model = inject_pst(copy.deepcopy(dense), PSTConfig(exclude_modules=LEFT_DENSE.get(family, ()), update_rank=0))
    assert len(stacks(model)) == 2 * sum(hasattr(m, "is_transposed") for m in dense.modules())
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-6)
    masked = injected(family)
    found = logits(masked)
    assert set(merge_and_unload(masked).state_dict()) == set(dense.state_dict())
    torch.testing.assert_close(found, logits(masked), rtol=0, atol=1e-6)
    assert (found - logits(dense)).abs().max() > 1e-3


PATTERNS = {
    "matrix": lambda keep: (keep.numel() - keep.sum()).item() == math.floor(0.7 * keep.numel()),
    "row": lambda keep: set((~keep).sum(1).tolist()) == {math.floor(0.7 * keep.shape[1])},
    "2:4": lambda keep: set(keep.view(-1, 4).sum(1).tolist()) == {2},
    "2x2": lambda keep: keep.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).float().var((1, 3)).max() == 0,
}


@every_pair
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "aria"])
def test_every_matrix_of_every_expert_has_its_share_of_zeros(family, pattern):
    """Along the inputs in both layouts; gate and up are two matrices where they lie side by side."""
    model = injected(family, pattern=pattern)
    update_masks(model, 0.5 if pattern == "2:4" else 0.7, progress=1.0)
    for name, layer in stacks(model).items():
        fused = layer.layout.num_matrices // layer.layout.num_experts
        assert fused == (2 if name.endswith("gate_up_proj") and family != "gpt_oss" else 1)
        keep = unpack_range(layer.pst_mask, layer.layout.numel, layer.num_shards, 0, layer.layout.numel)
        keep = keep.bool().view(layer.weight_shape)
        keep = keep.transpose(1, 2) if layer.layout.transposed else keep
        for expert in keep:
            for matrix in expert.chunk(fused):
                assert PATTERNS[pattern](matrix.contiguous())


@every_pair
@pytest.mark.parametrize("settings", [{}, {"target_modules": ("down_proj",)}, {"exclude_modules": ("down_proj",)}])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_is_not_pruned_or_bypassed_computes_as_the_dense_model(family, settings):
    dense = tiny_model(family)
    model = inject_pst(copy.deepcopy(dense), PSTConfig(**settings, modules_to_save=()))
    assert len(stacks(model)) == (2 if settings else 4)
    for layer in pst_layers(model).values():
        layer.pst_mask.data.zero_()
    assert (logits(model) - logits(dense)).abs().max() > 1e-3
    with bypassed(model):
        torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-6)


def test_the_gradient_of_the_inputs_passes_a_stack_that_stays_dense():
    ids, dense = IDS[:, :4], tiny_model("gpt_oss")
    model = inject_pst(copy.deepcopy(dense), PSTConfig(target_modules=("down_proj",), update_rank=0))
    found, expected = (m.get_input_embeddings()(ids).detach().requires_grad_() for m in (model, dense))
    for network, inputs in ((model, found), (dense, expected)):
        network(inputs_embeds=inputs, labels=ids).loss.backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    plain, checkpointed = injected("olmoe").train(), injected("olmoe").train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model(input_ids=IDS, labels=IDS).loss.backward()
    pairs = zip(stacks(plain).values(), stacks(checkpointed).values(), strict=True)
    for (_, one), (_, other) in (
        (a, b) for p, q in pairs for a, b in zip(p.factor_parameters(), q.factor_parameters(), strict=True)
    ):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8)


def test_a_layer_computes_in_the_dtype_of_its_weight_under_autocast_too():
    model, seen = injected("mixtral"), []
    for stack in stacks(model).values():
        stack.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    assert {of_output for _, of_output in seen} == {torch.float32}
    assert len(seen) == 4
    assert (found - logits(model)).abs().max() < 0.1
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16


def test_hidden_states_are_saved_once_not_once_for_every_expert_of_a_token():
    model, sizes = injected("mixtral"), []
    experts = next(m for m in model.modules() if hasattr(m, "is_transposed"))
    hidden = torch.randn(18, 16, requires_grad=True)
    index, weights = torch.randint(0, 4, (18, 2)), torch.rand(18, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        experts(hidden, index, weights)
    wide = [size for size in sizes if size[-1:] == (16,)]
    assert wide == [(18, 16), (36, 16)]  # what goes in; what comes out, for the router's gradient


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    experts = next(m for m in injected("qwen3_moe").modules() if hasattr(m, "is_transposed"))
    index = torch.tensor([[0, 2], [2, 0], [2, 0]])
    experts(torch.randn(3, 16, requires_grad=True), index, torch.rand(3, 2)).sum().backward()
    for stack in (experts.gate_up_proj, experts.down_proj):
        for _, param in stack.factor_parameters():
            norms = [float(part.abs().sum()) for part in param.grad.chunk(4)]
            assert [norm > 0 for norm in norms] == [True, False, True, False]


@pytest.mark.parametrize("family", ["mixtral", "aria"])
def test_weights_are_rounded_and_coded_as_in_other_layers(family):
    """With whole rows as groups."""
    grid = Grid(bits=8, group=None)
    dense = tiny_model(family)
    model = inject_pst(copy.deepcopy(dense), PSTConfig(update_rank=0, modules_to_save=()), base_grid=grid)
    assert all(stack.weight is None for stack in stacks(model).values())
    assert 0 < (logits(model) - logits(dense)).abs().max() < 0.05
    model(input_ids=IDS, labels=IDS).loss.backward()
    with bypassed(model):
        torch.testing.assert_close(logits(model), logits(merge_and_unload(copy.deepcopy(model))), rtol=0, atol=1e-6)


def test_unloading_gives_back_the_implementation_that_the_model_had():
    model = tiny_model("mixtral")
    experts, config = model.model.layers[0].mlp.experts, model.config
    inject_pst(model, PSTConfig(exclude_modules=("layers.1.mlp.experts",)))
    assert experts.config._experts_implementation == "pst"
    assert model.model.layers[1].mlp.experts.config is config
    assert config._experts_implementation == "eager"
    merge_and_unload(model)
    assert experts.config is config
    assert isinstance(experts.gate_up_proj, nn.Parameter)


def test_names_choose_a_stack_or_the_module_around_it():
    model = tiny_model("qwen3_moe")

    def names(**settings) -> list[str]:
        found = [target.name for target in resolve_targets(model, PSTConfig(**settings))]
        return [name.removeprefix("model.layers.0.mlp.") for name in found if name.startswith("model.layers.0.mlp")]

    both = ["experts.gate_up_proj", "experts.down_proj"]
    assert names() == names(target_modules=("experts",)) == names(target_modules=r".*\.experts") == both
    assert names(target_modules=("experts.down_proj",)) == names(exclude_modules=("gate_up_proj",)) == both[1:]
    assert names(exclude_modules=("experts",)) == names(exclude_modules=r".*\.experts") == []
    assert names(modules_to_save=("experts",), target_modules="all-linear") == []
    routers = router_names(model)
    assert router_names(inject_pst(model, PSTConfig())) == routers


def test_experts_that_ranks_cannot_divide_are_refused():
    def refused(family: str, degree: int = 3, **settings) -> str:
        with pytest.raises(InjectionError) as caught:
            inject_pst(tiny_model(family), PSTConfig(**settings), expert_parallel=degree)
        return str(caught.value)

    assert "does not divide the 4 experts of model.layers.0.mlp.experts.gate_up_proj" in refused("mixtral")
    assert "not loaded under deepspeed.zero.Init" in refused("mixtral", degree=2)
    assert "no stack of experts is pruned" in refused("mixtral", exclude_modules=("experts",))
    assert "layers.0.mlp.experts.gate_up_proj is pruned, and the other stack is not" in refused(
        "mixtral", exclude_modules=("down_proj",)
    )


def test_experts_of_another_form_and_on_other_ranks_are_refused():
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts._is_expert_parallel = True
    with pytest.raises(InjectionError, match=r"layers\.1\.mlp\.experts has its experts on several ranks"):
        inject_pst(model, PSTConfig())
    experts._is_expert_parallel = False
    experts.down_proj = nn.Parameter(torch.randn(4, 16, 11))
    with pytest.raises(InjectionError, match=r"another form .*: gate_up_proj makes 24 outputs, and down_proj takes 11"):
        inject_pst(model, PSTConfig())
    experts.down_proj = nn.Parameter(torch.randn(16, 12))
    with pytest.raises(
        InjectionError, match=r"down_proj is not a Parameter .* 4 matrices\. .* exclude_modules = \[\"experts"
    ):
        inject_pst(model, PSTConfig())


def test_factors_of_experts_have_a_rank_of_their_own():
    model = inject_pst(tiny_model("qwen3_moe"), PSTConfig(expert_rank=3, score_rank=2))
    stack = next(iter(stacks(model).values()))
    assert stack.pst_A.shape == (4 * 16, 2)
    assert stack.pst_V.shape == (8 * 3, 16)
    with pytest.raises(InjectionError, match=r"matrices of 8 x 16, .* expert_rank = 9, is higher; set it to at most 8"):
        inject_pst(tiny_model("qwen3_moe"), PSTConfig(expert_rank=9, update_rank=9))


def test_copies_are_models_of_their_own():
    model = injected("mixtral")
    twin = copy.deepcopy(model)
    for stack in stacks(twin).values():
        stack.pst_mask.data.zero_()
    assert (logits(twin) - logits(model)).abs().max() > 1e-3


def test_norms_of_inputs_are_each_experts_own_without_padding():
    model = injected("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(7)
    hidden, gates = torch.randn(6, 16, generator=generator), torch.rand(6, 2, generator=generator)
    index = torch.tensor([[0, 2], [2, 0], [2, 3], [0, 2], [3, 0], [0, 2]])
    real = torch.tensor([[1, 1, 0], [1, 1, 1]])
    gatherer = InputGatherer(squares)
    gatherer.begin({"attention_mask": real})
    with gatherer.listening({"up": experts.gate_up_proj, "down": experts.down_proj}), bypassed(model):
        experts(hidden, index, gates)
    up, down = (gatherer.sums[name].total.view(4, -1) for name in ("up", "down"))
    for expert in range(4):
        expected_up, expected_down = torch.zeros(16), torch.zeros(8)
        for token, _ in (index == expert).nonzero().tolist():
            if real.flatten()[token]:
                gate_part, up_part = (experts.gate_up_proj.weight[expert].detach() @ hidden[token]).chunk(2)
                expected_up += hidden[token] ** 2
                expected_down += (experts.act_fn(gate_part) * up_part) ** 2
        torch.testing.assert_close(up[expert].float(), expected_up, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(down[expert].float(), expected_down, rtol=1e-4, atol=1e-6)
    assert not up[1].any()


@pytest.mark.parametrize("form", ["spp", "dora"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stacks_are_updated_expert_by_expert_in_any_form(family, form, tmp_path, monkeypatch):
    install_forms(tmp_path, monkeypatch, dora="tests.update_forms:DoRA")
    model = injected(family, update_form=form)
    loss = model(input_ids=IDS).logits.square().mean()
    loss.backward()
    for name, layer in stacks(model).items():
        update = layer.update_parameters()
        assert all(param.grad.any() for param in update.values()), name
        own = layer.layout.expert
        matrices = layer.layout.num_matrices // layer.layout.num_experts
        expected = []
        for expert, weight in enumerate(layer.dense_weight().view(-1, *own.shape)):
            by_output = weight.t() if own.transposed else weight
            height = own.out_features // matrices
            whole = Tile(slice(0, height), slice(0, own.in_features), height, own.in_features)
            for part, of_matrix in enumerate(by_output.split(height)):
                number = expert * matrices + part
                values = {key: value.chunk(layer.layout.num_matrices)[number] for key, value in update.items()}
                expected.append(layer.constants.form.apply(of_matrix, values, whole, 1.0))
        merged = torch.cat(expected).view(layer.layout.num_experts, own.out_features, own.in_features)
        stored = merged.transpose(1, 2) if own.transposed else merged
        masked = layer.masked_weight().view(layer.weight_shape)
        assert torch.allclose(masked, stored * (masked != 0), atol=1e-6), name
    update_masks(model, 0.5)
    before = logits(model)
    # the products of transformers may add in another order than ours
    torch.testing.assert_close(logits(merge_and_unload(model)), before, rtol=1e-5, atol=1e-6)


def test_an_update_beside_the_mask_is_for_linear_layers():
    with pytest.raises(InjectionError, match="is a stack of experts"):
        injected(update_form="beside")
    model = injected(update_form="beside", expert_rank=0)
    assert not any(layer.update_parameters() for layer in stacks(model).values())
    logits(model)
