"""Keys of scores: native loops and their torch twins give the same bits, and keys sort as scores do."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core import bits, bracket, keys
from pst_ds.core import kernels as native
from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.keys import (
    HIGHEST_FINITE,
    LOWEST_FINITE,
    NO_KEY,
    Classifier,
    histogram,
    histograms,
    keys_of,
    order_keys,
    score_keys,
    scores_of_keys,
    single_weights,
)
from pst_ds.core.scores import importance
from tests.pairs import every_pair

CPU = torch.device("cpu")


def keys_at(*single):
    """Keys of individual weights."""
    return keys_of([single_weights(*single)])[0]


@pytest.fixture
def without_native(monkeypatch):
    """Run a function a second time in torch alone."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(keys, "library", lambda: None)
            patch.setattr(bits, "library", lambda: None)
            return function()

    return run


def require_native():
    assert native.library() is not None, "the tests need the C++ compiler that torch's own extensions need"


def tile(rows, cols, seed, score_rank=3, update_rank=2, structured=True, transposed=False):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def pair(rank):
        if not rank:
            return None, None
        if transposed:
            return random(rank, rows).t(), random(cols, rank).t()
        return random(rows, rank), random(rank, cols)

    structured_terms = (random(rows), random(cols)) if structured else (None, None)
    return TileFactors(*pair(score_rank), *structured_terms, *pair(update_rank))


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (2, 63), (3, 65), (5, 200), (4, 128)])
@pytest.mark.parametrize("options", [{}, {"score_rank": 0}, {"update_rank": 0}, {"structured": False},
                                     {"transposed": True, "score_rank": 8, "update_rank": 8}], ids=str)  # fmt: skip
@pytest.mark.parametrize(("constants", "scale"), [(Constants(), 1.0), (Constants(0.3, 0.7, 1.7), 0.0123)])
def test_native_score_keys_are_those_of_importance_to_the_bit(dtype, shape, options, constants, scale):
    require_native()
    weight = torch.randn(shape[0], shape[1] + 3, generator=torch.Generator().manual_seed(1)).to(dtype)[:, 1:-2]
    terms = tile(*shape, seed=2, **options)
    expected = order_keys(importance(weight, terms, constants, scale))
    assert torch.equal(score_keys(weight, terms, constants, scale), expected)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (5, 200)])
@pytest.mark.parametrize("of_rows", [True, False])
@pytest.mark.parametrize("constants", [Constants(beta=0.3), Constants(frozen_magnitude=True)])
def test_norms_and_kinds_of_scores_give_the_same_bits_natively(dtype, shape, of_rows, constants, without_native):
    require_native()
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    norms = torch.rand(shape[0 if of_rows else 1], generator=generator) * 3.0
    terms = replace(tile(*shape, seed=2), **{"row_norms" if of_rows else "col_norms": norms})
    found = score_keys(weight, terms, constants, 0.0123)
    assert torch.equal(found, order_keys(importance(weight, terms, constants, 0.0123)))
    assert torch.equal(found, without_native(lambda: score_keys(weight, terms, constants, 0.0123)))
    rows, cols = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    rows, cols = rows.flatten(), cols.flatten()
    assert torch.equal(keys_at(weight.flatten(), rows, cols, terms, constants, 0.0123), found.flatten())


def test_scores_of_every_kind_are_the_written_out_formula():
    weight, terms = torch.randn(6, 40), tile(6, 40, seed=3)
    norms = torch.rand(40)
    rest = terms.score_left @ terms.score_right + terms.score_rows.unsqueeze(1) + terms.score_cols
    update = terms.update_left @ terms.update_right
    for constants, tiles, expected in (
        (Constants(), replace(terms, col_norms=norms), (weight + update).abs() * norms / 0.5 + rest),
        (Constants(frozen_magnitude=True), replace(terms, col_norms=norms), weight.abs() * norms / 0.5 + rest),
    ):
        assert torch.allclose(importance(weight, tiles, constants, 0.5), expected, atol=1e-5)


def test_keys_at_are_the_rectangles_keys():
    weight, terms = torch.randn(7, 33), tile(7, 33, seed=3)
    whole = score_keys(weight, terms, Constants(0.5, 2.0, 0.1), 0.2)
    rows, cols = torch.tensor([0, 6, 3, 3]), torch.tensor([32, 0, 5, 5])
    assert torch.equal(keys_at(weight[rows, cols], rows, cols, terms, Constants(0.5, 2.0, 0.1), 0.2), whole[rows, cols])


def test_single_weights_of_many_matrices_have_the_keys_of_each():
    made = []
    for i, (norms, constants) in enumerate(
        [(True, Constants(0.5, 2.0, 0.1)), (False, Constants()), (True, Constants(0.5, 2.0, 0.1)), (False, Constants())]
    ):
        weight, terms = torch.randn(4 + i, 9), tile(4 + i, 9, seed=i)
        terms = replace(terms, col_norms=torch.rand(9)) if norms else terms
        rows, cols = torch.tensor([0, 3, 1, 3][: i + 1]), torch.tensor([8, 0, 5, 5][: i + 1])
        made.append((weight[rows, cols], rows, cols, terms, constants, 0.1 + i))
    found = keys_of([single_weights(*one) for one in made])
    assert [own.tolist() for own in found] == [keys_at(*one).tolist() for one in made]


def test_zeros_have_one_key_and_not_finite_ones_lie_outside():
    found = order_keys(torch.tensor([0.0, -0.0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]))
    assert found.tolist() == [0, 0, HIGHEST_FINITE, LOWEST_FINITE]
    bad = order_keys(torch.tensor([float("inf"), float("-inf"), float("nan"), -float("nan")]))
    assert all(key > HIGHEST_FINITE or key < LOWEST_FINITE for key in bad.tolist())


int32s = st.integers(-(2**31), 2**31 - 1)
finite = st.integers(LOWEST_FINITE, HIGHEST_FINITE)


@given(values=st.lists(int32s | st.integers(-5, 5), max_size=700),
       bounds=st.tuples(finite | st.integers(-5, 5), finite), room=st.integers(0, 800),
       tile_size=st.integers(1, 300))  # fmt: skip
def test_classifier_sorts_keys_about_the_interval(values, bounds, room, tile_size):
    low, high = min(bounds), max(bounds)
    array = np.array(values, dtype=np.int64)
    inside = (array >= low) & (array <= high)
    for use_native in (True, False):
        held = keys.library
        keys.library = held if use_native else lambda: None
        try:
            sorter = Classifier(len(values), low, high, room=room, device=CPU)
            for part in torch.from_numpy(array.astype(np.int32)).split(tile_size) if values else ():
                sorter.take(part)
        finally:
            keys.library = held
        assert sorter.above().bool().tolist() == (array > high).tolist()
        below, not_finite, overflowed, num_inside = sorter.counts().tolist()
        assert below == int((array < low).sum())
        assert not_finite == int(((array < LOWEST_FINITE) | (array > HIGHEST_FINITE)).sum())
        assert (num_inside, overflowed) == (int(inside.sum()), int(inside.sum()) > room)
        if not overflowed:
            found, index = sorter.inside()
            if not use_native:  # of a length that depends on no key
                found, index = found[found != NO_KEY], index[found != NO_KEY]
            assert index.tolist() == inside.nonzero()[0].tolist()
            assert found.tolist() == array[inside].tolist()


@pytest.mark.parametrize("use_native", [True, False])
def test_a_matrix_may_have_more_than_two_to_31_keys(use_native, monkeypatch):
    """As if all but the last 100 keys had come: of tensors as large as the matrix no more than the ends are touched."""
    if not use_native:
        monkeypatch.setattr(keys, "library", lambda: None)
        monkeypatch.setattr(bits, "library", lambda: None)
    before, size = 2**31 - 40, 100
    sorter = Classifier(before + size, 0, 9, room=size, device=CPU)
    sorter._taken = before
    values = torch.arange(size, dtype=torch.int32) % 20 - 5
    for part in values.split(30):
        sorter.take(part)
    found, index = sorter.inside()
    is_key = found != NO_KEY
    expected = ((values >= 0) & (values <= 9)).nonzero().flatten() + before
    assert index[is_key].tolist() == expected.tolist()
    held = bracket._RisingNumbers(index).all()
    assert torch.equal(held, index)
    first_byte = before // 8
    mask = torch.empty(first_byte + 13, dtype=torch.uint8)
    mask[first_byte:] = 0
    bits.set_bits_(mask, held, is_key)
    assert torch.equal(bits.unpack_shard(mask[first_byte:], size).nonzero().flatten() + before, expected)


@given(values=st.lists(int32s, max_size=300), low=int32s, shift=st.integers(0, 21))
def test_histogram_counts_digits(values, low, shift):
    expected = np.zeros(64, dtype=np.int64)
    for value in values:
        if 0 <= (digit := (value - low) >> shift) < 64:
            expected[digit] += 1
    sample = torch.tensor(values, dtype=torch.int32)
    assert histogram(sample, low, shift, 64).tolist() == expected.tolist()


@pytest.mark.parametrize("most", [1, 50, 1 << 22])
def test_histograms_of_many_runs_are_those_of_each(most, without_native, monkeypatch):
    monkeypatch.setattr(keys, "_COUNTED_AT_ONCE", most)
    runs = [torch.randint(-(1 << 31), (1 << 31) - 1, (size,)).int() for size in (40, 0, 7, 30)]
    lows = [-(1 << 31), 0, 5, (1 << 31) - 1 - (64 << 20)]
    expected = torch.stack([histogram(own, low, 20, 64) for own, low in zip(runs, lows, strict=True)])
    assert torch.equal(histograms(runs, lows, 20, 64), expected)
    assert torch.equal(without_native(lambda: histograms(runs, lows, 20, 64)), expected)


def test_torch_twins_of_the_bit_loops(without_native):
    require_native()
    generator = torch.Generator().manual_seed(5)
    before, after = (torch.randint(0, 256, (37,), generator=generator, dtype=torch.uint8) for _ in range(2))
    counts = bits.count_bits(before, after)
    assert counts.tolist() == without_native(lambda: bits.count_bits(before, after)).tolist()
    index = torch.tensor([0, 9, 11, 200, 295], dtype=torch.int32)
    chosen = torch.tensor([True, True, False, True, True])
    before[index.long() // 8] = 0
    ours, twins = before.clone(), before.clone()
    bits.set_bits_(ours, index, chosen)
    without_native(lambda: bits.set_bits_(twins, index, chosen))
    assert torch.equal(ours, twins)
    expected = bits.unpack_shard(before, 296)
    expected[index[chosen].long()] = 1
    assert torch.equal(bits.unpack_shard(ours, 296), expected)
    for count, start in ((290, 0), (290, 3), (1, 7), (13, 21), (0, 5)):
        shard = bits.pack_shard(torch.rand(count, generator=generator) > 0.5, 37)
        twin = without_native(lambda c=count, s=start, b=shard: bits.checksum(b, c, s, 99))
        assert int(bits.checksum(shard, count, start, 99)) == int(twin)


def test_native_code_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("PST_DS_NATIVE", "0")
    assert native.library.__wrapped__() is None


def test_a_compiler_that_fails_is_a_warning_and_torch_takes_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="native code cannot be built"):
        assert native.library.__wrapped__() is None
    assert not list((tmp_path / "pst_ds").iterdir())


def test_scores_come_back_from_their_keys():
    scores = torch.tensor([0.0, -0.0, 1.5, -1.5, 3e38, -3e38, 1e-45, -1e-45, math.inf, -math.inf])
    assert torch.equal(scores_of_keys(order_keys(scores)), scores)
