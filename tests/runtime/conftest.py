"""Packed weights made with numpy alone, and the levels that this machine has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pst_ds.runtime import native


@dataclass
class Problem:
    """A packed weight (rows, cols), vectors (n, cols) and a bias, of small whole numbers unless ``normal``.

    The products of whole numbers add up exactly in fp32, in any order, and so show a value in the wrong place.
    """

    weight: torch.Tensor
    x: torch.Tensor
    bias: torch.Tensor | None
    compressed: torch.Tensor
    bitmask: torch.Tensor
    row_offsets: torch.Tensor

    @property
    def parts(self):
        return self.compressed, self.bitmask, self.row_offsets

    def sums(self):
        """(n, rows) float64: exact for whole numbers."""
        product = self.x.double() @ self.weight.double().t()
        return product if self.bias is None else product + self.bias.double()

    def product(self, level, threads=1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return native.bitmask_linear(self.x, *self.parts, self.bias, level)
        finally:
            torch.set_num_threads(before)


def make_problem(rows, cols, n, sparsity=0.5, dtype=torch.bfloat16, bias=True, seed=0, normal=False):
    """Row 1 of every five is all zero, row 3 all kept."""
    generator = np.random.default_rng(seed)
    keep = generator.random((rows, cols)) >= sparsity
    keep[1::5], keep[3::5] = False, True

    def numbers(*shape):
        values = generator.standard_normal(shape) if normal else generator.integers(1, 4, shape) * _signs(shape)
        return torch.from_numpy(values).to(dtype)

    def _signs(shape):
        return generator.choice([-1, 1], shape)

    values = numbers(rows, cols)
    kept = torch.from_numpy(keep)
    return Problem(
        weight=torch.where(kept, values, 0),
        x=numbers(n, cols),
        bias=numbers(rows) if bias else None,
        compressed=values[kept],
        bitmask=torch.from_numpy(np.packbits(keep, axis=1, bitorder="little")),
        row_offsets=torch.from_numpy(np.concatenate([[0], keep.sum(axis=1).cumsum()[:-1]]).astype(np.int64)),
    )


@pytest.fixture(scope="session")
def problem():
    return make_problem


@pytest.fixture(scope="session")
def levels():
    """Indices of the levels that this processor has; skips where the kernels cannot be had."""
    if native.library() is None:
        pytest.skip("no C++ compiler, or PST_DS_NATIVE=0")
    return range(native.best_level() + 1)
