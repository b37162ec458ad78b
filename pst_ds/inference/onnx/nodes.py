"""Modules and functions that torch's exporter writes as single nodes of the domain "pst_ds".

Their results are without values: a model that contains them can only be traced. operators.cpp implements the operators
and documents their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.formats import FORMATS, QuantizedFormat
from pst_ds.inference.runtime import SparseLinear
from pst_ds.inference.runtime.dense import narrowed

DOMAIN, VERSION = "pst_ds", 1
ATTENTION = "pst_onnx"
"""Name under which :func:`attention` is registered with transformers."""
Table = tuple[Tensor, Tensor | None, int]
"""Values, scales and bits of an embedding, as EmbeddingNode takes them."""


class SparseLinearNode(nn.Module):
    """y = x W' + bias with the parts of a packed weight: (..., in_features) to (..., out_features) fp32."""

    mask: Tensor
    values: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: SparseLinear):
        """Use the parts of a checked ``layer``, converted to a bitmask if it has another format."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        form, parts = layer.format, layer.parts()
        if isinstance(form, QuantizedFormat) and form.packing in ("bitmask", "2:4"):
            self.bits = form.grid.bits
            values, scales = parts["codes"].reshape(-1), parts["scales"]
        else:
            self.bits, scales = 0, None
            if form.name not in ("bitmask", "2:4"):
                form = FORMATS["bitmask"]
                parts = form.pack(layer.dense_weight())
            values = parts[form.values_name].reshape(-1)
        self.register_buffer("mask", parts["bitmask"].contiguous())
        self.register_buffer("values", values if self.bits else narrowed(values))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """Reject models that read a weight without calling its layer, as Mamba's mixers do."""
        raise NotImplementedError("other code reads the weight of a packed layer. Use --format bitmask")

    def forward(self, x: Tensor) -> Tensor:
        return _node(
            "SparseLinear",
            [x, self.mask, self.values, self.scales, self.bias],
            {"bits": self.bits, "columns": self.in_features},
            (*x.shape[:-1], self.out_features),
        )


class EmbeddingNode(nn.Module):
    """Rows of a table of codes, or of bf16 numbers: ids (...) int64 to (..., columns) fp32."""

    values: Tensor
    scales: Tensor | None

    def __init__(self, values: Tensor, scales: Tensor | None, bits: int, columns: int):
        """``values``: (tokens, columns) int8 or bf16, or (tokens, ceil(columns / 2)) uint8, two 4-bit codes per
        byte.
        """
        super().__init__()
        self.bits, self.columns = bits, columns
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        attributes = {"bits": self.bits, "columns": self.columns}
        return _node("Embedding", [ids, self.values, self.scales], attributes, (*ids.shape, self.columns))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Return softmax(scale q k' + mask) v, with the signature that transformers expects.

    ``query`` (batch, heads, queries, head_size), ``key`` and ``value`` (batch, key_value_heads, keys, head_size), and
    the mask (batch, heads or 1, queries, keys), which is added. The result is (batch, queries, heads, head_size).
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with soft-capped scores or sinks is not supported")
    batch, heads, queries, size = query.shape
    attributes = {
        "heads": heads,
        "key_value_heads": key.shape[1],
        "head_size": size,
        "scale": float(scaling if scaling is not None else size**-0.5),
    }
    inputs = [query, key, value, attention_mask]
    return _node("Attention", inputs, attributes, (batch, queries, heads, size)), None


def _node(name: str, inputs: list[Tensor | None], attributes: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=torch.float32, shape=shape, version=VERSION
    )
