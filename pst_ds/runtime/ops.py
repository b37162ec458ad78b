"""Products with packed weights as operators of ``torch.ops.pst_ds``, and the choice of how each is computed.

Eager code calls the Python functions below, which is faster. torch.compile and torch.export use the operators. Neither
has a gradient: :class:`~pst_ds.runtime.linear.SparseLinear` uses a dense product where one is needed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from pst_ds.core.quantization import dequantize, unpack_nibbles
from pst_ds.formats import BitmaskFormat, QuantizedFormat
from pst_ds.formats.quantized import without_padding
from pst_ds.runtime import gpu, native
from pst_ds.storage_format import form_of

PANEL_ROWS = 1024
"""Rows of a weight that are expanded in one step."""
NATIVE_UP_TO = {torch.bfloat16: 1 << 62, torch.float32: 128}
"""Most vectors in a product for which our kernel is faster than expanding the weight."""


def backend_for(dtype: torch.dtype, device_type: str, vectors: int) -> str:
    """Return the fastest way to multiply ``vectors`` vectors with a weight of floats and a bitmask.

    "native": our CPU kernel on bits. "expand": a dense product with the weight expanded some rows at a time. The limits
    are measured (docs/background/results.md).
    """
    is_fast = device_type == "cpu" and vectors <= NATIVE_UP_TO.get(dtype, -1) and native.library() is not None
    return "native" if is_fast else "expand"


def bitmask_linear(
    x: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, backend: str = ""
) -> Tensor:
    """Compute x W' + bias, (..., I) to (..., O), with parts of the bitmask format that have passed its check."""
    # a backend is only named by tests and benchmarks, which compare the two for the CPU
    if not backend and gpu.takes(x, compressed):
        return gpu.packed_linear(x, gpu.PackedWeight(compressed, bitmask, row_offsets), bias)
    backend = backend or backend_for(x.dtype, x.device.type, x.numel() // max(1, x.shape[-1]))
    if backend == "native" and x.shape[-1] and compressed.dtype == x.dtype:
        return native.bitmask_linear(x, compressed, bitmask, row_offsets, bias, native.best_level())
    columns = x.shape[-1]
    if x.device.type != "cpu":
        return dense_linear(x, expand_on_device(compressed, bitmask, columns), bias)

    def expand(first: int, last: int) -> Tensor:
        return _expand_rows(compressed, bitmask, row_offsets, columns, first, last)

    return _by_panels(x, bitmask.shape[0], bias, expand)


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
    product, on a CPU some rows at a time. On a GPU, up to eight vectors are multiplied without rounding the weight.
    """
    if gpu.takes(x, codes):
        return gpu.packed_linear(x, gpu.PackedWeight(codes, bitmask, row_offsets, scales), bias)
    rows = scales.shape[0]
    columns = x.shape[-1]
    if x.device.type != "cpu":
        return dense_linear(x, expand_codes(codes, scales, bitmask, columns, packing, x.dtype), bias)

    def expand(first: int, last: int) -> Tensor:
        if codes.dim() == 2:
            codes_of_rows = codes[first:last]
        else:
            # rows that omit pruned codes have different lengths
            codes_of_rows = codes[_values_of_rows(row_offsets, first, last, codes.numel())]
        bits = None
        if bitmask is not None:
            bits = bitmask[first:last]
        return expand_codes(codes_of_rows, scales[first:last], bits, columns, packing, x.dtype)

    return _by_panels(x, rows, bias, expand)


def _values_of_rows(row_offsets: Tensor, first: int, last: int, total: int) -> slice:
    """Return where the values of rows [first, last) are among all ``total`` values."""
    # offsets name the start of each row only: the last row ends with the values, and a weight may have no rows
    rows = row_offsets.numel()
    start = 0
    if first < rows:
        start = int(row_offsets[first])
    stop = total
    if last < rows:
        stop = int(row_offsets[last])
    return slice(start, stop)


def _by_panels(x: Tensor, rows: int, bias: Tensor | None, expand: Callable[[int, int], Tensor]) -> Tensor:
    """Multiply with a weight panel by panel, so that only one is dense; ``expand`` returns rows [first, last)."""
    if rows <= PANEL_ROWS:
        return dense_linear(x, expand(0, rows), bias)
    y = x.new_empty((*x.shape[:-1], rows))
    for first in range(0, rows, PANEL_ROWS):
        last = min(first + PANEL_ROWS, rows)
        bias_of_rows = None if bias is None else bias[first:last]
        y[..., first:last] = dense_linear(x, expand(first, last), bias_of_rows)
    return y


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W' + bias in their dtype regardless of autocast: the backend must not change the result."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(x, weight, bias)


def expand_codes(
    codes: Tensor, scales: Tensor, bitmask: Tensor | None, columns: int, packing: str, dtype: torch.dtype
) -> Tensor:
    """Expand parts of a quantised ``packing`` to the dense (O, I) weight, on their device."""
    parts = {"codes": codes, "scales": scales}
    if bitmask is not None:
        parts["bitmask"] = bitmask
    form = form_of(packing, {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}, columns)
    assert isinstance(form, QuantizedFormat)
    if codes.device.type == "cpu":
        return form.unpack({**parts, "shape": torch.tensor([scales.shape[0], columns])}, dtype)
    return dequantize(codes_on_device(form, codes, bitmask, columns), scales, dtype)


def codes_on_device(form: QuantizedFormat, codes: Tensor, bitmask: Tensor | None, columns: int) -> Tensor:
    """Return the codes of every position, (O, I) int8, using torch operators only."""
    has_nibbles = form.grid.bits == 4  # two codes per byte
    if bitmask is None and has_nibbles:
        return unpack_nibbles(codes, columns).contiguous()
    if bitmask is None:
        return codes
    keep = _kept(bitmask, columns)
    flat = codes.reshape(-1)
    if has_nibbles:
        flat = unpack_nibbles(flat, 2 * codes.numel())
    if form.pads_rows:
        # each row starts at a byte, so a row with an odd number of codes ends with half a byte of padding
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


def _expand_rows(
    compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, columns: int, first: int, last: int
) -> Tensor:
    """Return rows [first, last) of the dense weight, (last - first, I)."""
    values = _values_of_rows(row_offsets, first, last, compressed.numel())
    parts = {
        "compressed": compressed[values],
        "bitmask": bitmask[first:last],
        "row_offsets": row_offsets[first:last] - values.start,  # from the first value of these rows
        "shape": torch.tensor([last - first, columns]),
    }
    return BitmaskFormat().unpack(parts)


_LIBRARY = torch.library.Library("pst_ds", "DEF")


def _define(function: Callable[..., Tensor], arguments: str, fake: Callable[..., Tensor]) -> None:
    """Register ``function`` as an operator; ``fake`` returns an empty result from the same arguments."""
    name = function.__name__
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pst_ds::{name}", fake, lib=_LIBRARY)


_define(
    bitmask_linear,
    "Tensor x, Tensor compressed, Tensor bitmask, Tensor row_offsets, Tensor? bias",
    lambda x, compressed, bitmask, row_offsets, bias: x.new_empty((*x.shape[:-1], bitmask.shape[0])),
)
_define(
    quantized_linear,
    "Tensor x, Tensor codes, Tensor scales, Tensor? bitmask, Tensor row_offsets, Tensor? bias, str packing",
    lambda x, codes, scales, *_: x.new_empty((*x.shape[:-1], scales.shape[0])),
)
