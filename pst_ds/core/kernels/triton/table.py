"""Matrices as arguments of the score kernels: many in one table, so that one launch serves all of a kind.

Layout of the table: (matrices, 30) int64 on the device, one row per matrix, in the order that score_kernels.py lists.
An entry is an address, a stride in elements, a position in the matrix, or the 32 bits of an fp32 number. The
Table holds the tensors that addresses point to. A launch numbers its programs through all matrices: an array
(matrices + 1,) has each matrix's first program, another (programs,) the matrix of each program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """Number in the matrix of the first unit."""
    end: int
    """Number in the matrix of the last unit, plus 1."""
    before: Tensor
    """Weights of other ranks, right before this rank's."""
    after: Tensor
    """Weights of other ranks, right after this rank's."""
    lost: int = 0
    """Weights that an N:M group loses."""
    prune: int = 0
    """Weights that a row loses."""

    @property
    def tile(self) -> tuple[int, int]:
        """Return the rows and columns of a tile: every weight of N:M is compared with all of its group."""
        rows, cols = self.shape
        size = 1024  # weights of a tile
        if self.lost:
            # every weight is compared with its whole group: memory for a tile times a group
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
        # imported when kernels run, because Triton may be missing
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
        shift = self.lead - self.first
        return first + shift, last + shift

    @property
    def fits(self) -> bool:
        """True if int32 indices suffice."""
        return self.values.numel() < _MOST and self.rect.numel < 2 * _MOST


def fit_together(matrices: Sequence[OwnKeys]) -> bool:
    """Return whether int32 numbers suffice for the programs and blocks of one search for cuts in all matrices."""
    from pst_ds.core.kernels.triton.score_kernels import FLAT

    # no kernel of a search has more programs for a matrix: tiles, and blocks of bits and keys, are at least as large
    return sum(blocks(matrix.num_bits, FLAT) for matrix in matrices) < 2 * _MOST


@dataclass(frozen=True, slots=True)
class Kind:
    """Properties that the matrices of one launch share."""

    numbers: tuple[float, float, float]
    """beta, alpha1, alpha2."""
    dtype: torch.dtype
    ranks: tuple[int, int]
    """Ranks of the update and of the learned scores; 0 without them."""
    terms: int
    """A bit for each vector of factors that a matrix has: score rows, score columns, row norms, column norms."""
    in_rows: bool
    """True if the weights are floats, with a multiple of 8 in every row."""
    aligned: tuple[bool, bool]
    """True if vectors can be loaded: of the factors; of the weights and bits."""
    unit: tuple[tuple[int, int], int, bool] | None
    """Its shape, what it loses, and whether there are weights of other ranks."""

    def constants(self) -> dict[str, Any]:
        import triton.language as tl

        dtype = getattr(tl, str(self.dtype).removeprefix("torch."))
        constants = {"TYPE": dtype, "UPDATE_RANK": self.ranks[0], "SCORE_RANK": self.ranks[1], "TERMS": self.terms}
        if self.unit is not None:
            constants |= {"ALIGNED": self.aligned[0], "HALO": self.unit[2]}
        return constants


class _Product(NamedTuple):
    """A low-rank product as the kernels read it: addresses, strides in elements, and its rank, 0 without a product."""

    left: int = 0
    left_row: int = 0
    left_component: int = 0
    right: int = 0
    right_component: int = 0
    """Stride from a component of the right factor to the next; its columns are contiguous."""
    rank: int = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        """Return what a row of the table has of it."""
        return self[:-1]


class Table:
    """Many matrices as rows of numbers in the memory of their device, to launch a kernel once for all of a kind."""

    def __init__(self, matrices: Sequence[OwnKeys]):
        self.matrices = matrices
        self.device = matrices[0].values.device
        # The table has only addresses: without these references, copies made for it would be freed before the launch.
        self._held = list[Tensor]()
        self.kinds: dict[Kind, set[int]] = {}
        rows = [self._row(i, m) for i, m in enumerate(matrices)]
        self._rows = upload(torch.tensor(rows), self.device)

    def _row(self, number: int, matrix: OwnKeys) -> list[int]:
        """Return what the kernels read about a matrix, in the order of score_kernels.py; remember its kind."""
        tile = matrix.tile
        constants = matrix.constants
        rect = matrix.rect
        # scores of frozen magnitudes use |W0| without its update
        update = _Product() if constants.frozen_magnitude else self._product(tile.update_left, tile.update_right)
        score = self._product(tile.score_left, tile.score_right)
        vectors: list[Tensor | None] = []
        for vector in (tile.score_rows, tile.score_cols, tile.row_norms, tile.col_norms):
            vectors.append(None if vector is None else vector.float().contiguous())
        self._held.append(matrix.values)
        self._held += [vector for vector in vectors if vector is not None]
        addresses = [0 if vector is None else vector.data_ptr() for vector in vectors]
        # the address of the matrix's first weight, which may be in another rank's shard: it is never read from there
        offset = rect.r0 * matrix.row_length + rect.c0 - matrix.start
        weight = matrix.values.data_ptr() + offset * matrix.values.element_size()
        # vector loads read 16 bytes along columns: of right factors with their strides, and of vectors of columns
        in_order = all(product.left_component == 1 for product in (update, score) if product.rank)
        by_col = [update.right, score.right, *addresses[1::2], 4 * update.right_component, 4 * score.right_component]
        factors_aligned = in_order and not any(at % 16 for at in by_col)
        starts_at_8 = not any(at % 8 for at in (matrix.row_length, matrix.first, matrix.end))
        aligned = factors_aligned, starts_at_8 and weight % 16 == 0
        terms = sum(1 << i for i, vector in enumerate(vectors) if vector is not None)
        unit = None
        ends = [matrix.first, matrix.end, *(matrix.counted or (matrix.first, matrix.end))]
        halo = [0] * 5
        if matrix.units is not None:
            has_halo = matrix.units.before.numel() + matrix.units.after.numel() > 0
            unit = matrix.units.shape, matrix.units.lost, has_halo
            ends = [matrix.units.first, matrix.units.end, 0, 0]
            halo = self._halo(matrix, matrix.units, weight)
        kind = Kind(
            numbers=(constants.beta, constants.alpha1, constants.alpha2),
            dtype=matrix.values.dtype,
            ranks=(update.rank, score.rank),
            terms=terms,
            in_rows=matrix.width % 8 == 0 and matrix.values.is_floating_point(),
            aligned=aligned,
            unit=unit,
        )
        self.kinds.setdefault(kind, set()).add(number)
        # rounded to fp32 as in the C++ loops, and passed as its bits in a table of integers
        factor = int(torch.tensor(1.0 / matrix.weight_scale, dtype=torch.float32).view(torch.int32))
        row = [weight, *update.numbers, *score.numbers, *addresses, factor, *ends]
        row += [rect.r1 - rect.r0, matrix.width, matrix.row_length]
        row += [matrix.rows.start, blocks(len(matrix.rows), matrix.tile_shape[0])]
        return [*row, *halo]

    def _halo(self, matrix: OwnKeys, units: OwnUnits, weight: int) -> list[int]:
        """Return addresses of the matrix's first weight among those before and after this rank's, this rank's places
        from that weight on, and the weights to prune of a row."""
        size = matrix.values.element_size()
        start = (matrix.values.data_ptr() - weight) // size
        stop = start + matrix.values.numel()
        self._held += [units.before, units.after]
        before = units.before.data_ptr() - (start - units.before.numel()) * size
        return [before, units.after.data_ptr() - stop * size, start, stop, units.prune]

    def _product(self, left: Tensor | None, right: Tensor | None) -> _Product:
        """Return the addresses and strides of a product, and hold its factors."""
        if left is None or right is None:
            return _Product()
        right = right if right.stride(1) == 1 else right.contiguous()
        self._held += [left, right]
        return _Product(
            left=left.data_ptr(),
            left_row=left.stride(0),
            left_component=left.stride(1),
            right=right.data_ptr(),
            right_component=right.stride(0),
            rank=right.shape[0],
        )

    def launch(
        self, kernel: Any, kind: Kind, programs: dict[int, int], *args: object, most: int = 1 << 31, **constants: Any
    ) -> None:
        """Launch so many ``programs`` for each matrix; if there are more than ``most``, programs do several in turn."""
        counts = [programs.get(i, 0) for i in range(len(self.matrices))]
        starts, matrix = programs_of(counts, self.device)
        table = self._rows, starts, matrix, *kind.numbers
        launch(kernel, (min(len(matrix), most),), *table, *args, **kind.constants(), **constants)
