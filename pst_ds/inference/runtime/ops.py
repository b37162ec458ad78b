"""Products with packed weights as operators of ``torch.ops.pst_ds``: bitmask_linear, quantized_linear, csr_linear.

Eager code calls the Python functions below, which is faster. torch.compile and torch.export use the operators, with
shapes from their meta kernels and gradients from gradients.py. The functions have no gradient:
:class:`~pst_ds.inference.runtime.linear.SparseLinear` uses a dense product in eager code that needs one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from pst_ds.core.quantization import dequantize, unpack_nibbles
from pst_ds.formats import FORMATS, QuantizedFormat, form_of
from pst_ds.formats.quantized import without_padding
from pst_ds.inference.runtime import gpu, native
from pst_ds.inference.runtime.backends import backend_for

PANEL_ROWS = 1024
"""Rows of a weight that are expanded in one step."""


def bitmask_linear(
    x: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, backend: str = ""
) -> Tensor:
    """Compute x W' + bias, (..., I) to (..., O), with parts of the bitmask format that have passed its check."""
    if not backend and gpu.takes(x, compressed):
        return gpu.packed_linear(x, gpu.PackedWeight(compressed, bitmask, row_offsets), bias)
    vectors = x.numel() // max(1, x.shape[-1])
    if not backend:
        density = compressed.numel() / max(1, bitmask.shape[0] * x.shape[-1])
        backend = backend_for("bitmask", x.dtype, x.device.type, vectors, density)
    if backend == "native" and x.shape[-1] and compressed.dtype == x.dtype:
        return native.bitmask_linear(x, compressed, bitmask, row_offsets, bias, native.best_level())
    if x.device.type != "cpu":
        return dense_linear(x, expand_on_device(compressed, bitmask, x.shape[-1]), bias)
    return _by_panels(x, compressed, bitmask, row_offsets, bias)


def csr_linear(x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W' + bias with torch's fp32 CSR product: (..., I) to (..., O) in the dtype of ``x``.

    ``values`` are fp32, or fp64 if ``x`` is. With too many vectors or values the weight is expanded instead.
    """
    shape = (crow_indices.numel() - 1, x.shape[-1])
    vectors, density = x.numel() // max(1, shape[1]), values.numel() / max(1, shape[0] * shape[1])
    if backend_for("csr", x.dtype, x.device.type, vectors, density) == "expand":
        parts = {"crow_indices": crow_indices, "col_indices": col_indices, "values": values}
        dense = FORMATS["csr"].unpack({**parts, "shape": torch.tensor(shape)})
        return dense_linear(x, dense.to(x), bias)
    weight = torch.sparse_csr_tensor(crow_indices, col_indices, values, shape, check_invariants=False)
    flat = x.reshape(math.prod(x.shape[:-1]), shape[1]).float()
    with torch.autocast(x.device.type, enabled=False):
        y = torch.mm(weight, flat.t()).t()
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous().view(*x.shape[:-1], shape[0])


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bitmask: Tensor | None,
    row_offsets: Tensor,
    bias: Tensor | None,
    packing: str,
) -> Tensor:
    """Compute x W' + bias: (..., I) to (..., O) in the dtype of ``x``, to which W = codes * scales is rounded.

    ``codes``, ``scales`` and ``bitmask`` are parts of ``packing``, "bitmask", "2:4" or "dense", that have passed their
    format's check. ``row_offsets`` (O,) int64: first byte of every row of ``codes``. The weight is expanded for a dense
    product, on a CPU some rows at a time. On a GPU, gpu.py multiplies up to eight vectors with codes, without rounding
    the weight.
    """
    if gpu.takes(x, codes):
        return gpu.packed_linear(x, gpu.PackedWeight(codes, bitmask, row_offsets, scales), bias)
    rows, columns = scales.shape[0], x.shape[-1]
    step = PANEL_ROWS if x.device.type == "cpu" else max(1, rows)
    if rows <= step:
        weight = expand_codes(codes, scales, bitmask, columns, packing, x.dtype)
        return dense_linear(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], rows))
    flat = codes.view(-1)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        stop = int(row_offsets[last]) if last < rows else flat.numel()
        held = codes[first:last] if codes.dim() == 2 else flat[int(row_offsets[first]) : stop]
        bits = None if bitmask is None else bitmask[first:last]
        weight = expand_codes(held, scales[first:last], bits, columns, packing, x.dtype)
        y[..., first:last] = dense_linear(x, weight, None if bias is None else bias[first:last])
    return y


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W' + bias in their dtype regardless of autocast: the backend must not change the result."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(x, weight, bias)


def expand_codes(
    codes: Tensor, scales: Tensor, bitmask: Tensor | None, columns: int, packing: str, dtype: torch.dtype
) -> Tensor:
    """Expand parts of a quantised ``packing`` to the dense (O, I) weight, on their device."""
    parts = {"codes": codes, "scales": scales} | ({} if bitmask is None else {"bitmask": bitmask})
    form = form_of(packing, {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}, columns)
    assert isinstance(form, QuantizedFormat)
    if codes.device.type == "cpu":
        return form.unpack({**parts, "shape": torch.tensor([scales.shape[0], columns])}, dtype)
    return dequantize(codes_on_device(form, codes, bitmask, columns), scales, dtype)


def codes_on_device(form: QuantizedFormat, codes: Tensor, bitmask: Tensor | None, columns: int) -> Tensor:
    """Return the codes of every position, (O, I) int8, using torch operators only."""
    if bitmask is None:
        return unpack_nibbles(codes, columns).contiguous() if form.grid.bits == 4 else codes
    keep = _kept(bitmask, columns)
    flat = unpack_nibbles(codes.reshape(-1), 2 * codes.numel()) if form.grid.bits == 4 else codes.reshape(-1)
    if form.grid.bits == 4 and form.packing == "bitmask":
        flat = without_padding(flat, keep.sum(1))
    return torch.zeros(keep.shape, dtype=torch.int8, device=codes.device).masked_scatter_(keep, flat)


def _kept(bitmask: Tensor, columns: int) -> Tensor:
    """Return the mask (O, I), bool, from its bits on any device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return (bitmask.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(1)[:, :columns].bool()


def expand_on_device(compressed: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """Expand bitmask parts to the dense (O, I) weight, on their device."""
    keep = _kept(bitmask, columns)
    return torch.zeros(keep.shape, dtype=compressed.dtype, device=compressed.device).masked_scatter_(keep, compressed)


def _by_panels(x: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Expand and multiply the weight panel by panel, so that only one is dense at a time."""
    rows, columns = bitmask.shape[0], x.shape[-1]
    if rows <= PANEL_ROWS:
        return dense_linear(x, _rows(compressed, bitmask, row_offsets, columns, 0, rows), bias)
    y = x.new_empty((*x.shape[:-1], rows))
    for first in range(0, rows, PANEL_ROWS):
        last = min(first + PANEL_ROWS, rows)
        panel = _rows(compressed, bitmask, row_offsets, columns, first, last)
        y[..., first:last] = dense_linear(x, panel, None if bias is None else bias[first:last])
    return y


def _rows(compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, columns: int, first: int, last: int) -> Tensor:
    """Expand rows [first, last) of the weight."""
    start = int(row_offsets[first]) if first < row_offsets.numel() else 0
    stop = int(row_offsets[last]) if last < row_offsets.numel() else compressed.numel()
    shape, offsets = torch.tensor([last - first, columns]), row_offsets[first:last] - start
    parts = {"compressed": compressed[start:stop], "bitmask": bitmask[first:last], "row_offsets": offsets}
    return FORMATS["bitmask"].unpack({**parts, "shape": shape})


_LIBRARY = torch.library.Library("pst_ds", "DEF")
_LIBRARY.define(
    "bitmask_linear(Tensor x, Tensor compressed, Tensor bitmask, Tensor row_offsets, Tensor? bias) -> Tensor"
)
_LIBRARY.define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bitmask, Tensor row_offsets, Tensor? bias, "
    "str packing) -> Tensor"
)
_LIBRARY.define("csr_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias) -> Tensor")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("bitmask_linear", bitmask_linear, _device)
    _LIBRARY.impl("csr_linear", csr_linear, _device)
    _LIBRARY.impl("quantized_linear", quantized_linear, _device)


@torch.library.register_fake("pst_ds::bitmask_linear")
def _(x: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


@torch.library.register_fake("pst_ds::csr_linear")
def _(x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], crow_indices.shape[0] - 1))


@torch.library.register_fake("pst_ds::quantized_linear")
def _(x: Tensor, codes: Tensor, scales: Tensor, *_others: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[0]))
