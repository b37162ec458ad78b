"""Matrices that lie whole in one rank's shard: the same masks as anywhere, and nothing exchanged for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_range
from pst_ds.core.layout import WeightLayout
from pst_ds.masks import sharded_select
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.linear import PSTLinear
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine

PATTERNS = ["matrix", "stack", "global", "row", "2:4", "5x4"]


def _stacks(num_matrices, num_shards, pattern="matrix", transposed=False, nan_at=None):
    """Two layers of many 5 x 12 matrices side by side, with ties; every factor is non-zero."""
    generator = torch.Generator().manual_seed(7)
    model = nn.Module()
    for name in ("first", "second"):
        layout = WeightLayout(5 * num_matrices, 12, transposed, num_matrices)
        weight = (torch.randn(layout.shape, generator=generator) * 8).round() / 8
        if nan_at is not None:
            weight.view(-1)[nan_at] = float("nan")
        weight = nn.Parameter(weight, requires_grad=False)
        config = PSTConfig(pattern=pattern, modules_to_save=())
        layer = PSTLinear(name, weight, None, layout, config.rule_for(name), config, num_shards, (1.0,) * num_matrices)
        for _, param in layer.factor_parameters():
            param.data = (torch.randn(param.shape, generator=generator) * 4).round() / 8
        model.add_module(name, layer)
    return model


def _engine(model, stage):
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1 << 16}
    return build_engine(model, groups, ds_config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})


def _updated(world_size, num_matrices, pattern, sparsity=0.37, **how):
    model = _engine(_stacks(num_matrices, world_size, pattern, **how), 3).module if world_size > 1 else None
    model = model or _stacks(num_matrices, 1, pattern, **how)
    stats = update_masks(model, sparsity)
    masks = []
    for layer in pst_layers(model).values():
        with sharding.gathered([layer.pst_mask]):
            numel = layer.layout.numel
            masks.append(unpack_range(layer.pst_mask.detach().clone(), numel, layer.num_shards, 0, numel))
    return stats, masks


def _all_patterns(world_size):
    sizes = {"row": 0.37, "2:4": 0.3}
    found = [_updated(world_size, 7, pattern, sizes.get(pattern, 0.37)) for pattern in PATTERNS]
    return [*found, _updated(world_size, 7, "2:4", 0.5), _updated(world_size, 7, "matrix", transposed=True)]


def test_a_matrix_prunes_its_smallest_scores():
    _, masks = _updated(1, 7, "matrix")
    for layer, mask in zip(pst_layers(_stacks(7, 1)).values(), masks, strict=True):
        f = {name: param.detach() for name, param in layer.factor_parameters()}
        for i, kept in enumerate(mask.view(7, 60)):
            rows, ranks = slice(5 * i, 5 * i + 5), slice(8 * i, 8 * i + 8)
            scores = (layer.weight[rows].double() + f["U"][rows].double() @ f["V"][ranks].double()).abs()
            scores += f["A"][rows].double() @ f["B"][ranks].double() + f["R"][rows, None] + f["C"][i]
            pruned = scores.flatten().sort(stable=True).indices[: math.floor(0.37 * 60)]
            expected = torch.ones(60, dtype=torch.uint8).index_fill_(0, pruned, 0)
            assert torch.equal(kept, expected)


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize("world_size", [2, 3])
def test_masks_are_the_same_bits_where_borders_cut_some_of_the_matrices(run_ranks, world_size):
    local = _all_patterns(1)
    for found in run_ranks(_all_patterns, world_size, world_size):
        for (stats, masks), (expected, expected_masks) in zip(found, local, strict=True):
            assert stats == expected
            assert all(torch.equal(a, b) for a, b in zip(masks, expected_masks, strict=True))


def _exchanged(num_matrices, pattern):
    """Bytes that an update of two ranks sums over them for selection, and how often."""
    sizes = []
    summed = sharded_select.group_sum
    whole_sums = sharded_select.rank_sums

    def counted(values, param):
        sizes.append(values.numel() * values.element_size())
        return summed(values, param)

    def counted_sums(param):
        sums = whole_sums(param)
        return sharded_select.RankSums(
            lambda v: counted(v, param), lambda v: sizes.append(2 * 8 * v.numel()) or sums.sum_of_lower_ranks(v)
        )

    model = _engine(_stacks(num_matrices, 2, pattern), 3).module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_select, "group_sum", counted)
        patch.setattr(sharded_select, "rank_sums", counted_sums)
        update_masks(model, 0.4)
    return sum(sizes), len(sizes)


def _exchanged_of_few_and_many():
    return {pattern: [_exchanged(n, pattern) for n in (3, 63)] for pattern in ("matrix", "stack", "global")}


@pytest.mark.zero3
def test_what_is_exchanged_does_not_grow_with_the_matrices_but_for_a_number_each(run_ranks):
    """Of those that are ranked together for a number and a sample, which for many matrices is a key each."""
    for found in run_ranks(_exchanged_of_few_and_many, 2):
        for pattern, ((few, exchanges), (many, exchanges_of_many)) in found.items():
            sampled = 0 if pattern == "matrix" else 2 * 60 * 60 * 4  # all of such small ones
            assert many - few < 2 * 60 * 8 + 2048 * 8 + sampled  # the last digits of a search have fewer bins
            assert max(exchanges, exchanges_of_many) <= 8  # how many digits are left depends on the keys
            assert few > 2 * 2048 * 8  # the one of each layer that the border cuts


def _update_with_nan(nan_at):
    model = _engine(_stacks(5, 2, nan_at=nan_at), 3).module
    with pytest.raises(FloatingPointError, match="first, second are not finite"):
        update_masks(model, 0.5)
    return True


@pytest.mark.zero3
def test_scores_that_are_not_finite_are_refused_by_the_ranks_that_do_not_hold_them(run_ranks):
    assert run_ranks(_update_with_nan, 2, 290) == [True, True]
