"""Where matrices, shards and tiles lie in a stored weight."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.layout import Rect, WeightLayout, row_tiles, runs_of, shard_tiles, view_in_shard


@st.composite
def layouts(draw) -> WeightLayout:
    experts = draw(st.integers(1, 3))
    count = experts * draw(st.integers(1, 3))
    return WeightLayout(count * draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.booleans()), count, experts)


def flat_indices(rect: Rect, row_length: int) -> list[int]:
    return [r * row_length + c for r in range(rect.r0, rect.r1) for c in range(rect.c0, rect.c1)]


def test_shape_follows_the_storage_order():
    assert WeightLayout(6, 4).shape == (6, 4)
    assert WeightLayout(6, 4, transposed=True).shape == (4, 6)
    assert WeightLayout(6, 4, num_matrices=3).matrix_numel == 8
    assert WeightLayout(6, 4, num_matrices=3, num_experts=3).shape == (6, 4)
    assert WeightLayout(6, 4, transposed=True, num_matrices=3, num_experts=3).shape == (12, 2)


@pytest.mark.parametrize(("outputs", "count"), [(7, 3), (4, 0), (4, 8)])
def test_outputs_that_cannot_be_split_are_refused(outputs, count):
    with pytest.raises(ValueError, match=f"{outputs} outputs cannot be split into {count} equal matrices"):
        WeightLayout(outputs, 4, num_matrices=count)


def test_matrices_that_cannot_be_split_over_experts_are_refused():
    with pytest.raises(ValueError, match="4 matrices cannot be split into 3 equal experts"):
        WeightLayout(8, 4, num_matrices=4, num_experts=3)


@given(layout=layouts())
def test_matrices_cover_the_weight_once(layout):
    matrices = layout.matrices()
    flat = [i for matrix in matrices for i in flat_indices(matrix.rect, layout.shape[1])]
    assert sorted(flat) == list(range(layout.numel))
    assert [m.index for m in matrices] == list(range(layout.num_matrices))
    assert {m.rect.numel for m in matrices} == {layout.matrix_numel}


@given(layout=layouts())
def test_matrices_hold_the_rows_of_their_outputs(layout):
    stack = layout.num_experts, *layout.expert.shape
    outputs = torch.arange(layout.out_features).view(layout.num_experts, -1)
    owner = (outputs.unsqueeze(1) if layout.transposed else outputs.unsqueeze(2)).expand(stack).reshape(layout.shape)
    inputs = torch.arange(layout.num_experts * layout.in_features).view(layout.num_experts, -1)
    read = (inputs.unsqueeze(2) if layout.transposed else inputs.unsqueeze(1)).expand(stack).reshape(layout.shape)
    for matrix in layout.matrices():
        inside = slice(matrix.rect.r0, matrix.rect.r1), slice(matrix.rect.c0, matrix.rect.c1)
        assert owner[inside].unique().tolist() == outputs.view(-1)[matrix.outputs].tolist()
        assert read[inside].unique().tolist() == inputs.view(-1)[matrix.inputs].tolist()
        assert matrix.ranges(matrix.rect, transposed=layout.transposed) == (
            slice(0, layout.out_features // layout.num_matrices),
            slice(0, layout.in_features),
        )


@given(layout=layouts())
def test_an_expert_has_its_share_of_the_matrices_and_of_the_flat_weights(layout):
    one, weight = layout.expert, torch.arange(layout.numel).view(layout.shape)
    assert one.num_experts == 1
    for expert in range(layout.num_experts):
        start, stop = layout.expert_range(expert)
        own = torch.arange(start, stop).view(one.shape)
        share = layout.matrices()[expert * one.num_matrices : (expert + 1) * one.num_matrices]
        for matrix, inside in zip(share, one.matrices(), strict=True):
            of_stack, of_expert = (
                values[rect.r0 : rect.r1, rect.c0 : rect.c1]
                for values, rect in ((weight, matrix.rect), (own, inside.rect))
            )
            assert torch.equal(of_stack, of_expert)


@given(layout=layouts(), world=st.integers(1, 5), max_elements=st.integers(1, 30))
def test_shard_tiles_cover_each_rank_in_rising_flat_order(layout, world, max_elements):
    row_length = layout.shape[1]
    share = -(-layout.numel // world)
    for rank, matrix in itertools.product(range(world), layout.matrices()):
        start, stop = min(rank * share, layout.numel), min((rank + 1) * share, layout.numel)
        tiles = list(shard_tiles(matrix.rect, row_length, start, stop, max_elements))
        walked = [i for tile in tiles for i in flat_indices(tile, row_length)]
        assert walked == [i for i in flat_indices(matrix.rect, row_length) if start <= i < stop]
        assert all(0 < t.numel <= max_elements or t.r1 - t.r0 == 1 for t in tiles)


@given(layout=layouts(), data=st.data())
def test_shard_tiles_cover_any_flat_range(layout, data):
    start = data.draw(st.integers(0, layout.numel))
    stop = data.draw(st.integers(start, layout.numel))
    walked = [
        i
        for matrix in layout.matrices()
        for tile in shard_tiles(matrix.rect, layout.shape[1], start, stop, 7)
        for i in flat_indices(tile, layout.shape[1])
    ]
    assert sorted(walked) == list(range(start, stop))


def test_shard_tiles_of_a_fused_conv1d_part():
    """(4, 6) stored, q k v in columns; flat [8, 21) is 4 of row 1, row 2, 3 of row 3."""
    q, k, v = (matrix.rect for matrix in WeightLayout(6, 4, transposed=True, num_matrices=3).matrices())
    assert list(shard_tiles(q, 6, 8, 21, 100)) == [Rect(2, 3, 0, 2), Rect(3, 4, 0, 2)]
    assert list(shard_tiles(k, 6, 8, 21, 100)) == [Rect(1, 2, 2, 4), Rect(2, 3, 2, 4), Rect(3, 4, 2, 3)]
    assert list(shard_tiles(v, 6, 8, 21, 100)) == [Rect(1, 2, 4, 6), Rect(2, 3, 4, 6)]


@pytest.mark.parametrize(("max_elements", "heights"), [(1, [1] * 5), (8, [2, 2, 1]), (1000, [5])])
def test_row_tiles_are_bands_of_whole_rows(max_elements, heights):
    rect = Rect(3, 8, 2, 6)
    tiles = list(row_tiles(rect, max_elements))
    assert [t.r1 - t.r0 for t in tiles] == heights
    assert {(t.c0, t.c1) for t in tiles} == {(2, 6)}
    assert [i for t in tiles for i in flat_indices(t, 10)] == flat_indices(rect, 10)


@given(layout=layouts(), world=st.integers(1, 4))
def test_views_read_and_write_the_shard(layout, world):
    row_length = layout.shape[1]
    share = -(-layout.numel // world)
    padded = torch.arange(-2, world * share, dtype=torch.int64)[2:]  # a view with a storage offset, as ZeRO's shards
    for rank, matrix in itertools.product(range(world), layout.matrices()):
        start = rank * share
        shard = padded[start : start + share]
        stop = min(start + share, layout.numel)
        for rect in shard_tiles(matrix.rect, row_length, start, stop, 10):
            view = view_in_shard(shard, rect, row_length, start)
            assert view.flatten().tolist() == flat_indices(rect, row_length)
            view.neg_()
            assert shard[flat_indices(rect, row_length)[0] - start] == -flat_indices(rect, row_length)[0]
            view.neg_()
    assert torch.equal(padded, torch.arange(world * share))


def test_runs_of_neighbours_add_up_to_so_many_or_are_one():
    assert [list(run) for run in runs_of([3, 4, 9, 1, 1, 8], 8)] == [[0, 1], [2], [3, 4], [5]]
    assert list(runs_of([], 8)) == []
