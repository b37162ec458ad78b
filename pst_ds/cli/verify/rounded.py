"""Round a masked training model in place as an export with values on a grid does, to hold the one against the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.export.encoding import Encoding
from pst_ds.export.manifest import TensorEntry, encoding_by, read_manifest
from pst_ds.export.rounding import grids
from pst_ds.formats.base_weights import BaseWeights, names_in_files, saved_tensors
from pst_ds.formats.safetensors_file import DTYPE_OF_CODE
from pst_ds.nn.inject import persistent_buffers, plain_name, pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.merge import plain_tensors
from pst_ds.nn.tables.embedding import pst_embeddings


def encoding_of_folder(folder: str) -> Encoding:
    """Return how an export is stored. Raises ExportError."""
    return encoding_by(read_manifest(Path(folder))[1])


def narrower_dtypes(masked: nn.Module, folder: str) -> dict[str, torch.dtype]:
    """Return the dtypes of the tensors of ``masked`` that have fewer bits in the export in ``folder``, by plain name.

    They have them after ``pst-ds export --dtype bf16`` of a run in fp32. Raises ExportError.
    """
    tensors = plain_tensors(masked)
    model_names = names_in_files(masked, tensors)
    for name in tensors.keys() - set(model_names.values()):  # the files hold it in parts, such as single experts
        model_names |= dict.fromkeys(saved_tensors(masked, {name: tensors[name]}), name)
    model_names |= {name: name for name in tensors}
    entries = [entry for entry in read_manifest(Path(folder))[0] if entry.name in model_names]
    stored = {model_names[entry.name]: DTYPE_OF_CODE[entry.dtype] for entry in entries}
    return {
        name: dtype
        for name, dtype in stored.items()
        if tensors[name].is_floating_point() and dtype.itemsize < tensors[name].dtype.itemsize
    }


@torch.no_grad()
def cast_model(masked: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give tensors of ``masked`` in place the numbers that they have in these ``dtypes``, and keep their own dtypes.

    Layers that rounded in training stay as they are.
    """
    layers = {plain_name(name, layer): layer for name, layer in pst_layers(masked).items()}
    embeddings = {f"{name}.weight": embedding for name, embedding in pst_embeddings(masked).items()}
    tensors = {**dict(masked.named_parameters()), **persistent_buffers(masked)}
    for name, dtype in dtypes.items():
        if name in layers:
            if not layers[name].rounds:
                settle(layers[name], layers[name].masked_weight().to(dtype))
        elif name in embeddings:
            settle(embeddings[name], embeddings[name].updated_weight().to(dtype))
        else:
            tensors[name].copy_(tensors[name].to(dtype))


@torch.no_grad()
def round_model(masked: nn.Module, folder: str, base_path: str, *, in_fp32: bool = False) -> dict[str, Tensor]:
    """Round the weights of ``masked`` that the export in ``folder`` has on a grid.

    Returns the rounded parameters of modules that are not pruned layers, by name.

    ``in_fp32``: their modules become fp32, which has every code times its scale; otherwise they are rounded once more
    to the model's own dtype, as a folder's are when it is loaded.

    Frozen weights are read from the base model at ``base_path``, and only which tensors are rounded to what, and the
    dtype that they had before, from the folder. Masks stay, and updates become part of the weights. Layers that rounded
    in training stay as they are. Raises ExportError.
    """
    entries, about = read_manifest(Path(folder))
    by_name, encoding = {entry.name: entry for entry in entries}, encoding_by(about)
    for name, layer in pst_layers(masked).items():
        if encoding.values is not None and not layer.rounds:
            weight, is_transposed = layer.masked_weight().view(layer.weight_shape), layer.layout.transposed
            oriented = (weight.transpose(-1, -2) if is_transposed else weight).contiguous()
            rows = _rounded(oriented.flatten(0, -2), encoding.values, by_name.get(plain_name(name, layer)), in_fp32)
            oriented = rows.view(oriented.shape)
            _widen(layer, in_fp32)
            settle(layer, (oriented.transpose(-1, -2) if is_transposed else oriented).contiguous())
    base = BaseWeights(base_path, getattr(masked, "base_model_prefix", ""))
    embeddings = pst_embeddings(masked)
    if any(layer.rounds for layer in pst_layers(masked).values()):
        encoding = replace(encoding, values=None)  # what training left as it is stays so in the file
    rounded: dict[str, Tensor] = {}
    for name, grid in grids(masked, encoding).items():
        owner = name.removesuffix(".weight")
        if owner in embeddings:
            weight = _rounded(embeddings[owner].updated_weight(), grid, by_name.get(name), in_fp32)
            _widen(embeddings[owner], in_fp32)
            settle(embeddings[owner], weight)
        elif name in dict(masked.named_parameters()):
            param = _before_rounding(masked, name, base)
            is_transposed = type(masked.get_submodule(owner)).__name__ == "Conv1D"
            weight = _rounded(param.t().contiguous() if is_transposed else param, grid, by_name.get(name), in_fp32)
            _widen(masked.get_submodule(owner), in_fp32)
            masked.get_parameter(name).copy_(weight.t() if is_transposed else weight)
        else:
            continue  # the files' name of a parameter that has another one
        rounded[name] = masked.get_parameter(name)
    return rounded


def _before_rounding(masked: nn.Module, name: str, base: BaseWeights) -> Tensor:
    """Return the values that an export quantises.

    A frozen parameter is read from the base's files, which may be fp32 although the run is in bf16.
    """
    param = masked.get_parameter(name)
    source = None if param.requires_grad else base.find(name)
    if source is None or base.size(source)[1] != tuple(param.shape):  # trained, or trimmed to fewer tokens
        return param
    return base.read(source).to(param.device)


def _rounded(weight: Tensor, grid: Grid, entry: TensorEntry | None, in_fp32: bool) -> Tensor:
    """``weight``, (O, I), on its grid, in fp32 or its own dtype."""
    before = weight if entry is None else weight.to(DTYPE_OF_CODE[entry.dtype])
    found = round_to_grid(before.detach().float().cpu(), None, grid)
    return found.to(weight.device, torch.float32 if in_fp32 else weight.dtype)


def _widen(module: nn.Module, in_fp32: bool) -> None:
    if in_fp32:
        nn.Module.float(module)


def settle(module: Any, weight: Tensor) -> None:
    """Make ``weight`` all that a PST module multiplies with, but for its mask."""
    if isinstance(module, PSTLayer):
        module.hold(weight)
    else:
        module.weight.copy_(weight)
    if module.pst_U is not None:
        module.pst_U.zero_()
