"""Values of a model folder's tensors for an export: read, verified and unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.quantization import Grid
from pst_ds.export.encoding import ExportError
from pst_ds.export.expert_stacks import FolderStack, ManifestFacts
from pst_ds.export.manifest import tensor_sha256
from pst_ds.export.plan import TensorJob, TensorValues
from pst_ds.export.pruned_scales import PrunedScales
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats import ForeignFormat, FormatError, PackedFormat, QuantizedFormat
from pst_ds.formats.base_weights import BaseWeights


@dataclass(frozen=True, slots=True)
class FolderRecipe:
    """How to read one tensor, or a whole stack of experts, from a folder."""

    dtype: torch.dtype
    """Dtype in the model."""
    facts: ManifestFacts
    parts: dict[str, str]
    """Name in the files of each part; "" is the part of a tensor that is stored unchanged. Empty for a dense stack."""
    form: PackedFormat | ForeignFormat | None = None
    """Format of the parts; None if values are stored unchanged."""
    matrix: tuple[int, ...] = ()
    """(O, I) of a packed tensor, (E*O, I) of a stack; more dimensions only in other libraries' formats."""
    transposed: bool = False
    pruned_layer: str = ""
    """The layer that ``pst-ds prune`` has quantised and whose weight this is."""
    rows: tuple[int, int] | None = None
    """Range of rows, if this is a piece of a stack of experts."""
    stack: FolderStack | None = None

    def is_on(self, grid: Grid | None) -> bool:
        """Return whether the values are quantised to ``grid`` already."""
        if grid is None or not self.matrix or not isinstance(self.form, QuantizedFormat):
            return False
        mine, inputs = self.form.grid, self.matrix[1]
        return mine.bits == grid.bits and mine.num_groups(inputs) == grid.num_groups(inputs)


class FolderSource:
    """Values of a model folder."""

    def __init__(self, weights: BaseWeights, pruned_scales: PrunedScales | None = None):
        self._weights, self._pruned_scales = weights, pruned_scales

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """Yield the values of the job's outputs. Raises ExportError and InputError."""
        recipe, output = job.recipe, job.outputs[0]
        assert isinstance(recipe, FolderRecipe)
        tensor, facts = self.read(recipe, output.name, output.dtype), recipe.facts
        scales, error = None, 0.0
        if recipe.is_on(output.grid):
            scales, error = self._weights.read(recipe.parts["scales"]), facts.rounding_error
        stack = recipe.stack
        if stack is not None and output.name != stack.name:  # as the tensors of a dense folder
            for piece in stack.pieces:
                own, pruned = slice(*piece.rows), stack.pruned_of(piece, facts.pruned_per_matrix)
                own_scales = None if scales is None else scales[own]
                yield TensorValues(tensor[own].view(piece.shape), None, pruned, own_scales, error)
            return
        tensor = tensor if stack is None else tensor.view(stack.shape)
        if scales is None and recipe.pruned_layer and self._pruned_scales and output.grid:
            scales = self._pruned_scales.scales_of(recipe.pruned_layer, output.as_matrix(tensor), recipe.rows)
        yield TensorValues(tensor, None, facts.pruned_per_matrix, scales, error)

    def read(self, recipe: FolderRecipe, name: str, dtype: torch.dtype, *, hashed: bool = True) -> Tensor:
        """Return a tensor in the model's shape, a stack of experts as the matrix that it is in memory.

        Args:
            recipe: how to read it.
            name: name for messages.
            dtype: dtype of the result for quantised values.
            hashed: whether to compare with the SHA-256 of the manifest, if there is one.

        Raises ExportError for damaged parts.
        """
        sha256 = recipe.facts.sha256 if hashed else {}
        parts = {part: self._stored(stored, sha256) for part, stored in recipe.parts.items()}
        form, stack = recipe.form, recipe.stack
        if form is None and stack is not None:
            rows = [self._stored(stored, sha256).flatten(0, -2) for stored in stack.stored]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        if form is None:
            return parts[""]
        if isinstance(form, ForeignFormat):
            return self._unpack_foreign(form, recipe, name, parts)
        outputs, inputs = recipe.matrix
        try:
            form.check(name, parts, (outputs, inputs))
        except FormatError as error:
            raise ExportError(f"{self._weights.folder}: {error}") from None
        dense = form.unpack(parts, dtype if isinstance(form, QuantizedFormat) else None)
        del parts
        if stack is not None:
            return stack.rows_of_matrix(dense)
        return dense.t().contiguous() if recipe.transposed else dense

    def _stored(self, name: str, sha256: dict[str, str]) -> Tensor:
        """Read a tensor of the files, and compare it with its SHA-256 if that is known."""
        tensor = self._weights.read(name)
        if name in sha256 and tensor_sha256(tensor) != sha256[name]:
            raise ExportError(
                f"{self._weights.folder}: {name} is not what was exported: its SHA-256 differs. If the weights were "
                f"changed on purpose, delete {MANIFEST_FILE}"
            )
        return tensor

    def _unpack_foreign(self, form: ForeignFormat, recipe: FolderRecipe, name: str, parts: dict[str, Tensor]) -> Tensor:
        """Return another library's weight in the model's shape and dtype. Raises ExportError."""
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
