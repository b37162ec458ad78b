"""Kernels of a mask update in Triton's interpreter: the bits of the loops for CPUs."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.core import bracket
from pst_ds.core.bits import pack_shard, unpack_shard
from pst_ds.core.bracket import select_bits
from pst_ds.core.factors import Constants, Factors, TileFactors, tile_factors
from pst_ds.core.kernels.triton import bit_sums, cut_kernels, scan, score_kernels, table
from pst_ds.core.kernels.triton.scan import KernelScans, sample_keys
from pst_ds.core.kernels.triton.table import OwnKeys
from pst_ds.core.keys import HIGHEST_FINITE, LOWEST_FINITE, Classifier, order_keys, score_keys
from pst_ds.core.layout import WeightLayout, positions_before, shard_tiles, view_in_shard
from pst_ds.core.select import MatrixKeys, NonFiniteScoreError, Sampled
from tests.core.test_bracket import Ranks, stable

pytestmark = pytest.mark.interpreted
NAN, INF = math.nan, math.inf
CONSTANTS = Constants(alpha1=0.3, alpha2=0.7, beta=1.7)
SCALE = 0.0123


def layer(layout, seed=0, rank=4, dtype=torch.float32, norms=False):
    """A weight with ties and zeros of both signs, and its factors."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    outputs, inputs, parts = layout.out_features, layout.in_features, layout.num_matrices
    weight = (random(*layout.shape) * 2).round() / 4
    weight[weight == 0] = -0.0
    factors = Factors(
        A=random(outputs, rank), B=random(parts * rank, inputs), R=random(outputs), C=random(parts, inputs),
        U=random(outputs, rank), V=random(parts * rank, inputs),
        norms=random(inputs).abs() if norms else None,
    )  # fmt: skip
    return weight.to(dtype), factors


def own_of(weight, factors, layout, matrix, start, stop, constants=CONSTANTS, scale=SCALE):
    """What a rank with the flat weights [start, stop) has of a matrix."""
    tile = tile_factors(factors, layout, matrix, matrix.rect)
    values = weight.flatten()[start:stop].clone()
    return OwnKeys(values, start, layout.shape[1], matrix.rect, tile, constants, scale)


def keys_of(weight, factors, layout, matrix, start, stop, constants=CONSTANTS, scale=SCALE):
    """The same keys by the path of CPUs, in rising order."""
    values, row_length = weight.flatten()[start:stop].clone(), layout.shape[1]
    found = [torch.empty(0, dtype=torch.int32)]
    for rect in shard_tiles(matrix.rect, row_length, start, stop, 1 << 20):
        tile = tile_factors(factors, layout, matrix, rect)
        found.append(score_keys(view_in_shard(values, rect, row_length, start), tile, constants, scale).flatten())
    return torch.cat(found)


def assert_sorted_alike(owns, expected_keys, share=None):
    """Sort matrices in one pass, around these shares of their keys or everything finite; return its counts."""
    brackets = [(LOWEST_FINITE, HIGHEST_FINITE)] * len(owns)
    if share:
        ordered = [keys.sort().values if keys.numel() else torch.zeros(1, dtype=torch.int32) for keys in expected_keys]
        brackets = [tuple(int(keys[int(at * (keys.numel() - 1))]) for at in share) for keys in ordered]
    scans = KernelScans(owns, brackets, [keys.numel() for keys in expected_keys])
    counts = scans.counts()
    bits = zip(*(scans.bits_of(words) for words in (scans.above, scans.inside)), strict=True)
    for own, keys, ends, (above, inside), found in zip(owns, expected_keys, brackets, bits, counts, strict=True):
        assert own.count == keys.numel()
        expected = Classifier(keys.numel(), *ends, room=keys.numel(), device=keys.device)
        expected.take(keys)
        is_inside = torch.zeros(keys.numel(), dtype=torch.uint8)
        is_inside[expected.inside()[1].long()] = 1
        assert torch.equal(above, pack_shard(expected.above(), len(above)))
        assert torch.equal(inside, pack_shard(is_inside, len(inside)))
        below, bad, overflowed, num_inside = expected.counts().tolist()
        assert found.tolist() == [below, found[1], overflowed, num_inside]
        assert bool(found[1]) == bool(bad)  # rows of a tile, not weights, are counted
    return counts


LAYOUTS = {
    "two tiles each way": WeightLayout(34, 72),
    "odd": WeightLayout(37, 29),
    "rows of 8": WeightLayout(17, 24),
    "Conv1D": WeightLayout(24, 35, transposed=True),
    "fused": WeightLayout(48, 40, num_matrices=3),
    "fused Conv1D": WeightLayout(48, 21, transposed=True, num_matrices=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_counts_and_samples_are_those_of_the_loops_wherever_shards_are_cut(dtype):
    """Matrices of all kinds in one table, those of a kind in one launch."""
    owns, expected = [], []
    for seed, layout in enumerate(LAYOUTS.values()):
        weight, factors = layer(layout, seed=seed, dtype=dtype)
        length = layout.shape[1]
        for start, stop in [(0, layout.numel), (length + 8, layout.numel - 8), (3 * length - 3, 9 * length + 5)]:
            for matrix in layout.matrices():
                owns.append(own_of(weight, factors, layout, matrix, start, stop))
                expected.append(keys_of(weight, factors, layout, matrix, start, stop))
    assert_sorted_alike(owns, expected, (0.4, 0.6))
    sizes = [own.rect.numel - i % 3 * 100 for i, own in enumerate(owns)]
    for own, keys, size, found in zip(owns, expected, sizes, sample_keys(owns, sizes).split(sizes), strict=True):
        everyone = torch.zeros(own.rect.numel, dtype=torch.int32)
        everyone[own.first : own.end] = keys
        assert torch.equal(found, everyone[bracket.sample_positions(own.rect.numel, size)])


@pytest.mark.parametrize(
    ("rank", "constants", "norms"),
    [
        *((rank, CONSTANTS, False) for rank in (1, 11, 64)),
        (4, CONSTANTS, True),
        (4, Constants(frozen_magnitude=True), True),
    ],
)
def test_every_rank_and_kind_of_score(rank, constants, norms):
    owns, expected = [], []
    for layout in (WeightLayout(5, 24), WeightLayout(9, 6, transposed=True))[: 1 + (rank < 64)]:
        weight, factors = layer(layout, seed=rank, rank=rank, norms=norms)
        (matrix,) = layout.matrices()
        expected.append(keys_of(weight, factors, layout, matrix, 0, layout.numel, constants))
        owns.append(own_of(weight, factors, layout, matrix, 0, layout.numel, constants))
    assert_sorted_alike(owns, expected, (0.45, 0.55))
    sizes = [keys.numel() for keys in expected]
    assert torch.equal(sample_keys(owns, sizes), torch.cat(expected))


@pytest.mark.parametrize("missing", ["A", "U", "R", "all"])
def test_layers_without_some_factors(missing):
    layout = WeightLayout(6, 16)
    weight, factors = layer(layout)
    pairs = {"A": {"A": None, "B": None}, "U": {"U": None, "V": None}, "R": {"R": None, "C": None}}
    factors = Factors() if missing == "all" else replace(factors, **pairs[missing])
    (matrix,) = layout.matrices()
    keys = keys_of(weight, factors, layout, matrix, 0, 96)
    assert_sorted_alike([own_of(weight, factors, layout, matrix, 0, 96)], [keys], (0.5, 1.0))


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_scores_that_are_not_finite_are_noticed_where_they_are(bad):
    owns, expected, there = [], [], []
    for layout in (WeightLayout(4, 16), WeightLayout(3, 7)):
        weight, factors = layer(layout)
        weight[1, 2] = bad
        (matrix,) = layout.matrices()
        length = layout.shape[1]
        for start, stop in ((0, layout.numel), (2 * length, layout.numel), (0, length)):
            expected.append(keys_of(weight, factors, layout, matrix, start, stop))
            owns.append(own_of(weight, factors, layout, matrix, start, stop))
            there.append(start == 0 and stop == layout.numel)
    assert assert_sorted_alike(owns, expected)[:, 1].bool().tolist() == there


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0])
def test_all_scores_equal_or_zero_of_either_sign(value):
    values = torch.full((300,), value)
    own = OwnKeys(values, 0, 20, WeightLayout(15, 20).matrices()[0].rect, TileFactors())
    key = int(order_keys(torch.tensor([value])))
    counts = KernelScans([own] * 3, [(key, key), (key - 1, key - 1), (key + 1, key + 1)], [300] * 3).counts()
    assert counts[:, [0, 3]].tolist() == [[0, 300], [0, 0], [300, 0]]


def test_positions_before_an_index_are_counted():
    for layout in LAYOUTS.values():
        for matrix in layout.matrices():
            rect = matrix.rect
            is_in = torch.zeros(layout.shape, dtype=torch.int64)
            is_in[rect.r0 : rect.r1, rect.c0 : rect.c1] = 1
            before = torch.cat([torch.zeros(1, dtype=torch.int64), is_in.flatten().cumsum(0)])
            found = [positions_before(rect, layout.shape[1], i) for i in range(layout.numel + 1)]
            assert found == before.tolist()


def one_launch_at_a_time(monkeypatch):
    """Launch by one thread of several at a time, which the interpreter needs."""
    lock, real = threading.Lock(), scan.launch

    def one_at_a_time(*args, **constants):
        with lock:
            real(*args, **constants)

    for module in (scan, bit_sums, table):
        monkeypatch.setattr(module, "launch", one_at_a_time)


def selected(scores, counts, world, shape, monkeypatch, *, pools=(), pool_of=None):
    """Masks that ``world`` ranks select from flat ``scores`` by kernels, one launch at a time."""
    one_launch_at_a_time(monkeypatch)
    ranks = Ranks(world)

    def work(rank, sums):
        own = []
        for i, (flat, count) in enumerate(zip(scores, counts, strict=True)):
            share = -(-flat.numel() // world)
            start, stop = min(rank * share, flat.numel()), min((rank + 1) * share, flat.numel())
            rect = WeightLayout(*shape).matrices()[0].rect
            pool = None if pool_of is None else pool_of[i]
            made = OwnKeys(flat[start:stop].clone(), start, shape[1], rect, TileFactors())
            sizes = {"num_keys": stop - start, "num_in_all": flat.numel(), "own_keys": made}
            keys = order_keys(flat[start:stop])
            own.append(MatrixKeys(count, lambda keys=keys: iter((keys,)), pool, **sizes))
        found = select_bits(own, sums, None, pools)
        return [unpack_shard(bits, m.num_keys) for bits, m in zip(found, own, strict=True)]

    by_rank = ranks.run(work)
    if any(isinstance(found, NonFiniteScoreError) for found in by_rank):
        return by_rank
    return [torch.cat(pieces).bool() for pieces in zip(*by_rank, strict=True)]


def random_scores(numel, seed, distinct=None):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator).abs()
    return values if distinct is None else (values * distinct).round()


@pytest.mark.parametrize(("world", "distinct"), [(1, None), (3, 40), (2, 0)])
def test_the_cut_is_that_of_a_stable_sort(world, distinct, monkeypatch):
    """Also with a sample of some keys alone, many ties, and all keys equal."""
    monkeypatch.setattr(bracket, "MIN_SAMPLE", 256)
    bracket.sample_positions.cache_clear()
    shape = (40, 33)
    scores = [random_scores(1320, seed, distinct) for seed in range(2)]
    counts = [600, 1319]
    found = selected(scores, counts, world, shape, monkeypatch)
    bracket.sample_positions.cache_clear()
    for keep, flat, count in zip(found, scores, counts, strict=True):
        assert torch.equal(keep, stable(flat, count))


@pytest.mark.parametrize("world", [1, 2])
def test_pools_are_cut_as_by_the_loops(world, monkeypatch):
    shape, scores = (30, 31), [random_scores(930, seed, 30) for seed in range(3)]
    found = selected(scores, [800, 930, 500], world, shape, monkeypatch, pools=[1200], pool_of=[0, 0, None])
    expected = []
    for i, flat in enumerate(scores):
        keys = order_keys(flat)

        def sample(at, _, keys=keys):
            return Sampled(slice(None), keys[at])

        sizes = {"num_keys": 930, "num_in_all": 930, "sample": sample}
        expected.append(MatrixKeys([800, 930, 500][i], lambda k=keys: iter((k,)), [0, 0, None][i], **sizes))
    for keep, bits in zip(found, select_bits(expected, pools=[1200]), strict=True):
        assert torch.equal(keep, unpack_shard(bits, 930).bool())


def test_every_rank_refuses_a_score_that_is_not_finite(monkeypatch):
    scores = [random_scores(930, 0), random_scores(930, 1)]
    scores[1][900] = NAN
    found = selected(scores, [100, 100], 2, (30, 31), monkeypatch)
    assert [error.matrices for error in found] == [[1], [1]]


FAR = 1 << 31
"""Bytes before the first that :class:`_Moved` says to have."""


class _Moved(torch.Tensor):
    """The last bytes of a run of more than 2**31: its address is that of the run, of which it has no memory."""

    def data_ptr(self):
        return super().data_ptr() - FAR


@pytest.mark.parametrize("width", [24, 21], ids=["rows", "flat"])
def test_bits_behind_2_gib_of_those_of_other_matrices_are_written_there(width):
    """As on a GPU with 17e9 weights, where a product in 32 bits wraps."""
    own = OwnKeys(random_scores(10 * width, 0), 0, width, WeightLayout(10, width).matrices()[0].rect, TileFactors())
    keys = order_keys(own.values)
    cut = int(keys.median())
    block = 4 * cut_kernels.WORDS  # bytes
    above = torch.zeros(2 * cut_kernels.WORDS, dtype=torch.int32)
    inside = torch.zeros_like(above)
    far = [words.as_subclass(_Moved) for words in (above, inside)]
    brackets = torch.tensor([[cut, HIGHEST_FINITE]], dtype=torch.int32)
    blocks = torch.tensor([FAR // block + 1], dtype=torch.int32)
    counts = torch.zeros(1, 3, dtype=torch.int64)
    scan._sort(table.Table([own]), brackets, blocks, *far, counts)
    bits = unpack_shard(inside.view(torch.uint8)[block:], own.count).bool()
    assert torch.equal(bits, keys >= cut)
    assert not inside[: cut_kernels.WORDS].any()
    assert not above.any()


def test_matrices_that_fit_one_by_one_need_not_fit_together():
    """Programs of a launch are numbered through all matrices, in 32 bits."""
    side = 1 << 14
    rect = WeightLayout(side, side).matrices()[0].rect
    values = torch.zeros(1).expand(side * side)  # without memory of its own
    own = OwnKeys(values, 0, side, rect, TileFactors())
    most = (1 << 31) * score_kernels.FLAT // own.count
    assert own.fits
    assert table.fit_together([own] * (most - 1))
    assert not table.fit_together([own] * most)
    matrices = [MatrixKeys(1, lambda: iter(()), own_keys=own)] * most
    assert bracket._own_keys(matrices) == []
    assert len(bracket._own_keys(matrices[1:])) == most - 1
