"""The pattern of zeros, held against slow counts of the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.writing.detect_pattern import detect_pattern, largest_group


def _pattern(matrix) -> str:
    matrix = np.asarray(matrix)
    return detect_pattern(torch.from_numpy(np.packbits(matrix != 0, axis=1, bitorder="little")), matrix.shape[1])


def _random(rows, columns, density, seed=0):
    return (np.random.default_rng(seed).random((rows, columns)) < density).astype(int)


def _n_of_m(n, m, rows=24, columns=48):
    scores = np.random.default_rng(n).random((rows, columns // m, m))
    return (scores.argsort(2).argsort(2) < n).astype(int).reshape(rows, columns)


@pytest.mark.parametrize("ratio", ["2:4", "1:4", "4:8", "3:8", "8:16", "5:16"])
def test_n_of_m_is_found(ratio):
    n, m = map(int, ratio.split(":"))
    assert _pattern(_n_of_m(n, m)) == ratio


@pytest.mark.parametrize(
    ("block", "grid"),
    [("16x1", (3, 40)), ("1x16", (40, 3)), ("4x4", (9, 7)), ("2x2", (5, 9)), ("8x32", (5, 3)), ("1x2", (9, 20))],
)
def test_blocks_are_found(block, grid):
    tall, wide = map(int, block.split("x"))
    kept = _random(*grid, 0.5, seed=3)
    kept[0, :2] = kept[:2, 0] = 0, 1  # no larger blocks by chance
    kept[0, :2] = 0, 1
    assert _pattern(kept.repeat(tall, 0).repeat(wide, 1)) == block


def test_the_rest():
    assert _pattern(np.ones((4, 6))) == "dense"
    assert _pattern([[1.0, 0, 2, 0, 0, 0, 3, 4]]) == "2:4"
    assert _pattern([[1.0, 0, 2, 0, 0, 0, 3]]) == "unstructured"  # no whole groups
    assert _pattern([[1.0, 1, 1, 0]]) == "3:4"
    rows = np.stack([np.random.default_rng(i).permutation([1] * 20 + [0] * 20) for i in range(9)])
    assert _pattern(rows) == "row"
    assert _pattern(_random(64, 48, 0.3)) == "unstructured"
    assert _pattern(_random(64, 48, 0.02)) == "unstructured"  # not 2:4, though no group has more than two


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_groups_and_blocks_are_those_of_the_matrix(rows, columns, density, seed):
    matrix = _random(rows, columns, density, seed)
    bits = np.packbits(matrix != 0, axis=1, bitorder="little")
    for m in (4, 8, 16):
        groups = matrix.reshape(rows, -1, m).sum(2) if columns % m == 0 else None
        assert largest_group(bits, columns, m) == (None if groups is None else groups.max())
    found = detect_pattern(torch.from_numpy(bits), columns)
    assert (found == "dense") == bool(matrix.all())
    if "x" in found and matrix.any():
        tall, wide = map(int, found.split("x"))
        blocks = torch.from_numpy(matrix).view(rows // tall, tall, columns // wide, wide).sum((1, 3))
        assert set(blocks.flatten().tolist()) <= {0, tall * wide}


def test_groups_without_pruned_weights_are_no_pattern():
    """One zero in an otherwise dense matrix: every group but one keeps all its weights, which is not 4:4."""
    weight = np.ones((4, 32))
    weight[1, 7] = 0.0
    assert _pattern(weight) == "unstructured"
