"""Quantisation of a layer's stored weight: which weights share a scale, and quantising a rectangle in place.

Scales are stored like the weight: (O, groups) for ``nn.Linear``, (groups, O) for a ``Conv1D``, which stores (I, O).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.layout import Rect, WeightLayout, row_tiles
from pst_ds.core.quantization.grid import Grid
from pst_ds.core.quantization.matrices import quantize
from pst_ds.core.quantization.native import NATIVE_DTYPES, native_for, threads_for
from pst_ds.core.quantization.scales import SCALE_DTYPE, rounded_codes

_AT_A_TIME = {"cpu": 1 << 17}
"""Weights that torch quantises in one step; 2**22 on other devices."""


@dataclass(frozen=True, slots=True)
class StoredGrid:
    """Quantisation scheme of a layer's weight. Raises ValueError if groups do not divide the layer's inputs."""

    layout: WeightLayout
    grid: Grid

    def __post_init__(self) -> None:
        self.grid.num_groups(self.layout.in_features)

    @property
    def size(self) -> int:
        """Weights per group."""
        return self.grid.group or self.layout.in_features

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns of a group in the stored weight."""
        return (self.size, 1) if self.layout.transposed else (1, self.size)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the scales: (O, groups), or (groups, O) for a Conv1D."""
        (height, width), (rows, cols) = self.layout.shape, self.unit
        return height // rows, width // cols

    @property
    def num_scales(self) -> int:
        return self.layout.numel // self.size

    @property
    def period(self) -> int:
        """Length of the shortest run of flat weights that, aligned to a multiple of it, contains whole groups only."""
        return self.size * (self.layout.shape[1] if self.layout.transposed else 1)

    @property
    def groups_per_period(self) -> int:
        return self.period // self.size

    def grouped(self, rect: Tensor) -> Tensor:
        """Return the groups of a rectangle's weights as rows: (rows, cols) to (groups, weights per group), contiguous.

        ``rect``: rows and columns of whole groups. The groups are in the order of their scales.
        """
        if not self.layout.transposed:
            return rect.reshape(-1, self.size).contiguous()
        rows, cols = rect.shape
        return rect.reshape(rows // self.size, self.size, cols).transpose(1, 2).reshape(-1, self.size).contiguous()


@dataclass(frozen=True, slots=True)
class Rounding:
    """Quantisation of a layer's weight: its scheme, and the scales (bf16, of the scheme's shape)."""

    stored: StoredGrid
    scales: Tensor

    def round_(self, weight: Tensor, rect: Rect | None = None) -> Tensor:
        """Quantise ``weight``, the rectangle ``rect`` of the stored weight or all of it, in place, and return it.

        Writes code * scale, exact in fp32 and rounded once to the dtype of ``weight``, with the code of
        :func:`nearest_codes`. Zeros stay +0.0.
        """
        whole = Rect(0, self.stored.layout.shape[0], 0, self.stored.layout.shape[1])
        rect = whole if rect is None else rect
        scales = self.scales
        native = native_for(weight, scales) if weight.dtype in NATIVE_DTYPES and weight.stride(1) == 1 else None
        if native is None:
            self._round_in_torch(weight, scales, rect)
            return weight
        scales = scales.contiguous()
        groups = torch.tensor([scales.shape[1], *self.stored.unit, rect.r0, rect.c0])
        rows, cols = weight.shape
        native.pst_round_to_grid(
            weight.data_ptr(),
            NATIVE_DTYPES[weight.dtype],
            weight.stride(0),
            rows,
            cols,
            scales.data_ptr(),
            groups.data_ptr(),
            self.stored.grid.largest,
            threads_for(weight.numel()),
        )
        return weight

    def of_expert(self, expert: int) -> Rounding:
        """Return the quantisation of one expert of a stack."""
        own = StoredGrid(self.stored.layout.expert, self.stored.grid)
        height = own.shape[0]
        return Rounding(own, self.scales[expert * height : (expert + 1) * height])

    @property
    def scales_by_output(self) -> Tensor:
        """Return the scales as files store them, (O, groups)."""
        return self.scales.t() if self.stored.layout.transposed else self.scales

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a file stores of a whole stored weight: codes (O, I) int8 and scales (O, groups) bf16.

        ``weight``: before or after quantisation, which gives the same result. :func:`dequantize` returns the quantised
        weight.
        """
        matrix = weight.t() if self.stored.layout.transposed else weight
        return quantize(matrix, None, self.stored.grid, self.scales_by_output)

    def _round_in_torch(self, weight: Tensor, scales: Tensor, rect: Rect) -> None:
        for band in row_tiles(rect, _AT_A_TIME.get(weight.device.type, 1 << 22)):
            part, own = weight[band.r0 - rect.r0 : band.r1 - rect.r0], _scales_of(scales, band, self.stored.unit)
            part.copy_(rounded_codes(part.float(), own, self.stored.grid).mul_(own).add_(0.0))


def bytes_of_scales(scales: Tensor) -> Tensor:
    """Return bf16 scales as bytes, (2 n,) uint8: a dtype that a conversion of the model's weights does not touch."""
    return scales.to(SCALE_DTYPE).contiguous().view(torch.uint8).flatten()


def scales_of_bytes(data: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the scales of :func:`bytes_of_scales`; a view if the bytes start at an even address."""
    aligned = data if data.is_meta or (data.data_ptr() % 2 == 0 and data.storage_offset() % 2 == 0) else data.clone()
    return aligned.view(SCALE_DTYPE).view(shape)


def _scales_of(scales: Tensor, rect: Rect, unit: tuple[int, int]) -> Tensor:
    """Return the scales of a rectangle's weights, fp32, of a shape that broadcasts to it."""
    for dim, (first, stop) in enumerate(((rect.r0, rect.r1), (rect.c0, rect.c1))):
        if unit[dim] == 1:
            scales = scales.narrow(dim, first, stop - first)
        elif scales.shape[dim] > 1:
            scales = scales.index_select(dim, torch.arange(first, stop, device=scales.device) // unit[dim])
    return scales.float()
