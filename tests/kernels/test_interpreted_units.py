"""Kernels of blocks, N:M groups and rows in Triton's interpreter, for shards that cut units: the bits of the CPU."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.pairs import every_pair

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.core.bits import pack_shard, unpack_shard
from pst_ds.core.coded_weight import OwnWeights
from pst_ds.core.factors import TileFactors
from pst_ds.core.kernels.triton.bit_sums import BitsOfShard, placed_bits
from pst_ds.core.kernels.triton.table import OwnKeys
from pst_ds.core.kernels.triton.unit_masks import keep_in_rows, keep_n_of_m, unit_keys
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.select import MatrixKeys
from pst_ds.masks import sharded_select
from pst_ds.masks.layer_scores import LayerScores
from pst_ds.masks.sharded_select import Matrix, as_run, weights_kept
from pst_ds.parallel.halo import Halo
from tests.core.test_bracket import Ranks, stable
from tests.kernels.test_interpreted_masks import CONSTANTS, SCALE, layer, one_launch_at_a_time, random_scores

pytestmark = pytest.mark.interpreted
LINEAR, CONV1D = WeightLayout(48, 24), WeightLayout(48, 16, transposed=True, num_matrices=3)


def shards(pattern, layout, dtype, cuts=(0, 131, 400, 401, 1 << 30)):
    """The scores of what each rank has of a layer whose weights are cut at ``cuts``."""
    weight, factors = layer(layout, dtype=dtype)
    flat, rule = weight.flatten(), SimpleNamespace(pattern=parse_pattern(pattern))
    split = SimpleNamespace(share=layout.numel)
    module = SimpleNamespace(
        layout=layout, rule=rule, constants=CONSTANTS, magnitude_scales=[SCALE] * layout.num_matrices,
        split=lambda: split,
    )  # fmt: skip
    for start, stop in pairwise(cuts):
        stop = min(stop, layout.numel)
        first, last = rule.pattern.aligned(layout, start, stop)
        halo = Halo(flat[first:start].clone(), flat[stop:last].clone())
        own = OwnWeights(flat[start:stop].clone(), start, layout.shape[1])
        yield LayerScores("0", module, factors, own, halo)


def in_place(matrix, bits):
    """The bits of a shard, by the kernel or in torch; 0 of what is not in the matrix."""
    scores = matrix.layer
    count = scores.stop - scores.start
    if (run := as_run(matrix, bits)) is not None:
        (placed,) = placed_bits([BitsOfShard(scores.start, scores.stop, -(-count // 8), [run])], scores.device)
        return unpack_shard(placed, count)
    keep = torch.zeros(count, dtype=torch.uint8)
    for rect, mask in weights_kept(matrix, bits):
        scores.write_own(keep, rect, mask)
    return keep


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pattern", "layout"), [
    ("2:4", LINEAR), ("3:8", CONV1D), ("4x4", LINEAR), ("16x1", LINEAR), ("1x8", LINEAR), ("2x4", CONV1D),
    ("16x8", CONV1D),
])  # fmt: skip
def test_keys_and_bits_of_units_are_those_of_the_cpu_wherever_shards_are_cut(pattern, layout, dtype):
    for scores in shards(pattern, layout, dtype):
        for stored in scores.matrices:
            matrix = Matrix(scores, stored, 0.25)
            expected = torch.cat([torch.empty(0, dtype=torch.int32), *scores.unit_keys(stored, matrix.prune_per_group)])
            (found,) = unit_keys([matrix.unit_weights])
            assert torch.equal(found, expected)
            units = pack_shard(
                (expected > expected.median() if len(expected) else expected).byte(), -(-len(expected) // 8)
            )
            by_kernel = keep_n_of_m([matrix.unit_weights], [units])[0][0] if matrix.kind == "n:m" else units
            in_torch = torch.zeros(scores.stop - scores.start, dtype=torch.uint8)
            for rect, mask in weights_kept(matrix, units):
                scores.write_own(in_torch, rect, mask)
            assert torch.equal(in_place(matrix, by_kernel), in_torch)


@pytest.mark.parametrize(("pattern", "layout", "keep", "dtype"), [
    ("2:4", LINEAR, keep_n_of_m, torch.float32), ("7:16", CONV1D, keep_n_of_m, torch.bfloat16),
    ("row", WeightLayout(11, 40), keep_in_rows, torch.bfloat16),
])  # fmt: skip
def test_groups_and_rows_decided_by_themselves_are_those_of_the_cpu(pattern, layout, keep, dtype):
    for scores in shards(pattern, layout, dtype, (0, 97, 203, 204, 1 << 30)):
        for stored in scores.matrices:
            matrix = Matrix(scores, stored, scores.pattern.fixed_sparsity or 0.6)
            (by_kernel,), bad = keep([matrix.unit_weights])
            in_torch, bad_in_torch = sharded_select._each_unit_in_torch(matrix)
            assert torch.equal(in_place(matrix, by_kernel), in_place(matrix, in_torch))
            assert bad.tolist() == [int(bad_in_torch)] == [0]


def test_scores_of_units_that_are_not_finite_are_noticed():
    for pattern, layout, keep in (("2:4", LINEAR, keep_n_of_m), ("row", LINEAR, keep_in_rows)):
        (scores,) = shards(pattern, layout, torch.float32, (0, 1 << 30))
        scores._own.values[100] = float("nan")
        matrix = Matrix(scores, scores.matrices[0], scores.pattern.fixed_sparsity or 0.6)
        assert keep([matrix.unit_weights])[1].tolist() == [1]


@pytest.mark.parametrize("distinct", [None, 3])
def test_ranks_that_share_units_decide_them_as_one(distinct, monkeypatch):
    """Also where units equal to the cut lie in what other ranks count."""
    one_launch_at_a_time(monkeypatch)
    keys = random_scores(200, 1, distinct).view(torch.int32)
    cuts, prune = (0, 61, 62, 130, 200), 90

    def work(rank, sums):
        first, last = max(0, cuts[rank] - 5), min(200, cuts[rank + 1] + 4)
        here, own = keys[first:last].clone(), (cuts[rank] - first, cuts[rank + 1] - first)
        table = OwnKeys(here, first, 200, Rect(0, 1, 0, 200), TileFactors(), counted=(cuts[rank], cuts[rank + 1]))
        made = MatrixKeys(prune, lambda: iter((here,)), own=own, num_keys=len(here), num_in_all=200, own_keys=table)
        (bits,) = sharded_select.select_bits([made], sums)
        return first, unpack_shard(bits, len(here)).bool()

    expected = stable(keys, prune)
    for first, kept in Ranks(4).run(work):
        assert torch.equal(kept, expected[first : first + len(kept)])
