"""Selection in one pass: the same cut as a stable sort, whatever the sample says and however the keys are spread."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core import bracket
from pst_ds.core.bits import unpack_shard
from pst_ds.core.bracket import sample_positions, sample_size, select_bits
from pst_ds.core.keys import order_keys
from pst_ds.core.select import MatrixKeys, NonFiniteScoreError, RankSums, Sampled
from tests.pairs import every_pair


class Ranks:
    """Collectives between threads of one process."""

    def __init__(self, world):
        self.num_exchanges = [0] * world
        self.num_bytes = 0
        self._slots = [torch.empty(0)] * world
        self._barrier = threading.Barrier(world, timeout=60)

    def _exchange(self, rank, value):
        self.num_exchanges[rank] += 1
        self.num_bytes += value.nbytes if rank == 0 else 0
        self._slots[rank] = value.clone()
        self._barrier.wait()
        everyone = torch.stack(self._slots)
        self._barrier.wait()
        return everyone

    def run(self, work):
        def guarded(rank):
            sums = RankSums(lambda v: self._exchange(rank, v).sum(0), lambda v: self._exchange(rank, v)[:rank].sum(0))
            try:
                return work(rank, sums)
            except NonFiniteScoreError as error:
                return error
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self._slots)) as pool:
            return list(pool.map(guarded, range(len(self._slots))))


def tiles_of(keys, size):
    yield from keys.split(size) if keys.numel() else ()


def selected(matrices, counts, world, *, pools=(), pool_of=None, tile=50, home=None, ranks=None):
    """Whole keep masks of ``matrices`` (flat fp32 scores), and the exchanges of a rank.

    Each is cut evenly over ranks, or lies whole on the one that ``home`` says.
    """
    ranks = ranks or Ranks(world)

    def work(rank, sums):
        own = []
        for i, (scores, count) in enumerate(zip(matrices, counts, strict=True)):
            share = -(-scores.numel() // world)
            start, stop = min(rank * share, scores.numel()), min((rank + 1) * share, scores.numel())
            lies_on = None if home is None else home[i]
            if lies_on is not None:
                start, stop = 0, scores.numel() if rank == lies_on else 0
            keys = order_keys(scores[start:stop])

            def sample(at, _, keys=keys, start=start, stop=stop):
                found = torch.zeros(at.numel(), dtype=torch.int32)
                here = (at >= start) & (at < stop)
                found[here] = keys[at[here] - start]
                return Sampled(slice(None), found)

            pool = None if pool_of is None else pool_of[i]
            tiles = partial(tiles_of, keys, tile)
            sizes = {"num_keys": keys.numel(), "num_in_all": scores.numel()}
            own.append(MatrixKeys(count, tiles, pool, None, lies_on is not None, **sizes, sample=sample))
        found = select_bits(own, sums, None, pools)
        return [unpack_shard(bits, m.num_keys) for bits, m in zip(found, own, strict=True)]

    by_rank = ranks.run(work)
    if any(isinstance(r, NonFiniteScoreError) for r in by_rank):
        return by_rank, ranks.num_exchanges
    return [torch.cat(pieces).bool() for pieces in zip(*by_rank, strict=True)], ranks.num_exchanges


def stable(scores, count):
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[np.argsort(scores.double().numpy(), kind="stable")[:count].copy()] = False
    return keep


def greedy(matrices, most, total):
    """Of all scores in rising order (of equals the first matrix's lowest index first), prune unless at most."""
    keep = [torch.ones(m.numel(), dtype=torch.bool) for m in matrices]
    left = list(most)
    for _, i, j in sorted((s, i, j) for i, m in enumerate(matrices) for j, s in enumerate(m.tolist())):
        if total and left[i]:
            keep[i][j] = False
            left[i] -= 1
            total -= 1
    return keep


def random_scores(numel, seed, distinct=None):
    generator = torch.Generator().manual_seed(seed)
    if distinct is None:
        return torch.randn(numel, generator=generator)
    return torch.randint(0, distinct, (numel,), generator=generator).float() - distinct // 2


@pytest.fixture
def small_samples(monkeypatch):
    """Brackets from a few keys, so that a bracket is narrower than a small matrix."""
    monkeypatch.setattr(bracket, "MIN_SAMPLE", 64)


@every_pair
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("distinct", [None, 1, 3, 500])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.9999])
def test_it_prunes_what_a_stable_sort_does(small_samples, world, distinct, sparsity):
    matrices = [random_scores(n, n, distinct) for n in (5000, 1, 700, 64)]
    counts = [math.floor(sparsity * m.numel()) for m in matrices]
    masks, _ = selected(matrices, counts, world)
    for scores, count, mask in zip(matrices, counts, masks, strict=True):
        assert torch.equal(mask, stable(scores, count))


def test_the_number_of_exchanges_does_not_depend_on_the_number_of_matrices(small_samples):
    few = selected([random_scores(3000, 1)], [1500], 2)[1]
    many = selected([random_scores(3000, seed) for seed in range(20)], [1500] * 20, 2)[1]
    assert few == many
    assert many[0] <= 6


@pytest.mark.parametrize(("low", "high", "most_inside"), [(-9, -5, 9999), (5, 9, 9999), (-1, 1, 3), (-0.1, 0.1, 9999)])
def test_a_bracket_that_misses_changes_nothing(monkeypatch, low, high, most_inside):
    """Below the cut, above it, with too many keys inside, and right for a few of the matrices."""
    low, high = order_keys(torch.tensor([low, high])).tolist()
    monkeypatch.setattr(bracket, "_matrix_bracket", lambda *_: bracket._Bracket(low, high, most_inside))
    matrices = [random_scores(4000, seed) for seed in range(6)]
    counts = [int(4000 * s) for s in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)]
    masks, _ = selected(matrices, counts, 2)
    for scores, count, mask in zip(matrices, counts, masks, strict=True):
        assert torch.equal(mask, stable(scores, count))


def test_scores_in_rising_order_over_the_ranks(small_samples):
    """All of the keys inside the bracket lie on one rank."""
    scores = torch.linspace(-1, 1, 6000)
    masks, _ = selected([scores], [4444], 3)
    assert torch.equal(masks[0], stable(scores, 4444))


@given(sizes=st.lists(st.integers(1, 120), min_size=1, max_size=4), world=st.integers(1, 3), share=st.floats(0, 1),
       most_share=st.floats(0.3, 1), distinct=st.sampled_from([None, 2, 7]), seed=st.integers(0, 10**6))  # fmt: skip
def test_a_pool_prunes_the_smallest_of_all_its_matrices(sizes, world, share, most_share, distinct, seed):
    matrices = [random_scores(n, seed + i, distinct) * (1 + i) for i, n in enumerate(sizes)]
    most = [math.ceil(most_share * n) for n in sizes]
    total = math.floor(share * sum(most))
    masks, _ = selected(matrices, most, world, pools=[total], pool_of=[0] * len(sizes))
    for mask, expected in zip(masks, greedy(matrices, most, total), strict=True):
        assert torch.equal(mask, expected)


@given(homes=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=6), share=st.floats(0, 1),
       most_share=st.floats(0.3, 1), distinct=st.sampled_from([None, 2, 7]), misses=st.booleans(),
       seed=st.integers(0, 10**6))  # fmt: skip
def test_a_pool_is_the_same_where_some_matrices_lie_whole_on_a_rank(homes, share, most_share, distinct, misses, seed):
    """Counted together there; also with a bracket that misses, after which all keys are passed."""
    sizes = [20 + (seed >> i) % 90 for i in range(len(homes))]
    matrices = [random_scores(n, seed + i, distinct) * (1 + i) for i, n in enumerate(sizes)]
    most, pool_of = [math.ceil(most_share * n) for n in sizes], [i % 2 for i in range(len(homes))]
    pools = [math.floor(share * sum(most[pool::2])) for pool in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        if misses:
            patch.setattr(bracket, "_pool_bracket", lambda *_: bracket._Bracket(0, 5, 9))
        masks, _ = selected(matrices, most, 3, pools=pools, pool_of=pool_of, home=homes)
    for pool in (0, 1):
        expected = greedy(matrices[pool::2], most[pool::2], pools[pool])
        assert all(torch.equal(*pair) for pair in zip(masks[pool::2], expected, strict=True))


def test_what_a_pool_exchanges_is_bounded(monkeypatch):
    """A number of each matrix beside a bounded sample and the rows: one of the pool, and one of each that is cut."""
    monkeypatch.setattr(bracket, "MAX_POOLED_SAMPLE", 2048)
    number = 200
    matrices = [random_scores(40, seed) for seed in range(number)]
    ranks, home = Ranks(2), [i % 2 for i in range(number)]
    home[50] = home[150] = None
    masks, _ = selected(matrices, [39] * number, 2, pools=[4000], pool_of=[0] * number, home=home, ranks=ranks)
    assert sum(int((~mask).sum()) for mask in masks) == 4000
    sample, rows, numbers = 4 * number * (2048 // number), 3 * 8 * (3 + 1) * (4 + 2048), 8 * number
    assert ranks.num_bytes <= sample + rows + numbers < number * 2048 * 8


def test_many_rows_are_narrowed_by_fewer_bits(monkeypatch):
    matrices = [random_scores(300, seed) for seed in range(6)]
    expected, few = selected(matrices, [100] * 6, 2)
    monkeypatch.setattr(bracket, "MAX_COUNTS", 6 * 16)
    ranks = Ranks(2)
    found, more = selected(matrices, [100] * 6, 2, ranks=ranks)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert more[0] > few[0]
    assert ranks.num_bytes < 6 * 300 * 4 + more[0] * 6 * 8 * (4 + 16)


def test_pools_and_single_matrices_side_by_side(small_samples):
    matrices = [random_scores(2000, 1), random_scores(2000, 2) * 5, random_scores(2000, 3)]
    masks, exchanges = selected(matrices, [1900, 700, 1900], 2, pools=[2600], pool_of=[0, None, 0])
    alone = greedy([matrices[0], matrices[2]], [1900, 1900], 2600)
    assert torch.equal(masks[0], alone[0])
    assert torch.equal(masks[2], alone[1])
    assert torch.equal(masks[1], stable(matrices[1], 700))
    assert exchanges[0] <= 6


def test_a_pool_with_a_matrix_at_its_most(small_samples):
    matrices = [random_scores(3000, 1) * 0.01, random_scores(3000, 2), random_scores(3000, 3)]
    masks, _ = selected(matrices, [1000, 3000, 3000], 2, pools=[4500], pool_of=[0, 0, 0])
    for mask, expected in zip(masks, greedy(matrices, [1000, 3000, 3000], 4500), strict=True):
        assert torch.equal(mask, expected)
    assert int((~masks[0]).sum()) == 1000


@every_pair
@pytest.mark.parametrize("pooled", [{}, {"pools": [90], "pool_of": [0] * 3, "home": [0, 2, None]}], ids=["", "pooled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_scores_are_refused_on_every_rank_by_matrix(bad, pooled):
    matrices = [random_scores(100, seed) for seed in range(3)]
    matrices[1][99] = bad
    errors, _ = selected(matrices, [50] * 3, 3, **pooled)
    assert [error.matrices for error in errors] == [[1]] * 3


@given(numel=st.integers(0, 10**7))
def test_one_sample_of_every_stratum(numel):
    at = sample_positions(numel, sample_size(numel))
    assert at.numel() == sample_size(numel)
    if numel:
        stratum = at.double() * at.numel() / numel
        assert bool((at[1:] > at[:-1]).all())
        assert int(at[0]) >= 0
        assert int(at[-1]) < numel
        assert bool(((stratum - torch.arange(at.numel())) > -1).all())
        assert bool(((stratum - torch.arange(at.numel())) < 1 + at.numel() / numel).all())


@pytest.mark.parametrize("numbers", [[], [0], [255], [0, 254, 509, 764, 764, 70_000, 2**31 - 1]], ids=len)
def test_places_of_keys_inside_are_kept_as_steps(numbers):
    index = torch.tensor(numbers, dtype=torch.int32)
    found = bracket._RisingNumbers(index).all()
    assert found.dtype == torch.int32
    assert torch.equal(found, index)
