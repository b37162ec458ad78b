"""The quantisation scheme: bits per value, and how many values share a scale."""

from __future__ import annotations

from dataclasses import dataclass

from pst_ds.core.packings import GROUPS, VALUE_BITS, WHOLE_ROW


@dataclass(frozen=True, slots=True)
class Grid:
    """Quantisation scheme. Raises ValueError for unsupported bits or groups."""

    bits: int
    """Bits per value: 8 or 4."""
    group: int | None = None
    """Consecutive inputs of an output that share a scale: 32, 64 or 128; None for all of them (per-row scale)."""

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in VALUE_BITS.values():
            raise ValueError(f"values have 8 or 4 bits, got {self.bits!r}")
        if self.group is not None and (type(self.group) is not int or self.group not in GROUPS):
            raise ValueError(f"a group has {', '.join(map(str, GROUPS))} inputs or is a whole row, got {self.group!r}")

    @property
    def values(self) -> str:
        """Name of the values: "int8" or "int4"."""
        return f"int{self.bits}"

    @property
    def largest(self) -> int:
        """The largest code: 127 or 7. The smallest is its negative; -128 and -8 are not used."""
        return (1 << self.bits - 1) - 1

    def num_groups(self, columns: int) -> int:
        """Return the number of scales of a row of ``columns`` inputs. Raises ValueError if groups do not divide it."""
        if self.group is None:
            return 1
        if columns % self.group:
            fits = [str(group) for group in GROUPS if columns % group == 0]
            raise ValueError(
                f"groups of {self.group} do not divide {columns} inputs; take {' or '.join([*fits, WHOLE_ROW])}"
            )
        return columns // self.group

    def __str__(self) -> str:
        return f"{self.values}, a scale for {'every row' if self.group is None else f'{self.group} inputs'}"


def grid_of(values: object, group: object = None) -> Grid:
    """Return the scheme for the names that users write: "int8" or "int4", and 32, 64, 128 or "row".

    Without a group, int8 has per-row scales and int4 has groups of 64 inputs. Raises ValueError.
    """
    if values not in tuple(VALUE_BITS):  # any JSON value is possible here
        raise ValueError(f"values on a grid are {' or '.join(VALUE_BITS)}, got {values!r}")
    if group is None:
        return Grid(VALUE_BITS[values], None if values == "int8" else 64)
    known = {str(size): size for size in GROUPS}
    if str(group) != WHOLE_ROW and str(group) not in known:
        raise ValueError(f"a group is {', '.join(known)} or {WHOLE_ROW}, got {group!r}")
    return Grid(VALUE_BITS[values], known.get(str(group)))
