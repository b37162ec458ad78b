"""Which weights of a model an export rounds, and the rounding of one of them."""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from torch import Tensor, nn

from pst_ds.core.quantization import Grid, quantize, squared_norms
from pst_ds.export.detect_pattern import detect_pattern
from pst_ds.export.encoding import Encoding
from pst_ds.export.manifest import DENSE, ExportError
from pst_ds.export.plan import PlannedTensor, TensorValues
from pst_ds.formats import FormatError, QuantizedFormat, row_bits
from pst_ds.formats.base_weights import names_in_files
from pst_ds.formats.rows import as_bools
from pst_ds.nn.linear import PSTLinear
from pst_ds.nn.model_structure import is_inside_block, is_linear, router_names, untied_linear_layers
from pst_ds.nn.tables.embedding import PSTEmbedding

LEAST_ROWS = 16
"""Smaller tables, such as those of two kinds of sentences, would save nothing, and are added to every token."""


def grids(model: nn.Module, encoding: Encoding) -> dict[str, Grid]:
    """Return the grid of every weight of ``model`` that is rounded, by its names in the model and in its files.

    ``values`` are for the linear layers inside the blocks, but routers of experts, which are small and decide;
    ``embeddings`` for embedding tables of some rows outside of them and for the output layer. A parameter with a name
    of its own in the files has both. Pruned layers are rounded wherever they are: the caller knows them.
    """
    if not encoding.is_quantized:
        return {}
    chosen: dict[int, Grid] = {}
    if encoding.embeddings:
        tables = embedding_tables(model).values()
        chosen = {id(table): encoding.embeddings for table in tables if table.shape[0] >= LEAST_ROWS}
    if encoding.values:
        routers = router_names(model)
        for name, module in untied_linear_layers(model).items():
            if is_inside_block(name, model) and name not in routers:
                chosen[id(module.weight)] = encoding.values
    return {name: chosen[id(param)] for name, param in _named(model, chosen).items()}


def embedding_tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of embeddings outside the blocks and of the output layer, by their names as of :func:`grids`.

    A tied output layer shares its table.
    """
    found: list[nn.Module] = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | PSTEmbedding) and not is_inside_block(name, model)
    ]
    get = getattr(model, "get_output_embeddings", None)
    output = get() if get is not None else None
    if isinstance(output, nn.Linear):
        found.append(output)
    return _named(model, {id(module.get_parameter("weight")) for module in found})


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of ``model``, pruned ones among them."""
    return [name for name, module in model.named_modules() if is_linear(module) or isinstance(module, PSTLinear)]


def _named(model: nn.Module, chosen: Container[int]) -> dict[str, nn.Parameter]:
    """The parameters of these identities, by every name in the model and in its files."""
    named = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) in chosen}
    return named | {saved: named[name] for saved, name in names_in_files(model, named).items()}


def matrix_of(output: PlannedTensor, tensor: Tensor) -> Tensor:
    """``tensor`` in (O, I) orientation; a stack of experts (E*O, I)."""
    return (tensor.transpose(-1, -2) if output.transposed else tensor).flatten(0, -2)


def rounded(
    output: PlannedTensor, form: QuantizedFormat, held: list[Tensor], made: TensorValues
) -> tuple[list[Tensor], int, str, float]:
    """(parts, non-zero codes, pattern of what is kept, relative error) of the one tensor in ``held``, which is let go.

    ``made``: what else its source says of it. Raises ExportError.
    """
    weight = matrix_of(output, held.pop()).contiguous()
    keep = row_bits(weight) if made.keep is None else made.keep
    kept = as_bools(keep, weight.shape[1])
    try:
        codes, scales = quantize(weight, kept, form.grid, made.scales)
        changed, norm = squared_norms(weight, kept, codes, scales)
        del weight, kept
        parts = form.pack_codes(codes, scales, keep, output.name)
    except FormatError as error:
        raise ExportError(str(error)) from None
    except ValueError as error:
        raise ExportError(f"{output.name}: {error}") from None
    relative = float(f"{math.sqrt(changed / norm) if norm else 0.0:.4g}")
    pattern = detect_pattern(keep.numpy(), output.matrix[1]) if output.is_linear else DENSE
    return list(parts.values()), int(torch.count_nonzero(codes)), pattern, max(relative, made.rounding_error)
