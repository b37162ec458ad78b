"""Model folders and token stores for ``pst-ds inspect``."""

import math
from pathlib import Path

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


def export_folder(path: Path) -> Inspection:
    """Describe an export from its manifest and the headers of its files. Raises InputError if one is damaged."""
    entries, about = read_manifest(path)
    files: dict[str, TensorFile] = {}
    for name in sorted({part.file for entry in entries for part in entry.parts}):
        if not (path / name).is_file():
            raise ExportError(f"{path / name} is missing")
        files[name] = TensorFile(path / name)
    layers = [_exported(entry, files, path) for entry in entries]
    known = (
        "architecture",
        "step",
        "sparsity_requested",
        "sparsity_measured",
        "refilled",
        "computed_in",
        "metrics",
        "base_model",
    )
    encoding = encoding_of(about["kind"], about)
    facts = {
        "format": about["kind"],
        **encoding.facts(),
        **{key: about.get(key) for key in known},
        "base_fingerprint": about.get("base_fingerprint"),
        "method": (about.get("run") or {}).get("method"),
        "dtypes": sorted({entry.dtype for entry in entries}),
        **tensor_counts(entries),
        "parameters": sum(entry.numel for entry in entries),
        "weight_files": sorted(files),
        **storage_facts(entries, [layer["bytes"] for layer in layers]),
        "additions": _additions(path),
        **_sizes(sum((path / name).stat().st_size for name in files), about.get("dense_bf16_bytes")),
    }
    note = f"sparsity and patterns are from the manifest. pst-ds verify {path} checks the files"
    if about.get("refilled"):
        note += f"\n{refilled_text(about['refilled'])}"
    return Inspection(f"{path}: an export, {encoding}", facts, layers, note)


def _additions(path: Path) -> Facts | None:
    """Describe the additions of an export, by name. Raises InputError for a damaged file."""
    described: Facts = {}
    for name, saved in read_additions(path).items():
        parameters = sum(tensor.numel() for tensor in saved.tensors.values())
        described[name] = {**saved.settings, **saved.facts, "parameters": parameters}
    return described or None


def _exported(entry: ExportedTensor, files: dict[str, TensorFile], path: Path) -> Layer:
    for part in entry.parts:
        if part.name not in files[part.file].slots:
            raise ExportError(f"{path / part.file} does not contain {part.name}, which the manifest lists")
    nbytes = sum(files[part.file].slots[part.name].nbytes for part in entry.parts)
    zeros = entry.numel - entry.nonzero
    layer = layer_of(entry.name, entry.shape, entry.dtype, entry.pattern, zeros, nbytes)
    layer |= {"packing": entry.packing, "origin": entry.origin}
    if entry.values:
        layer |= {"values": entry.values, "group": entry.group}
        layer["rounding_error"] = entry.rounding_error
        layer["bits_per_weight"] = round(8 * nbytes / max(entry.numel, 1), 4)
    if entry.pruned_per_matrix and len(entry.shape) == 3:
        fused = len(entry.pruned_per_matrix) // entry.shape[0]
        of_matrices = [entry.pruned_per_matrix[i::fused] for i in range(fused)]
        add_experts(layer, [sum(counts) for counts in zip(*of_matrices, strict=True)])
    return layer


def pruned_folder(path: Path) -> Inspection:
    """Describe a result of ``pst-ds prune`` from its record and its weights. Raises InputError for damaged files.

    The zeros of linear layers are counted, because other programs may have changed the weights, as merging an adapter
    does. Zeros of expert stacks are from the record: the files may store experts separately, under other names.
    """
    record, table = read_pruning_record(path)
    weights = BaseWeights(path, "")
    layers, refilled = list[Layer](), list[str]()
    with Progress("count", weights.file_bytes, "bytes") as progress:
        for row in record.layers:
            layers.append(_recorded_stack(row, path) if row.expert_zeros else _recorded(row, weights))
            if (layers[-1]["zeros"] or 0) < row.zeros:
                refilled.append(row.name)
            progress.add(layers[-1]["bytes"], row.name)
    facts = {key: value for key, value in table.items() if key not in ("format", "layers", "modules")}
    if layers:
        facts["sparsity_measured"] = sparsity_of(layers)
    facts |= {"refilled": refilled or None, **_sizes(weights.file_bytes)}
    note = f"layers are those in {RECORD_FILE}, and their zeros were counted in the weight files"
    if refilled:
        note += f"\n{refilled_text(refilled)}"
    return Inspection(f"{path}: a result of pst-ds prune", facts, layers, note)


def _recorded(row: RecordedLayer, weights: BaseWeights) -> Layer:
    """Describe a pruned linear layer."""
    stored = weights.find(f"{row.name}.weight")
    if stored is None:
        raise InputError(f"{weights.folder} has no {row.name}.weight, which {RECORD_FILE} lists as pruned")
    weight = weights.read(stored)
    zeros = weight.numel() - count_nonzero(weight)
    layer = layer_of(row.name, row.shape, CODE_OF_DTYPE[weight.dtype], row.pattern, zeros, weight.nbytes)
    return layer | {"sparsity_requested": row.sparsity_requested}


def _recorded_stack(row: RecordedLayer, folder: Path) -> Layer:
    """Describe a stack of experts, as it was recorded."""
    if not row.dtype:
        raise InputError(f"{folder / RECORD_FILE} is damaged: {row.name} has no dtype. Prune the model again")
    dtype = getattr(torch, row.dtype)
    nbytes = math.prod(row.shape) * dtype.itemsize
    layer = layer_of(row.name, row.shape, CODE_OF_DTYPE[dtype], row.pattern, row.zeros, nbytes)
    layer |= {"sparsity_requested": row.sparsity_requested}
    add_experts(layer, row.expert_zeros, row.expert_tokens)
    return layer


def model_folder(path: Path) -> Inspection:
    """Describe a model folder from its config and its weights, which are read one at a time. Raises InputError."""
    # the hub's cache consists of links
    config = read_table((path / CONFIG_FILE).resolve(), f"{path / CONFIG_FILE} is missing")
    require_plausible_config(path / CONFIG_FILE)
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == QUANT_METHOD:
        raise ExportError(f"{path} is a packed export without pst_manifest.json, which describes its tensors")
    text: Facts = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    facts = {
        "architectures": config.get("architectures"),
        "family": config.get("model_type"),
        "quantization": quantization.get("quant_method"),
        **{key: text.get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")},
    }
    if not any(any(path.glob(pattern)) for pattern in _WEIGHT_FILES):
        return Inspection(f"{path}: a model folder without weights", facts, [])
    weights = BaseWeights(path, "")
    layers: list[Layer] = []
    with Progress("count", weights.file_bytes, "bytes") as progress:
        for name in weights.names:
            layers.append(_counted(name, weights.read(name)))
            progress.add(layers[-1]["bytes"], name)
    in_blocks = [x for x in layers if len(x["shape"] or ()) == 2 and name_across_blocks(x["name"]) != x["name"]]
    pruned = {layer["name"] for layer in in_blocks if is_pruned(layer["zeros"] or 0, layer["weights"])}
    refilled = [layer["name"] for layer in in_blocks if pruned and layer["name"] not in pruned]
    facts |= {
        "dtypes": sorted({layer["dtype"] for layer in layers}),
        "tensors": len(layers),
        "parameters": sum(layer["weights"] for layer in layers),
        "sparsity_measured": sparsity_of(in_blocks),
        "refilled": refilled or None,
        **_sizes(weights.file_bytes),
    }
    note = "sparsity measured is that of the matrices inside blocks. Patterns are along the rows as stored"
    if refilled:
        note += f"\n{refilled_text(refilled)}"
    return Inspection(f"{path}: a model folder", facts, layers, note)


def _counted(name: str, tensor: Tensor) -> Layer:
    if tensor.dim() == 2 and tensor.is_floating_point() and tensor.element_size() in INT_OF_SIZE:
        bits = row_bits(tensor)
        nonzero, pattern = int(row_counts(bits).sum()), detect_pattern(bits, tensor.shape[1])
    else:
        nonzero, pattern = count_nonzero(tensor), ""
    zeros = tensor.numel() - nonzero
    return layer_of(name, tensor.shape, CODE_OF_DTYPE[tensor.dtype], pattern, zeros, tensor.nbytes)


def _sizes(nbytes: int, dense_bf16_bytes: int | None = None) -> Facts:
    """Return the bytes of the weight files, and their ratio to a dense bf16 model."""
    share = round(nbytes / dense_bf16_bytes, 4) if dense_bf16_bytes else None
    return {"weight_file_bytes": nbytes, "of_dense_bf16": share}


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
