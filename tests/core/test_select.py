"""Selection: exact counts, ties by flat index, and the same masks on any number of ranks."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.keys import order_keys
from pst_ds.core.select import MatrixKeys, NonFiniteScoreError, RankSums, prune_count, select
from tests.pairs import every_pair

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149

few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST, 1.0 + 2.0**-23])
any_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
score_lists = st.lists(few_values | any_finite, min_size=1, max_size=60)


def keep_mask(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The keep mask that :func:`select` makes on one rank."""
    keys = order_keys(scores)
    (cut,) = select([MatrixKeys(count, lambda: iter((keys,)))])
    return cut.keep(keys)[0]


def stable_sort_keep(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The keep mask written out: drop the first ``count`` of a stable sort."""
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[np.argsort(scores.double().flatten().numpy(), kind="stable")[:count].copy()] = False
    return keep.view(scores.shape)


class SimulatedRanks:
    """Collectives between threads of one process, one thread a rank."""

    def __init__(self, world: int):
        self.num_exchanges = [0] * world
        self._slots: list[torch.Tensor] = [torch.empty(0)] * world
        self._barrier = threading.Barrier(world, timeout=60)

    def _exchange(self, rank: int, value: torch.Tensor) -> torch.Tensor:
        self.num_exchanges[rank] += 1
        self._slots[rank] = value.clone()
        self._barrier.wait()
        everyone = torch.stack(self._slots)
        self._barrier.wait()
        return everyone

    def sums_of(self, rank: int) -> RankSums:
        return RankSums(lambda v: self._exchange(rank, v).sum(0), lambda v: self._exchange(rank, v)[:rank].sum(0))

    def run(self, work) -> list:
        """``work(rank)`` on every rank: results, or the exception each raised."""

        def guarded(rank: int):
            try:
                return work(rank)
            except NonFiniteScoreError as error:
                return error
            except BaseException:
                self._barrier.abort()
                raise

        world = len(self._slots)
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(guarded, range(world)))


def tiled(keys: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    yield from keys.split(size) if keys.numel() else ()


def keep_on_ranks(
    matrices: list[torch.Tensor], counts: list[int], cuts: list[list[int]], tile: int
) -> tuple[list[torch.Tensor], SimulatedRanks]:
    """Whole keep masks from ranks that each hold flat scores [cuts[m][rank], cuts[m][rank + 1]) of matrix m."""
    world = len(cuts[0]) - 1
    ranks = SimulatedRanks(world)

    def work(rank: int) -> list[torch.Tensor]:
        own = [order_keys(m[c[rank] : c[rank + 1]]) for m, c in zip(matrices, cuts, strict=True)]
        chosen = select(
            [MatrixKeys(n, lambda k=k: tiled(k, tile)) for n, k in zip(counts, own, strict=True)], ranks.sums_of(rank)
        )
        masks = []
        for cut, keys in zip(chosen, own, strict=True):
            pieces = [torch.empty(0, dtype=torch.bool)]
            for part in tiled(keys, tile):
                kept, cut = cut.keep(part)
                pieces.append(kept)
            masks.append(torch.cat(pieces))
        return masks

    by_rank = ranks.run(work)
    return [torch.cat(pieces) for pieces in zip(*by_rank, strict=True)], ranks


def zero3_cuts(numel: int, world: int) -> list[int]:
    """Where ZeRO-3 cuts a flat weight."""
    share = -(-numel // world)
    return [min(rank * share, numel) for rank in range(world + 1)]


def random_scores(numel: int, seed: int, distinct: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if distinct is None:
        return torch.randn(numel, generator=generator)
    return torch.randint(0, distinct, (numel,), generator=generator).float() - distinct // 2


@every_pair
@pytest.mark.parametrize("numel", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize("distinct", [None, 1, 3], ids=["distinct", "all-equal", "three-values"])
def test_count_is_exact_with_ties(numel, distinct):
    scores = random_scores(numel, seed=numel, distinct=distinct)
    for count in {0, 1, numel // 3, numel // 2, numel - 1, numel}:
        keep = keep_mask(scores, count)
        assert int((~keep).sum()) == count
        assert torch.equal(keep, stable_sort_keep(scores, count))


def test_lowest_flat_index_is_pruned_first_among_equals():
    scores = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert keep_mask(scores, 3).tolist() == [[True, False, False], [True, False, True]]


def test_minus_zero_equals_plus_zero():
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0])
    assert keep_mask(scores, 2).tolist() == [False, False, True, True]
    assert order_keys(scores).unique().numel() == 1


@given(values=score_lists, data=st.data())
def test_keep_mask_is_a_stable_sort(values, data):
    scores = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(0, len(values)))
    assert torch.equal(keep_mask(scores, count), stable_sort_keep(scores, count))


@given(a=few_values | any_finite, b=few_values | any_finite)
def test_keys_order_as_scores(a, b):
    key_a, key_b = order_keys(torch.tensor([a, b], dtype=torch.float32)).tolist()
    assert (key_a < key_b) == (a < b)
    assert (key_a == key_b) == (a == b)


def test_keys_keep_the_flat_order_of_a_strided_tile():
    whole = random_scores(48, seed=1).view(6, 8)
    assert torch.equal(order_keys(whole[1:4, 2:7]), order_keys(whole[1:4, 2:7].contiguous()))
    assert torch.equal(keep_mask(whole.t(), 20), stable_sort_keep(whole.t().contiguous(), 20))


@pytest.mark.parametrize(
    ("sparsity", "numel", "count"), [(0.0, 10, 0), (0.5, 7, 3), (0.9, 10, 9), (0.999, 10, 9), (0.5, 2**40, 2**39)]
)
def test_prune_count_rounds_down(sparsity, numel, count):
    assert prune_count(sparsity, numel) == count


def test_many_matrices_are_cut_apart():
    matrices = [random_scores(50 + 13 * i, seed=i, distinct=None if i % 2 else 4) * 10.0**i for i in range(6)]
    counts = [0, 1, 30, 60, 102, 115]
    keys = [order_keys(m) for m in matrices]
    cuts = select([MatrixKeys(n, lambda k=k: iter((k,))) for n, k in zip(counts, keys, strict=True)])
    for matrix, count, key, cut in zip(matrices, counts, keys, cuts, strict=True):
        assert torch.equal(cut.keep(key)[0], stable_sort_keep(matrix, count))


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
def test_ties_are_counted_across_tiles(tile):
    scores = random_scores(200, seed=3, distinct=3)
    (keep,), _ = keep_on_ranks([scores], [101], [[0, 200]], tile)
    assert torch.equal(keep, stable_sort_keep(scores, 101))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_masks_are_the_same_on_every_number_of_ranks(world):
    sizes = [1, 2, 4, 97, 240]  # the small ones leave the last ranks of a large world with empty shards
    matrices = [random_scores(n, seed=i, distinct=None if i % 2 else 5) for i, n in enumerate(sizes)]
    for sparsity in (0.0, 0.37, 0.5, 0.93):
        counts = [prune_count(sparsity, n) for n in sizes]
        cuts = [zero3_cuts(n, world) for n in sizes]
        keeps, ranks = keep_on_ranks(matrices, counts, cuts, tile=16)
        for matrix, count, keep in zip(matrices, counts, keeps, strict=True):
            assert torch.equal(keep, stable_sort_keep(matrix, count))
        assert ranks.num_exchanges == [4] * world  # whatever the number of matrices


@given(values=score_lists, data=st.data())
def test_masks_are_the_same_wherever_the_scores_are_cut(values, data):
    scores = torch.tensor(values, dtype=torch.float32)
    inner = data.draw(st.lists(st.integers(0, len(values)), min_size=1, max_size=3))
    count = data.draw(st.integers(0, len(values)))
    (keep,), _ = keep_on_ranks([scores], [count], [[0, *sorted(inner), len(values)]], tile=5)
    assert torch.equal(keep, keep_mask(scores, count))


def test_a_rank_without_scores_takes_part():
    scores = random_scores(30, seed=9, distinct=2)
    for cuts in ([0, 0, 30], [0, 30, 30], [0, 0, 11, 11, 30, 30]):
        (keep,), _ = keep_on_ranks([scores], [13], [cuts], tile=4)
        assert torch.equal(keep, stable_sort_keep(scores, 13))
        assert [b - a for a, b in pairwise(cuts)].count(0) >= 1


NEGATIVE_NAN = torch.tensor([-1], dtype=torch.int32).view(torch.float32).item()


@pytest.mark.parametrize("bad", [float("nan"), NEGATIVE_NAN, float("inf"), float("-inf")], ids=repr)
def test_non_finite_scores_are_refused_by_matrix(bad):
    matrices = [random_scores(20, seed=i) for i in range(4)]
    matrices[1][19] = bad
    matrices[3][0] = bad
    keys = [order_keys(m) for m in matrices]
    with pytest.raises(NonFiniteScoreError, match=r"matrices \[1, 3\]") as caught:
        select([MatrixKeys(5, lambda k=k: iter((k,))) for k in keys])
    assert caught.value.matrices == [1, 3]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -0x400000, -1], ids=hex)
def test_every_kind_of_nan_is_refused(bits):
    scores = random_scores(20, seed=0)
    scores[7] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    assert scores[7].isnan()
    with pytest.raises(NonFiniteScoreError):
        keep_mask(scores, 5)


def test_non_finite_scores_of_one_rank_are_refused_on_all():
    matrices = [random_scores(20, seed=i) for i in range(3)]
    matrices[2][15] = float("nan")  # on rank 1 of 2
    ranks = SimulatedRanks(2)

    def work(rank: int):
        own = [order_keys(m[10 * rank : 10 * rank + 10]) for m in matrices]
        return select([MatrixKeys(4, lambda k=k: iter((k,))) for k in own], ranks.sums_of(rank))

    errors = ranks.run(work)
    assert [type(e) for e in errors] == [NonFiniteScoreError] * 2
    assert [e.matrices for e in errors] == [[2], [2]]


def test_the_largest_finite_scores_are_accepted():
    scores = torch.tensor([LARGEST, -LARGEST, 0.0, LARGEST])
    assert keep_mask(scores, 3).tolist() == [False, False, False, True]
