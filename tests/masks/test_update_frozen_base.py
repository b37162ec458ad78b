"""A base in few bits over ranks: codes, masks, scales, statistics and gradients are those of one process."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.masks.base_zeros import masks_of_zeros
from pst_ds.masks.layer_stats import measure
from pst_ds.masks.scales import update_scales
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers, round_weights
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine, release

VALUES = Grid(4)
CASES = {
    "a cut group": ("bert", Grid(4, 32), {}),
    "odd rows": ("bert", Grid(8), {"pattern": "row"}),
    "odd bytes": ("odd", Grid(4), {}),
    "columns": ("gpt2", Grid(4, 32), {}),
    "blocks": ("gpt2", Grid(8, 32), {"pattern": "8x4"}),
    "2:4": ("bert", Grid(4), {"pattern": "2:4"}),
    "one cut": ("bert", Grid(4), {"pattern": "global"}),
    "zeros": ("bert", Grid(4), {"initial_mask": "zeros"}),
}


def bert(width=32, wide=96):
    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=width, num_hidden_layers=1, num_attention_heads=1, intermediate_size=wide,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def gpt2():
    return GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16))


MODELS = {"bert": bert, "odd": lambda: bert(15, 21), "gpt2": gpt2}


def is_target(name, weight):
    return (".layer." in name or name.startswith("h.")) and weight.dim() == 2


def base(kind):
    torch.manual_seed(3)
    model = MODELS[kind]()
    for name, param in model.named_parameters():
        if is_target(name, param):
            param.data[param.abs() < 0.005] = 0.0
    return model.eval()


def draw_factors(model):
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            values, own = torch.randn(sharding.full_shape(param), generator=generator) * 0.1, sharding.shard_of(param)
            sharding.write_shard(param, values.flatten()[own.start : own.start + own.values.numel()])
    return model


def course(engine, zeros):
    """All that is to be the same for every world size, and what may differ in the last bits."""
    model = engine.module
    stats = masks_of_zeros(model) if zeros else update_masks(model, 0.5)
    ids = torch.arange(8).view(1, 8)
    out = engine(input_ids=ids).last_hidden_state
    engine.backward(out.square().mean())
    engine.step()
    found = update_scales(model)
    stats_after = stats if zeros else update_masks(model, 0.5)
    figures = measure(model, with_scores=True)
    round_weights(model)
    rounded = engine(input_ids=ids).last_hidden_state
    whole = {}
    for name, layer in pst_layers(model).items():
        with sharding.gathered(list(layer.parameters(recurse=False))):
            weight = layer.base_weight()
            dense = weight.clone() if isinstance(weight, torch.Tensor) else weight.dense()
            whole[name] = (dense, layer.pst_scales.clone(), layer.magnitude_scales)
    exact = (stats.checksum, stats.kept, stats_after.checksum, whole)
    near = [out.detach(), rounded.detach(), torch.tensor(found.layer_errors), torch.tensor(figures.weight_norm)]
    return exact, near


def on_ranks(case, world_size):
    import deepspeed

    kind, grid, settings = CASES[case]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1 << 16, "stage3_param_persistence_threshold": 0},
    }
    model = base(kind)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    inject_pst(model, PSTConfig(modules_to_save=(), **settings), grid=VALUES, base_grid=grid)
    for layer in pst_layers(model).values():
        assert layer.num_shards == world_size
        assert sharding.is_partitioned(layer.pst_base_codes), "no rank holds the codes of another"
        assert sharding.is_partitioned(layer.pst_mask)
        held = sharding.shard_of(layer.pst_base_codes).values.numel()
        assert held * 8 <= grid.bits * (-(-layer.layout.numel // world_size) + 1)
    draw_factors(model)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
    engine = build_engine(model, groups, ds_config=config)
    found = course(engine, case == "zeros")
    release(engine)
    return found


def all_on_ranks(world_size):
    return {case: on_ranks(case, world_size) for case in CASES}


def alone(case, *, coded=False):
    """The same over the rounded weights, or over codes."""
    kind, grid, settings = CASES[case]
    model = base(kind)
    for name, param in model.named_parameters():
        if is_target(name, param) and not coded:
            transposed = name.startswith("h.")
            rounded = round_to_grid(param.data.t() if transposed else param.data, None, grid)
            param.data.copy_(rounded.t() if transposed else rounded)
    base_grid = grid if coded else None
    inject_pst(model, PSTConfig(modules_to_save=(), **settings), grid=VALUES, base_grid=base_grid)
    draw_factors(model)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
    return course(build_engine(model, groups, ds_config=None), case == "zeros")


def require_same(one, other):
    (checksum, kept, after, whole), near = one
    (same_checksum, same_kept, same_after, same_whole), same_near = other
    assert (checksum, kept, after) == (same_checksum, same_kept, same_after)
    for name, (dense, scales, magnitude_scales) in whole.items():
        same_dense, same_scales, same_magnitude_scales = same_whole[name]
        assert torch.equal(dense, same_dense), name
        assert torch.equal(scales, same_scales), name
        assert magnitude_scales == same_magnitude_scales, name
    for values, same in zip(near, same_near, strict=True):
        torch.testing.assert_close(values, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case != "zeros"])
def test_codes_on_one_process_are_the_rounded_weights(case):
    require_same(alone(case, coded=True), alone(case))


@pytest.mark.zero3
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.few(1)
def test_ranks_agree_with_one_process(run_ranks, world_size):
    expected = {case: alone(case, coded=case == "zeros") for case in CASES}
    for by_case in run_ranks(all_on_ranks, world_size, world_size):
        for case, found in by_case.items():
            require_same(found, expected[case])
