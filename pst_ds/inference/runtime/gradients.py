"""Gradients of the products with packed weights for torch.compile, with respect to x and the bias.

The backward pass expands the weight by an operator, so that graphs keep it packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pst_ds.formats import FORMATS
from pst_ds.inference.runtime import ops

_LIBRARY = torch.library.Library("pst_ds", "FRAGMENT")
for _schema in (
    "expand_bitmask(Tensor compressed, Tensor bitmask, Tensor row_offsets, int columns) -> Tensor",
    "expand_csr(Tensor crow_indices, Tensor col_indices, Tensor values, int columns) -> Tensor",
    "expand_codes(Tensor codes, Tensor scales, Tensor? bitmask, int columns, str packing, ScalarType dtype) -> Tensor",
):
    _LIBRARY.define(_schema)


def _expand_bitmask(compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, columns: int) -> Tensor:
    if compressed.device.type != "cpu":
        return ops.expand_on_device(compressed, bitmask, columns)
    parts = {"compressed": compressed, "bitmask": bitmask, "row_offsets": row_offsets}
    return FORMATS["bitmask"].unpack({**parts, "shape": torch.tensor([bitmask.shape[0], columns])})


def _expand_csr(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    parts = {"crow_indices": crow_indices, "col_indices": col_indices, "values": values}
    return FORMATS["csr"].unpack({**parts, "shape": torch.tensor([crow_indices.numel() - 1, columns])})


for _name, _function in (
    ("expand_bitmask", _expand_bitmask),
    ("expand_csr", _expand_csr),
    ("expand_codes", ops.expand_codes),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("pst_ds::expand_bitmask", lib=_LIBRARY)
def _(compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, columns: int) -> Tensor:
    return compressed.new_empty((bitmask.shape[0], columns))


@torch.library.register_fake("pst_ds::expand_csr", lib=_LIBRARY)
def _(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    return values.new_empty((crow_indices.shape[0] - 1, columns))


@torch.library.register_fake("pst_ds::expand_codes", lib=_LIBRARY)
def _(codes: Tensor, scales: Tensor, bitmask: Tensor | None, columns: int, packing: str, dtype: torch.dtype) -> Tensor:
    return scales.new_empty((scales.shape[0], columns), dtype=dtype)


def _register(name: str, bias_at: int, expand: Callable[..., Tensor]) -> None:
    """Register the gradient of an operator. ``expand`` returns the weight (O, I) from its arguments after x, I and a
    dtype.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest = inputs
        ctx.columns, ctx.dtype, ctx.num_inputs = x.shape[-1], x.dtype, len(inputs)
        ctx.others = [None if isinstance(one, Tensor) else one for one in rest]
        ctx.save_for_backward(*(one if isinstance(one, Tensor) else None for one in rest))

    def differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rest = [
            saved if saved is not None else other for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        found: list[Tensor | None] = [None] * ctx.num_inputs
        if ctx.needs_input_grad[0]:
            found[0] = ops.dense_linear(grad_y, expand(rest, ctx.columns, ctx.dtype).t(), None)
        if ctx.needs_input_grad[bias_at]:
            found[bias_at] = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
        return tuple(found)

    torch.library.register_autograd(f"pst_ds::{name}", differentiate, setup_context=keep, lib=_LIBRARY)


_register("bitmask_linear", 4, lambda rest, columns, dtype: torch.ops.pst_ds.expand_bitmask(*rest[:3], columns))
_register("csr_linear", 4, lambda rest, columns, dtype: torch.ops.pst_ds.expand_csr(*rest[:3], columns).to(dtype))
_register(
    "quantized_linear",
    5,
    lambda rest, columns, dtype: torch.ops.pst_ds.expand_codes(*rest[:3], columns, rest[5], dtype),
)
