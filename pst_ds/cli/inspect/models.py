"""Model folders and token stores for ``pst-ds inspect``."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pst_ds.cli.inspect.layers import Facts, Inspection, Layer, add_experts, layer_of, sparsity_of
from pst_ds.cli.plan import name_across_blocks
from pst_ds.core.bits import INT_OF_SIZE
from pst_ds.data.tokens import store
from pst_ds.errors import InputError
from pst_ds.formats import row_bits
from pst_ds.formats.base_weights import BaseWeights
from pst_ds.formats.rows import row_counts
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, TensorFile
from pst_ds.nn.addition import read_additions
from pst_ds.nn.config_values import require_plausible_config
from pst_ds.progress import Progress
from pst_ds.prune.folder import RECORD_FILE
from pst_ds.writing.detect_pattern import detect_pattern
from pst_ds.writing.encoding import QUANT_METHOD, ExportError, encoding_of
from pst_ds.writing.from_folder import CONFIG_FILE
from pst_ds.writing.manifest import ExportedTensor, count_nonzero, read_manifest, read_table
from pst_ds.writing.pruning_record import RecordedLayer, read_pruning_record
from pst_ds.writing.refilled import is_pruned, refilled_text
from pst_ds.writing.to_folder import storage_facts, tensor_counts

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
"""Patterns of names. An index without its files is a damaged download, and not a model without weights."""
_FACTS_OF_MANIFEST = (
    "architecture",
    "step",
    "sparsity_requested",
    "sparsity_measured",
    "refilled",
    "computed_in",
    "metrics",
    "base_model",
    "base_fingerprint",
)
"""Values of a manifest that are shown unchanged."""
_SIZES_IN_CONFIG = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
"""Values of a config that are shown unchanged."""


def export_folder(path: Path) -> Inspection:
    """Describe an export from its manifest and the headers of its files. Raises InputError if one is damaged."""
    entries, about = read_manifest(path)
    files = _weight_files(path, entries)
    layers = [_exported(entry, files, path) for entry in entries]
    encoding = encoding_of(about["kind"], about)
    facts: Facts = {"format": about["kind"]}
    facts |= encoding.facts()
    for key in _FACTS_OF_MANIFEST:
        facts[key] = about.get(key)
    # an export of a model folder is not of a run
    run = about.get("run") or {}
    facts["method"] = run.get("method")
    facts["dtypes"] = _dtypes(layers)
    facts |= tensor_counts(entries)
    facts["parameters"] = _parameters(layers)
    facts["weight_files"] = sorted(files)
    facts |= storage_facts(entries, [layer["bytes"] for layer in layers])
    facts["additions"] = _additions(path)
    file_bytes = sum((path / name).stat().st_size for name in files)
    facts |= _sizes(file_bytes, about.get("dense_bf16_bytes"))
    note = f"sparsity and patterns are from the manifest. pst-ds verify {path} checks the files"
    note += _note_on_refilled(about.get("refilled"))
    return Inspection(f"{path}: an export, {encoding}", facts, layers, note)


def _weight_files(path: Path, entries: Iterable[ExportedTensor]) -> dict[str, TensorFile]:
    """Open the weight files of an export; return them by name. Raises ExportError if one is missing or damaged."""
    names: set[str] = set()
    for entry in entries:
        names.update(part.file for part in entry.parts)
    files: dict[str, TensorFile] = {}
    # sorted, so that of several missing files always the same one is reported
    for name in sorted(names):
        if not (path / name).is_file():
            raise ExportError(f"{path / name} is missing")
        files[name] = TensorFile(path / name)
    return files


def _note_on_refilled(names: Sequence[str] | None) -> str:
    """Return a further line for a note about layers without pruned weights; "" if there are none."""
    if not names:
        return ""
    return f"\n{refilled_text(names)}"


def _additions(path: Path) -> Facts | None:
    """Describe the additions of an export, by name. Raises InputError for a damaged file."""
    described: Facts = {}
    for name, saved in read_additions(path).items():
        parameters = sum(tensor.numel() for tensor in saved.tensors.values())
        described[name] = {**saved.settings, **saved.facts, "parameters": parameters}
    return described or None


def _exported(entry: ExportedTensor, files: dict[str, TensorFile], path: Path) -> Layer:
    """Describe a tensor of an export. Raises ExportError if a part of it is not in its file."""
    # a packed weight has several parts, such as values, mask and offsets
    nbytes = 0
    for part in entry.parts:
        slots = files[part.file].slots
        if part.name not in slots:
            raise ExportError(f"{path / part.file} does not contain {part.name}, which the manifest lists")
        nbytes += slots[part.name].nbytes
    layer = layer_of(
        name=entry.name,
        shape=entry.shape,
        dtype=entry.dtype,
        pattern=entry.pattern,
        zeros=entry.numel - entry.nonzero,
        nbytes=nbytes,
    )
    layer["packing"] = entry.packing
    layer["origin"] = entry.origin
    if entry.values:
        layer["values"] = entry.values
        layer["group"] = entry.group
        layer["rounding_error"] = entry.rounding_error
        layer["bits_per_weight"] = round(8 * nbytes / max(entry.numel, 1), 4)
    # (experts, outputs, inputs)
    if entry.pruned_per_matrix and len(entry.shape) == 3:
        add_experts(layer, _pruned_per_expert(entry.pruned_per_matrix, entry.shape[0]))
    return layer


def _pruned_per_expert(pruned_per_matrix: Sequence[int], experts: int) -> list[int]:
    """Return the pruned weights of each expert. The fused matrices of an expert, such as gate and up, are adjacent."""
    fused = len(pruned_per_matrix) // experts
    if not fused:
        return []
    starts = range(0, len(pruned_per_matrix), fused)
    return [sum(pruned_per_matrix[start : start + fused]) for start in starts]


def pruned_folder(path: Path) -> Inspection:
    """Describe a result of ``pst-ds prune`` from its record and its weights. Raises InputError for damaged files.

    The zeros of linear layers are counted, because other programs may have changed the weights, as merging an adapter
    does. Zeros of expert stacks are from the record: the files may store experts separately, under other names.
    """
    record, table = read_pruning_record(path)
    weights = BaseWeights(path, "")
    layers: list[Layer] = []
    refilled: list[str] = []
    with Progress("count", weights.file_bytes, "bytes") as progress:
        for row in record.layers:
            # the files may have no tensor with the name of a stack, so its zeros are not counted
            layer = _recorded_stack(row, path) if row.expert_zeros else _recorded(row, weights)
            layers.append(layer)
            # fewer than pruning has left, so that another program has filled some again
            if (layer["zeros"] or 0) < row.zeros:
                refilled.append(row.name)
            progress.add(layer["bytes"], row.name)
    # layers have a table, and what each pruned module did is too much for a summary
    facts: Facts = dict(table)
    for key in ("format", "layers", "modules"):
        facts.pop(key, None)
    if layers:
        # in place of the record's, which may be older than the weights
        facts["sparsity_measured"] = sparsity_of(layers)
    facts["refilled"] = refilled or None
    facts |= _sizes(weights.file_bytes)
    note = f"layers are those in {RECORD_FILE}, and their zeros were counted in the weight files"
    note += _note_on_refilled(refilled)
    return Inspection(f"{path}: a result of pst-ds prune", facts, layers, note)


def _recorded(row: RecordedLayer, weights: BaseWeights) -> Layer:
    """Describe a pruned linear layer, with the zeros of its weight as stored. Raises InputError without the weight."""
    stored = weights.find(f"{row.name}.weight")
    if stored is None:
        raise InputError(f"{weights.folder} has no {row.name}.weight, which {RECORD_FILE} lists as pruned")
    weight = weights.read(stored)
    layer = layer_of(
        name=row.name,
        shape=row.shape,
        dtype=CODE_OF_DTYPE[weight.dtype],
        pattern=row.pattern,
        zeros=weight.numel() - count_nonzero(weight),
        nbytes=weight.nbytes,
    )
    layer["sparsity_requested"] = row.sparsity_requested
    return layer


def _recorded_stack(row: RecordedLayer, folder: Path) -> Layer:
    """Describe a stack of experts, as it was recorded. Raises InputError if the record lacks its dtype."""
    # only stacks need it, since the files tell the dtype of other layers
    if not row.dtype:
        raise InputError(f"{folder / RECORD_FILE} is damaged: {row.name} has no dtype. Prune the model again")
    dtype = getattr(torch, row.dtype)
    layer = layer_of(
        name=row.name,
        shape=row.shape,
        dtype=CODE_OF_DTYPE[dtype],
        pattern=row.pattern,
        zeros=row.zeros,
        nbytes=math.prod(row.shape) * dtype.itemsize,
    )
    layer["sparsity_requested"] = row.sparsity_requested
    add_experts(layer, row.expert_zeros, row.expert_tokens)
    return layer


def model_folder(path: Path) -> Inspection:
    """Describe a model folder from its config and its weights, which are read one at a time. Raises InputError."""
    facts = _facts_of_config(path)
    # as after copying a config.json to plan a run, which needs no weights
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_FILES):
        return Inspection(f"{path}: a model folder without weights", facts, [])
    weights = BaseWeights(path, "")
    layers: list[Layer] = []
    with Progress("count", weights.file_bytes, "bytes") as progress:
        for name in weights.names:
            layer = _counted(name, weights.read(name))
            layers.append(layer)
            progress.add(layer["bytes"], name)
    # embeddings and the output layer are rarely pruned, and would hide the sparsity of the rest
    in_blocks = [layer for layer in layers if _is_matrix_in_block(layer)]
    refilled = _refilled(in_blocks)
    facts |= {
        "dtypes": _dtypes(layers),
        "tensors": len(layers),
        "parameters": _parameters(layers),
        "sparsity_measured": sparsity_of(in_blocks),
        "refilled": refilled or None,
    }
    facts |= _sizes(weights.file_bytes)
    note = "sparsity measured is that of the matrices inside blocks. Patterns are along the rows as stored"
    note += _note_on_refilled(refilled)
    return Inspection(f"{path}: a model folder", facts, layers, note)


def _facts_of_config(path: Path) -> Facts:
    """Return what the config of a model folder tells. Raises InputError for an impossible one, or a packed export."""
    file = path / CONFIG_FILE
    # resolved, because the hub's cache consists of links
    config = read_table(file.resolve(), f"{file} is missing")
    require_plausible_config(file)
    quantization = _quantization(config, file)
    if quantization.get("quant_method") == QUANT_METHOD:
        raise ExportError(f"{path} is a packed export without pst_manifest.json, which describes its tensors")
    # a multimodal model has the sizes of its language model in a config inside its config
    text_config = config.get("text_config")
    with_sizes = text_config if isinstance(text_config, dict) else config
    facts: Facts = {
        "architectures": config.get("architectures"),
        "family": config.get("model_type"),
        "quantization": quantization.get("quant_method"),
    }
    for key in _SIZES_IN_CONFIG:
        facts[key] = with_sizes.get(key)
    return facts


def _quantization(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the entry "quantization_config" of a config; {} without one. Raises InputError if it is not an object."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise InputError(
            f"{file}: quantization_config = {str(quantization)[:80]!r} is not an object. Correct it, or copy "
            f"{file.name} from the original model"
        )
    return quantization


def _is_matrix_in_block(layer: Layer) -> bool:
    """Return whether a tensor is a matrix whose name has the number of a block, as pruned weights do."""
    name = layer["name"]
    is_matrix = len(layer["shape"] or ()) == 2
    return is_matrix and name_across_blocks(name) != name


def _refilled(layers: Sequence[Layer]) -> list[str]:
    """Return the names of the layers without pruned weights; none if no layer has any, as in a dense model."""
    names: list[str] = []
    for layer in layers:
        if not is_pruned(layer["zeros"] or 0, layer["weights"]):
            names.append(layer["name"])
    is_dense_model = len(names) == len(layers)
    return [] if is_dense_model else names


def _counted(name: str, tensor: Tensor) -> Layer:
    """Describe a tensor by its values: its zeros, and the sparsity pattern of a matrix of floats."""
    pattern = ""
    # the bits of a row are those of a float, stored as an integer of the same width
    if tensor.dim() == 2 and tensor.is_floating_point() and tensor.element_size() in INT_OF_SIZE:
        bits = row_bits(tensor)
        nonzero = int(row_counts(bits).sum())
        pattern = detect_pattern(bits, tensor.shape[1])
    else:
        nonzero = count_nonzero(tensor)
    return layer_of(
        name=name,
        shape=tensor.shape,
        dtype=CODE_OF_DTYPE[tensor.dtype],
        pattern=pattern,
        zeros=tensor.numel() - nonzero,
        nbytes=tensor.nbytes,
    )


def _dtypes(layers: Iterable[Layer]) -> list[str]:
    return sorted({layer["dtype"] for layer in layers})


def _parameters(layers: Iterable[Layer]) -> int:
    return sum(layer["weights"] for layer in layers)


def _sizes(nbytes: int, dense_bf16_bytes: int | None = None) -> Facts:
    """Return the bytes of the weight files, and their ratio to a dense bf16 model, None if its size is unknown."""
    ratio = None
    if dense_bf16_bytes:
        ratio = round(nbytes / dense_bf16_bytes, 4)
    return {"weight_file_bytes": nbytes, "of_dense_bf16": ratio}


def token_store(path: Path) -> Inspection:
    """Describe a token store from its manifest. Raises InputError for an incomplete one."""
    manifest = store.read_manifest(path)
    facts = {
        **manifest.counts,
        "dtype": manifest.tokenizer.dtype.name,
        "vocabulary": manifest.tokenizer.vocabulary,
        "shards": len(manifest.shards),
        "counts_bytes": store.BYTES in manifest.has,
        "masks_tokens": store.LEARNED in manifest.has,
        "digest": manifest.digest,
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "sources": manifest.source.get("sources"),
    }
    return Inspection(f"{path}: a token store", facts, [])
