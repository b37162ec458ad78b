"""The weights of a model that an export quantises, and the quantisation of one of them."""

import math
from collections.abc import Container

import torch
from torch import Tensor, nn

from pst_ds.core.packings import DENSE
from pst_ds.core.quantization import Grid, quantize, squared_norms
from pst_ds.export.detect_pattern import detect_pattern
from pst_ds.export.encoding import ExportError
from pst_ds.export.plan import TensorSpec, TensorValues
from pst_ds.formats import FormatError, QuantizedFormat, row_bits
from pst_ds.formats.base_weights import names_in_files
from pst_ds.formats.rows import as_bools
from pst_ds.nn.model_structure import is_inside_block, router_names, untied_linear_layers
from pst_ds.nn.tables.embedding import PSTEmbedding

MIN_ROWS = 16
"""Smaller tables, such as token types, would save nothing, and their error would affect every token."""


def grids(model: nn.Module, values: Grid | None, embeddings: Grid | None) -> dict[str, Grid]:
    """Return the quantisation of every weight that an export quantises, by its names in the model and in files.

    ``values`` is for linear layers inside the blocks, except the routers of experts, which are small and
    sensitive. ``embeddings`` is for embedding tables outside the blocks with at least :data:`MIN_ROWS` rows,
    and for the output layer. Pruned layers are not included: they are quantised wherever they are.
    """
    chosen: dict[int, Grid] = {}
    if embeddings:
        tables = embedding_tables(model).values()
        chosen = {id(table): embeddings for table in tables if table.shape[0] >= MIN_ROWS}
    if values:
        routers = router_names(model)
        for name, module in untied_linear_layers(model).items():
            if is_inside_block(name, model) and name not in routers:
                chosen[id(module.weight)] = values
    return {name: chosen[id(param)] for name, param in _named(model, chosen).items()}


def embedding_tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of embeddings outside the blocks and of the output layer, by their names as in :func:`grids`.

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


def _named(model: nn.Module, chosen: Container[int]) -> dict[str, nn.Parameter]:
    """Return the parameters with these identities, by each of their names in the model and in its files."""
    named = {n: p for n, p in model.named_parameters(remove_duplicate=False) if id(p) in chosen}
    return named | {saved: named[name] for saved, name in names_in_files(model, named).items()}


def quantised_parts(
    output: TensorSpec, form: QuantizedFormat, held: list[Tensor], made: TensorValues
) -> tuple[list[Tensor], int, str, float]:
    """Quantise and pack the only tensor in ``held``, which is removed to free its memory early.

    ``made``: its mask, scales and earlier error, if known. Returns the parts, the number of non-zero quantised values,
    the sparsity pattern, and the relative error. Raises ExportError.
    """
    weight = output.as_matrix(held.pop()).contiguous()
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
    pattern = detect_pattern(keep, output.matrix[1]) if output.is_linear else DENSE
    return list(parts.values()), int(torch.count_nonzero(codes)), pattern, max(relative, made.rounding_error)
