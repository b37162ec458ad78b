"""Change a masked training model in place as its export was changed: quantised, cast, or trimmed to fewer tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.data.tasks import ExampleSet
from pst_ds.export.encoding import Encoding, ExportError
from pst_ds.export.manifest import ExportedTensor, encoding_by, read_manifest
from pst_ds.export.quantization import grids
from pst_ds.export.trimmed_vocabulary import take_rows
from pst_ds.formats.base_weights import BaseWeights, names_in_files, saved_tensors
from pst_ds.nn.inject import persistent_buffers, plain_name, pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.merge import plain_tensors
from pst_ds.nn.model_structure import is_conv1d
from pst_ds.nn.tables.embedding import pst_embeddings
from pst_ds.train.run import RunContext


def encoding_of_folder(folder: Path) -> Encoding:
    """Return how an export is stored. Raises ExportError."""
    return encoding_by(read_manifest(folder)[1])


def narrower_dtypes(masked: nn.Module, folder: Path) -> dict[str, torch.dtype]:
    """Return the dtypes of the export's tensors that are narrower than those of ``masked``, by plain name.

    ``pst-ds export --dtype bf16`` of a run in fp32 has such tensors. Raises ExportError.
    """
    tensors = plain_tensors(masked)
    model_names = names_in_files(masked, tensors)
    for name in tensors.keys() - set(model_names.values()):  # saved as several tensors, such as single experts
        model_names |= dict.fromkeys(saved_tensors(masked, {name: tensors[name]}), name)
    model_names |= {name: name for name in tensors}
    stored = {model_names[t.name]: t.dtype for t in read_manifest(folder)[0] if t.name in model_names}
    return {
        name: dtype
        for name, dtype in stored.items()
        if tensors[name].is_floating_point() and dtype.itemsize < tensors[name].dtype.itemsize
    }


@torch.no_grad()
def cast_model(masked: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Round tensors of ``masked`` to the values of ``dtypes``, in place; they keep their own dtypes.

    Layers that were trained with quantisation stay unchanged.
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
def quantise_model(masked: nn.Module, folder: Path, base_path: str, *, in_fp32: bool = False) -> dict[str, Tensor]:
    """Quantise the weights of ``masked`` that the export has quantised.

    Masks stay, and updates are merged into the weights. Layers that were trained with quantisation stay unchanged.
    Frozen weights are read from the base model; only the names, quantisation and dtypes come from the export.

    Args:
        masked: the masked training model, changed in place.
        folder: the export.
        base_path: the base model.
        in_fp32: convert the quantised modules to fp32, which holds every value exactly; otherwise values are rounded
            to the model's dtype, as they are when the export is loaded.

    Returns:
        The quantised parameters of modules that are not pruned layers, by name.

    Raises ExportError.
    """
    tensors, facts = read_manifest(folder)
    by_name, encoding = {tensor.name: tensor for tensor in tensors}, encoding_by(facts)
    for name, layer in pst_layers(masked).items():
        if encoding.values is not None and not layer.rounds:
            _quantise_layer(layer, encoding.values, by_name.get(plain_name(name, layer)), in_fp32)
    base = BaseWeights(base_path, getattr(masked, "base_model_prefix", ""))
    embeddings = pst_embeddings(masked)
    quantised_in_training = any(layer.rounds for layer in pst_layers(masked).values())
    values = None if quantised_in_training else encoding.values  # the export leaves other linear layers unchanged
    quantised: dict[str, Tensor] = {}
    for name, grid in grids(masked, values, encoding.embeddings).items():
        owner = name.removesuffix(".weight")
        if owner in embeddings:
            weight = _quantised(embeddings[owner].updated_weight(), grid, by_name.get(name), in_fp32)
            _widen(embeddings[owner], in_fp32)
            settle(embeddings[owner], weight)
        elif name in dict(masked.named_parameters()):
            param = _before_quantisation(masked, name, base)
            is_transposed = is_conv1d(masked.get_submodule(owner))
            weight = _quantised(param.t().contiguous() if is_transposed else param, grid, by_name.get(name), in_fp32)
            _widen(masked.get_submodule(owner), in_fp32)
            masked.get_parameter(name).copy_(weight.t() if is_transposed else weight)
        else:
            continue  # the name in the files of a parameter that has another name in the model
        quantised[name] = masked.get_parameter(name)
    return quantised


def _quantise_layer(layer: PSTLayer, grid: Grid, exported: ExportedTensor | None, in_fp32: bool) -> None:
    weight, is_transposed = layer.masked_weight().view(layer.weight_shape), layer.layout.transposed
    oriented = (weight.transpose(-1, -2) if is_transposed else weight).contiguous()
    rows = _quantised(oriented.flatten(0, -2), grid, exported, in_fp32)
    oriented = rows.view(oriented.shape)
    _widen(layer, in_fp32)
    settle(layer, (oriented.transpose(-1, -2) if is_transposed else oriented).contiguous())


def _before_quantisation(masked: nn.Module, name: str, base: BaseWeights) -> Tensor:
    """Return the values that an export quantises.

    A frozen parameter is read from the base's files, which may be fp32 although the run is in bf16.
    """
    param = masked.get_parameter(name)
    source = None if param.requires_grad else base.find(name)
    if source is None or base.size(source)[1] != tuple(param.shape):  # trained, or trimmed to fewer tokens
        return param
    return base.read(source).to(param.device)


def _quantised(weight: Tensor, grid: Grid, exported: ExportedTensor | None, in_fp32: bool) -> Tensor:
    """Return the quantised values of ``weight`` (O, I), in fp32 or its own dtype."""
    before = weight if exported is None else weight.to(exported.dtype)
    found = round_to_grid(before.detach().float().cpu(), None, grid)
    return found.to(weight.device, torch.float32 if in_fp32 else weight.dtype)


def _widen(module: nn.Module, in_fp32: bool) -> None:
    if in_fp32:
        nn.Module.float(module)


def settle(module: Any, weight: Tensor) -> None:
    """Make ``weight`` the whole weight of a PST layer or embedding, apart from its mask: the update becomes zero."""
    if isinstance(module, PSTLayer):
        module.hold(weight)
    else:
        module.weight.copy_(weight)
    if module.pst_U is not None:
        module.pst_U.zero_()


def tokens_of_folder(folder: Path) -> list[int]:
    """Return the old id of each token of an export; [] if it has all tokens. Raises ExportError."""
    return list(read_manifest(folder)[1].get("tokens_kept") or [])


def trim_model(masked: nn.Module, context: RunContext, folder: Path, kept: list[int]) -> RunContext:
    """Keep only the rows of the tokens ``kept`` in ``masked``; return ``context`` with the export's tokenizer.

    Raises ExportError if the tokenizer has other tokens.
    """
    tokenizer = type(context.tokenizer).from_pretrained(folder)
    if max(tokenizer.get_vocab().values()) >= len(kept):
        raise ExportError(f"{folder}: the manifest has {len(kept)} tokens, and the tokenizer has more")
    take_rows(masked, kept)
    return replace(context, tokenizer=tokenizer)


def count_same_tokens(
    before: RunContext, whole: ExampleSet, after: RunContext, examples: ExampleSet, kept: list[int]
) -> int | None:
    """Count the examples whose tokens did not change; None if examples are packed into sequences."""
    if before.run.task_facts.packs_text or len(whole) != len(examples):
        return None

    def ids(context: RunContext, of: ExampleSet, index: int) -> list[int]:
        found: list[int] = context.task.collate(of, [index], context.tokenizer)["input_ids"].flatten().tolist()
        return found

    return sum([kept[new] for new in ids(after, examples, i)] == ids(before, whole, i) for i in range(len(examples)))
