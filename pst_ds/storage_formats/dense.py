"""Format "dense": an ordinary model folder, or one whose matrices are quantised but not packed."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pst_ds.storage_format import EMBEDDINGS, VALUES, StorageFormat

if TYPE_CHECKING:
    from pst_ds.core.quantization import Grid
    from pst_ds.formats import PackedFormat


class Dense(StorageFormat):
    """Pruned weights are stored as zeros. Without quantisation, transformers loads the folder without pst-ds."""

    name = "dense"
    purpose = "ordinary model folder, pruned weights stored as zeros"
    quantises = (VALUES, EMBEDDINGS)

    def is_plain(self, *, is_quantized: bool) -> bool:
        return not is_quantized

    def layout(self, grid: Grid | None) -> PackedFormat | None:
        if grid is None:  # stored unchanged
            return None
        return _quantised(grid)


# Cached, because every tensor of an export asks for its layout.
@cache
def _quantised(grid: Grid) -> PackedFormat:
    from pst_ds.formats import QuantizedDense

    return QuantizedDense(grid)
