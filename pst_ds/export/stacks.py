"""Which of a stack's experts a tensor of the files is, so that each is made by itself and never a stack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import CodeLayout, StoredGrid
from pst_ds.formats.base_weights import saved_tensors


@dataclass(frozen=True)
class StackRun:
    """Consecutive experts of a stack, or consecutive matrices of its experts; of another layer, all of it."""

    stack: WeightLayout
    first: int
    """Which of the equal pieces of the stack begins the run."""
    last: int
    """The piece behind it."""
    of: int
    """Pieces of the whole stack: its experts, or its matrices."""

    @cached_property
    def piece(self) -> WeightLayout:
        """Layout of one of them."""
        stack, count = self.stack, self.of
        experts = max(1, stack.num_experts // count)
        return WeightLayout(
            stack.out_features // count, stack.in_features, stack.transposed, stack.num_matrices // count, experts
        )  # fmt: skip

    @property
    def rows(self) -> tuple[int, int]:
        """First and last + 1 of the rows of the matrix that the stack is in memory."""
        height = self.piece.shape[0]
        return self.first * height, self.last * height

    @property
    def num_pieces(self) -> int:
        return self.last - self.first

    def flat_range(self, piece: int) -> tuple[int, int]:
        """Return the flat range of weights of a piece of the stack."""
        return piece * self.piece.numel, (piece + 1) * self.piece.numel

    def share(self, piece: int, numel: int) -> tuple[int, int]:
        """Return the range that belongs to a piece in ``numel`` values that lie expert by expert."""
        return piece * (numel // self.of), (piece + 1) * (numel // self.of)

    def grid_of_piece(self, grid: StoredGrid) -> StoredGrid:
        """Return the grid of one piece, from the stack's."""
        return StoredGrid(self.piece, grid.grid)

    def codes_of_piece(self, codes: CodeLayout) -> CodeLayout:
        """Return where a piece's codes lie, from where the stack's do."""
        return replace(codes, stored=self.grid_of_piece(codes.stored))


@dataclass(frozen=True, slots=True)
class FilePart:
    """A tensor of the files that is a run of a stack."""

    name: str
    """As ``save_pretrained`` names it."""
    in_base: str
    """Its name in the base model's files."""
    run: StackRun
    shape: tuple[int, ...]


def whole(layout: WeightLayout) -> StackRun:
    """Return all of a layer, in one piece."""
    return StackRun(layout, 0, 1, 1)


def all_experts(layout: WeightLayout) -> StackRun:
    """Return all of a stack, expert by expert."""
    return StackRun(layout, 0, layout.num_experts, layout.num_experts)


def runs_in_files(model: nn.Module, name: str, layout: WeightLayout) -> dict[str, tuple[StackRun, tuple[int, ...]]]:
    """Return which run of the stack ``name`` each tensor of the files is, and its shape there, by its name.

    transformers is asked with the numbers of the stack's rows in place of the rows. Raises ValueError, with the tensor,
    for one that is not of whole matrices or experts.
    """
    height, width = layout.shape
    numbers = torch.arange(height).view(layout.num_experts, -1, 1)
    found = {}
    for part, rows in saved_tensors(model, {name: numbers}).items():
        flat = rows.flatten()
        first, last = int(flat[0]), int(flat[0]) + flat.numel()
        counts = {layout.num_experts} | (set() if layout.transposed else {layout.num_matrices})
        fitting = [n for n in sorted(counts) if not first % (height // n) and not last % (height // n)]
        if rows.shape[-1] != 1 or not torch.equal(flat, torch.arange(first, last)) or not fitting:
            raise ValueError(part)
        size = height // fitting[0]
        found[part] = StackRun(layout, first // size, last // size, fitting[0]), (*rows.shape[:-1], width)
    return found
