"""The weights of a model that an export quantises, and the quantisation of one of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pst_ds.core.quantization import Grid, quantize, squared_norms
from pst_ds.formats import FormatError, QuantizedFormat, row_bits
from pst_ds.formats.base_weights import names_in_files
from pst_ds.formats.rows import as_bools
from pst_ds.nn.model_structure import is_inside_block, is_of_transformers, router_names, untied_linear_layers
from pst_ds.nn.tables.rounded import named_parameters, quantisable_tables
from pst_ds.writing.detect_pattern import NO_PATTERN, detect_pattern
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.plan import TensorSpec, TensorValues


def grids(model: nn.Module, values: Grid | None, embeddings: Grid | None) -> dict[str, Grid]:
    """Return the quantisation of every weight that an export quantises, by its names in the model and in files.

    ``values`` is for linear layers inside the blocks, except the routers of experts, which are small and
    sensitive. ``embeddings`` is for embedding tables outside the blocks that are not tiny,
    and for the output layer. Pruned layers are not included: they are quantised wherever they are.
    """
    # by object, because tied weights and tensors of files are one weight under several names
    chosen: dict[int, Grid] = {}
    if embeddings:
        chosen = {id(table): embeddings for table in quantisable_tables(model).values()}
    if values:
        routers = router_names(model)
        layers = untied_linear_layers(model)
        weights = {f"{name}.weight": module.weight for name, module in layers.items()}
        written = set(weights)
        if is_of_transformers(model):
            # a tensor of the files from which several layers are made is copied unchanged
            written = set(names_in_files(model, weights).values())
        for name, module in layers.items():
            if is_inside_block(name, model) and name not in routers and f"{name}.weight" in written:
                chosen[id(module.weight)] = values
    return {name: chosen[id(param)] for name, param in named_parameters(model, chosen).items()}


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """The parts of a packed tensor, and what the manifest says about its values."""

    parts: list[Tensor]
    nonzero: int
    """Values, or quantised values, that are not 0."""
    pattern: str
    """Sparsity pattern."""
    rounding_error: float = 0.0
    """Norm of the quantisation error, relative to the norm of the kept weights."""


def quantised_parts(
    output: TensorSpec, form: QuantizedFormat, weights: list[Tensor], known: TensorValues
) -> PackedTensor:
    """Quantise and pack the only tensor in ``weights``, which is removed to free its memory early.

    ``known``: its mask, scales and earlier error, if known. Raises ExportError.
    """
    weight = output.as_matrix(weights.pop()).contiguous()
    keep = known.keep
    if keep is None:
        keep = row_bits(weight)
    kept = as_bools(keep, weight.shape[1])
    try:
        codes, scales = quantize(weight, kept, form.grid, known.scales)
        changed, norm = squared_norms(weight, kept, codes, scales)
        del weight, kept
        parts = form.pack_codes(codes, scales, keep, output.name)
    except FormatError as error:
        raise ExportError(str(error)) from None
    except ValueError as error:
        raise ExportError(f"{output.name}: {error}") from None
    relative_error = 0.0
    if norm:
        relative_error = math.sqrt(changed / norm)
    pattern = NO_PATTERN
    if output.is_linear:
        # of the mask, because quantisation turns small kept weights into zeros as well
        _, inputs = output.matrix
        pattern = detect_pattern(keep, inputs)
    return PackedTensor(
        parts=list(parts.values()),
        nonzero=int(torch.count_nonzero(codes)),
        pattern=pattern,
        # a weight that was quantised before keeps the error that it had then
        rounding_error=max(float(f"{relative_error:.4g}"), known.rounding_error),
    )
