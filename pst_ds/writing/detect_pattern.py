"""Detect the sparsity pattern of a matrix, given one bit per weight."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pst_ds.formats.rows import row_counts

_LEAST_FILLED = 0.75
"""Share of the kept positions of N:M that must be non-zero; otherwise any very sparse matrix would match."""
_LARGEST_BLOCK = 64
"""Largest block side that is searched for."""
_SAMPLE = 64
"""Rows that are checked before all rows: enough to reject most matrices."""
NO_PATTERN = "dense"
"""Pattern of a matrix without pruned weights, and of tensors that are not linear weights."""
Bits = NDArray[np.uint8]
"""(O, ceil(I/8)): a set bit for each non-zero, little-endian, padding bits zero."""


def detect_pattern(row_bits: Tensor, inputs: int) -> str:
    """Return the sparsity pattern of a matrix (O, I) from its row bits, by its name in ``pst.pattern``.

    "dense" without pruned weights; blocks of outputs x inputs, such as "16x1", that are kept or pruned whole; "2:4" or
    another N:M for groups of 4, 8 or 16 consecutive inputs; "row" when all rows have the same number of non-zeros; else
    "unstructured". If several hold, it is the first in this order; among several N:M, the one that keeps least.
    """
    counts = row_counts(row_bits)  # (O,)
    bits = row_bits.numpy()
    nonzero = int(counts.sum())
    outputs = bits.shape[0]
    if nonzero == outputs * inputs:
        return NO_PATTERN
    if nonzero:
        pattern = _blocks(bits, inputs) or _groups(bits, inputs, nonzero / (outputs * inputs))
        if pattern:
            return pattern
    if outputs > 1 and bool((counts == counts[0]).all()):
        return "row"
    return "unstructured"


def _groups(bits: Bits, inputs: int, density: float) -> str:
    """Return N:M, the one that keeps the smallest share; "" without any. ``density``: share of non-zeros."""
    candidates: list[tuple[float, int, int]] = []
    for m in (4, 8, 16):
        # m - 1, because m of m would be no pattern at all
        most = min(m - 1, int(density / _LEAST_FILLED * m))
        n = largest_group(bits[:_SAMPLE], inputs, m)
        if n is not None and n <= most:
            n = largest_group(bits, inputs, m)
        if n is not None and n <= most:
            candidates.append((n / m, m, n))
    if not candidates:
        return ""
    _, m, n = min(candidates)
    return f"{n}:{m}"


def largest_group(bits: Bits, inputs: int, m: int) -> int | None:
    """Return the most non-zeros in ``m`` (4, 8 or 16) consecutive inputs; None if I is not a multiple of ``m``."""
    if inputs % m or not bits.size:
        return None
    return int(_grouped(bits, inputs, m).sum(2, dtype=np.uint8).max())


def _blocks(bits: Bits, inputs: int) -> str:
    """Return the largest blocks, outputs x inputs, that are entirely zero or non-zero; "" without any."""
    outputs = bits.shape[0]
    tall = 1
    wide = 1
    # blocks of 2 n rows are blocks of n rows, too: the search may stop at the first size that fails
    while outputs % (2 * tall) == 0 and tall < _LARGEST_BLOCK and _alike(bits, 2 * tall):
        tall *= 2
    while inputs % (2 * wide) == 0 and wide < _LARGEST_BLOCK and _uniform(bits, inputs, 2 * wide):
        wide *= 2
    if tall * wide == 1:
        return ""
    return f"{tall}x{wide}"


def _alike(bits: Bits, size: int) -> bool:
    """Return whether rows are equal in groups of ``size`` consecutive rows."""
    first_rows = bits[::size]
    for i in range(1, size):
        rows = bits[i::size]
        # the sample first, which decides about almost every matrix
        if not np.array_equal(first_rows[:_SAMPLE], rows[:_SAMPLE]) or not np.array_equal(first_rows, rows):
            return False
    return True


def _uniform(bits: Bits, inputs: int, size: int) -> bool:
    """Return whether every ``size`` consecutive inputs are all zero or all non-zero."""
    if len(bits) > _SAMPLE and not _uniform(bits[:_SAMPLE], inputs, size):
        return False
    grouped = _grouped(bits, inputs, size)
    return bool((grouped == grouped[:, :, :1]).all())


def _grouped(bits: Bits, inputs: int, size: int) -> NDArray[np.uint8]:
    """Return (O, I / size, size): 1 for each non-zero."""
    return np.unpackbits(bits, axis=1, count=inputs, bitorder="little").reshape(bits.shape[0], -1, size)
