"""Trace a model to an ONNX graph whose packed layers and embeddings become single nodes of the domain "pst_ds".

operators.cpp implements the operators and documents their inputs.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from pst_ds.errors import first_line
from pst_ds.formats import BitmaskFormat, QuantizedFormat
from pst_ds.hf.model_folder import input_names
from pst_ds.inference.onnx.fuse import DOMAIN, fuse
from pst_ds.runtime import SparseLinear, sparse_layers
from pst_ds.runtime.native_loop import narrowed
from pst_ds.writing.encoding import ExportError

OPSET = 20
"""Version of ONNX's operators."""
VERSION = 1
"""Version of our operators."""
ATTENTION = "pst_onnx"
"""Name under which :func:`attention` is registered with transformers."""
Table = tuple[Tensor, Tensor | None, int]
"""Values, scales and bits of an embedding, as EmbeddingNode reads them."""


def sparse_graph(model: PreTrainedModel, tables: Mapping[str, Table], outputs: Sequence[str]) -> ir.Model:
    """Trace ``model``, whose packed layers are SparseLinear, in fp32 with its sparse products as single nodes.

    ``tables``: embeddings that stay in their stored form, by name. ``outputs``: fields of the forward pass's result.
    Consumes the model: its layers become nodes without values. Raises ExportError if torch cannot trace it.
    """
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    nodes: dict[str, nn.Module] = {name: SparseLinearNode(layer) for name, layer in sparse_layers(model).items()}
    for name, table in tables.items():
        nodes[name] = EmbeddingNode(*table, columns=model.get_submodule(name).get_parameter("weight").shape[1])
    # out of the model while it is cast: quantised values must keep their dtype
    for name in nodes:
        model.set_submodule(name, nn.Identity())
    # transformers refuses to cast what it loaded as quantised
    nn.Module.float(model).eval()
    for name, node in nodes.items():
        model.set_submodule(name, node)
    model.set_attn_implementation(ATTENTION)
    traced = _trace(model, outputs)
    fuse(traced.graph)
    return traced


def plain_graph(model: PreTrainedModel, outputs: Sequence[str]) -> ir.Model:
    """Trace ``model``, whose layers are dense, in fp32 with ONNX's standard operators. Raises ExportError."""
    return _trace(nn.Module.float(model).eval(), outputs)


def _trace(model: PreTrainedModel, outputs: Sequence[str]) -> ir.Model:
    """Return the graph of ``model`` for any number of sequences and tokens. Raises ExportError."""
    inputs = input_names(model)
    # torch refuses an axis that could be longer than the model's positions
    most_tokens = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=most_tokens)}
    # 2 rows of 8 tokens, since a size of 1 would be taken for a constant
    examples = tuple(torch.ones(2, 8, dtype=torch.long) for _ in inputs)
    disabled = logging.root.manager.disable
    # torch's messages about axes that share a size
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                _ByPosition(model, inputs, outputs),
                examples,
                input_names=inputs,
                output_names=list(outputs),
                dynamic_shapes={"values": (axes,) * len(inputs)},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"{type(model).__name__} cannot be written as a graph: {_cause(error)}") from error
        finally:
            logging.disable(disabled)
    assert program is not None
    # a free axis has a name as its size
    for value in program.model.graph.inputs:
        if any(isinstance(size, int) for size in value.shape or ()):
            why = "cannot be written as a graph: torch's exporter fixes the number of tokens. Choose another format"
            raise ExportError(f"{type(model).__name__} {why}")
    return program.model


def _cause(error: BaseException) -> str:
    """Return the first line of the original error of a chain."""
    # the exporter's errors say only in which of its steps they were raised
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


class _ByPosition(nn.Module):
    """A model that takes its inputs by position and returns its named outputs in order."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        results = self.model(**dict(zip(self.inputs, values, strict=True)), return_dict=True)
        return tuple(results[name] for name in self.outputs)


class SparseLinearNode(nn.Module):
    """y = x W' + bias with the parts of a packed weight: (..., in_features) to (..., out_features) fp32."""

    mask: Tensor
    values: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: SparseLinear):
        """Use the parts of a checked ``layer``, converted to a bitmask if it has another format."""
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bits = 0
        form = layer.format
        parts = layer.parts()
        scales = None
        if isinstance(form, QuantizedFormat) and not form.is_dense:
            # with a bit per weight already, next to the quantised values
            self.bits = form.grid.bits
            values = parts["codes"].reshape(-1)
            scales = parts["scales"]
        else:
            # the operator reads one layout of floating-point weights
            if not form.has_row_bits:
                form = BitmaskFormat()
                parts = form.pack(layer.dense_weight())
            values = narrowed(parts[form.values_name].reshape(-1))
        self.register_buffer("mask", parts["bitmask"].contiguous())
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """Reject models that read a weight without calling its layer, as Mamba's mixers do."""
        raise NotImplementedError("other code reads the weight of a packed layer. Choose another format")

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
        """``values``: (tokens, columns) int8 or bf16, or (tokens, ceil(columns / 2)) uint8 with two codes per byte."""
        super().__init__()
        self.bits = bits
        self.columns = columns
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
    # the operator would compute something else without a message
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with soft-capped scores or sinks is not supported")
    batch, heads, queries, size = query.shape
    attributes = {
        "heads": heads,
        "key_value_heads": key.shape[1],
        "head_size": size,
        # the usual factor, if a model does not state another
        "scale": size**-0.5 if scaling is None else float(scaling),
    }
    inputs = [query, key, value, attention_mask]
    return _node("Attention", inputs, attributes, (batch, queries, heads, size)), None


def _node(name: str, inputs: list[Tensor | None], numbers: Mapping[str, int | float], shape: tuple[int, ...]) -> Tensor:
    """Return a result without values: a model with such nodes can only be traced."""
    op = f"{DOMAIN}::{name}"
    return torch.onnx.ops.symbolic(op, inputs, {**numbers}, dtype=torch.float32, shape=shape, version=VERSION)
