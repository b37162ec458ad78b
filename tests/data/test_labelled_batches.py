"""The order of the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.data.labelled import GlobalBatches
from tests.pairs import every_pair


@given(
    num=st.integers(24, 200), seed=st.integers(0, 99), epoch=st.integers(0, 5), by_length=st.booleans(), data=st.data()
)
def test_an_epoch_is_a_pure_function_of_whole_batches_of_distinct_examples(num, seed, epoch, by_length, data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=num, max_size=num))
    batches = GlobalBatches(lengths, 24, seed, by_length)
    first = batches.epoch(epoch)
    batches.epoch(epoch + 1)  # nothing is remembered
    torch.manual_seed(seed)
    assert batches.epoch(epoch) == first == GlobalBatches(lengths, 24, seed, by_length).epoch(epoch)
    assert [len(batch) for batch in first] == [24] * batches.batches_per_epoch == [24] * (num // 24)
    taken = [i for batch in first for i in batch]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(num))


def test_epochs_and_seeds_differ():
    batches = GlobalBatches([1] * 96, 24, 0)
    assert batches.epoch(0) != batches.epoch(1)
    assert batches.epoch(0) != GlobalBatches([1] * 96, 24, 1).epoch(0)
    assert batches.epoch(0)[0] != sorted(batches.epoch(0)[0])


@every_pair
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_micro_batches_of_all_ranks_make_the_global_batch(world_size, accumulation):
    batches = GlobalBatches([1] * 100, 24, 5)
    for batch in batches.epoch(3):
        of_ranks = [batches.micro_batches(batch, rank, world_size, accumulation) for rank in range(world_size)]
        assert all(len(micro) == 24 // (world_size * accumulation) for of_rank in of_ranks for micro in of_rank)
        assert all(len(of_rank) == accumulation for of_rank in of_ranks)
        for step in range(accumulation):  # each accumulation step takes the same examples at every world size
            together = [i for of_rank in of_ranks for i in of_rank[step]]
            size = len(batch) // accumulation
            assert together == list(batch[step * size : (step + 1) * size])


@pytest.mark.parametrize(("world_size", "accumulation"), [(5, 1), (7, 3), (24, 1), (23, 1)])
def test_a_batch_that_does_not_divide_is_shared_out_as_evenly_as_can_be(world_size, accumulation):
    batches = GlobalBatches([1] * 100, 24, 5)
    (batch, *_) = batches.epoch(0)
    of_ranks = [batches.micro_batches(batch, rank, world_size, accumulation) for rank in range(world_size)]
    sizes = [len(micro) for of_rank in of_ranks for micro in of_rank]
    assert max(sizes) - min(sizes) == (24 % (world_size * accumulation) > 0)
    assert [i for step in range(accumulation) for of_rank in of_ranks for i in of_rank[step]] == list(batch)


@pytest.mark.parametrize("num", [24 * 7, 24 * 120 + 5])  # fewer and more than one window
def test_group_by_length_takes_the_same_examples_with_less_padding(num):
    lengths = [1 + (i * 37) % 50 for i in range(num)]
    plain, grouped = GlobalBatches(lengths, 24, 0), GlobalBatches(lengths, 24, 0, group_by_length=True)

    def padding(epoch):
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in epoch)

    one, other = plain.epoch(2), grouped.epoch(2)
    assert sorted(i for batch in one for i in batch) == sorted(i for batch in other for i in batch)
    assert padding(other) < padding(one) / 2
    longest = [max(lengths[i] for i in batch) for batch in other]
    assert longest != sorted(longest)  # batches are shuffled: no curriculum from short to long
    assert any([lengths[i] for i in batch] != sorted(lengths[i] for i in batch) for batch in other)
