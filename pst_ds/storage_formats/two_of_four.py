"""Format "2:4": the two kept values of every four inputs, and bits for their places."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pst_ds.storage_format import EMBEDDINGS, VALUES, PackedFolder

if TYPE_CHECKING:
    from pst_ds.core.quantization import Grid
    from pst_ds.formats import PackedFormat


class TwoOfFour(PackedFolder):
    """At most two of four consecutive inputs are kept, as pattern "2:4" prunes."""

    name = "2:4"
    purpose = "two of four values and their places; as bitmask"
    quantises = (VALUES, EMBEDDINGS)
    # A layer that keeps more has a group of four with three weights, for which there is no place.
    most_kept = 0.5
    most_kept_text = "two of four weights"
    fix_for_most_kept = 'Choose format = "bitmask", or train with pst.pattern = "2:4"'

    def layout(self, grid: Grid | None) -> PackedFormat:
        return _layout(grid)


# Cached, because every tensor of an export asks for its layout.
@cache
def _layout(grid: Grid | None) -> PackedFormat:
    from pst_ds.formats import FORMATS, QuantizedTwoFour

    if grid is None:
        return FORMATS[TwoOfFour.name]
    return QuantizedTwoFour(grid)
