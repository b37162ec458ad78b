"""Products with packed weights, as torch operators: ``torch.ops.pst_ds.bitmask_linear`` and ``.csr_linear``.

Eager code calls the Python functions below, which costs less; torch.compile and torch.export see the operators, with
shapes from their meta kernels. They have no gradient: :class:`~pst_ds.runtime.linear.SparseLinear` takes a dense
product where one is needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from pst_ds.core.formats import FORMATS
from pst_ds.runtime import native
from pst_ds.runtime.backends import backend_for

PANEL_ROWS = 1024
"""Rows of a weight that are expanded at a time."""


def bitmask_linear(
    x: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, backend: str = ""
) -> Tensor:
    """Compute x W' + bias: (..., I) to (..., O) with parts of the bitmask format, which must have passed its check."""
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

    ``values`` are fp32, or fp64 where ``x`` is. With too many vectors or values the weight is expanded.
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


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W' + bias in their dtype, autocast or not: how a product is computed must not change its result."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(x, weight, bias)


def expand_on_device(compressed: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """Expand bitmask parts to the dense (O, I) weight, on their device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    keep = (bitmask.unsqueeze(-1) >> shifts).bitwise_and_(1).flatten(1)[:, :columns].bool()
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
_LIBRARY.define("csr_linear(Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias) -> Tensor")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("bitmask_linear", bitmask_linear, _device)
    _LIBRARY.impl("csr_linear", csr_linear, _device)


@torch.library.register_fake("pst_ds::bitmask_linear")
def _(x: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


@torch.library.register_fake("pst_ds::csr_linear")
def _(x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], crow_indices.shape[0] - 1))
