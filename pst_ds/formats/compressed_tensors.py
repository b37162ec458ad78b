"""Dense quantised matrices in two layouts of compressed-tensors, which vLLM and transformers read.

Described in the library's source (compressed_tensors/compressors, version 0.20). "pack-quantized": unsigned values with
128 or 8 added, packed from the lowest bit of each int32; every row starts with a new int32. "int-quantized": plain int8
values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pst_ds.core.packings import COMPRESSED_TENSORS, COMPRESSED_TENSORS_W8A8, DENSE
from pst_ds.core.quantization import RULE_OF_SCALES, SCALE_DTYPE, Grid, dequantize, first_bad_scale
from pst_ds.formats.parts import FormatError, Part
from pst_ds.formats.quantized import QuantizedFormat


class _OfCompressedTensors(QuantizedFormat):
    """Quantised values, and ``weight_scale`` (O, groups) bf16."""

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        bad = first_bad_scale(parts["weight_scale"], self.grid)
        if bad is not None:
            value = float(parts["weight_scale"].flatten()[bad])
            raise FormatError(f"{name}: weight_scale {bad} is {value:g}; {RULE_OF_SCALES}")
        if shape[1]:
            codes = self.unpack_codes(parts)
            held, again = parts[self.values_name], self.pack_codes(codes, parts["weight_scale"], codes)
            beyond = again[self.values_name] != held
            for problem, wrong in (("the code -128", codes < self.grid.least), ("a bit beyond its codes", beyond)):
                if wrong.any():
                    row = int(wrong.any(1).to(torch.uint8).argmax())
                    raise FormatError(f"{name}: {self.values_name} has {problem} in row {row}")

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        return dequantize(self.unpack_codes(parts), parts["weight_scale"], dtype or torch.float32)


class PackQuantizedFormat(_OfCompressedTensors):
    """``weight_packed`` (O, ceil(I bits / 32)) int32, ``weight_scale`` (O, groups) bf16, ``weight_shape`` (2,)."""

    values_name, shape_name = "weight_packed", "weight_shape"

    def __init__(self, grid: Grid):
        super().__init__(DENSE, grid)
        self.packing, self.name = COMPRESSED_TENSORS, f"{COMPRESSED_TENSORS} {grid.values}"
        self.part_names = ("weight_packed", "weight_scale", "weight_shape")
        self.value_dtypes = (torch.int32,)

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        """Return dtype and shape of every part; ``nonzero`` and ``dtype`` are not used."""
        rows, columns = shape
        return {
            "weight_packed": (torch.int32, (rows, -(-columns * self.grid.bits // 32))),
            "weight_scale": (SCALE_DTYPE, (rows, self._num_groups(columns))),
            "weight_shape": (torch.int64, (2,)),
        }

    def pack_codes(self, codes: Tensor, scales: Tensor, keep: Tensor, name: str = "") -> dict[str, Tensor]:
        raw = (codes.to(torch.int16) + (self.grid.largest + 1)).to(torch.uint8)
        if self.grid.bits == 4:
            raw = torch.nn.functional.pad(raw, (0, raw.shape[1] % 2))
            raw = raw[:, ::2] | raw[:, 1::2] << 4
        words = torch.nn.functional.pad(raw, (0, -raw.shape[1] % 4)).contiguous()
        return {
            "weight_packed": words.view(torch.int32),
            "weight_scale": scales,
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }

    def unpack_codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        raw = parts["weight_packed"].detach().cpu().contiguous().view(torch.uint8)
        if self.grid.bits == 4:
            raw = torch.stack([raw & 15, raw >> 4], -1).flatten(1)
        return (raw[:, : int(parts["weight_shape"][1])].to(torch.int16) - (self.grid.largest + 1)).to(torch.int8)


class IntQuantizedFormat(_OfCompressedTensors):
    """``weight`` (O, I) int8 and ``weight_scale`` (O, 1) bf16, of layers with int8 activations."""

    values_name = "weight"

    def __init__(self, grid: Grid):
        """Create the format. Raises ValueError unless ``grid`` is int8 with per-row scales."""
        if grid != Grid(8):
            raise ValueError(f"{COMPRESSED_TENSORS_W8A8} needs int8 values with per-row scales, not {grid}")
        super().__init__(DENSE, grid)
        self.packing = self.name = COMPRESSED_TENSORS_W8A8
        self.part_names = ("weight", "weight_scale")

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        """Return dtype and shape of every part; ``nonzero`` and ``dtype`` are not used."""
        return {"weight": (torch.int8, shape), "weight_scale": (SCALE_DTYPE, (shape[0], 1))}

    def pack_codes(self, codes: Tensor, scales: Tensor, keep: Tensor, name: str = "") -> dict[str, Tensor]:
        return {"weight": codes, "weight_scale": scales}

    def unpack_codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight"].detach().cpu()

    def _claimed_shape(self, name: str, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        codes = parts["weight"]
        if codes.ndim != 2:
            raise FormatError(f"{name}: weight must be a matrix, but has the shape {tuple(codes.shape)}")
        return codes.shape[0], codes.shape[1]
