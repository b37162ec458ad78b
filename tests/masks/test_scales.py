"""Scales searched on shards: those of the whole matrices, the same on any number of ranks and after a gather."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from pst_ds.config.pst import PSTConfig
from pst_ds.core.factors import tile_factors
from pst_ds.core.quantization import UNUSED_SCALE, dequantize, grid_of, quantize
from pst_ds.core.scores import sliced_weight
from pst_ds.masks import scales as searching
from pst_ds.masks.layer_scores import whole_factors
from pst_ds.masks.scales import update_scales
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import InjectionError, inject_pst, pst_layers, round_weights
from pst_ds.nn.linear import PSTLinear
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine
from tests.pairs import every_pair

SPARSITY = 0.6
GRIDS = {"int4-32": grid_of("int4", 32), "int8-row": grid_of("int8"), "int4-row": grid_of("int4", "row")}
CONFIGS = {
    "pst": PSTConfig(modules_to_save=(), update_rank=3),
    "lora": PSTConfig(modules_to_save=(), update_rank=3, score_rank=0, structured_scores=False),
    "weights": PSTConfig(
        modules_to_save=(), update_rank=0, score_rank=0, structured_scores=False, train_weights=True
    ),
}  # fmt: skip


def _bert():
    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def _gpt2():
    return GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16))


MODELS = {"bert": _bert, "gpt2": _gpt2}


def _injected(kind: str, method: str, grid_name: str, num_shards: int = 1) -> torch.nn.Module:
    """A model with masks and updates, the same in every call."""
    torch.manual_seed(3)
    model = inject_pst(MODELS[kind](), CONFIGS[method], num_shards=num_shards, grid=GRIDS[grid_name])
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    return model


def _outputs_first(values: torch.Tensor, layer: PSTLinear) -> torch.Tensor:
    return values.t() if layer.layout.transposed else values


def _whole_scales(layer: PSTLinear) -> torch.Tensor:
    """(O, groups) of a layer whose parameters are whole."""
    return _outputs_first(layer.rounding().scales, layer)


def _exact_weight(layer: PSTLinear) -> torch.Tensor:
    """M . W, (O, I), of the fp32 values, as scales are searched for it."""
    (factors,) = whole_factors([layer])
    whole = torch.empty(layer.layout.shape)
    for matrix in layer.layout.matrices():
        rect = matrix.rect
        at = slice(rect.r0, rect.r1), slice(rect.c0, rect.c1)
        tile = tile_factors(factors, layer.layout, matrix, rect)
        whole[at] = sliced_weight(layer.weight.detach()[at], tile, layer.constants)
    kept = layer.masked_weight() != 0
    return _outputs_first(torch.where(kept, whole, 0.0), layer)


@every_pair
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("grid", GRIDS)
def test_scales_are_those_of_the_whole_matrix(kind, method, grid):
    model = _injected(kind, method, grid)
    update_masks(model, SPARSITY)
    before = {name: layer.masked_weight() for name, layer in pst_layers(model).items()}
    assert all(bool((_whole_scales(layer) == UNUSED_SCALE).all()) for layer in pst_layers(model).values())
    found = update_scales(model)
    round_weights(model)
    errors = []
    for name, layer in pst_layers(model).items():
        exact = _exact_weight(layer)
        codes, expected = quantize(exact, None, GRIDS[grid])
        assert torch.equal(_whole_scales(layer), expected), name
        errors.append(float((exact - dequantize(codes, expected)).norm() / exact.norm()))
        own_codes, _ = quantize(_outputs_first(before[name], layer), None, GRIDS[grid], expected)
        assert torch.equal(_outputs_first(layer.masked_weight(), layer), dequantize(own_codes, expected)), name
    assert found.layer_errors == pytest.approx(errors, rel=1e-4)
    assert min(errors) <= found.error <= max(errors)
    assert (0.02 < found.error < 0.2) if "int4" in grid else (0.001 < found.error < 0.02)


def test_masks_decide_which_weights_have_a_say():
    model = _injected("bert", "pst", "int4-32")
    update_masks(model, 0.0)
    dense = update_scales(model)
    update_masks(model, 0.9)
    sparse = update_scales(model)
    assert sparse.error < dense.error, "fewer weights to a scale lose less"


def test_weights_that_are_not_finite_are_named():
    model = _injected("bert", "pst", "int4-32")
    update_masks(model, SPARSITY)
    name, layer = list(pst_layers(model).items())[3]
    layer.pst_U.data[0, 0] = float("nan")
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=f"weights of {name} are not finite"):
        update_scales(model)


def test_groups_that_do_not_divide_name_the_layer():
    with pytest.raises(InjectionError, match=r"encoder.layer.0.attention.self.query: groups of 64 do not divide 32"):
        inject_pst(_bert(), CONFIGS["pst"], grid=grid_of("int4", 64))


def _state(kind, method, grid, stage, world_size, batch_scales=1 << 22, persistence=0):
    """Every layer's scales and rounded weight, whole, and the error; after a search on ``world_size`` ranks."""
    searching._BATCH_SCALES = batch_scales
    model = _injected(kind, method, grid, world_size if stage == 3 else 1)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
    zero = {"stage": stage, "reduce_bucket_size": 1 << 16, "stage3_param_persistence_threshold": persistence}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine = build_engine(model, groups, ds_config=config)
    update_masks(engine.module, SPARSITY)
    found = update_scales(engine.module)
    round_weights(engine.module)
    whole = {}
    for name, layer in pst_layers(engine.module).items():
        with sharding.gathered(list(layer.parameters(recurse=False))):
            whole[name] = (_whole_scales(layer).clone(), layer.masked_weight())
    return whole, found.layer_errors


CASES = [
    ("bert", "pst", "int4-32"), ("bert", "lora", "int8-row"), ("bert", "weights", "int4-32"),
    ("gpt2", "pst", "int4-32"), ("gpt2", "lora", "int8-row"), ("gpt2", "weights", "int4-row"),
]  # fmt: skip


def _states(world_size: int):
    batch_scales = 1 << 22 if world_size < 3 else 1  # on three ranks a layer at a time
    return [_state(*case, 3, world_size, batch_scales) for case in CASES]


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_scales_are_the_same_on_any_number_of_ranks(run_ranks, world_size):
    by_rank = run_ranks(_states, world_size, world_size)
    for i, case in enumerate(CASES):
        model = _injected(*case)
        update_masks(model, SPARSITY)
        expected = update_scales(model)
        round_weights(model)
        for states in by_rank:
            whole, errors = states[i]
            for name, layer in pst_layers(model).items():
                scales, weight = whole[name]
                assert torch.equal(scales, _whole_scales(layer)), (case, name)
                assert torch.equal(weight, layer.masked_weight()), (case, name)
            assert errors == pytest.approx(expected.layer_errors, rel=1e-9), case


@pytest.mark.zero3
@pytest.mark.parametrize(("stage", "persistence"), [(0, 0), (2, 0), (3, 10**6)])
def test_scales_are_the_same_at_every_stage(run_ranks, stage, persistence):
    model = _injected("gpt2", "weights", "int4-32")
    update_masks(model, SPARSITY)
    update_scales(model)
    for whole, _ in run_ranks(_state, 2, "gpt2", "weights", "int4-32", stage, 2, 1 << 22, persistence):
        for name, layer in pst_layers(model).items():
            assert torch.equal(whole[name][0], _whole_scales(layer)), name
