"""Patterns of zeros: names, units, and what is kept in each, against loops written out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core import units
from pst_ds.core.keys import order_keys
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.units import block_keys, expand_units, keep_in_rows, keep_n_of_m, loss_keys, unit_tiles
from tests.pairs import every_pair


@pytest.mark.parametrize("name", ["matrix", "global", "row", "2:4", "4:8", "1:16", "16x1", "32x32"])
def test_names_round_trip(name):
    assert str(parse_pattern(name)) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [("4:4", "N < M"), ("0:4", "N < M"), ("2:17", "M <= 16"), ("1x1", "at least 2 weights"),
     ("0x4", "at least 2 weights"), ("rows", "is not known"), ("2:4:8", "is not known"), ("", "is not known")],
)  # fmt: skip
def test_bad_names_say_what_there_is(name, said):
    with pytest.raises(ValueError, match=said):
        parse_pattern(name)


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("2:4", WeightLayout(8, 6), "in_features divisible by 4, got 6"),
        ("2:4", WeightLayout(8, 6, transposed=True), "in_features divisible by 4, got 6"),
        ("16x1", WeightLayout(24, 6), "out_features divisible by 16, got 24"),
        ("4x2", WeightLayout(12, 6, transposed=True, num_matrices=2), "out_features divisible by 4, got 6"),
    ],
)
def test_a_pattern_that_does_not_divide_is_named(name, layout, said):
    with pytest.raises(ValueError, match=said):
        parse_pattern(name).require_fit(layout)
    parse_pattern("row").require_fit(layout)


@every_pair
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (11, 16)])
def test_n_of_m_keeps_the_largest_of_every_group(monkeypatch, native, transposed, n, m):
    if not native:
        monkeypatch.setattr(units, "native_for", lambda *_: None)
    keys = torch.randint(-4, 4, (6, 3 * m), generator=torch.Generator().manual_seed(m), dtype=torch.int32)
    expected = np.ones((6, 3 * m), dtype=np.uint8)
    for row in range(6):
        for group in range(3):
            order = np.argsort(keys[row, group * m : (group + 1) * m].numpy(), kind="stable")
            expected[row, group * m + order[: m - n]] = 0
    down = keep_n_of_m(keys.t().contiguous(), (m, 1), m - n).t()
    found = down if transposed else keep_n_of_m(keys, (1, m), m - n)
    assert np.array_equal(found.numpy(), expected)


@every_pair
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("prune", [0, 1, 7, 12])
def test_rows_lose_the_same_number_and_the_first_of_equals(monkeypatch, native, transposed, prune):
    if not native:
        monkeypatch.setattr(units, "native_for", lambda *_: None)
    keys = torch.randint(-3, 3, (5, 13), generator=torch.Generator().manual_seed(prune), dtype=torch.int32)
    expected = np.ones((5, 13), dtype=np.uint8)
    for row in range(5):
        expected[row, np.argsort(keys[row].numpy(), kind="stable")[:prune]] = 0
    found = keep_in_rows(keys.t(), (13, 1), prune).t() if transposed else keep_in_rows(keys, (1, 13), prune)
    assert np.array_equal(found.numpy(), expected)


def test_block_keys_sort_like_sums_of_scores():
    scores = torch.randn(8, 12, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    sums = scores.double().view(4, 2, 3, 4).sum((1, 3)).flatten()
    found = block_keys(order_keys(scores), (2, 4))
    assert torch.equal(found.argsort(stable=True), sums.argsort(stable=True))


def test_loss_of_a_group_is_what_it_would_lose():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, -1.0, -2.0, 5.0, 6.0]])
    found = loss_keys(order_keys(scores), (1, 4), 2)
    assert torch.equal(found, order_keys(torch.tensor([1.0 + 2.0, -1.0 - 2.0])))


@given(rows=st.integers(1, 33), cols=st.integers(1, 33), seed=st.integers(0, 99))
def test_a_blocks_sum_does_not_depend_on_the_tile(rows, cols, seed):
    scores = torch.randn(2 * rows, 3 * cols, generator=torch.Generator().manual_seed(seed))
    whole = block_keys(order_keys(scores), (rows, cols)).view(2, 3)
    for i in range(2):
        for j in range(3):
            part = scores[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols].contiguous()
            assert int(block_keys(order_keys(part), (rows, cols))) == int(whole[i, j])


def test_units_expand_to_their_weights():
    found = expand_units(torch.tensor([1, 0, 0, 1], dtype=torch.uint8), Rect(4, 8, 0, 6), (2, 3))
    assert found.tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2


@given(name=st.sampled_from(["matrix", "row", "2:4", "2x4", "4x1", "1x4", "6x2"]), transposed=st.booleans(),
       parts=st.sampled_from([1, 2]), world=st.integers(1, 9), size=st.integers(1, 200))  # fmt: skip
def test_unit_tiles_cover_every_ranks_weights_with_whole_units_in_order(name, transposed, parts, world, size):
    layout = WeightLayout(24, 8, transposed=transposed, num_matrices=parts)
    pattern = parse_pattern(name)
    unit, length = pattern.unit(layout), layout.shape[1]
    share = -(-layout.numel // world)
    for rank in range(world):
        start, stop = min(rank * share, layout.numel), min((rank + 1) * share, layout.numel)
        region = pattern.aligned(layout, start, stop)
        covered = np.zeros(layout.shape, dtype=int)
        for block in layout.matrices():
            firsts = []
            for rect in unit_tiles(block.rect, unit, length, *region, size):
                assert (rect.r1 - rect.r0) % unit[0] == 0
                assert (rect.c1 - rect.c0) % unit[1] == 0
                covered[rect.r0 : rect.r1, rect.c0 : rect.c1] += 1
                firsts += [
                    r * length + c for r in range(rect.r0, rect.r1, unit[0]) for c in range(rect.c0, rect.c1, unit[1])
                ]
            assert firsts == sorted(firsts)
        flat = covered.reshape(-1)
        assert flat.max(initial=0) <= 1
        assert (flat[start:stop] == 1).all()
