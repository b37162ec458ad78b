"""Mask updates in every pattern: the same bits on any number of ranks, and those of loops over whole matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from pst_ds.config.pst import Override, PSTConfig
from pst_ds.core.bits import unpack_range
from pst_ds.core.patterns import parse_pattern
from pst_ds.masks import layer_scores as layer_keys
from pst_ds.masks import sharded_select
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine
from tests.pairs import every_pair

RANK = 8


def _bert():
    return BertModel(
        BertConfig(vocab_size=50, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40,
                   max_position_embeddings=16)
    )  # fmt: skip


def _gpt2():
    return GPT2Model(GPT2Config(vocab_size=50, n_embd=20, n_layer=1, n_head=2, n_positions=16, n_inner=40))


MODELS = {"bert": _bert, "gpt2": _gpt2}
SHARED = {"min_kept_share": 0.35}
CASES = {
    "row": ({"pattern": "row"}, 0.37, 0.37 / 0.8),
    "a stack alone": (
        {"overrides": (Override(modules=("query", "c_attn"), pattern="stack", final_sparsity=0.6),)},
        0.0,
        0.7,
    ),
    "global": ({"pattern": "global"}, 0.55, 0.55 / 0.6),
    "stack": ({"pattern": "stack"}, 0.55, 0.55 / 0.6),
    "2:4": ({"pattern": "2:4"}, 0.5, 1.0),
    "2:4 in part": ({"pattern": "2:4"}, 0.3, 0.3 / 0.5),
    "1:4 in part": ({"pattern": "1:4"}, 0.6, 0.6 / 0.75),
    "blocks": ({"pattern": "2x4"}, 0.61, 1.0),
    "blocks taller than a shard": ({"pattern": "10x4"}, 0.5, 1.0),
    "overrides": (
        {
            "overrides": (
                Override(modules=("query", "c_attn"), pattern="row"),
                Override(modules=r".*(intermediate\.dense|c_fc)", pattern="2:4"),
                Override(modules=("output.dense", "c_proj"), final_sparsity=0.5),
            )
        },
        0.4,
        0.4 / 0.8,
    ),
    "some layers alone": (
        {
            "overrides": (
                Override(modules=("query", "c_attn"), pattern="row", final_sparsity=0.6),
                Override(modules=r".*(intermediate\.dense|c_fc)", pattern="2:4"),
                Override(modules=("output.dense", "c_proj"), final_sparsity=0.5),
            )
        },
        0.0,
        0.7,
    ),
}


def _mid_ramp(kind, num_shards, config):
    """A model whose every factor is non-zero, with ties among the weights, the same in every call."""
    torch.manual_seed(3)
    model = MODELS[kind]()
    for param in model.parameters():
        param.data = (param.data * 200).round() / 200
    inject_pst(model, PSTConfig(modules_to_save=(), **SHARED, **config), num_shards=num_shards)
    generator = torch.Generator().manual_seed(5)
    for i, layer in enumerate(pst_layers(model).values()):
        for _, param in layer.factor_parameters():
            values = torch.randn(param.shape, generator=generator) * 0.3
            param.data = (values * 8).round() / 8 if i % 2 else values
    return model


def _updated(kind, stage, world_size, config, sparsity, progress):
    model = _mid_ramp(kind, world_size if stage == 3 else 1, config)
    zero = {"stage": stage, "reduce_bucket_size": 1 << 16, "stage3_param_persistence_threshold": 0}
    ds_config = None if stage is None else {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = build_engine(model, [{"params": trained, "lr": 0.0, "name": "all"}], ds_config=ds_config)
    stats = update_masks(engine.module, sparsity, progress=progress)
    masks = []
    for layer in pst_layers(engine.module).values():
        with sharding.gathered([layer.pst_mask]):
            numel = layer.layout.numel
            masks.append(unpack_range(layer.pst_mask.detach().clone(), numel, layer.num_shards, 0, numel))
    return stats, masks


def _scores(layer):
    """Of each matrix: (scores (rows, cols) as stored, flat storage index of each), from the written-out formula."""
    layout, width = layer.layout, layer.layout.out_features // layer.layout.num_matrices
    storage = np.arange(layout.numel).reshape(layout.shape)
    f = {name: param.detach().numpy() for name, param in layer.factor_parameters()}
    found = []
    for part in range(layout.num_matrices):
        o, r = slice(part * width, (part + 1) * width), slice(part * RANK, (part + 1) * RANK)
        weight = layer.weight.detach().numpy()
        score = (weight.T if layout.transposed else weight)[o].copy()
        for j in range(RANK):
            score = score + f["U"][o, j : j + 1] * f["V"][r][j]
        score = np.abs(score) * np.float32(1.0 / layer.magnitude_scales[part])
        for j in range(RANK):
            score = score + f["A"][o, j : j + 1] * f["B"][r][j]
        structured = (f["C"][part], f["R"][o, None]) if layout.transposed else (f["R"][o, None], f["C"][part])
        score = (score + structured[0]) + structured[1]
        index = storage[:, o] if layout.transposed else storage[o]
        found.append((score.T if layout.transposed else score, index))
    return found


def _halves(values):
    """Sum over axis 0 by adding halves."""
    while len(values) > 1:
        half = len(values) // 2
        rest = values[2 * half :]
        values = np.concatenate([values[:half] + values[half : 2 * half], rest])
    return values[0]


def _unit_sums(score, unit):
    rows, cols = unit
    units = score.reshape(score.shape[0] // rows, rows, score.shape[1] // cols, cols)
    return _halves(np.moveaxis(_halves(np.moveaxis(units, 3, 0)), 1, 0))


def _prune_first(values, count):
    """1 for all but the ``count`` smallest, the first of equals."""
    keep = np.ones(values.size, dtype=np.uint8)
    keep[np.argsort(values.reshape(-1), kind="stable")[:count]] = 0
    return keep.reshape(values.shape)


def _along_inputs(score, transposed):
    return score.T if transposed else score


def _n_of_m(score, transposed, prune, m):
    along = _along_inputs(score, transposed)
    groups = along.reshape(along.shape[0], -1, m)
    keep = np.stack([np.stack([_prune_first(g, prune) for g in row]) for row in groups]).reshape(along.shape)
    return _along_inputs(keep, transposed)


def _expected_of(score, layer, sparsity, progress):
    pattern, transposed = layer.rule.pattern, layer.layout.transposed
    own = layer.rule.final_sparsity
    v = sparsity if own is None else own * progress
    if pattern.kind == "matrix":
        return _prune_first(score, math.floor(v * score.size))
    if pattern.kind == "row":
        along = _along_inputs(score, transposed)
        return _along_inputs(np.stack([_prune_first(row, math.floor(v * row.size)) for row in along]), transposed)
    unit = pattern.unit(layer.layout)
    if pattern.kind == "block":
        sums = _unit_sums(score, unit)
        kept = _prune_first(sums, math.floor(v * sums.size))
    else:
        best = _n_of_m(score, transposed, pattern.m - pattern.n, pattern.m)
        loss = _unit_sums(np.where(best, np.float32(0), score), unit)
        kept = _prune_first(loss, math.floor(v / own * loss.size))
    spread = kept.repeat(unit[0], 0).repeat(unit[1], 1)
    return spread if pattern.kind == "block" else spread | best


def _brute_force(kind, config, sparsity, progress):
    masks, pooled = [], []
    for i, layer in enumerate(pst_layers(_mid_ramp(kind, 1, config)).values()):
        mask = np.ones(layer.layout.numel, dtype=np.uint8)
        for part, (score, index) in enumerate(_scores(layer)):
            if layer.rule.pattern.kind in ("global", "stack"):
                pooled += [(s, (i, part), at) for s, at in zip(score.reshape(-1), index.reshape(-1), strict=True)]
            else:
                mask[index.reshape(-1)] = _expected_of(score, layer, sparsity, progress).reshape(-1)
        masks.append(mask)
        if layer.rule.pattern.kind == "stack":
            own = layer.rule.final_sparsity
            _prune_pool(pooled, masks, sparsity if own is None else own * progress)
            pooled = []
    if pooled:
        _prune_pool(pooled, masks, sparsity)
    return masks


def _prune_pool(pooled, masks, sparsity):
    sizes = {matrix: sum(m == matrix for _, m, _ in pooled) for matrix in {m for _, m, _ in pooled}}
    left = {matrix: size - math.ceil(SHARED["min_kept_share"] * size) for matrix, size in sizes.items()}
    total = sum(math.floor(sparsity * size) for size in sizes.values())
    for _, matrix, at in sorted(pooled):
        if total and left[matrix]:
            masks[matrix[0]][at] = 0
            left[matrix] -= 1
            total -= 1


@every_pair
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_loops_over_whole_matrices(kind, case):
    config, sparsity, progress = CASES[case]
    _, masks = _updated(kind, None, 1, config, sparsity, progress)
    for ours, expected in zip(masks, _brute_force(kind, config, sparsity, progress), strict=True):
        assert np.array_equal(ours.numpy(), expected)


@every_pair
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_matrices_whose_keys_are_not_held_at_once_have_the_same_masks(kind, case, monkeypatch):
    at_once = _updated(kind, None, 1, *CASES[case])
    monkeypatch.setattr(sharded_select, "MOST_AT_ONCE", 0)
    in_passes = _updated(kind, None, 1, *CASES[case])
    assert in_passes[0] == at_once[0]
    assert all(torch.equal(a, b) for a, b in zip(in_passes[1], at_once[1], strict=True))


def _all_cases(kind, world_size):
    return {case: _updated(kind, 3, world_size, *CASES[case]) for case in CASES}


@pytest.mark.zero3
@pytest.mark.parametrize(("kind", "world_size"), [("bert", 3), ("gpt2", 2)])
def test_masks_are_the_same_bits_on_ranks_that_cut_units(run_ranks, kind, world_size):
    local = {case: _updated(kind, None, 1, *CASES[case]) for case in CASES}
    for found in run_ranks(_all_cases, world_size, kind, world_size):
        for case, (stats, masks) in found.items():
            assert stats == local[case][0], case
            assert all(torch.equal(a, b) for a, b in zip(masks, local[case][1], strict=True)), case


@pytest.mark.parametrize("case", ["2:4 in part", "blocks"])
def test_unit_keys_that_are_not_kept_between_passes_give_the_same_masks(case, monkeypatch):
    monkeypatch.setattr(sharded_select, "MOST_AT_ONCE", 0)  # in passes, though the matrices are whole
    kept, kept_masks = _updated("gpt2", None, 1, *CASES[case])
    tiles_made = []
    for name in ("block_keys", "loss_keys"):
        made = getattr(layer_keys, name)
        monkeypatch.setattr(layer_keys, name, lambda *a, made=made: tiles_made.append(1) or made(*a))
    _updated("gpt2", None, 1, *CASES[case])
    once = len(tiles_made)
    monkeypatch.setattr(layer_keys, "UNIT_CACHE_BYTES", 0)
    stats, masks = _updated("gpt2", None, 1, *CASES[case])
    assert len(tiles_made) - once > 2 * once  # made anew in every pass
    assert stats == kept
    assert all(torch.equal(a, b) for a, b in zip(masks, kept_masks, strict=True))


def test_a_global_cut_holds_the_least_share_of_a_matrix():
    model = _mid_ramp("bert", 1, {"pattern": "global"})
    small = pst_layers(model)["encoder.layer.0.output.dense"]
    small.magnitude_scales = (small.magnitude_scales[0] * 100,)  # all of its scores near zero, or below
    for _, param in small.factor_parameters():
        param.data.zero_()
    stats = update_masks(model, 0.6)
    sizes = [layer.layout.numel for layer in pst_layers(model).values()]
    assert stats.num_pruned == sum(math.floor(0.6 * n) for n in sizes)
    kept = int(unpack_range(small.pst_mask, small.layout.numel, small.num_shards, 0, small.layout.numel).sum())
    assert kept == math.ceil(0.35 * small.layout.numel)


def test_n_of_m_ends_exact_and_starts_dense():
    model = _mid_ramp("bert", 1, {"pattern": "2:4"})
    assert update_masks(model, 0.0, progress=0.0).num_pruned == 0
    end = update_masks(model, 0.5)
    assert end.num_pruned * 2 == end.num_weights
    for layer in pst_layers(model).values():
        mask = unpack_range(layer.pst_mask, layer.layout.numel, layer.num_shards, 0, layer.layout.numel)
        assert bool((mask.view(-1, 4).sum(1) == 2).all())


@pytest.mark.parametrize("pattern", ["row", "2:4", "2x4"])
def test_not_finite_scores_are_refused_by_layer_and_masks_stay(pattern):
    model = _mid_ramp("bert", 1, {"pattern": pattern})
    layer = pst_layers(model)["encoder.layer.0.output.dense"]
    layer.weight.data[3, 3] = float("nan")
    before = [m.pst_mask.clone() for m in pst_layers(model).values()]
    with pytest.raises(FloatingPointError, match=r"encoder\.layer\.0\.output\.dense are not finite"):
        update_masks(model, 0.5)
    assert all(torch.equal(a, m.pst_mask) for a, m in zip(before, pst_layers(model).values(), strict=True))


def test_rules_come_from_the_last_override_that_matches():
    config = PSTConfig(
        pattern="row",
        overrides=(Override(modules=("q",), final_sparsity=0.3), Override(modules=r".*\.q", pattern="2:4")),
    )
    assert str(config.rule_for("a.q").pattern) == "2:4"
    assert config.rule_for("a.q").final_sparsity == 0.5
    assert config.rule_for("q").final_sparsity == 0.3
    assert config.rule_for("q").pattern == parse_pattern("row")
    assert config.rule_for("k").final_sparsity is None
