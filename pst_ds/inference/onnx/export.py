"""Trace a model to an ONNX graph whose sparse layers stay packed."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from pst_ds.export.encoding import ExportError
from pst_ds.inference.onnx.fuse import fuse
from pst_ds.inference.onnx.nodes import ATTENTION, EmbeddingNode, SparseLinearNode, Table, attention
from pst_ds.inference.runtime import SparseLinear

OPSET = 20
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Possible inputs of a graph, each (batch, tokens) int64, in this order."""


class _ByPosition(nn.Module):
    """A model that takes its inputs by position and returns its named outputs in order."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        results = self.model(**dict(zip(self.inputs, values, strict=True)), return_dict=True)
        return tuple(results[name] for name in self.outputs)


def input_names(model: PreTrainedModel) -> list[str]:
    """Return the inputs of a model's graph: the :data:`INPUTS` that its forward accepts and has a table for."""
    takes = inspect.signature(model.forward).parameters
    names = [name for name in INPUTS if name in takes]
    if getattr(model.config, "type_vocab_size", 0) < 2:  # with one type, as in RoBERTa, 0 is the only valid value
        names = [name for name in names if name != "token_type_ids"]
    return names


def sparse_graph(model: PreTrainedModel, tables: Mapping[str, Table], outputs: Sequence[str]) -> ir.Model:
    """Trace ``model``, whose packed layers are SparseLinear, in fp32 with its sparse products as single nodes.

    ``tables``: embeddings that stay in their stored form, by name. ``outputs``: fields of the forward pass's result.
    The model is consumed: its layers become nodes without values. Raises ExportError if torch's exporter cannot trace
    it.
    """
    _register_attention()
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    nodes: dict[str, nn.Module] = {name: SparseLinearNode(layer) for name, layer in sparse.items()}
    for name, (values, scales, bits) in tables.items():
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        nodes[name] = EmbeddingNode(values, scales, bits, embedding.embedding_dim)
    for name in nodes:  # not cast with the rest
        model.set_submodule(name, nn.Identity())
    nn.Module.float(model).eval()  # transformers refuses to cast what it loaded as quantised
    for name, node in nodes.items():
        model.set_submodule(name, node)
    model.set_attn_implementation(ATTENTION)
    traced = _trace(model, outputs)
    fuse(traced.graph)
    return traced


def plain_graph(model: PreTrainedModel, outputs: Sequence[str]) -> ir.Model:
    """Trace ``model``, whose layers are dense, in fp32 with ONNX's standard operators. Raises ExportError."""
    return _trace(nn.Module.float(model).eval(), outputs)


def _register_attention() -> None:
    """Register :func:`~pst_ds.inference.onnx.nodes.attention` with transformers, once per process."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)


def _trace(model: PreTrainedModel, outputs: Sequence[str]) -> ir.Model:
    inputs = input_names(model)
    most = getattr(model.config, "max_position_embeddings", None)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=most or 1 << 20)}
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _ByPosition(model, inputs, outputs),
                tuple(torch.ones(2, 8, dtype=torch.long) for _ in inputs),
                input_names=inputs,
                output_names=list(outputs),
                dynamic_shapes={"values": tuple(axes for _ in inputs)},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"{type(model).__name__} cannot be written as a graph: {_cause(error)}") from error
    assert program is not None
    if any(isinstance(size, int) for value in program.model.graph.inputs for size in value.shape or ()):
        raise ExportError(
            f"{type(model).__name__} cannot be written as a graph: torch's exporter fixes the number of tokens. Use "
            "--format bitmask"
        )
    return program.model


def _cause(error: BaseException) -> str:
    """Return the first line of the original error of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's messages about axes that share a size."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
