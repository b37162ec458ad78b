"""Values of a model folder's tensors, for an export: read, checked, unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.quantization import Grid
from pst_ds.export import manifest
from pst_ds.export.folder_stacks import FolderStack
from pst_ds.export.manifest import MANIFEST_FILE, ExportError
from pst_ds.export.plan import PlannedTensor, TensorJob, TensorValues
from pst_ds.export.promised_grid import PromisedGrid
from pst_ds.export.rounding import matrix_of
from pst_ds.formats import ForeignFormat, FormatError, PackedFormat, QuantizedFormat
from pst_ds.formats.base_weights import BaseWeights


@dataclass(frozen=True, slots=True)
class FolderTensor:
    parts: dict[str, str]
    """Name in the files of each part; of a tensor that is stored as it is its own under ""."""
    form: PackedFormat | ForeignFormat | None
    """The format of the parts; None of a tensor that is stored as it is."""
    dtype: torch.dtype
    """The model's."""
    matrix: tuple[int, ...] | None
    """(O, I) of a tensor in parts; another library's may be the shape of several."""
    transposed: bool
    sha256: dict[str, str]
    """By the manifest, of each tensor in the files; empty without a manifest."""
    pruned_per_matrix: tuple[int, ...] = ()
    rounding_error: float = 0.0
    promised: str = ""
    """The layer whose weight this is, if the folder was pruned to a grid."""
    rows: tuple[int, int] | None = None
    """First and last + 1 of those of a stack of experts that this is."""

    def is_on(self, grid: Grid | None) -> bool:
        """Return whether its values are codes on that very grid."""
        if grid is None or self.matrix is None or not isinstance(self.form, QuantizedFormat):
            return False
        mine, inputs = self.form.grid, self.matrix[1]
        return mine.bits == grid.bits and mine.num_groups(inputs) == grid.num_groups(inputs)


@dataclass(frozen=True, slots=True)
class StackTensor:
    """A stack of experts that is packed, or will be."""

    stack: FolderStack
    packed: FolderTensor | None
    """Its parts, (E*O, I); None of one that plain tensors hold."""
    sha256: dict[str, str]
    """Of the plain tensors, as :attr:`FolderTensor.sha256`."""
    pruned_per_matrix: tuple[int, ...] = ()
    promised: bool = False
    """True if the folder was pruned to a grid, and the stack with it."""


class FolderSource:
    """Values of a model folder."""

    def __init__(self, weights: BaseWeights, promised: PromisedGrid | None = None):
        self._weights, self._promised = weights, promised

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """The values of the job's one output, or of all that a stack becomes. Raises ExportError and InputError."""
        if isinstance(job.recipe, StackTensor):
            yield from self._of_stack(job.recipe, job.outputs)
            return
        recipe: FolderTensor = job.recipe
        (output,) = job.outputs
        tensor = self.read(recipe, output.name, output.dtype)
        scales, error = None, 0.0
        if recipe.is_on(output.grid):
            scales, error = self._weights.read(recipe.parts["scales"]), recipe.rounding_error
        elif recipe.promised and self._promised and output.grid:
            matrix = tensor.t() if output.transposed else tensor
            scales = self._promised.scales_of(recipe.promised, matrix, recipe.rows)
        yield TensorValues(tensor, None, recipe.pruned_per_matrix, scales, error)

    def read(self, recipe: FolderTensor, name: str, dtype: torch.dtype, *, hashed: bool = True) -> Tensor:
        """A tensor in the model's shape; codes become weights of ``dtype``. Raises ExportError for damaged parts.

        ``hashed``: hold it against the SHA-256 of the manifest, if there is one.
        """
        sha256 = recipe.sha256 if hashed else {}
        parts = {part: self._stored(stored, sha256) for part, stored in recipe.parts.items()}
        form = recipe.form
        if form is None:
            return parts[""]
        if isinstance(form, ForeignFormat):
            return self._read_foreign(form, recipe, name, parts)
        assert recipe.matrix is None or len(recipe.matrix) == 2
        try:
            form.check(name, parts, recipe.matrix)
        except FormatError as error:
            raise ExportError(f"{self._weights.folder}: {error}") from None
        dense = form.unpack(parts, dtype if isinstance(form, QuantizedFormat) else None)
        del parts
        return dense.t().contiguous() if recipe.transposed else dense

    def read_stack(self, recipe: StackTensor, dtype: torch.dtype, *, hashed: bool = True) -> Tensor:
        """A stack as the matrix that it is in memory, (E*O, I) or (E*I, O); see :meth:`read`."""
        stack = recipe.stack
        if recipe.packed is not None:
            return stack.rows_of_matrix(self.read(recipe.packed, stack.name, dtype, hashed=hashed))
        stored = [self._stored(name, recipe.sha256 if hashed else {}).flatten(0, -2) for name in stack.stored]
        return stored[0] if len(stored) == 1 else torch.cat(stored)

    def _of_stack(self, recipe: StackTensor, outputs: tuple[PlannedTensor, ...]) -> Iterator[TensorValues]:
        """A stack as one tensor, or as those that plain files have of it."""
        stack, scales, error, grid = recipe.stack, None, 0.0, outputs[0].grid
        rows = self.read_stack(recipe, outputs[0].dtype)
        if recipe.packed is not None and recipe.packed.is_on(grid):
            scales, error = self._weights.read(recipe.packed.parts["scales"]), recipe.packed.rounding_error
        if outputs[0].name == stack.name:
            tensor = rows.view(stack.shape)
            if scales is None and recipe.promised and self._promised and grid:
                scales = self._promised.scales_of(stack.name, matrix_of(outputs[0], tensor))
            yield TensorValues(tensor, None, recipe.pruned_per_matrix, scales, error)
            return
        for piece in stack.pieces:
            own, pruned = slice(*piece.rows), stack.pruned_of(piece, recipe.pruned_per_matrix)
            own_scales = None if scales is None else scales[own]
            yield TensorValues(rows[own].view(piece.shape), None, pruned, own_scales, error)

    def _stored(self, name: str, sha256: dict[str, str]) -> Tensor:
        """A tensor of the files, held against its SHA-256 if that is known."""
        tensor = self._weights.read(name)
        if name in sha256 and manifest.tensor_sha256(tensor) != sha256[name]:
            raise ExportError(
                f"{self._weights.folder}: {name} is not what was exported: its SHA-256 differs. If the weights were "
                f"changed on purpose, delete {MANIFEST_FILE}"
            )
        return tensor

    def _read_foreign(self, form: ForeignFormat, recipe: FolderTensor, name: str, parts: dict[str, Tensor]) -> Tensor:
        """Another library's weight in the model's shape and dtype."""
        try:
            weight = form.unpack(name, parts)
        except FormatError as error:
            raise ExportError(f"{self._weights.folder}: {error}") from None
        if tuple(weight.shape) != recipe.matrix:
            raise ExportError(
                f"{self._weights.folder}: {name} is {tuple(weight.shape)} in its {form.method} parts, and "
                f"{recipe.matrix} in the model"
            )
        return (weight.t() if recipe.transposed else weight).to(recipe.dtype).contiguous()
