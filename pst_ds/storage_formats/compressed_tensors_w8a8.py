"""Format "compressed-tensors" with int8 activations: int8 weights with per-row scales, in another layout."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pst_ds.storage_formats.compressed_tensors import CompressedTensors

if TYPE_CHECKING:
    from pst_ds.core.quantization import Grid
    from pst_ds.formats import PackedFormat


class CompressedTensorsW8A8(CompressedTensors):
    """Chosen by ``format = "compressed-tensors"`` with ``activation_bits = 8`` ("int-quantized")."""

    name = "compressed-tensors-w8a8"
    is_listed = False
    activations_text = ""
    layout_name = "int-quantized"

    def problem(self, values: Grid | None, embeddings: Grid | None) -> str:
        from pst_ds.core.quantization import Grid

        unsupported = super().problem(values, embeddings)
        # A product of integers has one scale per output; groups would need a sum per group.
        if unsupported or values == Grid(8):
            return unsupported
        return (
            f"{CompressedTensors.name} with int8 activations needs int8 weights with per-row scales, got "
            f'{values}. Set values = "int8" and group = "row"'
        )

    def layout(self, grid: Grid | None) -> PackedFormat | None:
        if grid is None:
            return None
        return _layout(grid)

    def input_scheme(self) -> dict[str, object] | None:
        """Return int8 with a scale per token, computed as the model runs."""
        return {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
        }


@cache
def _layout(grid: Grid) -> PackedFormat:
    from pst_ds.formats.compressed_tensors import IntQuantizedFormat

    return IntQuantizedFormat(grid)
