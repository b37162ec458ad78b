"""Packed formats of a sparse matrix with values in the model's dtype: bitmask, 2:4 and csr."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pst_ds.formats.parts import FormatError, PackedFormat, Part, require_no_padding
from pst_ds.formats.rows import bytes_of_row, columns_of, gather, row_counts, scatter, scatter_columns

GROUP = 4
"""Consecutive inputs of 2:4 of which two are kept."""
MOST_COLUMNS = 1 << 31
"""Most inputs of a csr matrix, whose column indices are int32."""


class BitmaskFormat(PackedFormat):
    """The smallest format up to about 94 % sparsity.

    ``compressed`` (nnz,), ``bitmask`` (O, ceil(I / 8)) uint8, ``row_offsets`` (O,) int64, ``shape`` (2,) int64.
    """

    name = "bitmask"
    part_names: tuple[str, ...] = ("compressed", "bitmask", "row_offsets", "shape")
    values_name = "compressed"
    has_row_bits = True
    holds_stacks = True

    def row_starts(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["row_offsets"]

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        rows, columns = shape
        return {
            "compressed": (dtype, (nonzero,)),
            "bitmask": (torch.uint8, (rows, bytes_of_row(columns))),
            "row_offsets": (torch.int64, (rows,)),
            "shape": (torch.int64, self.shape_dims),
        }

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        return scatter(parts["compressed"], parts["bitmask"], int(parts["shape"][1]))

    def _pack(self, weight: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        counts = row_counts(keep)
        return {
            "compressed": gather(weight, keep, int(counts.sum())),
            "bitmask": keep,
            "row_offsets": counts.cumsum(0) - counts,
            "shape": self._shape_part(weight.shape),
        }

    def check_bits(self, name: str, bits: Tensor, columns: int) -> None:
        """Raise FormatError unless the part "bitmask" has positions of this layout, and no bit beyond its row."""
        require_no_padding(name, "bitmask", bits, columns)

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        self.check_bits(name, parts["bitmask"], shape[1])
        counts = row_counts(parts["bitmask"])
        total = int(counts.sum())
        num_values = parts["compressed"].numel()
        if total != num_values:
            raise FormatError(f"{name}: bitmask keeps {total} positions, and compressed has {num_values} values")
        wrong = parts["row_offsets"] != counts.cumsum(0) - counts
        if wrong.any():
            row = int(wrong.to(torch.uint8).argmax())
            stored = int(parts["row_offsets"][row])
            expected = int(counts[:row].sum())
            raise FormatError(f"{name}: row_offsets of row {row} is {stored}, and the bitmask makes it {expected}")


class CsrFormat(PackedFormat):
    """Compressed sparse rows as in scipy and torch, with 2-byte column indices where they fit.

    ``crow_indices`` (O + 1,), ``col_indices`` (nnz,), ``values`` (nnz,), ``shape`` (2,) int64.

    crow_indices are int32, or int64 from 2**31 values on; col_indices uint16, or int32 beyond 65,536 inputs.
    """

    name = "csr"
    part_names = ("crow_indices", "col_indices", "values", "shape")
    values_name = "values"
    holds_stacks = True

    def row_starts(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["crow_indices"][:-1]

    def rows_of(self, parts: Mapping[str, Tensor], rows: slice, values: slice, starts: Tensor) -> dict[str, Tensor]:
        others = {name: part for name, part in parts.items() if name != "crow_indices"}
        # one more index than rows: where the last row ends
        ends = parts["crow_indices"][rows.start : rows.stop + 1] - values.start
        return super().rows_of(others, rows, values, starts) | {"crow_indices": ends}

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        rows, columns = shape
        if columns > MOST_COLUMNS:
            raise FormatError(f"csr holds at most {MOST_COLUMNS} inputs, got {columns}")
        starts_dtype = torch.int64
        if nonzero < 1 << 31:
            starts_dtype = torch.int32
        columns_dtype = torch.int32
        if columns <= 1 << 16:
            columns_dtype = torch.uint16
        return {
            "crow_indices": (starts_dtype, (rows + 1,)),
            "col_indices": (columns_dtype, (nonzero,)),
            "values": (dtype, (nonzero,)),
            "shape": (torch.int64, self.shape_dims),
        }

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        starts = parts["crow_indices"].to(torch.int64)
        columns = int(parts["shape"][1])
        return scatter_columns(parts["values"], starts, parts["col_indices"], columns)

    def _pack(self, weight: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        columns = weight.shape[1]
        counts = row_counts(keep)
        count = int(counts.sum())
        try:
            expected = self.parts((weight.shape[0], columns), count, weight.dtype)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
        starts_dtype, starts_shape = expected["crow_indices"]
        columns_dtype, _ = expected["col_indices"]
        starts = torch.zeros(starts_shape, dtype=starts_dtype)
        starts[1:] = counts.cumsum(0)
        return {
            "crow_indices": starts,
            "col_indices": columns_of(bits=keep, columns=columns, count=count, dtype=columns_dtype),
            "values": gather(weight, keep, count),
            "shape": self._shape_part(weight.shape),
        }

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        starts = parts["crow_indices"].numpy()  # (O + 1,)
        indices = parts["col_indices"].numpy()  # (nnz,)
        if starts[0] != 0 or starts[-1] != len(indices):
            raise FormatError(
                f"{name}: crow_indices must go from 0 to the number of values, {len(indices)}, but go from {starts[0]} "
                f"to {starts[-1]}"
            )
        falls = starts[1:] < starts[:-1]
        if falls.any():
            row = int(falls.argmax())
            raise FormatError(f"{name}: crow_indices decrease after row {row}, from {starts[row]} to {starts[row + 1]}")
        if not len(indices):
            return
        for column in (int(indices.min()), int(indices.max())):
            if not 0 <= column < shape[1]:
                raise FormatError(f"{name}: col_indices has column {column}, but the matrix has {shape[1]}")
        rises = indices[1:] > indices[:-1]
        # columns may fall where a row starts; empty rows at the ends start outside the indices
        first_of_row = starts[1:-1]
        has_neighbour = (first_of_row > 0) & (first_of_row < len(indices))
        rises[first_of_row[has_neighbour] - 1] = True
        if not rises.all():
            i = int(np.argmin(rises))
            row = int(np.searchsorted(starts, i, side="right")) - 1
            raise FormatError(
                f"{name}: col_indices must increase within a row, but row {row} has {indices[i]} before "
                f"{indices[i + 1]}"
            )


class TwoFourFormat(BitmaskFormat):
    """Two of every four consecutive inputs, the format of sparse tensor cores.

    ``compressed`` (O, I / 2), ``bitmask`` (O, ceil(I / 8)) uint8, ``shape`` (2, 1) int64.

    Groups that keep fewer than two inputs are filled with their lowest free positions, with value +0.0.
    """

    name = "2:4"
    part_names = ("compressed", "bitmask", "shape")

    def row_starts(self, parts: Mapping[str, Tensor]) -> Tensor:
        rows, columns = parts["shape"].flatten().tolist()
        return torch.arange(rows, device=parts["bitmask"].device) * (columns // 2)

    shape_dims = (2, 1)

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        rows, columns = shape
        if columns % GROUP:
            raise FormatError(f"2:4 needs in_features divisible by {GROUP}, got {columns}")
        return {
            "compressed": (dtype, (rows, columns // 2)),
            "bitmask": (torch.uint8, (rows, bytes_of_row(columns))),
            "shape": (torch.int64, self.shape_dims),
        }

    def accepts(self, bits: Tensor, shape: tuple[int, int]) -> bool:
        fits = super().accepts(bits, shape) and shape[1] % GROUP == 0
        return fits and not bool(_TOO_MANY[bits.numpy()].any())

    def _pack(self, weight: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        rows, columns = weight.shape
        filled = filled_groups(name, keep, columns)
        if not torch.equal(filled, keep):
            # values at filled positions are pruned, and must be stored as 0
            kept_values = gather(weight, keep, int(row_counts(keep).sum()))
            weight = scatter(kept_values, keep, columns)
        values = gather(weight, filled, rows * columns // 2)
        return {
            "compressed": values.view(rows, columns // 2),
            "bitmask": filled,
            "shape": self._shape_part(weight.shape),
        }

    def check_bits(self, name: str, bits: Tensor, columns: int) -> None:
        require_two_of_four(name, bits, columns)

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        self.check_bits(name, parts["bitmask"], shape[1])


def filled_groups(name: str, keep: Tensor, columns: int) -> Tensor:
    """Return bits that keep two of every four inputs: ``keep``, filled with the lowest free positions of each group.

    Raises FormatError if a group keeps more, or ``columns`` is not a multiple of 4.
    """
    if columns % GROUP:
        raise FormatError(f"{name}: 2:4 needs in_features divisible by {GROUP}, got {columns}")
    _require_groups(name, keep, _TOO_MANY, "at most two")
    filled = _FILLED[keep.numpy()]
    if columns % 8:
        # the table has filled the half byte after the last group, too
        filled[:, -1] &= 0x0F
    return torch.from_numpy(filled)


def require_two_of_four(name: str, bits: Tensor, columns: int) -> None:
    """Raise FormatError unless a part "bitmask" keeps two of every four inputs and has no bit beyond its row."""
    if not bits.numel():
        return
    require_no_padding(name, "bitmask", bits, columns)
    whole = columns // 8
    _require_groups(name, bits[:, :whole], _NOT_TWO, "two")
    if columns % 8:  # padding in the upper half of the last byte
        _require_groups(name, bits[:, whole:] | 0x30, table=_NOT_TWO, wanted="two", first_byte=whole)


def _table(of_group: list[int], join: str) -> np.ndarray:
    """Combine a value for each of the 16 groups into a value for each of the 256 bytes of two groups."""
    low = np.array(of_group * 16, dtype=np.uint8)  # (256,): the value for the lower half of each byte
    high = np.repeat(np.array(of_group, dtype=np.uint8), 16)
    if join == "or":
        return low | high
    return low | high << 4


def _fill(group: int) -> int:
    """Return ``group`` with its lowest free positions set until it has two."""
    while group.bit_count() < 2:
        group |= ~group & (group + 1)  # the lowest bit that is not set
    return group


# tables for a byte, which is two groups: looking up bytes is much faster than unpacking bits
_TOO_MANY = _table([int(group.bit_count() > 2) for group in range(16)], "or").view(bool)
_NOT_TWO = _table([int(group.bit_count() != 2) for group in range(16)], "or").view(bool)
_FILLED = _table([_fill(group) for group in range(16)], "bytes")


def _require_groups(name: str, bits: Tensor, table: np.ndarray, wanted: str, first_byte: int = 0) -> None:
    """Raise FormatError at the first invalid group; ``bits`` start with byte ``first_byte`` of each row."""
    bad = table[bits.numpy()]
    if not bad.any():
        return
    row, byte = divmod(int(bad.argmax()), bits.shape[1])
    value = int(bits[row, byte])
    # 0x30 is a valid upper half in both tables, so that this looks at the lower half only
    half = 1
    if table[(value & 0x0F) | 0x30]:
        half = 0
    group = value >> GROUP * half & 0x0F
    first = 8 * (first_byte + byte) + GROUP * half
    raise FormatError(
        f"{name}: 2:4 keeps {wanted} of every 4 inputs, and row {row} keeps {group.bit_count()} of the inputs {first} "
        f"to {first + GROUP - 1}"
    )
