"""Quantised weights: every kept weight is a small integer, its quantised value, times a scale shared by a group.

    w  ~  code * scale        code: -127 .. 127 (int8) or -8 .. 7 (int4); scale: bf16, one per group of inputs

There is no zero point, so a pruned weight has code 0 and stays 0. An int4 scale may be negative: its sign gives code -8
to the weight of largest magnitude, and the squared error is a fifth less than with -7 .. 7. Groups of 32 are the Q8_0
and Q4_0 of llama.cpp.

Scales are rounded to bf16 before any weight is quantised, and ``code * scale`` is exact in fp32 (7 bits times 8), so
every program that multiplies the two gets the same weight. Scales are bf16 instead of fp16 because scales of small
weights are far below the range of fp16 (6e-5 without loss), and a scale needs at most 8 bits: codes are chosen for the
rounded scale.

The code of a weight is ``w / scale``, divided in fp32, rounded half to even and limited to the largest code. The scale
of a group has the least squared error of those tried (:func:`search_scales`). The search compares sums of integers, so
the result depends only on the weights of the group, not on their order, the device or the sharding.
"""

from collections.abc import Callable
from ctypes import CDLL, c_float
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.bits import NATIVE_DTYPES
from pst_ds.core.kernels import INT, TENSOR, NativeSource, load
from pst_ds.core.layout import Rect, WeightLayout, row_tiles
from pst_ds.core.packings import GROUPS, VALUE_BITS, WHOLE_ROW


@dataclass(frozen=True, slots=True)
class Grid:
    """Quantisation scheme. Raises ValueError for unsupported bits or groups."""

    bits: int
    """Bits per value: 8 or 4."""
    group: int | None = None
    """Consecutive inputs of an output that share a scale: 32, 64 or 128; None for all of them (per-row scale)."""

    def __post_init__(self) -> None:
        # 8.0 and True equal numbers that are allowed, but print as others.
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
        """The largest code: 127 or 7."""
        return (1 << self.bits - 1) - 1

    @property
    def least(self) -> int:
        """The smallest code: -127 or -8. For -128 some processors would need other instructions."""
        if self.bits == 8:
            return -127
        return -8

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
        shared_by = "every row"
        if self.group is not None:
            shared_by = f"{self.group} inputs"
        return f"{self.values}, a scale for {shared_by}"


def grid_of(values: object, group: object = None) -> Grid:
    """Return the scheme for the names that users write: "int8" or "int4", and 32, 64, 128 or "row".

    Without a group, int8 has per-row scales and int4 has groups of 64 inputs. Raises ValueError.
    """
    if values not in tuple(VALUE_BITS):  # any JSON value is possible here
        raise ValueError(f"quantised values are {' or '.join(VALUE_BITS)}, got {values!r}")
    if group is None:
        # Four bits are too few for one scale per row.
        if values == "int8":
            return Grid(VALUE_BITS[values])
        return Grid(VALUE_BITS[values], 64)
    known = {str(size): size for size in GROUPS}  # a command line passes text, JSON a number
    if str(group) != WHOLE_ROW and str(group) not in known:
        raise ValueError(f"a group is {', '.join(known)} or {WHOLE_ROW}, got {group!r}")
    return Grid(VALUE_BITS[values], known.get(str(group)))


SOURCE = NativeSource(
    "rounding.cpp",
    {
        "pst_round_to_grid": ([TENSOR, *([INT] * 4), TENSOR, TENSOR, *([INT] * 3)], None),
        "pst_expand_codes": ([TENSOR, TENSOR, TENSOR, INT, TENSOR, TENSOR, *([INT] * 5)], None),
        "pst_whole_weights": ([TENSOR, INT, INT, TENSOR, TENSOR, INT], None),
        "pst_kept_weights": ([TENSOR, *([INT] * 4), TENSOR, TENSOR, INT], INT),
        "pst_group_codes": ([TENSOR, *([INT] * 2), TENSOR, *([INT] * 2), TENSOR, INT], None),
        "pst_grid_losses": ([TENSOR, INT, INT, TENSOR, INT, INT, TENSOR, TENSOR, INT], None),
        "pst_search_scales": ([TENSOR, *([INT] * 4), TENSOR, *([INT] * 2), c_float, TENSOR, INT], None),
        "pst_grid_moments": ([TENSOR, TENSOR, *([INT] * 2), TENSOR, *([INT] * 2), TENSOR, TENSOR, INT], None),
    },
    "quantisation",
    may_flags=("-fopenmp",),
)
_WORTH_THREADS = 1 << 16
"""Weights from which a loop is worth starting threads."""
library = cache(partial(load, SOURCE))


def native_for(*tensors: Tensor) -> CDLL | None:
    """Return the native loops if all tensors are on the CPU, and the loops can be compiled or are installed."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    return library()


def threads_for(numel: int) -> int:
    """Return the number of threads for a loop over ``numel`` weights."""
    if numel < _WORTH_THREADS:
        return 1
    return torch.get_num_threads()


SCALE_DTYPE = torch.bfloat16
LEAST_SCALE = torch.finfo(SCALE_DTYPE).tiny
"""The smallest scale, 2^-126. Smaller ones would be denormal, which some processors treat as 0."""
RULE_OF_SCALES = "scales are at least 2^-126 without their sign, and times the largest code still finite in bf16"
UNUSED_SCALE = 1.0
"""Scale of a group without weights."""
_DIVISORS = {
    8: (124.0, 125.0, 126.0, 128.0, 130.0, 133.0, 136.0, 140.0, 145.0, 150.0),
    4: (4.0, 5.0, 5.5, 6.0, 6.5, 7.5, 8.0, 8.5, 9.0, 10.0, 11.0),
}
"""Scales that are tried: the largest magnitude of the group divided by these. Weights beyond are clipped."""
_REFITS = 2
"""Least-squares scales that are tried after the divisors, each for the codes of the best scale so far."""
_WEIGHT_BITS = 28
"""Bits of a group's weights as integers; sums over 2^18 of them times a code stay below 2^53."""


def group_scales(grouped: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scale of least squared error for every row of ``grouped``: (groups, weights per group) to (groups,).

    ``grouped``: finite, fp32, 0 where pruned. ``dtype``: the dtype in which a quantised weight must be finite.
    """
    grouped = grouped.contiguous()
    native = native_for(grouped)
    if native is not None and grouped.numel():
        scales = torch.empty(len(grouped), dtype=SCALE_DTYPE)
        divisors = torch.tensor([grid.largest, *_DIVISORS[grid.bits]], dtype=torch.float32)
        tried = (divisors, len(divisors), _REFITS, largest_scale(grid, dtype))
        threads = threads_for(grouped.numel())
        native.pst_search_scales(grouped, *grouped.shape, grid.least, grid.largest, *tried, scales, threads)
        return scales
    least, most = torch.aminmax(grouped, dim=1)
    extremes = larger_end(least, most)
    whole = whole_weights(grouped, extremes)
    return search_scales(extremes, lambda scales: group_moments(grouped, whole, scales, grid), grid, dtype)


def larger_end(least: Tensor, most: Tensor) -> Tensor:
    """Return the one of larger magnitude, with its sign."""
    return torch.where(most >= -least, most, least)


def limited(scales: Tensor, least: float, most: float) -> Tensor:
    """Return scales whose magnitudes are limited to [``least``, ``most``]."""
    return torch.copysign(scales.abs().clamp(least, most), scales)


def whole_weights(grouped: Tensor, extremes: Tensor) -> Tensor:
    """Return weights in units of :func:`unit_of`, rounded: (groups, n) fp32, contiguous, to (groups, n) int32.

    ``extremes``: (groups,) fp32, the weight of largest magnitude of each whole group.
    """
    unit = unit_of(extremes)
    native = native_for(grouped)
    if native is None:
        return (grouped.double() / unit.unsqueeze(1)).round_().int()
    whole = torch.empty(grouped.shape, dtype=torch.int32)
    native.pst_whole_weights(grouped, *grouped.shape, 1.0 / unit, whole, threads_for(grouped.numel()))
    return whole


def group_losses(grouped: Tensor, scales: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the sums of (w - code * scale)^2 and of w^2 over each row: (groups,) float64.

    ``grouped``: (groups, n) fp32, contiguous. ``scales``: (groups,) fp32.
    """
    native = native_for(grouped)
    if native is None:
        rounded = rounded_codes(grouped, scales.unsqueeze(1), grid).mul_(scales.unsqueeze(1))
        weights = grouped.double()
        return (weights - rounded).square().sum(1), weights.square().sum(1)
    errors, squares = torch.empty(2, len(grouped), dtype=torch.float64)
    threads = threads_for(grouped.numel())
    native.pst_grid_losses(
        grouped, *grouped.shape, scales.contiguous(), grid.least, grid.largest, errors, squares, threads
    )
    return errors, squares


def group_moments(grouped: Tensor, whole: Tensor, scales: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the sums of w code and of code^2 over each row for :func:`search_scales`: (groups,) float64.

    ``grouped``: (groups, n) fp32, contiguous, 0 where pruned. ``whole``: its :func:`whole_weights`. ``scales``:
    (groups,) fp32.
    """
    native = native_for(grouped)
    if native is None:
        codes = rounded_codes(grouped, scales.unsqueeze(1), grid).double()
        return torch.linalg.vecdot(whole.double(), codes), torch.linalg.vecdot(codes, codes)
    by_weight, by_code = torch.empty(2, len(grouped), dtype=torch.float64)
    threads = threads_for(grouped.numel())
    native.pst_grid_moments(
        grouped, whole, *grouped.shape, scales.contiguous(), grid.least, grid.largest, by_weight, by_code, threads
    )
    return by_weight, by_code


def unit_of(extremes: Tensor) -> Tensor:
    """Return the unit of :func:`search_scales`: a power of two, about 2^-28 of a group's magnitude, float64."""
    _, exponents = torch.frexp(extremes.double())
    return torch.ldexp(torch.ones_like(extremes, dtype=torch.float64), exponents - _WEIGHT_BITS)


def search_scales(
    extremes: Tensor, moments: Callable[[Tensor], tuple[Tensor, Tensor]], grid: Grid, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the bf16 scales of least squared error among those tried: (groups,).

    Tried are the largest magnitude / the largest code, so the error never exceeds plain rounding's, some larger and
    smaller scales, and twice the least-squares scale for the best codes, sum(w code) / sum(code^2).

    ``extremes``: (groups,) fp32, the weight of largest magnitude of each group; 0 gives scale 1. ``moments``: returns,
    for fp32 scales that are bf16 numbers, the sums of w code and of code^2 over each group, (groups,) float64, where w
    is a rounded weight in units of :func:`unit_of`. These are integers below 2^53, so sums over shards may be
    added. ``dtype``: the dtype in which a quantised weight must be finite.
    """
    limit = largest_scale(grid, dtype)
    unit = unit_of(extremes)
    # With codes -8 to 7, a scale whose sign differs from the extreme's gives it a negative code: there is one more.
    numerator = extremes.abs()
    if -grid.least > grid.largest:
        numerator = -extremes

    def rounded(scales: Tensor) -> Tensor:
        """Return the nearest scales that can be stored, fp32."""
        return limited(scales.float(), LEAST_SCALE, limit).to(SCALE_DTYPE).float()

    def judged(scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (scale, error, sum w code, sum code^2) of each group."""
        by_weight, by_code = moments(scales)
        in_units = scales.double() / unit
        # sum (w - s code)^2 without its constant term sum w^2: s^2 sum code^2 - 2 s sum w code
        return scales, in_units * (in_units * by_code - 2 * by_weight), by_weight, by_code

    def better(best: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wins = other[1] < best[1]  # of equal errors, the scale that was tried first
        return tuple(torch.where(wins, new, old) for new, old in zip(other, best, strict=True))

    best: tuple[Tensor, ...] = judged(rounded(numerator / grid.largest))
    for divisor in _DIVISORS[grid.bits]:
        best = better(best, judged(rounded(numerator / divisor)))
    for _ in range(_REFITS):
        scales, _, by_weight, by_code = best
        # Where all codes are 0, no scale is better than another.
        fitted = by_weight / by_code.clamp(min=1) * unit
        best = better(best, judged(rounded(torch.where(by_code > 0, fitted.float(), scales))))
    return torch.where(extremes != 0, best[0], UNUSED_SCALE).to(SCALE_DTYPE)


def rounded_codes(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Return the codes of fp32 weights as fp32, for fp32 scales that broadcast to them."""
    return (weight / scales).round_().clamp_(grid.least, grid.largest)


def nearest_codes(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Return the int8 codes of ``weight`` for ``scales`` that broadcast to it: w / scale in fp32, half to even."""
    return rounded_codes(weight.float(), scales.float(), grid).to(torch.int8)


def first_bad_scale(scales: Tensor, grid: Grid) -> int | None:
    """Return the flat index of the first bf16 scale that breaks :data:`RULE_OF_SCALES`, or None."""
    good = (scales.abs() >= LEAST_SCALE) & (scales.abs() <= largest_scale(grid, SCALE_DTYPE))
    if bool(good.all()):
        return None
    return int(good.flatten().to(torch.uint8).argmin())  # the first of the smallest: the first 0


def require_scales(scales: Tensor, grid: Grid) -> None:
    """Raise ValueError with index and value for the first bf16 scale that :func:`first_bad_scale` finds."""
    bad = first_bad_scale(scales, grid)
    if bad is not None:
        raise ValueError(f"scale {bad} is {float(scales.flatten()[bad]):g}; {RULE_OF_SCALES}")


def largest_scale(grid: Grid, dtype: torch.dtype) -> float:
    """Return the largest bf16 number whose products with all codes are finite in ``dtype`` and in bf16."""
    most = min(torch.finfo(dtype).max, torch.finfo(SCALE_DTYPE).max) / -grid.least
    scale = torch.tensor(most).to(SCALE_DTYPE)
    if float(scale) > most:  # rounded up: take the next smaller bf16 number, whose bits are one less
        scale = (scale.view(torch.int16) - 1).view(SCALE_DTYPE)
    return float(scale)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack int4 codes, (..., n) int8, two per byte: (..., ceil(n / 2)) uint8.

    The first of two is in the lower four bits, in two's complement. For odd n, the last upper four bits are 0.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.view(torch.uint8).bitwise_and(15)
    return pairs[..., ::2] | pairs[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Return the first ``count`` codes of each row of ``packed``: (..., ceil(count / 2)) uint8 to (..., count) int8."""
    signed = packed.view(torch.int8)
    pairs = torch.stack([(signed << 4) >> 4, signed >> 4], -1)  # shifts of int8 extend the sign
    return pairs.flatten(-2)[..., :count]


_AT_A_TIME = {"cpu": 1 << 17}
"""Weights that torch quantises in one step, which stay in a CPU's cache. Elsewhere it is one of the next two."""
_IN_PLACE_ELSEWHERE = 1 << 22
_IN_COPIES_ELSEWHERE = 1 << 24


def quantize(weight: Tensor, keep: Tensor | None, grid: Grid, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a matrix: (codes (O, I) int8, scales (O, groups) bf16), on the device of ``weight``.

    ``weight``: (O, I) of any float dtype. ``keep``: (O, I) bool, true for kept weights; None keeps all. Pruned weights
    have code 0 and do not affect the scale. ``scales``: use these instead of searching. Raises ValueError if groups do
    not divide the inputs, and for kept weights that are not finite.
    """
    rows, columns = weight.shape
    groups = grid.num_groups(columns)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    used_scales = torch.full((rows, groups), UNUSED_SCALE, dtype=SCALE_DTYPE, device=weight.device)
    if scales is not None:
        if scales.dtype != SCALE_DTYPE or tuple(scales.shape) != (rows, groups):
            passed = f"{scales.dtype} of shape {tuple(scales.shape)}"
            raise ValueError(f"scales are {SCALE_DTYPE} of shape {(rows, groups)}, got {passed}")
        require_scales(scales, grid)
        used_scales.copy_(scales)
    if not columns:
        return codes, used_scales
    step = _rows_at_a_time(columns, weight.device)
    for first in range(0, rows, step):
        band = slice(first, min(first + step, rows))
        kept_band = None
        if keep is not None:
            kept_band = keep[band]
        kept, is_finite = _kept_weights(weight[band].detach(), kept_band)
        if not is_finite:
            raise ValueError(f"a weight of rows {band.start} to {band.stop - 1} is not finite in fp32")
        grouped = kept.reshape(-1, columns // groups)  # (rows * groups, weights per group)
        if scales is None:
            used_scales[band] = group_scales(grouped, grid, weight.dtype).view(-1, groups)
        _write_codes(grouped, used_scales[band], grid, codes[band])
    return codes, used_scales


def _kept_weights(weight: Tensor, keep: Tensor | None) -> tuple[Tensor, bool]:
    """Return a matrix as fp32, with 0 where ``keep`` is false, and whether that is finite."""
    native = native_for(weight)
    if native is None or weight.dtype not in NATIVE_DTYPES or weight.stride(1) != 1:
        kept = weight.float()
        if keep is not None:
            kept = torch.where(keep, kept, 0.0)
        return kept, bool(torch.isfinite(kept).all())
    if keep is not None:
        keep = keep.to("cpu", torch.bool).contiguous()
    kept = torch.empty(weight.shape, dtype=torch.float32)
    source = (weight, NATIVE_DTYPES[weight.dtype], weight.stride(0), *weight.shape)
    return kept, bool(native.pst_kept_weights(*source, keep, kept, threads_for(weight.numel())))


def _write_codes(grouped: Tensor, scales: Tensor, grid: Grid, codes: Tensor) -> None:
    """Write the codes of groups, fp32 rows, to ``codes``, contiguous int8, in the same order. ``scales``: bf16."""
    native = native_for(grouped, codes)
    if native is None:
        codes.copy_(nearest_codes(grouped, scales.reshape(-1, 1), grid).view(codes.shape))
        return
    grouped = grouped.contiguous()
    threads = threads_for(grouped.numel())
    native.pst_group_codes(grouped, *grouped.shape, scales.contiguous(), grid.least, grid.largest, codes, threads)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return code * scale, (O, I): exact in fp32 and float64, rounded once to a narrower ``dtype``; +0.0 for code 0.

    ``codes``: (O, I) int8. ``scales``: (O, groups) bf16; the number of groups divides I.
    """
    rows, columns = codes.shape
    dense = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    if not columns:
        return dense
    step = _rows_at_a_time(columns, codes.device)
    for first in range(0, rows, step):
        band = slice(first, first + step)
        # fp32 is computed in place, which saves a temporary array; other dtypes are rounded from fp32
        is_exact = dtype == torch.float32
        exact = dense[band]
        if not is_exact:
            exact = torch.empty(codes[band].shape, device=codes.device)
        grouped = exact.copy_(codes[band]).unflatten(1, (scales.shape[1], -1))  # (rows, groups, weights per group)
        grouped.mul_(scales[band].float().unsqueeze(2)).add_(0.0)  # the sum turns -0 into +0
        if not is_exact:
            dense[band] = exact
    return dense


def round_to_grid(weight: Tensor, keep: Tensor | None, grid: Grid, scales: Tensor | None = None) -> Tensor:
    """Return the weight as a program with codes and scales computes it."""
    return dequantize(*quantize(weight, keep, grid, scales), weight.dtype)


def first_off_grid(weight: Tensor, grid: Grid, scales: Tensor) -> tuple[int, int] | None:
    """Return (row, column) of the first weight that is not bit-identical to a code * scale in its dtype, or None.

    ``weight``: (O, I), finite. ``scales``: (O, groups) bf16. Raises ValueError as :func:`quantize` does.
    """
    codes, _ = quantize(weight, None, grid, scales)
    differs = (dequantize(codes, scales, weight.dtype) != weight).flatten()
    if not bool(differs.any()):
        return None
    first = int(differs.to(torch.uint8).argmax())  # the first of the largest: the first 1
    return divmod(first, weight.shape[1])


def squared_norms(weight: Tensor, keep: Tensor, codes: Tensor, scales: Tensor) -> tuple[float, float]:
    """Return the squared norms of the quantisation error and of the kept weights of a matrix on the CPU, in float64.

    ``keep``: (O, I) bool. numpy adds on one thread, so the sums do not depend on the number of threads.
    """
    changed = 0.0
    norm = 0.0
    step = _rows_at_a_time(weight.shape[1], weight.device)
    for first in range(0, len(weight), step):
        band = slice(first, first + step)
        kept = torch.where(keep[band], weight[band].detach().double(), 0.0)
        changed += float(np.square((kept - dequantize(codes[band], scales[band], torch.float64)).numpy()).sum())
        norm += float(np.square(kept.numpy()).sum())
    return changed, norm


def _rows_at_a_time(columns: int, device: torch.device) -> int:
    """Return the rows of ``columns`` weights that are quantised in one step."""
    return max(1, _AT_A_TIME.get(device.type, _IN_COPIES_ELSEWHERE) // max(1, columns))


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
        if self.layout.transposed:
            return self.size, 1
        return 1, self.size

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the scales: (O, groups), or (groups, O) for a Conv1D."""
        height, width = self.layout.shape
        rows, cols = self.unit
        return height // rows, width // cols

    @property
    def num_scales(self) -> int:
        return self.layout.numel // self.size

    @property
    def period(self) -> int:
        """Length of the shortest run of flat weights that, aligned to a multiple of it, contains whole groups only."""
        if not self.layout.transposed:
            return self.size
        # Groups are columns, so a run of whole ones has whole rows.
        return self.size * self.layout.shape[1]

    @property
    def groups_per_period(self) -> int:
        return self.period // self.size

    def grouped(self, rect: Tensor) -> Tensor:
        """Return the groups of a rectangle of whole groups as rows, in the order of their scales: contiguous."""
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

        Writes code * scale, exact in fp32 and rounded once to the dtype of ``weight``. Zeros stay +0.0.
        """
        if rect is None:
            height, width = self.stored.layout.shape
            rect = Rect(0, height, 0, width)
        scales = self.scales
        native = None
        if weight.dtype in NATIVE_DTYPES and weight.stride(1) == 1:
            native = native_for(weight, scales)
        if native is None:
            for band in row_tiles(rect, _AT_A_TIME.get(weight.device.type, _IN_PLACE_ELSEWHERE)):
                part = weight[band.inside(rect)]
                band_scales = _scales_of(scales, band, self.stored.unit)
                codes = rounded_codes(part.float(), band_scales, self.stored.grid)
                part.copy_(codes.mul_(band_scales).add_(0.0))  # turns -0 into +0
            return weight
        # The loop takes what it reads of the scales as one tensor of integers.
        groups = torch.tensor([scales.shape[1], *self.stored.unit, rect.r0, rect.c0])
        target = (weight, NATIVE_DTYPES[weight.dtype], weight.stride(0), *weight.shape)
        threads = threads_for(weight.numel())
        native.pst_round_to_grid(
            *target, scales.contiguous(), groups, self.stored.grid.least, self.stored.grid.largest, threads
        )
        return weight

    def of_expert(self, expert: int) -> "Rounding":
        """Return the quantisation of one expert of a stack."""
        of_expert = StoredGrid(self.stored.layout.expert, self.stored.grid)
        height = of_expert.shape[0]
        return Rounding(of_expert, self.scales[expert * height : (expert + 1) * height])

    @property
    def scales_by_output(self) -> Tensor:
        """Scales as files store them, (O, groups)."""
        if self.stored.layout.transposed:
            return self.scales.t()
        return self.scales

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a file stores of a whole stored weight: codes (O, I) int8 and scales (O, groups) bf16.

        ``weight``: before or after quantisation, which gives the same result.
        """
        if self.stored.layout.transposed:
            weight = weight.t()
        return quantize(weight, keep=None, grid=self.stored.grid, scales=self.scales_by_output)


def bytes_of_scales(scales: Tensor) -> Tensor:
    """Return bf16 scales as bytes, (2 n,) uint8: a dtype that a conversion of the model's weights does not touch."""
    return scales.to(SCALE_DTYPE).contiguous().view(torch.uint8).flatten()


def scales_of_bytes(data: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the scales of :func:`bytes_of_scales`; a view if the bytes start at an even address."""
    # torch views bytes as bf16 only from an even offset; a shard of bytes may start anywhere.
    is_even = data.is_meta or (data.data_ptr() % 2 == 0 and data.storage_offset() % 2 == 0)
    if not is_even:
        data = data.clone()
    return data.view(SCALE_DTYPE).view(shape)


def _scales_of(scales: Tensor, rect: Rect, unit: tuple[int, int]) -> Tensor:
    """Return the scales of a rectangle's weights, fp32, of a shape that broadcasts to it."""
    for dim, (first, stop) in enumerate(((rect.r0, rect.r1), (rect.c0, rect.c1))):
        if unit[dim] == 1:
            scales = scales.narrow(dim, first, stop - first)
        elif scales.shape[dim] > 1:
            scales = scales.index_select(dim, torch.arange(first, stop, device=scales.device) // unit[dim])
    return scales.float()
