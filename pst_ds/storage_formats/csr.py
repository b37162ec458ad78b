"""Format "csr": kept values and the column of each, smaller than a bitmask above about 94 % sparsity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pst_ds.storage_format import PackedFolder

if TYPE_CHECKING:
    from pst_ds.core.quantization import Grid
    from pst_ds.formats import PackedFormat


class Csr(PackedFolder):
    """Any pattern, with values of the model's dtype. Products unpack the weight."""

    name = "csr"
    purpose = "rows of values and columns, above 80 % sparsity; as bitmask"

    def layout(self, grid: Grid | None) -> PackedFormat:
        from pst_ds.formats import FORMATS

        self.require_values_of_model(grid)
        return FORMATS[self.name]
