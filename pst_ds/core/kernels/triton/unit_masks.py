"""Patterns whose units are several weights, by kernels: keys of blocks and N:M groups, masks of N:M groups and rows.

Layout: keys are int32, one per unit, matrix after matrix. Bits are bytes as in the whole matrix. A matrix's bits
start at the byte of its first unit on this rank, after ``lead`` unused bits. ``slots`` has the place of each matrix's
first key or byte, (matrices + 1,) int64. Sizes do not depend on the values of weights, so the host never waits.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pst_ds.core.kernels.triton.bit_sums import MatrixBits
from pst_ds.core.kernels.triton.launch import blocks, upload
from pst_ds.core.kernels.triton.table import Kind, OwnKeys, Table

_SCRATCH = 1 << 24
"""Keys of rows that are held at once."""


def unit_keys(matrices: Sequence[OwnKeys]) -> list[Tensor]:
    """Return the keys of the units of each matrix that overlap this rank's shard, (units,) int32."""
    from pst_ds.core.kernels.triton import unit_kernels as kernels

    sizes = [m.units.end - m.units.first for m in matrices if m.units is not None]
    table = Table(matrices)
    slots = upload(torch.tensor([0, *accumulate(sizes)]), matrices[0].values.device)
    keys = torch.empty(sum(sizes), dtype=torch.int32, device=slots.device)
    for kind, members in table.kinds.items():
        table.launch(kernels.unit_keys, kind, _tiles(table, members), slots, keys, **_constants(table, kind, members))
    return list(keys.split(sizes))


def keep_n_of_m(matrices: Sequence[OwnKeys], free: Sequence[Tensor] = ()) -> tuple[list[MatrixBits], Tensor]:
    """Return the bits of the weights kept in N:M groups, and per matrix whether scores are not finite, (n,) int64.

    ``free``: bits of the groups that lose nothing, for each matrix; scores are then not checked.
    """
    from pst_ds.core.kernels.triton import unit_kernels as kernels

    table, slots, bits, bad = _outputs(matrices)
    units = upload(torch.tensor([group.data_ptr() for group in free]), slots.device) if free else None
    for kind, members in table.kinds.items():
        constants = _constants(table, kind, members)
        table.launch(kernels.keep_n_of_m, kind, _tiles(table, members), slots, units, bits, bad, **constants)
    return _masks(matrices, bits), bad


def keep_in_rows(matrices: Sequence[OwnKeys]) -> tuple[list[MatrixBits], Tensor]:
    """Return the bits of the weights kept in rows, and per matrix whether scores are not finite, (n,) int64."""
    from pst_ds.core.kernels.triton import unit_kernels as kernels

    table, slots, bits, bad = _outputs(matrices)
    longest = max(m.width for m in matrices)
    rows = {i: len(m.rows) for i, m in enumerate(matrices)}
    # programs that run concurrently; each needs a row of scratch, and does several rows in turn if there are more
    most = min(sum(rows.values()), max(1, _SCRATCH // longest))
    scratch = torch.empty(most * longest, dtype=torch.int32, device=slots.device)
    for kind, members in table.kinds.items():
        programs = {i: rows[i] for i in members}
        args = sum(programs.values()), scratch, longest, slots, bits, bad
        table.launch(kernels.keep_in_rows, kind, programs, *args, most=most, SIZE=kernels.ROW_SIZE)
    return _masks(matrices, bits), bad


def _tiles(table: Table, members: set[int]) -> dict[int, int]:
    return {i: table.matrices[i].num_tiles for i in members}


def _constants(table: Table, kind: Kind, members: set[int]) -> dict[str, Any]:
    assert kind.unit is not None, "a matrix without units"
    (rows, cols), lost, _ = kind.unit
    tile_rows, tile_cols = table.matrices[min(members)].tile_shape  # the same for all matrices of a kind
    return {"LOST": lost, "UNIT_ROWS": rows, "UNIT_COLS": cols, "ROWS": tile_rows, "COLS": tile_cols}


def _outputs(matrices: Sequence[OwnKeys]) -> tuple[Table, Tensor, Tensor, Tensor]:
    """Return the table, each matrix's first byte, the bytes of all, and room for what is not finite."""
    device = matrices[0].values.device
    sizes = _num_bytes(matrices)
    slots = upload(torch.tensor([0, *accumulate(sizes)]), device)
    bits = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    return Table(matrices), slots, bits, torch.zeros(len(matrices), dtype=torch.int64, device=device)


def _num_bytes(matrices: Sequence[OwnKeys]) -> list[int]:
    """Return how many bytes of the whole matrix have bits of its units on this rank."""
    sizes = []
    for matrix in matrices:
        first, end = matrix.span
        sizes.append(blocks(end, 8) - first // 8 if first < end else 0)
    return sizes


def _masks(matrices: Sequence[OwnKeys], bits: Tensor) -> list[MatrixBits]:
    masks = []
    for matrix, part in zip(matrices, bits.split(_num_bytes(matrices)), strict=True):
        first = matrix.span[0]
        masks.append(MatrixBits(part, matrix.rect, matrix.row_length, first_unit=first, lead=first % 8))
    return masks
