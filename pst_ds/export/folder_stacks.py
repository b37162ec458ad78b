"""Stacks of experts in a model folder: each one tensor of its files, or several, such as every expert's matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pst_ds.core.layout import WeightLayout
from pst_ds.export.manifest import TensorEntry
from pst_ds.export.plan import PlannedTensor
from pst_ds.export.stacks import runs_in_files
from pst_ds.formats.base_weights import BaseWeights
from pst_ds.nn.model_structure import is_experts, stack_layouts


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A tensor of plain files that is rows of a stack."""

    name: str
    """As ``save_pretrained`` names it, or as the folder's own files do."""
    rows: tuple[int, int]
    """First and last + 1 of those of the matrix that the stack is in memory."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StackFacts:
    """What a manifest says of a stack, or of all the tensors that are pieces of it."""

    origin: str = "model"
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each tensor in the files."""
    pruned_per_matrix: tuple[int, ...] = ()
    rounding_error: float = 0.0


@dataclass(frozen=True, slots=True)
class FolderStack:
    """A stack of experts, and where it is in a folder."""

    name: str
    layout: WeightLayout
    shape: tuple[int, ...]
    """The Parameter's."""
    pieces: tuple[FilePiece, ...]
    """What plain files hold of it, in the order of the rows."""
    stored: tuple[str, ...]
    """The tensors of the folder's files that these are; empty where the stack is packed."""

    def facts(self, entries: dict[str, TensorEntry]) -> StackFacts:
        """Return what is known by a manifest: it was pruned where every piece of it was."""
        found = [entry for name in (self.stored or (self.name,)) if (entry := entries.get(name)) is not None]
        pruned = tuple(count for entry in found for count in entry.pruned_per_matrix)
        sums = {part.name: part.sha256 for entry in found for part in entry.parts}
        error = found[0].rounding_error if len(found) == 1 else 0.0
        is_pruned = len(pruned) == self.layout.num_matrices
        return StackFacts("pruned", sums, pruned, error) if is_pruned else StackFacts("model", sums, (), error)

    def planned(self, dtype: torch.dtype, origin: str) -> PlannedTensor:
        """Return the stack as one tensor of an export."""
        return PlannedTensor(
            self.name, self.shape, dtype, origin, transposed=self.layout.transposed, is_linear=True
        )  # fmt: skip

    def planned_pieces(self, whole: PlannedTensor) -> tuple[PlannedTensor, ...]:
        """Return the tensors of plain files that the stack becomes."""
        return tuple(replace(whole, name=piece.name, shape=piece.shape) for piece in self.pieces)

    def pruned_of(self, piece: FilePiece, pruned: Sequence[int]) -> tuple[int, ...]:
        """Return which of the counts of all matrices, if there are any, are those of a piece."""
        each = len(pruned) / self.layout.shape[0]
        first, last = (round(row * each) for row in piece.rows)
        return tuple(pruned[first:last])

    def rows_of_matrix(self, matrix: Tensor) -> Tensor:
        """Return (E*O, I) as rows of the stack in memory."""
        if not self.layout.transposed:
            return matrix
        return matrix.view(self.layout.num_experts, -1, matrix.shape[1]).transpose(1, 2).flatten(0, 1)


def folder_stacks(model: nn.Module, weights: BaseWeights) -> list[FolderStack]:
    """Return the stacks of ``model`` that a folder holds whole: in tensors of one dtype each, or packed."""
    found = []
    for owner, module in model.named_modules():
        if not is_experts(module):
            continue
        try:
            layouts = stack_layouts(module)
        except ValueError:  # of a form of its own: left as it is
            continue
        for attribute, layout in layouts.items():
            stack = _stack(model, f"{owner}.{attribute}", layout, weights)
            found += [] if stack is None else [stack]
    return found


def _stack(model: nn.Module, name: str, layout: WeightLayout, weights: BaseWeights) -> FolderStack | None:
    shape = tuple(model.get_parameter(name).shape)
    try:
        runs = runs_in_files(model, name, layout)
    except ValueError:  # written in another order
        return None
    pieces = sorted((FilePiece(part, run.rows, shape) for part, (run, shape) in runs.items()), key=_first)
    if (own := weights.find(name)) is not None:
        pieces = [FilePiece(name, (0, layout.shape[0]), shape)]
        return FolderStack(name, layout, shape, tuple(pieces), (own,))
    stored = [at for piece in pieces if (at := weights.find(piece.name)) is not None]
    if len(stored) not in (0, len(pieces)) or len({weights.size(at)[0] for at in stored}) > 1:
        return None
    if any(weights.size(at)[1] != piece.shape for at, piece in zip(stored, pieces, strict=False)):
        return None
    return FolderStack(name, layout, shape, tuple(pieces), tuple(stored))


def _first(piece: FilePiece) -> int:
    return piece.rows[0]
