"""Pack dense weights into sparse layers without a model, for tests and benchmarks."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from pst_ds.formats import FORMATS, PackedFormat
from pst_ds.runtime import SparseLinear
from pst_ds.runtime.experts import SparseExperts

L = TypeVar("L", bound=SparseLinear)


def packed_linear(weight: Tensor, bias: Tensor | None = None, format: str | PackedFormat = "bitmask") -> SparseLinear:
    """Pack the non-zero weights of ``weight`` (O, I)."""
    form, parts, count = _packed(weight, format)
    outputs, inputs = weight.shape
    layer = SparseLinear(inputs, outputs, count, format=form, bias=bias is not None, dtype=weight.dtype)
    return _filled(layer, parts | ({} if bias is None else {"bias": bias}))


def packed_experts(stack: Tensor, format: str | PackedFormat = "bitmask") -> SparseExperts:
    """Pack the non-zero weights of a ``stack`` (E, O, I)."""
    form, parts, count = _packed(stack.flatten(0, 1), format)
    experts, outputs, inputs = stack.shape
    return _filled(SparseExperts(experts, inputs, outputs, count, format=form, dtype=stack.dtype), parts)


def _packed(weight: Tensor, format: str | PackedFormat) -> tuple[PackedFormat, dict[str, Tensor], int]:
    form = FORMATS[format] if isinstance(format, str) else format
    parts = form.pack(weight)
    return form, parts, form.stored_of(parts[form.values_name].numel())


def _filled(layer: L, tensors: dict[str, Tensor]) -> L:
    layer.load_state_dict(tensors)
    layer.check("packed")
    return layer
