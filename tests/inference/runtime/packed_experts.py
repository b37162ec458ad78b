"""Packs stacks of experts without a model."""

from __future__ import annotations

from pst_ds.formats import FORMATS
from pst_ds.inference.runtime.experts import SparseExperts


def of_stack(stack, format="bitmask"):
    """The non-zero weights of a ``stack``, (E, O, I)."""
    form = FORMATS[format] if isinstance(format, str) else format
    parts = form.pack(stack.detach().flatten(0, 1))
    experts, outputs, inputs = stack.shape
    count = form.stored_of(parts[form.values_name].numel())
    return SparseExperts(experts, inputs, outputs, count, format=form, dtype=stack.dtype, device="meta")._with_parts(
        parts
    )
