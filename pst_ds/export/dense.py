"""Export to Hugging Face safetensors with exact zeros: one tensor in memory at a time, one file at a time."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.bits import unpack_range
from pst_ds.core.factors import Factors
from pst_ds.core.low_rank_rows import updated_rows
from pst_ds.core.scores import masked_weight
from pst_ds.durable import whole_folder
from pst_ds.export.base_weights import BaseWeights, saved_tensors
from pst_ds.export.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    ExportError,
    TensorEntry,
    found_pattern,
    tensor_sha256,
    write_manifest,
)
from pst_ds.nn.checkpoint import Checkpoint
from pst_ds.nn.embedding import pst_embeddings
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.linear import FACTOR_NAMES, PSTLinear

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class _Exported:
    name: str
    tensor: Tensor
    origin: str
    layer: PSTLinear | None = None
    mask: Tensor | None = None


def export_dense(
    model: nn.Module,
    checkpoint: Checkpoint,
    tokenizer: Any,
    out: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write ``out``, a model folder that plain transformers loads; whole or not at all. Returns what was written.

    ``model`` gives names, shapes and the config; it may be on the meta device, since values come from the base model's
    files and the checkpoint. Pruned tensors have the values the masked model multiplied with, +0.0 where pruned; other
    tensors are the base model's bytes, or were trained. ``dtype`` ("bf16", "fp32") casts all of them instead.
    """
    if not _may_be_replaced(out):
        raise ExportError(f"{out.absolute()} exists and is not an export; name another folder with --out")
    base = BaseWeights(checkpoint.state.base_path, getattr(model, "base_model_prefix", ""))
    with whole_folder(out) as partial:
        entries = _write_tensors(partial, _tensors(model, checkpoint, base, dtype), shard_bytes)
        _write_config(partial, model, entries)
        base.copy_if_there("generation_config.json", partial)
        tokenizer.save_pretrained(partial)
        about = _about(checkpoint, entries)
        write_manifest(partial, entries, about)
    pruned = sum(e.origin == "pruned" for e in entries)
    return {**about, "export_dir": str(out), "tensors": len(entries), "pruned_tensors": pruned}


def _may_be_replaced(out: Path) -> bool:
    """Whether ``out`` is free, an empty folder, or an older export."""
    if not out.exists():
        return True
    return out.is_dir() and (not any(out.iterdir()) or (out / MANIFEST_FILE).is_file())


def _about(checkpoint: Checkpoint, entries: list[TensorEntry]) -> dict[str, Any]:
    """What the manifest says of the whole export."""
    pruned = [e for e in entries if e.origin == "pruned"]
    zeros = sum(_numel(e) - e.nonzero for e in pruned)
    return {
        "kind": "dense",
        "step": checkpoint.state.step,
        "base_fingerprint": checkpoint.state.base_fingerprint,
        "computed_in": checkpoint.state.precision,
        "sparsity_asked": checkpoint.state.sparsity,
        "sparsity_counted": zeros / sum(map(_numel, pruned)) if pruned else 0.0,
        "metrics": checkpoint.state.metrics,
    }


def _tensors(model: nn.Module, checkpoint: Checkpoint, base: BaseWeights, dtype: str | None) -> Iterator[_Exported]:
    """Every tensor that ``save_pretrained`` of the plain model would write, under its name there."""
    layers, embeddings = pst_layers(model), pst_embeddings(model)
    seen: set[int] = set()
    for name, param in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if last.startswith("pst_") or id(param) in seen:
            continue
        seen.add(id(param))
        layer = layers.get(owner) if last == "weight" else None
        in_base = base.find(name)
        if in_base is None:
            saved = saved_tensors(model, name, param.to("meta"))
            if set(saved) != {name}:  # the base's files hold it in another form, and so does the export
                yield from _in_files_form(name, saved, model, checkpoint, base, layer, dtype)
                continue
        stored = None if in_base is None else base.read(in_base)
        if last == "weight" and owner in embeddings:
            exported = _updated_embedding(name, stored, checkpoint, embeddings[owner].beta)
        else:
            exported = _tensor(name, stored, checkpoint, layer)
        yield _finished(exported, tuple(param.shape), dtype)


def _in_files_form(
    name: str,
    saved: dict[str, Tensor],
    model: nn.Module,
    checkpoint: Checkpoint,
    base: BaseWeights,
    layer: PSTLinear | None,
    dtype: str | None,
) -> Iterator[_Exported]:
    """The tensor ``name`` as ``saved``, the tensors that the base's files hold of it."""
    in_base = {part: base.find(part) for part in saved}
    stored = {part: None if found is None else base.read(found) for part, found in in_base.items()}
    if layer is None and name not in checkpoint.trained:
        for part, tensor in stored.items():
            yield _finished(_tensor(part, tensor, checkpoint, None), tuple(saved[part].shape), dtype)
        return
    first = next(iter(stored.values()))
    if layer is not None and not (first is not None and _is_renamed(name, saved, model, first)):
        raise ExportError(
            f"{name} is made of {', '.join(saved)} by transformers, and cannot be turned back once it is pruned; leave "
            f"it out with exclude_modules = [{json.dumps(name.rpartition('.')[0])}]"
        )
    whole = _tensor(name, first, checkpoint, layer)
    for part, tensor in saved_tensors(model, name, whole.tensor).items():
        changed = replace(whole, name=part, tensor=tensor.clone(memory_format=torch.contiguous_format))
        yield _finished(changed, tuple(saved[part].shape), dtype)


def _is_renamed(name: str, saved: dict[str, Tensor], model: nn.Module, stored: Tensor) -> bool:
    """Whether the model's tensor ``name`` is the file's ``stored`` under another name, not cut or permuted."""
    return len(saved) == 1 and all(torch.equal(t, stored) for t in saved_tensors(model, name, stored).values())


def _finished(exported: _Exported, shape: tuple[int, ...], dtype: str | None) -> _Exported:
    """``exported`` in the dtype asked for, after a look at its shape."""
    if tuple(exported.tensor.shape) != shape:
        raise ExportError(
            f"{exported.name} has shape {tuple(exported.tensor.shape)} in the base model or checkpoint, and {shape} in "
            "the trained model"
        )
    if dtype is not None and exported.tensor.is_floating_point():
        exported = replace(exported, tensor=exported.tensor.to(DTYPES[dtype]))
    if exported.layer is not None:
        exported.tensor.add_(0.0)  # a weight of -0.0 that the mask keeps becomes +0.0
    return exported


def _tensor(name: str, stored: Tensor | None, checkpoint: Checkpoint, layer: PSTLinear | None) -> _Exported:
    """One tensor: ``stored`` is the base model's, or None where it has none."""
    compute = DTYPES[checkpoint.state.precision]
    trained = checkpoint.trained.get(name)
    start = stored if trained is None else trained.to(compute)
    if start is None:
        raise ExportError(f"{name} is neither trained nor in the base model {checkpoint.state.base_path!r}")
    if trained is None and layer is None:
        return _Exported(name, start.contiguous(), "base")
    # values are those computed with; they are stored at least as wide as the base's, so that files stay uniform
    width = compute if stored is None else torch.promote_types(compute, stored.dtype)
    if layer is None:
        return _Exported(name, start.to(width).contiguous(), "trained")
    mask = checkpoint.masks[name.removesuffix(".weight")]
    merged = _merge(name.removesuffix(".weight"), layer, start, mask, checkpoint, compute)
    return _Exported(name, merged.to(width).contiguous(), "pruned", layer, mask)


def _updated_embedding(name: str, stored: Tensor | None, checkpoint: Checkpoint, beta: float) -> _Exported:
    """W0 + beta U V of a PSTEmbedding, as the model looked it up."""
    if stored is None:
        raise ExportError(f"{name} is not in the base model {checkpoint.state.base_path!r}")
    compute = DTYPES[checkpoint.state.precision]
    left, right = (checkpoint.trained[f"{name.removesuffix('weight')}pst_{f}"].to(compute) for f in "UV")
    merged = updated_rows(stored.to(compute), left, right, beta)
    return _Exported(name, merged.to(torch.promote_types(compute, stored.dtype)), "trained")


def _merge(
    name: str, layer: PSTLinear, start: Tensor, mask: Tensor, checkpoint: Checkpoint, compute: torch.dtype
) -> Tensor:
    """M . (W0 + beta U V) as the model computed it: same function, same dtype, same kind of device."""
    device = checkpoint.state.device_type if torch.accelerator.is_available() else "cpu"
    values = {f: checkpoint.trained[f"{name}.pst_{f}"] for f in FACTOR_NAMES if f"{name}.pst_{f}" in checkpoint.trained}
    factors = Factors(**{f: v.to(device=device, dtype=compute) for f, v in values.items()})
    weight = start.to(device=device, dtype=compute)
    return masked_weight(weight, mask.to(device), 1, layer.layout, factors, layer.constants).cpu()


def _write_tensors(folder: Path, tensors: Iterator[_Exported], shard_bytes: int) -> list[TensorEntry]:
    """Fill one file after another; their final names, which count them, are given at the end."""
    from safetensors.torch import save_file

    entries: list[TensorEntry] = []
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for exported in tensors:
        if held and sum(t.nbytes for t in held.values()) + exported.tensor.nbytes > shard_bytes:
            flush()
        held[exported.name] = exported.tensor
        entries.append(_entry(exported))
    flush()
    count = len(shards)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    file_of = {}
    for i, (final, keys) in enumerate(zip(names, shards, strict=True)):
        (folder / f"shard-{i}.safetensors").rename(folder / final)
        file_of.update(dict.fromkeys(keys, final))
    if count > 1:
        total = sum((folder / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [replace(entry, file=file_of[entry.name]) for entry in entries]


def _entry(exported: _Exported) -> TensorEntry:
    tensor, layer = exported.tensor, exported.layer
    pattern, pruned, axis = "dense", [], 0
    if layer is not None and exported.mask is not None:
        pattern = found_pattern(tensor, input_axis=0 if layer.layout.transposed else 1)
        mask = unpack_range(exported.mask, layer.layout.numel, 1, 0, layer.layout.numel).view(layer.layout.shape)
        for block in layer.layout.blocks():
            part = mask[block.rect.r0 : block.rect.r1, block.rect.c0 : block.rect.c1]
            pruned.append(int(block.rect.numel - part.sum(dtype=torch.int64)))
        axis = 1 if layer.layout.transposed else 0
    return TensorEntry(
        name=exported.name,
        file="",
        shape=list(tensor.shape),
        dtype=str(tensor.dtype),
        origin=exported.origin,
        nonzero=int(torch.count_nonzero(tensor)),
        pattern=pattern,
        pruned_per_matrix=pruned,
        matrix_axis=axis,
        sha256=tensor_sha256(tensor),
    )


def _write_config(folder: Path, model: nn.Module, entries: list[TensorEntry]) -> None:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    widths = {e.dtype for e in entries if e.dtype in ("torch.bfloat16", "torch.float16", "torch.float32")}
    config.dtype = widths.pop().removeprefix("torch.") if len(widths) == 1 else "float32"
    config.save_pretrained(folder)


def _numel(entry: TensorEntry) -> int:
    return math.prod(entry.shape)
