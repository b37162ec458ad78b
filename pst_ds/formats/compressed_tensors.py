"""Dense quantised matrices in two layouts of compressed-tensors, which vLLM and transformers read.

Described in the library's source (compressed_tensors/compressors, version 0.20). "pack-quantized": unsigned values with
128 or 8 added, packed from the lowest bit of each int32; every row starts with a new int32. "int-quantized": plain int8
values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pst_ds.core.packings import COMPRESSED_TENSORS, COMPRESSED_TENSORS_W8A8
from pst_ds.core.quantization import RULE_OF_SCALES, SCALE_DTYPE, Grid, dequantize, first_bad_scale
from pst_ds.formats.parts import FormatError, Part
from pst_ds.formats.quantized import QuantizedDense


class _OfCompressedTensors(QuantizedDense):
    """Quantised values, and ``weight_scale`` (O, groups) bf16."""

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        bad = first_bad_scale(parts["weight_scale"], self.grid)
        if bad is not None:
            value = float(parts["weight_scale"].flatten()[bad])
            raise FormatError(f"{name}: weight_scale {bad} is {value:g}; {RULE_OF_SCALES}")
        if not shape[1]:
            return
        codes = self.unpack_codes(parts)
        # padding is not part of the codes, so that packing them again clears a bit set in it
        again = self.pack_codes(codes, parts["weight_scale"], codes)[self.values_name]
        problems = {
            "the code -128": codes < self.grid.least,
            "a bit beyond its codes": again != parts[self.values_name],
        }
        for problem, wrong in problems.items():
            if wrong.any():
                row = int(wrong.any(1).to(torch.uint8).argmax())
                raise FormatError(f"{name}: {self.values_name} has {problem} in row {row}")

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        return dequantize(self.unpack_codes(parts), parts["weight_scale"], dtype or torch.float32)


class PackQuantizedFormat(_OfCompressedTensors):
    """``weight_packed`` (O, ceil(I bits / 32)) int32, ``weight_scale`` (O, groups) bf16, ``weight_shape`` (2,)."""

    packing = COMPRESSED_TENSORS
    values_name = "weight_packed"
    shape_name = "weight_shape"

    def __init__(self, grid: Grid):
        super().__init__(grid)
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
        # int8 could not hold the sum
        raw = (codes.to(torch.int16) + (self.grid.largest + 1)).to(torch.uint8)
        if self.grid.bits == 4:
            raw = torch.nn.functional.pad(raw, (0, raw.shape[1] % 2))
            raw = raw[:, ::2] | raw[:, 1::2] << 4  # (O, ceil(I / 2))
        # every row is filled to whole int32 words; four bytes are one word on little-endian hosts
        words = torch.nn.functional.pad(raw, (0, -raw.shape[1] % 4)).contiguous()
        return {
            "weight_packed": words.view(torch.int32),
            "weight_scale": scales,
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }

    def unpack_codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        raw = parts["weight_packed"].detach().cpu().contiguous().view(torch.uint8)
        if self.grid.bits == 4:
            # the lower half of a byte has the first of its two codes
            raw = torch.stack([raw & 15, raw >> 4], -1).flatten(1)
        columns = int(parts["weight_shape"][1])
        # int16, because an unsigned byte minus 128 has no place in uint8
        unsigned = raw[:, :columns].to(torch.int16)
        return (unsigned - (self.grid.largest + 1)).to(torch.int8)


class IntQuantizedFormat(_OfCompressedTensors):
    """``weight`` (O, I) int8 and ``weight_scale`` (O, 1) bf16, of layers with int8 activations."""

    packing = COMPRESSED_TENSORS_W8A8
    values_name = "weight"

    def __init__(self, grid: Grid):
        """Create the format. Raises ValueError unless ``grid`` is int8 with per-row scales."""
        if grid != Grid(8):
            raise ValueError(f"{COMPRESSED_TENSORS_W8A8} needs int8 values with per-row scales, not {grid}")
        super().__init__(grid)
        self.name = self.packing
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
