"""Packed formats with quantised values ("codes"): bitmask, 2:4, and dense matrices.

bitmask and 2:4 have codes for the kept positions, row by row, and bits for the positions; "dense" has a code for every
position. Two int4 codes share a byte, the first in its lower half. Every row starts with a new byte; the unused half
byte after an odd number of codes is 0.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.packings import DENSE, GROUPS, QUANTIZED_PACKINGS
from pst_ds.core.quantization import (
    RULE_OF_SCALES,
    SCALE_DTYPE,
    Grid,
    dequantize,
    first_bad_scale,
    pack_nibbles,
    quantize,
    unpack_nibbles,
)
from pst_ds.formats.parts import FormatError, PackedFormat, Part, require_no_padding
from pst_ds.formats.rows import as_bools, bytes_of_row, gather, row_counts, scatter
from pst_ds.formats.sparse import BitmaskFormat, TwoFourFormat, filled_groups, require_two_of_four


def grid_of_parts(parts: Mapping[str, Part], columns: int) -> Grid:
    """Return the quantisation of a weight with ``columns`` inputs, given dtype and shape of its codes and scales.

    Raises FormatError if the scales fit no quantisation.
    """
    bits = 4 if parts["codes"][0] == torch.uint8 else 8
    dims = parts["scales"][1] if "scales" in parts else ()
    groups = dims[1] if len(dims) == 2 else 1
    group = None if groups == 1 or not columns else columns // max(groups, 1)
    if group is not None and (group not in GROUPS or group * groups != columns):
        known = ", ".join(map(str, GROUPS))
        raise FormatError(f"{groups} scales per row of {columns} inputs: a scale must be for {known} inputs or for all")
    return Grid(bits, group)


class QuantizedFormat(PackedFormat):
    """``codes``, ``scales`` (O, groups) bf16, ``shape`` and, unless dense, ``bitmask`` (O, ceil(I / 8)) uint8.

    ``codes`` are int8: (nnz,) for bitmask, (O, I / 2) for 2:4, (O, I) for a dense matrix. int4 codes are uint8, with
    half as many bytes per row, rounded up; in bitmask, the rows are concatenated.
    """

    values_name = "codes"
    holds_stacks = True
    shape_dims: tuple[int, ...]
    _POSITIONS: ClassVar[dict[str, PackedFormat]] = {"bitmask": BitmaskFormat(), "2:4": TwoFourFormat()}

    def __init__(self, packing: str, grid: Grid):
        """Create the format; ``packing``: "bitmask", "2:4" or "dense". Raises ValueError for others."""
        if packing not in QUANTIZED_PACKINGS:
            raise ValueError(f"quantised values are packed as {', '.join(QUANTIZED_PACKINGS)}, not as {packing}")
        self.packing, self.grid = packing, grid
        self._base = self._POSITIONS.get(packing)
        self.name = f"{packing} {grid.values}"
        self.shape_dims = self._base.shape_dims if self._base else (2,)
        self.part_names = ("codes", *(["bitmask"] if self._base else []), "scales", "shape")
        self.value_dtypes = (torch.int8,) if grid.bits == 8 else (torch.uint8,)

    def stored(self, counts: Tensor) -> int:
        """Return the number of stored codes; int4 codes fill whole bytes in every row."""
        return int((counts + (counts & 1 if self.grid.bits == 4 else 0)).sum())

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        """Return dtype and shape of every part; ``nonzero``: from :meth:`stored`. ``dtype`` is not used."""
        rows, columns = shape
        sizes: dict[str, tuple[int, ...]] = {"bitmask": (nonzero,), "2:4": (rows, columns // 2), DENSE: (rows, columns)}
        *outer, codes = sizes[self.packing]
        if self._base is not None:
            self._base.parts(shape, nonzero, torch.float32)  # rejects shapes that it cannot hold
        parts: dict[str, Part] = {
            "codes": (self.value_dtypes[0], (*outer, codes if self.grid.bits == 8 else -(-codes // 2))),
            "bitmask": (torch.uint8, (rows, bytes_of_row(columns))),
            "scales": (SCALE_DTYPE, (rows, self._num_groups(columns))),
            "shape": (torch.int64, self.shape_dims),
        }
        return {part: parts[part] for part in self.part_names}

    def _num_groups(self, columns: int) -> int:
        try:
            return self.grid.num_groups(columns)
        except ValueError as error:
            raise FormatError(str(error)) from None

    def accepts(self, bits: Tensor, shape: tuple[int, int]) -> bool:
        return self._base is None or self._base.accepts(bits, shape)

    def _pack(self, weight: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        try:
            codes, scales = quantize(weight, as_bools(keep, weight.shape[1]), self.grid)
        except ValueError as error:
            raise FormatError(f"{name}: {error}") from None
        return self.pack_codes(codes, scales, keep, name)

    def pack_codes(self, codes: Tensor, scales: Tensor, keep: Tensor, name: str = "") -> dict[str, Tensor]:
        """Pack quantised values; return the parts on the CPU.

        Args:
            codes: (O, I) int8, 0 at pruned positions.
            scales: (O, groups) bf16.
            keep: row bits of the kept positions, (O, ceil(I / 8)) uint8.
            name: name for messages.

        Raises FormatError if 2:4 cannot hold the positions.
        """
        rows, columns = codes.shape
        held = {"scales": scales, "shape": self._shape_part(codes.shape)}
        if self.packing == "2:4":
            held["bitmask"] = filled_groups(name, keep, columns)
        elif self.packing == "bitmask":
            held["bitmask"] = keep
        if self._base is not None:
            codes = gather(codes.contiguous(), held["bitmask"], int(row_counts(held["bitmask"]).sum()))
        if self.packing == "2:4":
            codes = codes.view(rows, columns // 2)
        if self.grid.bits == 4:
            codes = _packed_rows(codes, row_counts(keep)) if self.packing == "bitmask" else pack_nibbles(codes)
        held["codes"] = codes
        return {part: held[part] for part in self.part_names}

    @property
    def is_dense(self) -> bool:
        """True if every position has a code."""
        return self._base is None

    @property
    def pads_rows(self) -> bool:
        """True if a row with an odd number of kept int4 codes ends with half a byte of padding."""
        return self.packing == "bitmask" and self.grid.bits == 4

    def row_starts(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the index of the first byte of every row in ``codes``, (O,) int64, on the device of the parts."""
        codes, rows = parts["codes"], int(parts["shape"].flatten()[0])
        if self.packing != "bitmask":
            return torch.arange(rows, device=codes.device) * (codes.shape[1] if rows else 0)
        counts = row_counts(parts["bitmask"].cpu())
        nbytes = counts if self.grid.bits == 8 else (counts + 1) // 2
        return (nbytes.cumsum(0) - nbytes).to(codes.device)

    def unpack_codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the codes, (O, I) int8 on the CPU, 0 at pruned positions. Call :meth:`check` first."""
        codes, columns = parts["codes"].detach().cpu().contiguous(), int(parts["shape"].flatten()[1])
        if self._base is None:
            return unpack_nibbles(codes, columns).contiguous() if self.grid.bits == 4 else codes
        bits = parts["bitmask"].detach().cpu().contiguous()
        if self.grid.bits == 4 and columns:
            flat = unpack_nibbles(codes, 2 * codes.shape[-1])
            codes = without_padding(flat, row_counts(bits)) if self.packing == "bitmask" else flat
        return scatter(codes.contiguous(), bits, columns)

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        return dequantize(self.unpack_codes(parts), parts["scales"], dtype or torch.float32)

    def stored_of(self, num_values: int) -> int:
        return num_values * (2 if self.grid.bits == 4 else 1)

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        bad = first_bad_scale(parts["scales"], self.grid)
        if bad is not None:
            row, group = divmod(bad, parts["scales"].shape[1])
            value = float(parts["scales"][row, group])
            raise FormatError(f"{name}: scale {group} of row {row} is {value:g}; {RULE_OF_SCALES}")
        if self._base is not None:
            require_no_padding(name, "bitmask", parts["bitmask"], shape[1])
        if self.packing == "2:4":
            require_two_of_four(name, parts["bitmask"], shape[1])
        if shape[1]:
            self._check_codes(name, parts["codes"], self._counts(name, parts, shape))
        elif parts["codes"].numel():  # without inputs, a file of few bytes may claim any number of rows
            raise FormatError(f"{name}: codes has {parts['codes'].numel()} bytes, but the matrix has no inputs")

    def _counts(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the number of codes per row, (O,) int64, given checked bits. Raises FormatError."""
        if self.packing != "bitmask":
            return torch.full((shape[0],), shape[1] // (2 if self.packing == "2:4" else 1), dtype=torch.int64)
        counts = row_counts(parts["bitmask"])
        total, held = self.stored(counts), self.stored_of(parts["codes"].numel())
        if total != held:
            filled = ", including padding," if self.grid.bits == 4 else ""
            raise FormatError(
                f"{name}: bitmask keeps {int(counts.sum())} positions, so codes must have {total}{filled} but "
                f"has {held}"
            )
        return counts

    def _check_codes(self, name: str, codes: Tensor, counts: Tensor) -> None:
        flat = codes.flatten()
        bad = flat == -128
        if self.grid.bits == 8 and bad.any():
            at = int(bad.to(torch.uint8).argmax())
            raise FormatError(f"{name}: codes has -128 in byte {at}; int8 codes go from -127 to 127")
        if self.grid.bits == 4 and bool((counts & 1).any()):
            ends = ((counts + 1) // 2).cumsum(0) - 1
            odd = (counts & 1).nonzero().flatten()
            wrong = (flat[ends[odd]] >> 4) != 0
            if wrong.any():
                row = int(odd[int(wrong.to(torch.uint8).argmax())])
                raise FormatError(f"{name}: the last half byte of row {row} in codes is padding, and must be 0")


def _packed_rows(codes: Tensor, counts: Tensor) -> Tensor:
    """Pack int4 codes row by row, (nnz,) int8 to (bytes,) uint8; ``counts``: codes per row."""
    odd = (counts & 1).bool()
    if odd.any():
        codes = torch.from_numpy(np.insert(codes.numpy(), counts.cumsum(0)[odd].numpy(), 0))
    return pack_nibbles(codes)


def without_padding(codes: Tensor, counts: Tensor) -> Tensor:
    """Remove the padding after rows with an odd number of codes, on any device.

    ``counts``: codes per row, (O,) int64.
    """
    odd = counts & 1
    whole = torch.ones(codes.shape, dtype=torch.bool, device=codes.device)
    whole[((counts + odd).cumsum(0) - 1)[odd.bool()]] = False
    return codes[whole]
