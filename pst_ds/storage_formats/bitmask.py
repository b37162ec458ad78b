"""Format "bitmask": kept values and one bit per position; the smallest up to about 94 % sparsity."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pst_ds.storage_format import EMBEDDINGS, VALUES, PackedFolder

if TYPE_CHECKING:
    from pst_ds.core.quantization import Grid
    from pst_ds.formats import PackedFormat


class Bitmask(PackedFolder):
    """Any pattern. Our kernels multiply with it without unpacking, on CPUs and GPUs."""

    name = "bitmask"
    purpose = "a bit per weight and the kept values; loads after import pst_ds.hf"
    quantises = (VALUES, EMBEDDINGS)
    compresses_bitmask = True
    is_faster_packed_on_cpu = True

    def layout(self, grid: Grid | None) -> PackedFormat:
        return _layout(grid)


# Cached, because every tensor of an export asks for its layout.
@cache
def _layout(grid: Grid | None) -> PackedFormat:
    from pst_ds.formats import FORMATS, QuantizedBitmask

    if grid is None:
        return FORMATS[Bitmask.name]
    return QuantizedBitmask(grid)
