"""The weights of a model that an export quantises, and the quantisation of one of them."""

import math

import torch
from torch import Tensor, nn

from pst_ds.core.packings import DENSE
from pst_ds.core.quantization import Grid, quantize, squared_norms
from pst_ds.formats import FormatError, QuantizedFormat, row_bits
from pst_ds.formats.base_weights import names_in_files
from pst_ds.formats.rows import as_bools
from pst_ds.nn.model_structure import is_inside_block, is_of_transformers, router_names, untied_linear_layers
from pst_ds.nn.tables.rounded import named_parameters, quantisable_tables
from pst_ds.writing.detect_pattern import detect_pattern
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.plan import TensorSpec, TensorValues


def grids(model: nn.Module, values: Grid | None, embeddings: Grid | None) -> dict[str, Grid]:
    """Return the quantisation of every weight that an export quantises, by its names in the model and in files.

    ``values`` is for linear layers inside the blocks, except the routers of experts, which are small and
    sensitive. ``embeddings`` is for embedding tables outside the blocks that are not tiny,
    and for the output layer. Pruned layers are not included: they are quantised wherever they are.
    """
    chosen: dict[int, Grid] = {}
    if embeddings:
        chosen = {id(table): embeddings for table in quantisable_tables(model).values()}
    if values:
        routers, layers = router_names(model), untied_linear_layers(model)
        weights = {f"{name}.weight": module.weight for name, module in layers.items()}
        # A tensor of the files from which several layers are made is copied unchanged.
        written = set(names_in_files(model, weights).values()) if is_of_transformers(model) else set(weights)
        for name, module in layers.items():
            if is_inside_block(name, model) and name not in routers and f"{name}.weight" in written:
                chosen[id(module.weight)] = values
    return {name: chosen[id(param)] for name, param in named_parameters(model, chosen).items()}


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
