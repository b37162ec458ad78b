"""Format "compressed-tensors": dense int8 or int4 matrices as the library of that name reads them, for vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pst_ds.errors import ExportError
from pst_ds.storage_format import PLAIN_STEM, VALUES, StorageFormat

if TYPE_CHECKING:
    from torch import Tensor

    from pst_ds.core.quantization import Grid
    from pst_ds.formats import PackedFormat


class CompressedTensors(StorageFormat):
    """int8 or int4 weights, and activations in the model's dtype ("pack-quantized")."""

    name = "compressed-tensors"
    purpose = "int8 or int4 for vLLM and transformers"
    quantises = (VALUES,)
    stem = PLAIN_STEM
    marks_tensors = True
    keeps_stacks_in_pieces = True
    loads_with_pst_ds = False
    engine = "compressed-tensors"
    lists_unquantised = True
    activations_text = 'format = "compressed-tensors"'
    layout_name = "pack-quantized"
    """Name of the layout in the terms of the library."""
    variant_of_eight_bits = "compressed-tensors-w8a8"
    """Format with int8 activations, which stores weights in another layout."""

    def problem(self, values: Grid | None, embeddings: Grid | None) -> str:
        if values is None or embeddings is not None:
            return (
                f'format = "{CompressedTensors.name}" holds int8 or int4 linear layers only. Set values = "int8" or '
                '"int4" only'
            )
        return ""

    def layout(self, grid: Grid | None) -> PackedFormat | None:
        if grid is None:  # embeddings and the like stay as they would be in a dense folder
            return None
        return _layout(grid)

    def spec_of(self, spec: Any, encoding: Any, grid: Grid | None, keep: Callable[[Any], Tensor] | None) -> Any:
        """Return a quantised matrix in the library's layout; other tensors unchanged. Raises ExportError for Conv1D."""
        quantised = spec.quantised(grid)
        if quantised.grid is None:
            return quantised
        if len(spec.shape) > 2:  # a stack of experts; its readers support linear layers only
            return spec
        if spec.transposed:
            raise ExportError(
                f"{spec.name} is the weight of a Conv1D, and {CompressedTensors.name} supports nn.Linear only. Export "
                'with format = "dense", and load with pst_ds.hf'
            )
        return quantised.marked(self.name)

    def config_entry(
        self, encoding: Any, num_files: int, unquantised: Sequence[str], *, compressed: bool
    ) -> dict[str, object]:
        """Describe quantised nn.Linear weights, and int8 activations, in the terms of compressed-tensors."""
        grid = encoding.values
        strategy = "channel"  # a scale per output
        if grid.group is not None:
            strategy = "group"
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": True,
            "strategy": strategy,
            "group_size": grid.group,
            "dynamic": False,
        }
        scheme = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": self.input_scheme(),
            "output_activations": None,
        }
        # vLLM matches the targets by class, so layers in the model's dtype are listed under "ignore".
        return {
            "quant_method": CompressedTensors.name,
            "format": self.layout_name,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(unquantised),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def input_scheme(self) -> dict[str, object] | None:
        """Return the quantisation of activations; None if they have the model's dtype."""
        return None

    def quantises_activations(self, settings: Any) -> bool:
        return True

    def needs_no_values(self, settings: Any) -> bool:
        # A run that trained with quantised weights decides; `problem` checks its values later.
        return settings.values is None

    def variant_for(self, activation_bits: int) -> str:
        # The library has a separate layout for weights that are multiplied as integers.
        if activation_bits == 8:
            return self.variant_of_eight_bits
        return self.name


@cache
def _layout(grid: Grid) -> PackedFormat:
    from pst_ds.formats.compressed_tensors import PackQuantizedFormat

    return PackQuantizedFormat(grid)
