"""Positions of the matrices of a layer in its stored weight.

``nn.Linear`` stores (O, I); GPT-2's ``Conv1D`` stores (I, O). A fused projection contains several matrices side by side
along its outputs (``c_attn`` is q, k, v). A stack of experts, (E, O, I) or transposed (E, I, O), is stored as the
matrix (E*O, I) or (E*I, O), one expert below the other. Everything below uses *storage* coordinates, so that a flat
index is a flat index of the tensor in the state dict, and "the lowest flat index is pruned first" has one meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # layouts are used where torch is not imported
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rect:
    """Rows [r0, r1) by columns [c0, c1) of a stored weight."""

    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def numel(self) -> int:
        return (self.r1 - self.r0) * (self.c1 - self.c0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.r1 - self.r0, self.c1 - self.c0

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to index the stored weight."""
        return slice(self.r0, self.r1), slice(self.c0, self.c1)

    def inside(self, whole: Rect) -> tuple[slice, slice]:
        """Return rows and columns relative to the corner of ``whole``."""
        return slice(self.r0 - whole.r0, self.r1 - whole.r0), slice(self.c0 - whole.c0, self.c1 - whole.c0)

    def meet(self, other: Rect) -> Rect | None:
        """Return the intersection with another rectangle, or None if it is empty."""
        both = Rect(
            r0=max(self.r0, other.r0), r1=min(self.r1, other.r1), c0=max(self.c0, other.c0), c1=min(self.c1, other.c1)
        )
        if both.r0 >= both.r1 or both.c0 >= both.c1:
            return None
        return both


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix of a layer: where it is stored, and its outputs and inputs, counted over all experts."""

    index: int
    rect: Rect
    outputs: slice
    inputs: slice

    def ranges(self, rect: Rect, *, transposed: bool) -> tuple[slice, slice]:
        """Return the outputs and inputs of a rectangle inside the matrix, counted from the matrix's first."""
        rows, cols = rect.inside(self.rect)
        if transposed:
            return cols, rows
        return rows, cols


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Shape of a linear layer or stack of experts, its storage order, and how many matrices it fuses.

    Raises ValueError unless ``out_features`` splits into ``num_matrices``, and these into ``num_experts``.
    """

    out_features: int
    """Outputs of all experts together."""
    in_features: int
    """Inputs per expert."""
    transposed: bool = False
    """True for Conv1D, which stores (I, O), and for experts stored that way."""
    num_matrices: int = 1
    """Matrices fused along the outputs, over all experts. Each is ranked and scored separately."""
    num_experts: int = 1

    def __post_init__(self) -> None:
        if self.num_matrices < 1 or self.out_features % self.num_matrices:
            raise ValueError(f"{self.out_features} outputs cannot be split into {self.num_matrices} equal matrices")
        if self.num_experts < 1 or self.num_matrices % self.num_experts:
            raise ValueError(f"{self.num_matrices} matrices cannot be split into {self.num_experts} equal experts")

    @property
    def shape(self) -> tuple[int, int]:
        """Storage shape: (O, I), or (I, O) if transposed; for experts (E*O, I), or (E*I, O)."""
        if self.transposed:
            return self.num_experts * self.in_features, self.out_features // self.num_experts
        return self.out_features, self.in_features

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def num_inputs(self) -> int:
        """Inputs over all experts, each of which has a norm."""
        return self.num_experts * self.in_features

    @property
    def matrix_numel(self) -> int:
        """Weights in each of the ``num_matrices`` matrices."""
        return self.numel // self.num_matrices

    @property
    def expert(self) -> WeightLayout:
        """Layout of one expert, as used in a product; the layout itself if it is not a stack."""
        return self.part(self.num_experts)

    def part(self, parts: int) -> WeightLayout:
        """Return the layout of one of ``parts`` equal parts of a stack, each of whole experts."""
        experts = self.num_experts // parts
        matrices = self.num_matrices // parts
        return WeightLayout(
            out_features=self.out_features // parts,
            in_features=self.in_features,
            transposed=self.transposed,
            num_matrices=matrices,
            num_experts=experts,
        )

    def expert_range(self, expert: int) -> tuple[int, int]:
        """Return the flat range [first, last) of an expert's weights."""
        numel = self.numel // self.num_experts
        return expert * numel, (expert + 1) * numel

    def matrices(self) -> tuple[StoredMatrix, ...]:
        """Return every matrix in storage order of the corners, expert by expert."""
        return _matrices(self)


# Cached, because every forward pass of a layer asks for its matrices.
@cache
def _matrices(layout: WeightLayout) -> tuple[StoredMatrix, ...]:
    inputs = layout.in_features
    fused = layout.num_matrices // layout.num_experts
    width = layout.out_features // layout.num_matrices
    matrices: list[StoredMatrix] = []
    for i in range(layout.num_matrices):
        expert, part = divmod(i, fused)
        outputs = slice(i * width, (i + 1) * width)
        inputs_of_expert = slice(expert * inputs, (expert + 1) * inputs)
        if layout.transposed:
            # Experts are below each other along the inputs, fused matrices next to each other along the outputs.
            rect = Rect(inputs_of_expert.start, inputs_of_expert.stop, part * width, (part + 1) * width)
        else:
            # Both are below each other along the outputs.
            rect = Rect(outputs.start, outputs.stop, 0, inputs)
        matrices.append(StoredMatrix(index=i, rect=rect, outputs=outputs, inputs=inputs_of_expert))
    return tuple(matrices)


def row_tiles(rect: Rect, max_elements: int) -> Iterator[Rect]:
    """Split ``rect`` into bands of whole rows with at most ``max_elements`` each (at least one row)."""
    step = max(1, max_elements // max(1, rect.c1 - rect.c0))
    for r0 in range(rect.r0, rect.r1, step):
        yield Rect(r0, min(r0 + step, rect.r1), rect.c0, rect.c1)


def shard_tiles(whole: Rect, row_length: int, start: int, stop: int, max_elements: int) -> Iterator[Rect]:
    """Yield the part of ``whole`` in the flat range [start, stop) as rectangles in increasing flat order.

    A range that starts and ends inside a row gives a partial row, a band of whole rows and a partial row.
    ``row_length``: of the whole stored weight.
    """
    if stop <= start:
        return
    first, head = divmod(start, row_length)
    last, tail = divmod(stop, row_length)
    if first == last:  # inside one row
        pieces = [Rect(first, first + 1, head, tail)]
    else:
        whole_from = first + (head > 0)  # the first whole row
        pieces = [
            Rect(first, whole_from, head, row_length),
            Rect(whole_from, last, 0, row_length),
            Rect(last, last + (tail > 0), 0, tail),
        ]
    for piece in pieces:
        if cut := piece.meet(whole):
            yield from row_tiles(cut, max_elements)


def positions_before(rect: Rect, row_length: int, index: int) -> int:
    """Return how many weights of ``rect`` precede the flat ``index`` of a stored weight with rows of ``row_length``."""
    row, col = divmod(index, row_length)
    width = rect.c1 - rect.c0
    rows_above = min(max(row, rect.r0), rect.r1) - rect.r0
    in_row = 0  # weights of the index's row to its left
    if rect.r0 <= row < rect.r1:
        in_row = min(max(0, col - rect.c0), width)
    return rows_above * width + in_row


def view_in_shard(shard: Tensor, rect: Rect, row_length: int, start: int) -> Tensor:
    """Return a writable (rows, cols) view of ``rect`` in ``shard``, the flat storage from index ``start`` on."""
    offset = rect.r0 * row_length + rect.c0 - start
    return shard.as_strided(rect.shape, (row_length, 1), shard.storage_offset() + offset)


def runs_of(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Yield runs of neighbours, in order, whose ``sizes`` add up to at most ``most``, or of one."""
    first = 0
    total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > most:
            yield range(first, i)
            first = i
            total = 0
        total += size
    if first < len(sizes):
        yield range(first, len(sizes))
