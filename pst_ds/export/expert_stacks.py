"""Stacks of experts: which rows of a stack each tensor of the files holds, so that no stack is built as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from pst_ds.core.coded_weight import CodeLayout
from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import StoredGrid
from pst_ds.export.manifest import ExportedTensor
from pst_ds.export.tensor_spec import Origin, TensorSpec
from pst_ds.formats.base_weights import BaseWeights, saved_tensors
from pst_ds.nn.model_structure import is_experts, stack_layouts


@dataclass(frozen=True)
class StackRun:
    """Consecutive pieces of a stack: its experts, or the matrices of its experts. Any other layer is one piece."""

    stack: WeightLayout
    first: int
    """Index of the first piece."""
    last: int
    """Index of the last piece + 1."""
    of: int
    """Number of pieces of the whole stack."""

    @cached_property
    def piece(self) -> WeightLayout:
        """Layout of one piece."""
        stack, count = self.stack, self.of
        experts = max(1, stack.num_experts // count)
        outputs, matrices = stack.out_features // count, stack.num_matrices // count
        return WeightLayout(outputs, stack.in_features, stack.transposed, matrices, experts)

    @property
    def rows(self) -> tuple[int, int]:
        """Range of rows of the stack, viewed in memory as one matrix."""
        height = self.piece.shape[0]
        return self.first * height, self.last * height

    @property
    def num_pieces(self) -> int:
        return self.last - self.first

    def flat_range(self, piece: int) -> tuple[int, int]:
        """Return the range of flat weights of a piece."""
        return piece * self.piece.numel, (piece + 1) * self.piece.numel

    def share(self, piece: int, numel: int) -> tuple[int, int]:
        """Return the range of a piece in ``numel`` values that are stored expert by expert."""
        return piece * (numel // self.of), (piece + 1) * (numel // self.of)

    def grid_of_piece(self, grid: StoredGrid) -> StoredGrid:
        """Return the quantisation of one piece, given that of the stack."""
        return StoredGrid(self.piece, grid.grid)

    def codes_of_piece(self, codes: CodeLayout) -> CodeLayout:
        """Return the layout of a piece's quantised values, given that of the stack."""
        return replace(codes, stored=self.grid_of_piece(codes.stored))


def whole(layout: WeightLayout) -> StackRun:
    """Return a whole layer as one piece."""
    return StackRun(layout, 0, 1, 1)


def all_experts(layout: WeightLayout) -> StackRun:
    """Return a whole stack, expert by expert."""
    return StackRun(layout, 0, layout.num_experts, layout.num_experts)


def runs_in_files(model: nn.Module, name: str, layout: WeightLayout) -> dict[str, tuple[StackRun, tuple[int, ...]]]:
    """Return the run of the stack ``name`` that each tensor of the files holds, and its shape there, by its name.

    The row numbers of the stack are passed through transformers' conversion in place of the rows. Raises ValueError,
    with the tensor's name, if it does not consist of whole matrices or experts.
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


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A tensor of a dense folder that holds rows of a stack."""

    name: str
    """Name that ``save_pretrained`` gives it, or its name in the folder."""
    rows: tuple[int, int]
    """Range of rows of the stack, viewed in memory as one matrix."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ManifestFacts:
    """What a manifest says of a tensor, or of all tensors that a stack consists of; the defaults without a manifest."""

    origin: Origin = "model"
    sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each tensor, by its name in the files."""
    pruned_per_matrix: tuple[int, ...] = ()
    rounding_error: float = 0.0


def facts_of(tensor: ExportedTensor | None) -> ManifestFacts:
    """Return the facts of a tensor of a manifest."""
    if tensor is None:
        return ManifestFacts()
    sums = {part.name: part.sha256 for part in tensor.parts}
    return ManifestFacts(tensor.origin, sums, tensor.pruned_per_matrix, tensor.rounding_error)


@dataclass(frozen=True, slots=True)
class FolderStack:
    """A stack of experts in a folder."""

    name: str
    layout: WeightLayout
    shape: tuple[int, ...]
    """Shape of the Parameter."""
    pieces: tuple[FilePiece, ...]
    """Tensors that a dense folder has in its place, in the order of the rows."""
    stored: tuple[str, ...]
    """Names of these tensors in the folder's files; empty if the stack is packed."""

    def facts(self, tensors: dict[str, ExportedTensor]) -> ManifestFacts:
        """Return the facts of the manifest with these tensors. A stack is "pruned" if all its pieces were."""
        found = [tensor for name in (self.stored or (self.name,)) if (tensor := tensors.get(name)) is not None]
        pruned = tuple(count for tensor in found for count in tensor.pruned_per_matrix)
        sums = {part.name: part.sha256 for tensor in found for part in tensor.parts}
        error = found[0].rounding_error if len(found) == 1 else 0.0
        is_pruned = len(pruned) == self.layout.num_matrices
        return ManifestFacts("pruned", sums, pruned, error) if is_pruned else ManifestFacts("model", sums, (), error)

    def spec(self, dtype: torch.dtype, origin: Origin) -> TensorSpec:
        """Return the stack as one tensor of an export."""
        return TensorSpec(self.name, self.shape, dtype, origin, transposed=self.layout.transposed, is_linear=True)

    def piece_specs(self, whole: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors that a dense folder has in place of the stack."""
        return tuple(replace(whole, name=piece.name, shape=piece.shape) for piece in self.pieces)

    def pruned_of(self, piece: FilePiece, pruned: Sequence[int]) -> tuple[int, ...]:
        """Return the counts of a piece among the counts of all matrices, if there are any."""
        each = len(pruned) / self.layout.shape[0]
        first, last = (round(row * each) for row in piece.rows)
        return tuple(pruned[first:last])

    def rows_of_matrix(self, matrix: Tensor) -> Tensor:
        """Return the matrix (E*O, I) as rows of the stack in memory."""
        if not self.layout.transposed:
            return matrix
        return matrix.view(self.layout.num_experts, -1, matrix.shape[1]).transpose(1, 2).flatten(0, 1)


def folder_stacks(model: nn.Module, weights: BaseWeights) -> list[FolderStack]:
    """Return the stacks of ``model`` that a folder holds completely, packed or in tensors of one dtype."""
    found = []
    for owner, module in model.named_modules():
        if not is_experts(module):
            continue
        try:
            layouts = stack_layouts(module)
        except ValueError:  # an unknown form of experts is exported unchanged
            continue
        for attribute, layout in layouts.items():
            stack = _stack(model, f"{owner}.{attribute}", layout, weights)
            found += [] if stack is None else [stack]
    return found


def _stack(model: nn.Module, name: str, layout: WeightLayout, weights: BaseWeights) -> FolderStack | None:
    shape = tuple(model.get_parameter(name).shape)
    try:
        runs = runs_in_files(model, name, layout)
    except ValueError:  # the files have the rows in another order
        return None
    pieces = [FilePiece(part, run.rows, shape) for part, (run, shape) in runs.items()]
    pieces.sort(key=lambda piece: piece.rows[0])
    if (own := weights.find(name)) is not None:
        pieces = [FilePiece(name, (0, layout.shape[0]), shape)]
        return FolderStack(name, layout, shape, tuple(pieces), (own,))
    stored = [at for piece in pieces if (at := weights.find(piece.name)) is not None]
    if len(stored) not in (0, len(pieces)) or len({weights.size(at)[0] for at in stored}) > 1:
        return None
    if any(weights.size(at)[1] != piece.shape for at, piece in zip(stored, pieces, strict=False)):
        return None
    return FolderStack(name, layout, shape, tuple(pieces), tuple(stored))
