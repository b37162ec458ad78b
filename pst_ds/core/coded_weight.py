"""A frozen weight as int8 or int4 codes and scales, in as many shards as ZeRO-3 splits it into.

Shard i contains the codes of flat weights [i * p, (i + 1) * p) of the stored weight, p = ceil(numel / num_shards),
packed from its first byte (int4: two per byte, see :mod:`pst_ds.core.quantization`) and padded to whole bytes.
It also contains the scales of every group with weights in the shard: the scale of a group that crosses a boundary is in
both shards. As with masks, ZeRO's split of the two byte tensors gives each rank the codes and scales of its weights.

A weight is code * scale, exact in fp32 and rounded once to the dtype that the layer computes in.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from pst_ds.core.bits import NATIVE_DTYPES, shard_numel, shard_range
from pst_ds.core.layout import Rect, row_tiles, shard_tiles, view_in_shard
from pst_ds.core.quantization import (
    SCALE_DTYPE,
    UNUSED_SCALE,
    StoredGrid,
    bytes_of_scales,
    group_scales,
    native_for,
    nearest_codes,
    pack_nibbles,
    scales_of_bytes,
    threads_for,
    unpack_nibbles,
)

_ENCODED_AT_A_TIME = 1 << 20
"""Weights that are quantised in one step."""
_EXPANDED_AT_A_TIME = {"cpu": 1 << 17}
"""Weights that torch expands in one step, with about 8 extra bytes each, by device type."""
_EXPANDED_ELSEWHERE = 1 << 22
_ALL = 1 << 62
"""A limit for the weights of a tile that no tile reaches: runs are cut at their ends only."""


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """Positions of the codes and scales of a stored weight."""

    stored: StoredGrid
    num_shards: int = 1

    @property
    def bits(self) -> int:
        return self.stored.grid.bits

    @property
    def shard_numel(self) -> int:
        """Weights per shard. The last shards may have fewer."""
        return shard_numel(self.stored.layout.numel, self.num_shards)

    @property
    def shard_code_bytes(self) -> int:
        """Bytes of codes per shard."""
        return -(-self.shard_numel * self.bits // 8)

    @property
    def shard_num_scales(self) -> int:
        """Scales per shard including padding: as many as the shard with most groups has."""
        most_periods = 0
        for shard in range(self.num_shards):
            first, last = self.periods_of(shard)
            most_periods = max(most_periods, last - first)
        return most_periods * self.stored.groups_per_period

    @property
    def num_code_bytes(self) -> int:
        return self.num_shards * self.shard_code_bytes

    @property
    def num_scale_bytes(self) -> int:
        return self.num_shards * self.shard_num_scales * SCALE_DTYPE.itemsize

    def weights_of(self, shard: int) -> tuple[int, int]:
        return shard_range(self.stored.layout.numel, self.num_shards, shard)

    def periods_of(self, shard: int) -> tuple[int, int]:
        """Return the first and the last + 1 of the periods that contain weights of a shard."""
        start, stop = self.weights_of(shard)
        return start // self.stored.period, -(-stop // self.stored.period)

    @property
    def is_contiguous(self) -> bool:
        """True if the concatenated shards equal a single shard of the whole weight."""
        if self.num_shards == 1:
            return True
        # No group crosses a boundary, and no byte has padding.
        share = self.shard_numel
        return share % self.stored.period == 0 and share * self.bits % 8 == 0

    def encode(self, weight: Tensor, shard: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of a shard's codes and scales, with scales of least squared error, on the weight's device.

        ``weight``: the whole stored weight, of any float dtype. Values that are not finite become 0.
        """
        stored = self.stored
        flat = weight.detach().reshape(-1)
        start, stop = self.weights_of(shard)
        first, last = self.periods_of(shard)
        codes = torch.empty((last - first) * stored.period, dtype=torch.int8, device=weight.device)
        scales = torch.full((self.shard_num_scales,), UNUSED_SCALE, dtype=SCALE_DTYPE, device=weight.device)
        step = max(1, _ENCODED_AT_A_TIME // stored.period)
        row_length = stored.size
        if stored.layout.transposed:  # a period is then one group of every output
            row_length = stored.layout.shape[1]
        # Whole periods, also where the shard has only a part of one: a group's scale depends on all its weights, and
        # so both shards of a group that a boundary crosses find the same.
        for begin in range(first, last, step):
            end = min(begin + step, last)
            values = flat[begin * stored.period : end * stored.period].float().nan_to_num(0.0, 0.0, 0.0)
            grouped = stored.grouped(values.view(-1, row_length))
            step_scales = group_scales(grouped, stored.grid, weight.dtype)
            first_group = (begin - first) * stored.groups_per_period
            scales[first_group : first_group + len(step_scales)] = step_scales
            rounded = nearest_codes(grouped, step_scales.unsqueeze(1), stored.grid)
            codes[(begin - first) * stored.period : (end - first) * stored.period] = self._in_storage_order(rounded)
        shard_codes = codes[start - first * stored.period : stop - first * stored.period]
        packed = shard_codes.view(torch.uint8)
        if self.bits == 4:
            packed = pack_nibbles(shard_codes)
        # ZeRO splits a tensor into equal parts, so a last shard with fewer weights is padded.
        padded = torch.zeros(self.shard_code_bytes, dtype=torch.uint8, device=weight.device)
        padded[: packed.numel()] = packed
        return padded, bytes_of_scales(scales)

    def _in_storage_order(self, grouped: Tensor) -> Tensor:
        """Invert :meth:`StoredGrid.grouped`: (groups, weights per group) to flat."""
        if not self.stored.layout.transposed:
            return grouped.flatten()
        return grouped.view(-1, self.stored.layout.shape[1], self.stored.size).transpose(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class CodedRun:
    """Codes and scales of the flat weights [start, stop) of a stored weight, from one shard or all of it.

    Like a flat tensor it has a dtype, a device and ``numel()``, and slicing it returns a tensor.
    """

    stored: StoredGrid
    start: int
    stop: int
    codes: Tensor
    """uint8, starting with the code of ``start``."""
    scales: Tensor
    """bf16, starting with the first scale of the period that contains ``start``."""
    dtype: torch.dtype
    """Dtype of the expanded weights."""

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.stop - self.start

    def element_size(self) -> int:
        return self.dtype.itemsize

    def __getitem__(self, part: slice) -> Tensor:
        first, last, step = part.indices(self.numel())
        assert step == 1, "weights of a run are in a row"
        return self.flat(self.start + first, self.start + max(first, last))

    def flat(self, first: int, last: int) -> Tensor:
        """Return the flat weights [first, last) of the stored weight, which must be in this run."""
        out = torch.empty(last - first, dtype=self.dtype, device=self.device)
        height, width = self.stored.layout.shape
        for rect in shard_tiles(Rect(0, height, 0, width), width, first, last, _ALL):
            self.expand_(view_in_shard(out, rect, width, first), rect)
        return out

    def rect(self, rect: Rect) -> Tensor:
        """Return a rectangle of weights, (rows, cols), which must be in this run."""
        out = torch.empty(rect.shape, dtype=self.dtype, device=self.device)
        return self.expand_(out, rect)

    def at(self, index: Tensor) -> Tensor:
        """Return individual weights by flat ``index`` in the stored weight, (n,) int64, all in this run: (n,)."""
        width = self.stored.layout.shape[1]
        tall, wide = self.stored.unit
        local = index - self.start
        if self.stored.grid.bits == 4:
            pairs = self.codes[local // 2].view(torch.int8)
            codes = torch.where(local % 2 == 0, (pairs << 4) >> 4, pairs >> 4)  # shifts of int8 extend the sign
        else:
            codes = self.codes[local].view(torch.int8)
        group_rows = index // width // tall
        group_cols = index % width // wide
        groups = group_rows * self.stored.shape[1] + group_cols - self._first_scale
        return (codes.float() * self.scales[groups].float()).to(self.dtype)

    def expand_(self, out: Tensor, rect: Rect) -> Tensor:
        """Write the weights of a rectangle in this run to ``out``, (rows, cols), and return it."""
        native = None
        if out.dtype in NATIVE_DTYPES and out.stride(1) == 1:
            native = native_for(out, self.codes, self.scales)
        if native is None:
            for band in row_tiles(rect, _EXPANDED_AT_A_TIME.get(out.device.type, _EXPANDED_ELSEWHERE)):
                self._expand_in_torch_(out[band.inside(rect)], band)
            return out
        width = self.stored.layout.shape[1]
        # The loop takes its many integers in two tensors: what it reads of the codes, and of the scales.
        codes = torch.tensor([self.stored.grid.bits, self.start, width])
        groups = torch.tensor([self.stored.shape[1], *self.stored.unit, rect.r0, rect.c0])
        target = (out, NATIVE_DTYPES[out.dtype], out.stride(0), *out.shape)
        native.pst_expand_codes(
            self.codes, codes, self.scales, self._first_scale, groups, *target, threads_for(rect.numel)
        )
        return out

    @property
    def _first_scale(self) -> int:
        """Number of the first of :attr:`scales` among those of the whole weight."""
        period = self.stored.period
        return self.start // period * self.stored.groups_per_period

    def _expand_in_torch_(self, out: Tensor, rect: Rect) -> None:
        """Expand with torch: fp32 products of int8 and fp32, rounded on writing, without a wider tensor."""
        codes = self._codes_of(rect)
        wide = self.stored.unit[1]
        scales = self._scales_of(rect)
        if wide > 1 and rect.c0 % wide == 0 and rect.c1 % wide == 0:
            # Whole groups: the scales broadcast to their weights, without a copy per weight.
            by_group = (-1, wide)
            torch.mul(codes.unflatten(1, by_group), scales.unsqueeze(2), out=out.unflatten(1, by_group))
            return
        if wide > 1:
            group_of_column = torch.arange(rect.c0, rect.c1, device=self.device) // wide - rect.c0 // wide
            scales = scales.index_select(1, group_of_column)
        torch.mul(codes, scales, out=out)

    def _codes_of(self, rect: Rect) -> Tensor:
        """Return the codes of a rectangle, (rows, cols) int8."""
        width = self.stored.layout.shape[1]
        bits = self.stored.grid.bits
        first = rect.r0 * width + rect.c0
        last = (rect.r1 - 1) * width + rect.c1
        local = first - self.start
        # All codes from the first of the rectangle to its last, in whose rows its columns are then a view.
        if bits == 4:
            packed = self.codes[local // 2 : -(-(last - self.start) // 2)]
            is_second_of_byte = local % 2
            flat = unpack_nibbles(packed, is_second_of_byte + last - first)[is_second_of_byte:]
        else:
            flat = self.codes[local : local + last - first].view(torch.int8)
        return flat.as_strided(rect.shape, (width, 1), flat.storage_offset())

    def _scales_of(self, rect: Rect) -> Tensor:
        """Return the scales of the groups of a rectangle, fp32: (rows, groups per row)."""
        tall, wide = self.stored.unit
        device = self.device
        blocks = torch.arange(rect.r0 // tall, (rect.r1 - 1) // tall + 1, device=device)
        across = torch.arange(rect.c0 // wide, (rect.c1 - 1) // wide + 1, device=device)
        table = self.scales[blocks.unsqueeze(1) * self.stored.shape[1] + across - self._first_scale].float()
        if tall > 1:  # a Conv1D, whose groups are columns: each scale counts for several rows
            group_of_row = torch.arange(rect.r0, rect.r1, device=device) // tall - rect.r0 // tall
            table = table.index_select(0, group_of_row)
        return table


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A whole frozen weight as codes and scales, in shards, in place of the tensor W0 in a layer's formulas."""

    layout: CodeLayout
    codes: Tensor
    """uint8, (num_code_bytes,)."""
    scales: Tensor
    """uint8, the bytes of bf16 scales, (num_scale_bytes,)."""
    dtype: torch.dtype
    rows: slice | None = None
    """Rows of the stored weight; None for all of them."""

    def __getitem__(self, rows: slice) -> "CodedWeight":
        return replace(self, rows=rows)

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.layout.stored.layout.shape
        if self.rows is not None:
            height = self.rows.stop - self.rows.start
        return height, width

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def expand_(self, out: Tensor, rect: Rect) -> Tensor:
        """Write the weights of a rectangle to ``out``, (rows, cols), and return it."""
        width = self.shape[1]
        # Runs count rows of the whole stored weight.
        if self.rows is not None:
            rect = Rect(rect.r0 + self.rows.start, rect.r1 + self.rows.start, rect.c0, rect.c1)
        for run in self._runs(rect):
            for part in shard_tiles(rect, width, run.start, run.stop, _ALL):
                run.expand_(out[part.inside(rect)], part)
        return out

    def dense(self) -> Tensor:
        """Return the weight as a new tensor, without -0."""
        height, width = self.shape
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        # Code 0 times a negative scale is -0; adding 0 makes it +0.
        return self.expand_(out, Rect(0, height, 0, width)).add_(0.0)

    def _runs(self, rect: Rect) -> Iterator[CodedRun]:
        """Yield the runs that ``rect`` needs: one if the shards follow each other without a gap."""
        layout = self.layout
        width = self.shape[1]
        if layout.is_contiguous:
            yield coded_run(layout, self.codes, self.scales, self.dtype, shard=None)
            return
        share = layout.shard_numel
        first = rect.r0 * width + rect.c0
        last = (rect.r1 - 1) * width + rect.c1
        codes_by_shard = self.codes.view(layout.num_shards, -1)
        scales_by_shard = self.scales.view(layout.num_shards, -1)
        for shard in range(first // share, -(-last // share)):
            yield coded_run(layout, codes_by_shard[shard], scales_by_shard[shard], self.dtype, shard=shard)


def coded_run(layout: CodeLayout, codes: Tensor, scales: Tensor, dtype: torch.dtype, shard: int | None) -> CodedRun:
    """Return the weights of a shard from the bytes of its codes and scales; of all consecutive shards for None."""
    start = 0
    stop = layout.stored.layout.numel
    if shard is not None:
        start, stop = layout.weights_of(shard)
    table = scales_of_bytes(scales, (1, scales.numel() // SCALE_DTYPE.itemsize))
    return CodedRun(stored=layout.stored, start=start, stop=stop, codes=codes, scales=table.view(-1), dtype=dtype)


def weights_at(weight: Tensor | CodedWeight, rect: Rect, out: Tensor) -> Tensor:
    """Return a rectangle of W0, (rows, cols): a view of a tensor, or codes expanded to ``out``."""
    if isinstance(weight, CodedWeight):
        return weight.expand_(out, rect)
    return weight[rect.slices]


@dataclass(frozen=True, slots=True)
class OwnWeights:
    """The flat weights from ``start`` on of a stored weight with rows of ``row_length``."""

    values: Tensor | CodedRun
    """(n,). Slicing either type returns a tensor."""
    start: int
    row_length: int

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    def rect(self, rect: Rect) -> Tensor:
        """Return a rectangle of the stored weight that is in this part, (rows, cols). Do not modify it."""
        if isinstance(self.values, CodedRun):
            return self.values.rect(rect)
        return view_in_shard(self.values, rect, self.row_length, self.start)

    def at(self, index: Tensor) -> Tensor:
        """Return individual weights by flat ``index`` in the stored weight, (n,) int64: (n,)."""
        if isinstance(self.values, CodedRun):
            return self.values.at(index)
        if self.start:  # a subtraction is one more kernel launch
            index = index - self.start
        return self.values[index]

    def flat(self, first: int, last: int) -> Tensor:
        """Return the flat weights [first, last) of the stored weight, limited to this part: (n,)."""
        return self.values[max(0, first - self.start) : max(0, last - self.start)]


_TABLE_AT_A_TIME = {"cpu": 1 << 20}
"""Weights per slice, which stays in a CPU's caches; 2**24 on other devices."""


def table_rows(table: CodedWeight, numbers: Tensor) -> Tensor:
    """Return rows of a ``table`` by their ``numbers``, (...,) int64, like an embedding: (..., width).

    Tables are of one shard, (rows, width), with rows that start at byte boundaries. Only the codes exist as a whole.
    """
    stored = table.layout.stored
    flat = numbers.reshape(-1)
    height, width = stored.layout.shape
    packed = embedding(flat, table.codes.view(height, -1))
    codes = packed.view(torch.int8)
    if stored.grid.bits == 4:
        codes = unpack_nibbles(packed, width)
    scales = embedding(flat, scales_of_bytes(table.scales, stored.shape)).float()
    out = torch.empty(len(flat), width, dtype=table.dtype, device=table.device)
    by_group = (-1, stored.size)
    torch.mul(codes.unflatten(1, by_group), scales.unsqueeze(2), out=out.unflatten(1, by_group))
    return out.view(*numbers.shape, width)


def times_table(x: Tensor, table: CodedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x T' + bias, (n, width) to (n, rows), like ``linear`` with the whole table T."""
    out = x.new_empty(len(x), table.shape[0])
    for rows in _slices(table):
        slice_bias = None
        if bias is not None:
            slice_bias = bias[rows]
        out[:, rows] = linear(x, table[rows].dense(), slice_bias)
    return out


def of_table_inputs(grad_y: Tensor, table: CodedWeight) -> Tensor:
    """Return the gradient of x, (n, width), from that of x T', (n, rows): products of slices, summed in fp32."""
    slices = list(_slices(table))
    # One product needs no sum, nor a tensor in fp32.
    if len(slices) == 1:
        return grad_y @ table.dense()
    total = torch.zeros(len(grad_y), table.shape[1], dtype=torch.float32, device=grad_y.device)
    for rows in slices:
        total += grad_y[:, rows] @ table[rows].dense()
    return total.to(grad_y.dtype)


def slice_numel(rows: int, width: int, device_type: str) -> int:
    """Return the weights per slice of a table that are expanded in one step."""
    return width * min(rows, max(1, _TABLE_AT_A_TIME.get(device_type, 1 << 24) // width))


def _slices(table: CodedWeight) -> Iterator[slice]:
    """Yield the rows of a table that are expanded in one step."""
    height, width = table.shape
    step = slice_numel(height, width, table.device.type) // width
    return (slice(first, min(first + step, height)) for first in range(0, height, step))
