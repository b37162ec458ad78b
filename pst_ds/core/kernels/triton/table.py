"""Matrices as arguments of the score kernels: many in one table, so that one launch serves all of a kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.kernels.triton.launch import blocks, launch, programs_of, upload
from pst_ds.core.layout import Rect, positions_before

_DEFAULTS = Constants()
_MOST = 1 << 30
"""Limit for int32 indices in the kernels, including those just beyond an edge."""


@dataclass(frozen=True, slots=True)
class OwnUnits:
    """The units of several weights of a matrix that overlap a rank's shard."""

    shape: tuple[int, int]
    """Rows, cols."""
    first: int
    """Number in the matrix of the first; and of the last + 1."""
    end: int
    before: Tensor
    """Weights of other ranks, right before this rank's; and right after."""
    after: Tensor
    lost: int = 0
    """Weights that an N:M group loses."""
    prune: int = 0
    """Weights that a row loses."""

    @property
    def tile(self) -> tuple[int, int]:
        """Return the rows and columns of a tile: every weight of N:M is compared with all of its group."""
        rows, cols = self.shape
        size = 1024
        if self.lost:
            size = min(size, 8192 // (rows * cols))
        width = max(cols, min(64, max(16, size // rows)))
        return max(rows, min(32, size // width)), width


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """The weights of ``rect`` in ``values``, a flat run of a stored weight, with the factors that score them."""

    values: Tensor
    """(n,) W0, of at most 32 bits, from flat index ``start`` on; or int32 keys."""
    start: int
    row_length: int
    rect: Rect
    tile: TileFactors
    """Factors of the whole ``rect``, fp32."""
    constants: Constants = _DEFAULTS
    weight_scale: float = 1.0
    counted: tuple[int, int] | None = None
    """First and last + 1 of the positions in the matrix that this rank counts and samples, of keys; all if None."""
    units: OwnUnits | None = None
    """Numbers that the kernels of units read."""

    @property
    def first(self) -> int:
        """Position of this rank's first weight among the matrix's weights, in storage order."""
        return positions_before(self.rect, self.row_length, self.start)

    @property
    def end(self) -> int:
        return positions_before(self.rect, self.row_length, self.start + self.values.numel())

    @property
    def count(self) -> int:
        return self.end - self.first

    @property
    def lead(self) -> int:
        """Bits before that of the first weight in its byte: bytes start where they do in the whole matrix."""
        return self.first % 8

    @property
    def num_bits(self) -> int:
        return self.lead + self.count if self.count else 0

    @property
    def width(self) -> int:
        return self.rect.c1 - self.rect.c0

    @property
    def span(self) -> tuple[int, int]:
        """Return the first and the last + 1 position of the weights that this rank decides."""
        if self.units is None:
            return self.first, self.end
        numel = self.units.shape[0] * self.units.shape[1]
        return self.units.first * numel, self.units.end * numel

    @property
    def rows(self) -> range:
        """Return the rows of the matrix that have weights of :attr:`span`."""
        first, end = self.span
        return range(first // self.width, blocks(end, self.width) if first < end else 0)

    @property
    def tile_shape(self) -> tuple[int, int]:
        from pst_ds.core.kernels.triton.score_kernels import TILE_COLS, TILE_ROWS

        return (TILE_ROWS, TILE_COLS) if self.units is None else self.units.tile

    @property
    def num_tiles(self) -> int:
        rows, cols = self.tile_shape
        return blocks(len(self.rows), rows) * blocks(self.width, cols)

    @property
    def own_bits(self) -> tuple[int, int]:
        """Return the first and the last + 1 bit of what this rank counts."""
        first, last = self.counted or (self.first, self.end)
        return first - self.first + self.lead, last - self.first + self.lead

    @property
    def fits(self) -> bool:
        """True if int32 indices suffice."""
        return self.values.numel() < _MOST and self.rect.numel < 2 * _MOST


@dataclass(frozen=True, slots=True)
class Kind:
    """Properties that the matrices of one launch share."""

    numbers: tuple[float, float, float]
    dtype: torch.dtype
    ranks: tuple[int, int]
    terms: int
    in_rows: bool
    aligned: tuple[bool, bool]
    unit: tuple[tuple[int, int], int, bool] | None
    """Its shape, what it loses, and whether there are weights of other ranks."""

    def constants(self) -> dict[str, Any]:
        import triton.language as tl

        dtype = getattr(tl, str(self.dtype).removeprefix("torch."))
        made = {"TYPE": dtype, "UPDATE_RANK": self.ranks[0], "SCORE_RANK": self.ranks[1], "TERMS": self.terms}
        return made if self.unit is None else made | {"ALIGNED": self.aligned[0], "HALO": self.unit[2]}


class Table:
    """Many matrices as rows of numbers in the memory of their device, to launch a kernel once for all of a kind."""

    def __init__(self, matrices: Sequence[OwnKeys]):
        self.matrices = matrices
        self.device = matrices[0].values.device
        self._held = list[Tensor]()  # what the addresses in the table point to
        self.kinds: dict[Kind, set[int]] = {}
        rows = [self._row(i, m) for i, m in enumerate(matrices)]
        self._rows = upload(torch.tensor(rows), self.device)

    def _row(self, number: int, own: OwnKeys) -> list[int]:
        """Return what the kernels read about a matrix, in the order of score_kernels.py; remember its kind."""
        tile = own.tile
        constants = own.constants
        rect = own.rect
        update = (None, None) if constants.frozen_magnitude else (tile.update_left, tile.update_right)
        pairs = [self._pair(*update), self._pair(tile.score_left, tile.score_right)]
        vectors = [
            None if v is None else v.float().contiguous()
            for v in (tile.score_rows, tile.score_cols, tile.row_norms, tile.col_norms)
        ]
        self._held += [own.values, *(v for v in vectors if v is not None)]
        offset = rect.r0 * own.row_length + rect.c0 - own.start
        weight = own.values.data_ptr() + offset * own.values.element_size()  # of the matrix's first, perhaps outside
        addresses = [0 if v is None else v.data_ptr() for v in vectors]
        by_col = [pair[3] for pair, _ in pairs] + addresses[1::2] + [4 * pair[4] for pair, _ in pairs]
        in_order = all(pair[2] == 1 for pair, rank in pairs if rank)
        starts_at_8 = not any(at % 8 for at in (own.row_length, own.first, own.end))
        aligned = in_order and not any(at % 16 for at in by_col), starts_at_8 and weight % 16 == 0
        terms = sum(1 << i for i, v in enumerate(vectors) if v is not None)
        numbers = constants.beta, constants.alpha1, constants.alpha2
        in_rows = own.width % 8 == 0 and own.values.is_floating_point()
        unit = None
        ends = [own.first, own.end, *(own.counted or (own.first, own.end))]
        beside = [0] * 5
        if own.units is not None:
            unit = own.units.shape, own.units.lost, own.units.before.numel() + own.units.after.numel() > 0
            ends = [own.units.first, own.units.end, 0, 0]
            beside = self._beside(own, own.units, weight)
        kind = Kind(numbers, own.values.dtype, (pairs[0][1], pairs[1][1]), terms, in_rows, aligned, unit)
        self.kinds.setdefault(kind, set()).add(number)
        factor = int(torch.tensor(1.0 / own.weight_scale, dtype=torch.float32).view(torch.int32))
        row = [weight, *pairs[0][0], *pairs[1][0], *addresses, factor, *ends, rect.r1 - rect.r0, own.width]
        return [*row, own.row_length, own.rows.start, blocks(len(own.rows), own.tile_shape[0]), *beside]

    def _beside(self, own: OwnKeys, units: OwnUnits, weight: int) -> list[int]:
        """Return addresses of the matrix's first weight among those before and after this rank's, this rank's places
        from that weight on, and the weights to prune of a row."""
        size = own.values.element_size()
        start = (own.values.data_ptr() - weight) // size
        stop = start + own.values.numel()
        self._held += [units.before, units.after]
        before = units.before.data_ptr() - (start - units.before.numel()) * size
        return [before, units.after.data_ptr() - stop * size, start, stop, units.prune]

    def _pair(self, left: Tensor | None, right: Tensor | None) -> tuple[list[int], int]:
        """Return the addresses and strides of a product, and its rank."""
        if left is None or right is None:
            return [0] * 5, 0
        right = right if right.stride(1) == 1 else right.contiguous()
        self._held += [left, right]
        return [left.data_ptr(), *left.stride(), right.data_ptr(), right.stride(0)], right.shape[0]

    def launch(
        self, kernel: Any, kind: Kind, programs: dict[int, int], *args: object, most: int = 1 << 31, **constants: Any
    ) -> None:
        """Launch so many ``programs`` for each matrix; if there are more than ``most``, programs do several in turn."""
        starts, matrix = programs_of([programs.get(i, 0) for i in range(len(self.matrices))], self.device)
        table = self._rows, starts, matrix, *kind.numbers
        launch(kernel, (min(len(matrix), most),), *table, *args, **kind.constants(), **constants)
