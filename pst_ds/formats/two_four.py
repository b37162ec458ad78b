"""2:4 sparsity: two of every four consecutive inputs, the format of sparse tensor cores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pst_ds.formats.parts import FormatError, PackedFormat, Part, checked_bits
from pst_ds.formats.rows import bytes_of_row, gather, row_counts, scatter

GROUP = 4


class TwoFourFormat(PackedFormat):
    """``compressed`` (O, I / 2), ``bitmask`` (O, ceil(I / 8)) uint8, ``shape`` (2, 1) int64.

    Groups that keep fewer than two inputs are filled with their lowest free positions, with value +0.0.
    """

    name = "2:4"
    part_names = ("compressed", "bitmask", "shape")
    values_name = "compressed"
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

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        dense = scatter(parts["compressed"], parts["bitmask"], int(parts["shape"][1]))
        return dense if dtype is None else dense.to(dtype)

    def _pack(self, weight: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        rows, columns = weight.shape
        filled = filled_groups(name, keep, columns)
        if not torch.equal(filled, keep):  # values at filled positions are pruned, and must be stored as 0
            weight = scatter(gather(weight, keep, int(row_counts(keep).sum())), keep, columns)
        values = gather(weight, filled, rows * columns // 2)
        return {
            "compressed": values.view(rows, columns // 2),
            "bitmask": filled,
            "shape": self._shape_part(weight.shape),
        }

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        checked_groups(name, parts["bitmask"], shape[1])


def filled_groups(name: str, keep: Tensor, columns: int) -> Tensor:
    """Return bits that keep two of every four inputs: ``keep``, filled with the lowest free positions of each group.

    Raises FormatError if a group keeps more, or ``columns`` is not a multiple of 4.
    """
    if columns % GROUP:
        raise FormatError(f"{name}: 2:4 needs in_features divisible by {GROUP}, got {columns}")
    _refuse_groups(name, keep, _TOO_MANY, "at most two")
    return _filled(keep, columns)


def checked_groups(name: str, bits: Tensor, columns: int) -> None:
    """Raise FormatError unless a part "bitmask" keeps two of every four inputs and has no bit beyond its row."""
    if not bits.numel():
        return
    checked_bits(name, bits, columns)
    whole = columns // 8
    _refuse_groups(name, bits[:, :whole], _NOT_TWO, "two")
    if columns % 8:  # padding in the upper half of the last byte
        _refuse_groups(name, bits[:, whole:] | 0x30, _NOT_TWO, "two", whole)


def _table(of_group: list[int], join: str) -> np.ndarray:
    """Combine a value for each of the 16 groups into a value for each of the 256 bytes of two groups."""
    low, high = np.array(of_group * 16, dtype=np.uint8), np.repeat(np.array(of_group, dtype=np.uint8), 16)
    return (low | high) if join == "or" else (low | high << 4)


def _fill(group: int) -> int:
    """Return ``group`` with its lowest free positions set until it has two."""
    while group.bit_count() < 2:
        group |= ~group & (group + 1)
    return group


_TOO_MANY = _table([int(group.bit_count() > 2) for group in range(16)], "or").view(bool)
_NOT_TWO = _table([int(group.bit_count() != 2) for group in range(16)], "or").view(bool)
_FILLED = _table([_fill(group) for group in range(16)], "bytes")


def _filled(keep: Tensor, columns: int) -> Tensor:
    filled = _FILLED[keep.numpy()]
    if columns % 8:
        filled[:, -1] &= 0x0F
    return torch.from_numpy(filled)


def _refuse_groups(name: str, bits: Tensor, table: np.ndarray, wanted: str, first_byte: int = 0) -> None:
    """Raise FormatError at the first invalid group; ``bits`` start with byte ``first_byte`` of each row."""
    bad = table[bits.numpy()]
    if not bad.any():
        return
    row, byte = divmod(int(bad.argmax()), bits.shape[1])
    value = int(bits[row, byte])
    half = 0 if table[(value & 0x0F) | 0x30] else 1
    group = value >> GROUP * half & 0x0F
    first = 8 * (first_byte + byte) + GROUP * half
    raise FormatError(
        f"{name}: 2:4 keeps {wanted} of every 4 inputs, and row {row} keeps {group.bit_count()} of the inputs {first} "
        f"to {first + GROUP - 1}"
    )
