"""Which weights are decided together: patterns of zeros, as units that tile a stored matrix.

    "matrix"   every weight by itself, ranked within its matrix                  the paper's
    "global"   every weight by itself, ranked over all matrices of the pattern
    "row"      the same share of every output's weights
    "2:4"      N:M: at most N of every M consecutive inputs of an output are kept, N < M <= 16
    "16x1"     blocks of outputs x inputs, kept or pruned whole, ranked within their matrix by the sum of their scores

All positions are those of the *stored* weight, as in :mod:`pst_ds.core.layout`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pst_ds.core.keys import native_for, order_keys
from pst_ds.core.layout import Rect, WeightLayout, shard_tiles

Kind = Literal["matrix", "global", "row", "n:m", "block"]
MAX_M = 16


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern of zeros; :func:`parse_pattern` makes one from its name."""

    kind: Kind
    n: int = 0
    m: int = 0
    """Of N:M: n of m consecutive inputs are kept."""
    outputs: int = 1
    inputs: int = 1
    """Of blocks."""

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        return f"{self.outputs}x{self.inputs}" if self.kind == "block" else self.kind

    @property
    def fixed_sparsity(self) -> float | None:
        """The only final sparsity the pattern has, 1 - N/M; None for a pattern that takes any."""
        return (self.m - self.n) / self.m if self.kind == "n:m" else None

    def unit(self, layout: WeightLayout) -> tuple[int, int]:
        """(rows, cols) of a unit in the stored weight."""
        by_output = {"row": (1, layout.in_features), "n:m": (1, self.m), "block": (self.outputs, self.inputs)}
        outputs, inputs = by_output.get(self.kind, (1, 1))
        return (inputs, outputs) if layout.transposed else (outputs, inputs)

    def require_fit(self, layout: WeightLayout) -> None:
        """Raise ValueError when units do not tile each matrix of ``layout``, with the number that does not divide."""
        outputs, inputs = reversed(self.unit(layout)) if layout.transposed else self.unit(layout)
        per_matrix = layout.out_features // layout.parts
        if layout.in_features % inputs:
            raise ValueError(f"pattern {self} needs in_features divisible by {inputs}, got {layout.in_features}")
        if per_matrix % outputs:
            raise ValueError(f"pattern {self} needs out_features divisible by {outputs}, got {per_matrix}")

    def aligned(self, layout: WeightLayout, start: int, stop: int) -> tuple[int, int]:
        """The flat range of whole units (and whole rows of them) that covers the weights [start, stop)."""
        if stop <= start:
            return start, start
        rows, cols = self.unit(layout)
        step = rows * layout.shape[1] if rows > 1 else cols
        return start // step * step, min(-(-stop // step) * step, layout.numel)


def parse_pattern(text: str) -> Pattern:
    """The pattern of that name. Raises ValueError with the names there are."""
    if text in ("matrix", "global", "row"):
        return Pattern(text)  # type: ignore[arg-type]
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m <= MAX_M:
            raise ValueError(f"pattern {text!r} needs 0 < N < M <= {MAX_M}")
        return Pattern("n:m", n=n, m=m)
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        outputs, inputs = int(match[1]), int(match[2])
        if outputs * inputs < 2:
            raise ValueError(f'pattern {text!r} needs blocks of at least 2 weights; single weights are "matrix"')
        return Pattern("block", outputs=outputs, inputs=inputs)
    raise ValueError(
        f'pattern {text!r} is not known; there are "matrix", "global", "row", N:M such as "2:4", and blocks of outputs '
        'x inputs such as "16x1"'
    )


def unit_tiles(
    matrix: Rect, unit: tuple[int, int], row_length: int, start: int, stop: int, size: int
) -> Iterator[Rect]:
    """The part of ``matrix`` in the flat range [start, stop), as rectangles of whole units in rising order of units.

    The range must be aligned (:meth:`Pattern.aligned`). A rectangle has about ``size`` weights, at least one unit.
    """
    rows, cols = unit
    if rows == 1:
        yield from shard_tiles(matrix, row_length, start, stop, size)
        return
    first, last = max(start // row_length, matrix.r0), min(stop // row_length, matrix.r1)
    width = matrix.c1 - matrix.c0
    bands = max(1, size // (rows * width))
    across = max(1, size // (rows * cols)) * cols
    for r0 in range(first, last, bands * rows):
        r1 = min(r0 + bands * rows, last)
        if rows * width <= size:
            yield Rect(r0, r1, matrix.c0, matrix.c1)
            continue
        for c0 in range(matrix.c0, matrix.c1, across):
            yield Rect(r0, r1, c0, min(c0 + across, matrix.c1))


def block_keys(keys: Tensor, unit: tuple[int, int]) -> Tensor:
    """Keys of the blocks in a rectangle's ``keys`` (rows, cols): of the sum of their scores, (num blocks,) int32."""
    return order_keys(_sum_of_units(_scores(keys), unit)).flatten()


def loss_keys(keys: Tensor, unit: tuple[int, int], prune: int) -> Tensor:
    """Keys of N:M groups: of the sum of the scores that pruning ``prune`` of each would lose, (num groups,) int32."""
    kept = keep_n_of_m(keys, unit, prune)
    return order_keys(_sum_of_units(_scores(keys).masked_fill_(kept.bool(), 0.0), unit)).flatten()


def expand_units(kept: Tensor, rect: Rect, unit: tuple[int, int]) -> Tensor:
    """The weights' mask (rows, cols) of ``rect`` from its units', (num units,) uint8."""
    grid = kept.view((rect.r1 - rect.r0) // unit[0], (rect.c1 - rect.c0) // unit[1])
    return grid.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)


def keep_n_of_m(keys: Tensor, unit: tuple[int, int], prune: int) -> Tensor:
    """uint8 mask (rows, cols) without the ``prune`` smallest keys of every unit, (1, M) or (M, 1).

    Of equals the first go.
    """
    size, stride = max(unit), keys.shape[1] if unit[0] > 1 else 1
    native = native_for(keys)
    if native is not None:
        keys, keep = keys.contiguous(), torch.empty(keys.shape, dtype=torch.uint8)
        groups = keys.numel() // (size * stride)
        native.pst_keep_n_of_m(keys.data_ptr(), groups, size, stride, prune, keep.data_ptr())
        return keep
    grouped = keys.reshape(-1, size, stride)
    rank = grouped.sort(dim=1, stable=True).indices.argsort(dim=1)
    return (rank >= prune).to(torch.uint8).view(keys.shape)


def keep_in_rows(keys: Tensor, unit: tuple[int, int], prune: int) -> Tensor:
    """uint8 mask (rows, cols) without the ``prune`` smallest keys of every unit, a whole row or column.

    Of equals the first go.
    """
    along = (keys if unit[0] == 1 else keys.t()).contiguous()
    native = native_for(keys)
    if native is not None:
        keep = torch.empty(along.shape, dtype=torch.uint8)
        native.pst_keep_in_rows(along.data_ptr(), along.shape[0], along.shape[1], prune, keep.data_ptr())
    else:
        pruned = along.sort(dim=1, stable=True).indices[:, :prune]
        keep = torch.ones_like(along, dtype=torch.uint8).scatter_(1, pruned, 0)
    return keep if unit[0] == 1 else keep.t()


def _scores(keys: Tensor) -> Tensor:
    """The fp32 scores that ``keys`` order."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _sum_of_units(scores: Tensor, unit: tuple[int, int]) -> Tensor:
    """Sums over units, (unit rows, unit cols).

    Halves are added to halves, so a unit's sum has the same bits in any tile.
    """
    rows, cols = unit
    units = scores.view(scores.shape[0] // rows, rows, scores.shape[1] // cols, cols)
    return _fold(_fold(units, 3), 1).view(units.shape[0], units.shape[2])


def _fold(values: Tensor, dim: int) -> Tensor:
    while (size := values.shape[dim]) > 1:
        half = size // 2
        folded = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        values = torch.cat([folded, values.narrow(dim, size - 1, 1)], dim) if size % 2 else folded
    return values
