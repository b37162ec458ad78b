"""Packed formats with quantised values ("codes"): bitmask, 2:4, and dense matrices.

bitmask and 2:4 have codes for the kept positions, row by row, and bits for the positions; "dense" has a code for every
position. Two int4 codes share a byte, the first in its lower half. Every row starts with a new byte; the unused half
byte after an odd number of codes is 0.
"""

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.packings import DENSE, GROUPS
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
from pst_ds.formats.parts import FormatError, PackedFormat, Part
from pst_ds.formats.rows import as_bools, bytes_of_row, gather, row_counts, scatter, scatter_nibbles
from pst_ds.formats.sparse import BitmaskFormat, TwoFourFormat, filled_groups


def grid_of_parts(parts: Mapping[str, Part], columns: int) -> Grid:
    """Return the quantisation of a weight with ``columns`` inputs, given dtype and shape of its codes and scales.

    Raises FormatError if the scales fit no quantisation.
    """
    # two int4 codes share a byte, which is unsigned; int8 codes are signed bytes
    bits = 4 if parts["codes"][0] == torch.uint8 else 8
    groups = 1
    if "scales" in parts:
        _, dims = parts["scales"]
        # scales of another shape are refused by the check of the parts
        if len(dims) == 2:
            groups = dims[1]
    if groups == 1 or not columns:
        return Grid(bits, None)
    group = columns // max(groups, 1)
    if group not in GROUPS or group * groups != columns:
        known = ", ".join(map(str, GROUPS))
        raise FormatError(f"{groups} scales per row of {columns} inputs: a scale must be for {known} inputs or for all")
    return Grid(bits, group)


class QuantizedFormat(PackedFormat):
    """Quantised values with their scales; a subclass says which positions have one, and how a row of them is stored.

    ``codes``, ``scales`` (O, groups) bf16, ``shape`` and, unless every position has a code, ``bitmask``
    (O, ceil(I / 8)) uint8. ``codes`` are int8; int4 codes are uint8, with half as many bytes per row, rounded up.
    """

    values_name = "codes"
    holds_stacks = True
    packing: str
    """Name of the storage format."""
    positions: BitmaskFormat | None = None
    """Layout whose bits say which positions have a code; None if all have one."""
    pads_rows = False
    """True if a row with an odd number of kept int4 codes ends with half a byte of padding."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.name = f"{self.packing} {grid.values}"
        self.value_dtypes = (torch.int8,) if grid.bits == 8 else (torch.uint8,)
        if self.positions is None:
            self.part_names = ("codes", "scales", "shape")
        else:
            self.shape_dims = self.positions.shape_dims
            self.part_names = ("codes", "bitmask", "scales", "shape")

    def stored(self, counts: Tensor) -> int:
        """Return the number of stored codes; int4 codes fill whole bytes in every row."""
        if self.grid.bits == 4:
            counts = counts + (counts & 1)
        return int(counts.sum())

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        """Return dtype and shape of every part; ``nonzero``: from :meth:`stored`. ``dtype`` is not used."""
        rows, columns = shape
        if self.positions is not None:
            self.positions.parts(shape, nonzero, torch.float32)  # rejects shapes that it cannot hold
        *outer, num_codes = self._shape_of_codes(shape, nonzero)
        if self.grid.bits == 4:
            # two codes per byte, rounded up
            num_codes = -(-num_codes // 2)
        parts: dict[str, Part] = {
            "codes": (self.value_dtypes[0], (*outer, num_codes)),
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
        return self.positions is None or self.positions.accepts(bits, shape)

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
        packed = self._pack_kept(codes, keep, name)
        packed["scales"] = scales
        packed["shape"] = self._shape_part(codes.shape)
        return {part: packed[part] for part in self.part_names}

    @property
    def is_dense(self) -> bool:
        """True if every position has a code."""
        return self.positions is None

    def row_starts(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the index of the first byte of every row in ``codes``, (O,) int64, on the device of the parts."""
        codes = parts["codes"]
        rows = int(parts["shape"].flatten()[0])
        bytes_per_row = codes.shape[1] if rows else 0
        return torch.arange(rows, device=codes.device) * bytes_per_row

    def unpack_codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the codes, (O, I) int8 on the CPU, 0 at pruned positions. Call :meth:`check` first."""
        codes = parts["codes"].detach().cpu().contiguous()
        columns = int(parts["shape"].flatten()[1])
        bits = parts["bitmask"].detach().cpu().contiguous()
        if self.grid.bits == 4 and columns:
            unpacked = scatter_nibbles(codes, bits, rows=bits.shape[0], columns=columns)
            if unpacked is not None:
                return unpacked
            codes = unpack_nibbles(codes, 2 * codes.shape[-1])
            if self.pads_rows:
                codes = without_padding(codes, row_counts(bits))
        return scatter(codes.contiguous(), bits, columns)

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        return dequantize(self.unpack_codes(parts), parts["scales"], dtype or torch.float32)

    def stored_of(self, num_values: int) -> int:
        if self.grid.bits == 4:
            # the padding of odd rows is counted too, as in :meth:`stored`
            return num_values * 2
        return num_values

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        bad = first_bad_scale(parts["scales"], self.grid)
        if bad is not None:
            row, group = divmod(bad, parts["scales"].shape[1])
            value = float(parts["scales"][row, group])
            raise FormatError(f"{name}: scale {group} of row {row} is {value:g}; {RULE_OF_SCALES}")
        if self.positions is not None:
            self.positions.check_bits(name, parts["bitmask"], shape[1])
        if shape[1]:
            self._check_codes(name, parts["codes"], self._codes_per_row(name, parts, shape))
        elif parts["codes"].numel():  # without inputs, a file of few bytes may claim any number of rows
            raise FormatError(f"{name}: codes has {parts['codes'].numel()} bytes, but the matrix has no inputs")

    def _check_codes(self, name: str, codes: Tensor, counts: Tensor) -> None:
        """Check for codes that no quantisation writes; ``counts``: codes per row, (O,) int64."""
        flat = codes.flatten()
        if self.grid.bits == 8:
            # quantisation is symmetric: codes go as far down as up
            # numpy compares vectors of bytes, where torch's comparison first writes a byte per code
            lowest = flat.numpy().min(initial=0) if flat.is_cpu else int(flat.amin())
            if lowest == -128:
                place = int((flat == -128).to(torch.uint8).argmax())
                raise FormatError(f"{name}: codes has -128 in byte {place}; int8 codes go from -127 to 127")
            return
        odd_rows = (counts & 1).nonzero().flatten()
        if not odd_rows.numel():
            return
        # a bit set in the padding would be read as the same weights, so no other check could find it
        last_bytes = ((counts + 1) // 2).cumsum(0) - 1
        wrong = (flat[last_bytes[odd_rows]] >> 4) != 0
        if wrong.any():
            row = int(odd_rows[int(wrong.to(torch.uint8).argmax())])
            raise FormatError(f"{name}: the last half byte of row {row} in codes is padding, and must be 0")

    def _in_bytes(self, codes: Tensor) -> Tensor:
        """Return int8 codes (rows, codes) in stored form: int4 in pairs, (rows, ceil(codes / 2)) uint8."""
        if self.grid.bits == 4:
            return pack_nibbles(codes)
        return codes

    @abstractmethod
    def _shape_of_codes(self, shape: tuple[int, int], nonzero: int) -> tuple[int, ...]:
        """Return the shape of the int8 codes of an (O, I) matrix; int4 codes halve the last dimension."""

    @abstractmethod
    def _pack_kept(self, codes: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        """Return the part "codes", and "bitmask" if there is one; see :meth:`pack_codes`."""

    @abstractmethod
    def _codes_per_row(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the number of codes per row, (O,) int64, given checked bits. Raises FormatError."""


class QuantizedDense(QuantizedFormat):
    """A code for every position: ``codes`` (O, I)."""

    packing = DENSE

    def unpack_codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["codes"].detach().cpu().contiguous()
        if self.grid.bits == 8:
            return codes
        columns = int(parts["shape"].flatten()[1])
        unpacked = scatter_nibbles(codes, None, rows=codes.shape[0], columns=columns)
        if unpacked is not None:
            return unpacked
        return unpack_nibbles(codes, columns).contiguous()

    def _shape_of_codes(self, shape: tuple[int, int], nonzero: int) -> tuple[int, ...]:
        return shape

    def _pack_kept(self, codes: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        return {"codes": self._in_bytes(codes)}

    def _codes_per_row(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return torch.full((shape[0],), shape[1], dtype=torch.int64)


class QuantizedBitmask(QuantizedFormat):
    """Codes of the kept positions, row after row: ``codes`` (nnz,). The rows of int4 codes are padded to bytes."""

    positions = BitmaskFormat()
    packing = positions.name

    def __init__(self, grid: Grid):
        super().__init__(grid)
        self.pads_rows = grid.bits == 4

    def row_starts(self, parts: Mapping[str, Tensor]) -> Tensor:
        counts = row_counts(parts["bitmask"].cpu())
        nbytes = counts
        if self.grid.bits == 4:
            nbytes = (counts + 1) // 2
        return (nbytes.cumsum(0) - nbytes).to(parts["codes"].device)

    def _shape_of_codes(self, shape: tuple[int, int], nonzero: int) -> tuple[int, ...]:
        return (nonzero,)

    def _pack_kept(self, codes: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        counts = row_counts(keep)
        kept = gather(codes.contiguous(), keep, int(counts.sum()))
        if self.grid.bits == 4:
            kept = _packed_rows(kept, counts)
        return {"codes": kept, "bitmask": keep}

    def _codes_per_row(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        counts = row_counts(parts["bitmask"])
        expected = self.stored(counts)
        in_file = self.stored_of(parts["codes"].numel())
        if expected != in_file:
            filled = ", including padding," if self.grid.bits == 4 else ""
            raise FormatError(
                f"{name}: bitmask keeps {int(counts.sum())} positions, so codes must have {expected}{filled} but "
                f"has {in_file}"
            )
        return counts


class QuantizedTwoFour(QuantizedFormat):
    """Codes of two of every four inputs: ``codes`` (O, I / 2)."""

    positions = TwoFourFormat()
    packing = positions.name

    def _shape_of_codes(self, shape: tuple[int, int], nonzero: int) -> tuple[int, ...]:
        return shape[0], shape[1] // 2

    def _pack_kept(self, codes: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        rows, columns = codes.shape
        # groups that keep fewer than two are filled with pruned positions, whose codes are 0
        filled = filled_groups(name, keep, columns)
        kept = gather(codes.contiguous(), filled, rows * columns // 2).view(rows, columns // 2)
        return {"codes": self._in_bytes(kept), "bitmask": filled}

    def _codes_per_row(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return torch.full((shape[0],), shape[1] // 2, dtype=torch.int64)


def _packed_rows(codes: Tensor, counts: Tensor) -> Tensor:
    """Pack int4 codes row by row, (nnz,) int8 to (bytes,) uint8; ``counts``: codes per row."""
    odd = (counts & 1).bool()
    if odd.any():
        # a 0 where each odd row ends makes all rows even, so that pairs never cross rows
        codes = torch.from_numpy(np.insert(codes.numpy(), counts.cumsum(0)[odd].numpy(), 0))
    return pack_nibbles(codes)


def without_padding(codes: Tensor, counts: Tensor) -> Tensor:
    """Remove the padding after rows with an odd number of codes, on any device.

    ``counts``: codes per row, (O,) int64.
    """
    odd = counts & 1
    is_code = torch.ones(codes.shape, dtype=torch.bool, device=codes.device)
    # the last place of each row, padding included
    row_ends = (counts + odd).cumsum(0) - 1
    is_code[row_ends[odd.bool()]] = False
    return codes[is_code]
