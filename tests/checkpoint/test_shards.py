"""Cuts of tensors over files: every value is in one file, at the place that a brute-force map says."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.checkpoint.shards import ChunkedTensors

SIZES = st.lists(st.integers(0, 23), min_size=1, max_size=5)


def _named(sizes):
    return {f"t{i}": size for i, size in enumerate(sizes)}


def _map_of(files):
    """{(tensor, value): (file, index in the file)} of ``files``: each a list of (tensor, value), in its order."""
    return {value: (file, i) for file, content in enumerate(files) for i, value in enumerate(content)}


def _even_files(sizes, num_files):
    """Every value goes to the file that it falls into when a tensor is dealt out in runs of ceil(size / files)."""
    files = [[] for _ in range(num_files)]
    for t, size in enumerate(sizes):
        share = (size + num_files - 1) // num_files
        for value in range(size):
            files[value // share].append((t, value))
    return files


def _contents_of(cuts):
    return [[(t, value) for t, start, stop in of_file for value in range(start, stop)] for of_file in cuts]


def _assert_holds(cut, sizes, files, data):
    where = _map_of(files)
    assert len(where) == sum(sizes)
    assert [cut.length(i) for i in range(len(files))] == [len(content) for content in files]
    for t, size in enumerate(sizes):
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        for first, last in ((start, stop), (0, size), (start, start)):
            found = []
            for run in cut.fragments(f"t{t}", first, last):
                assert run.start < run.stop
                found += [(value, (run.file, run.offset + value - run.start)) for value in range(run.start, run.stop)]
            assert found == [(value, where[t, value]) for value in range(first, last)]


@given(SIZES, st.integers(1, 7), st.data())
def test_even_cuts_are_zero_3_s(sizes, num_files, data):
    _assert_holds(ChunkedTensors(_named(sizes), num_files), sizes, _even_files(sizes, num_files), data)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_experts_on_ranks_are_cut_within_the_part_of_each_position_of_a_group(sizes, degree, owners, data):
    """File i has experts of part i % degree, cut evenly over the files that have the same part."""
    parts = {f"t{t}": degree for t in range(1, len(sizes))}  # the first tensor is no stack
    sizes = [sizes[0], *(degree * size for size in sizes[1:])]
    files = _even_files(sizes[:1], degree * owners)
    for t, size in enumerate(sizes[1:], 1):
        part = size // degree
        for position in range(degree):
            for owner, content in enumerate(_even_files([part], owners)):
                files[owner * degree + position] += [(t, position * part + value) for _, value in content]
    _assert_holds(ChunkedTensors(_named(sizes), degree * owners, parts=parts), sizes, files, data)


def _cuts(bounds, sizes):
    """Runs of the concatenated tensors between ``bounds``, one file each, as ZeRO-1 cuts a parameter group."""
    begins = [sum(sizes[:t]) for t in range(len(sizes))]
    return [
        [
            (t, max(low - begin, 0), min(high - begin, size))
            for t, (begin, size) in enumerate(zip(begins, sizes, strict=True))
            if max(low, begin) < min(high, begin + size)
        ]
        for low, high in itertools.pairwise(bounds)
    ]


@st.composite
def _consecutive(draw):
    sizes = draw(SIZES)
    total = sum(sizes)
    bounds = [0, *sorted(draw(st.lists(st.integers(0, total), max_size=5))), total]
    return sizes, _cuts(bounds, sizes)


@given(_consecutive(), st.data())
def test_runs_over_tensors_one_after_another_are_found_also_with_empty_files(case, data):
    sizes, cuts = case
    _assert_holds(ChunkedTensors(_named(sizes), len(cuts), cuts), sizes, _contents_of(cuts), data)


@st.composite
def _scattered(draw):
    """Small runs in any order in any file: several of one tensor in one file too."""
    sizes, cuts = draw(_consecutive())
    halves = [run for of_file in cuts for t, a, b in of_file for run in ((t, a, (a + b) // 2), (t, (a + b) // 2, b))]
    shuffled = draw(st.permutations([run for run in halves if run[1] < run[2]]))
    num_files = draw(st.integers(1, 4))
    return sizes, [shuffled[i::num_files] for i in range(num_files)]


@given(_scattered(), st.data())
def test_runs_in_any_order_are_found(case, data):
    sizes, cuts = case
    # a file has its runs in the order of its cuts
    _assert_holds(ChunkedTensors(_named(sizes), len(cuts), cuts), sizes, _contents_of(cuts), data)


def test_the_runs_of_one_tensor_in_one_file_are_each_found_once():
    cut = ChunkedTensors({"a": 5}, 2, [[(0, 0, 2), (0, 4, 5)], [(0, 2, 4)]])
    assert [(run.file, run.start, run.stop, run.offset) for run in cut.fragments("a", 1, 5)] == [
        (0, 1, 2, 1),
        (1, 2, 4, 0),
        (0, 4, 5, 2),
    ]


@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ([[(0, 0, 2)], [(0, 3, 5), (1, 0, 3)]], "the chunks of a leave or repeat values from 2 on"),
        ([[(0, 1, 5)], [(1, 0, 3)]], "the chunks of a leave or repeat values from 0 on"),
        ([[(0, 0, 4)], [(0, 3, 5), (1, 0, 3)]], "the chunks of a leave or repeat values from 3 on"),
        ([[(0, 0, 5), (1, 0, 3)], [(0, 0, 5)]], "the chunks of a leave or repeat values from 0 on"),
        ([[(0, 0, 6)], [(1, 0, 3)]], "the chunks of a end at 6 of 5"),
        ([[(0, 0, 5)], [(1, 0, 2)]], "the chunks of b end at 2 of 3"),
        ([[(0, 0, 5)], []], "the chunks of b end at 0 of 3"),
        ([[(0, 0, 5)], [(2, 0, 3)]], "file 1 has a chunk (2, 0, 3) of no tensor"),
        ([[(0, 0, 5)], [(-1, 0, 3)]], "file 1 has a chunk (-1, 0, 3) of no tensor"),
        ([[(0, -1, 5)], [(1, 0, 3)]], "file 0 has a chunk (0, -1, 5) of no tensor"),
        ([[(0, 5, 0)], [(1, 0, 3)]], "file 0 has a chunk (0, 5, 0) of no tensor"),
        ([[(0, 0, 5), (1, 0, 3)]], "chunks of 1 files, not of 2"),
        ([[(0, 0, 5)], [(1, 0, 3)], []], "chunks of 3 files, not of 2"),
    ],
)
def test_cuts_that_do_not_hold_every_value_once_are_refused(cuts, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared
        ChunkedTensors({"a": 5, "b": 3}, 2, cuts)
    assert said in str(caught.value)


@given(_consecutive(), st.data())
def test_cuts_with_one_run_moved_or_lost_are_refused(case, data):
    sizes, cuts = case
    places = [(file, i) for file, of_file in enumerate(cuts) for i in range(len(of_file))]
    if not places:
        return
    file, i = data.draw(st.sampled_from(places))
    t, start, stop = cuts[file][i]
    wrong = data.draw(st.sampled_from([None, (start + 1, stop + 1), (start, stop + 1), (start - 1, stop)]))
    cuts[file][i : i + 1] = [] if wrong is None else [(t, *wrong)]
    with pytest.raises(ValueError):  # noqa: PT011  which one depends on the neighbours
        ChunkedTensors(_named(sizes), len(cuts), cuts)
