"""The portable checkpoint: what training changed, in a form that no world size or ZeRO stage shows in.

A folder with

    trained.safetensors   fp32 masters of every trainable parameter, by its name in the model
    masks.safetensors     mask bits of every PST layer, by the layer's name, in the canonical one-shard form
    state.json            counters, the scales of |W|, the base model's fingerprint, and a SHA-256 of each file

The frozen weights are the base model's and are not copied. No pickle; written beside, synced to disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.bits import relayout
from pst_ds.errors import InputError
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import zero3
from pst_ds.parallel.ranks import barrier, is_main

FORMAT = 1
_TRAINED, _MASKS, _STATE = "trained.safetensors", "masks.safetensors", "state.json"
_GATHER_BYTES = 256 << 20


class CheckpointError(InputError):
    """A checkpoint that is not there, is damaged, or belongs to another model."""


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """What a checkpoint knows beside its tensors."""

    step: int
    """Applied optimizer steps."""
    sparsity: float
    """Fraction of zeros asked of every pruned matrix."""
    masks_final: bool
    """Whether the masks were at their final sparsity and fixed."""
    precision: str
    """What the model computed in: "bf16" or "fp32"."""
    device_type: str
    """Where it computed: "cpu", "cuda"."""
    base_path: str
    base_fingerprint: str
    labels: list[str]
    """Names of the classes, in the order of their ids."""
    weight_scales: dict[str, list[float]]
    """Of each PST layer, the mean |W0| of its matrices (or ones)."""
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint read back, its checksums verified."""

    folder: Path
    state: CheckpointState
    trained: dict[str, Tensor]
    masks: dict[str, Tensor]


def save_checkpoint(folder: Path, model: nn.Module, state: CheckpointState) -> None:
    """Write ``folder`` whole or not at all; an older one of that name is replaced. Collective; rank 0 writes."""
    trained: dict[str, Tensor] = {}
    for names, params in _chunks([(n, p) for n, p in model.named_parameters() if p.requires_grad]):
        masters = zero3.fp32_masters(params)
        if is_main():
            trained.update({n: m.cpu().contiguous().clone() for n, m in zip(names, masters, strict=True)})
    masks: dict[str, Tensor] = {}
    for name, layer in pst_layers(model).items():
        with zero3.gathered([layer.pst_mask]):
            if is_main():
                masks[name] = relayout(layer.pst_mask.detach().cpu(), layer.layout.numel, layer.num_shards, 1)
    if is_main():
        _write(folder, trained, masks, state)
    barrier()


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``. Raises CheckpointError when it is missing, unknown or damaged, naming the file."""
    from safetensors.torch import load_file

    try:
        table = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint in {folder.absolute()}: {_STATE} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / _STATE} is damaged: {error}") from None
    found = table.get("format") if isinstance(table, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{folder / _STATE} has format {found!r}; this version reads {FORMAT}")
    try:
        state = CheckpointState(**table["state"])
        sums = {name: table["sha256"][name] for name in (_TRAINED, _MASKS)}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _STATE} is damaged: {error!r}") from None
    for name, wanted in sums.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if file_sha256(path) != wanted:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {_STATE}")
    return Checkpoint(folder, state, load_file(folder / _TRAINED), load_file(folder / _MASKS))


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's values into an injected ``model``, before an engine is made of it. Collective under ZeRO-3.

    Raises CheckpointError when the names or shapes are not the model's.
    """
    layers = pst_layers(model)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for kind, ours, theirs in (("trained parameters", params, checkpoint.trained), ("masks", layers, checkpoint.masks)):
        if set(ours) != set(theirs):
            extra = sorted(set(ours) ^ set(theirs))
            raise CheckpointError(
                f"{checkpoint.folder} does not fit the model: {kind} differ in {', '.join(extra[:4])}"
                + (f" and {len(extra) - 4} more" if len(extra) > 4 else "")
            )
    for name, param in params.items():
        value = checkpoint.trained[name]
        if tuple(value.shape) != tuple(zero3.full_shape(param)):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {tuple(value.shape)}, the model's is "
                f"{tuple(zero3.full_shape(param))}"
            )
        with zero3.gathered([param], writer_rank=0), torch.no_grad():
            param.copy_(value)
    for name, layer in layers.items():
        layer.weight_scales = tuple(checkpoint.state.weight_scales[name])
        bits = relayout(checkpoint.masks[name], layer.layout.numel, 1, layer.num_shards).to(layer.pst_mask.device)
        if zero3.is_partitioned(layer.pst_mask):
            bits = bits.view(layer.num_shards, -1)[zero3.shard_index(layer.pst_mask)]
        zero3.write_shard(layer.pst_mask, bits)


def weight_scales(model: nn.Module) -> dict[str, list[float]]:
    """The scales of |W| that a checkpoint of ``model`` must keep."""
    return {name: list(layer.weight_scales) for name, layer in pst_layers(model).items()}


def base_fingerprint(path: str | Path) -> str:
    """A SHA-256 over the names, shapes and a sample of the bytes of a model folder's weight files; "" for none.

    64 KiB out of every 4 MiB are read, so that a model of any size takes seconds.
    """
    digest = hashlib.sha256()
    files = sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("pytorch_model*.bin")])
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            for offset in range(0, file.stat().st_size, 4 << 20):
                stream.seek(offset)
                digest.update(stream.read(64 << 10))
    return digest.hexdigest() if files else ""


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` at the end; after an error nothing of it is left."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace_folder(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, once its files are on disk; what had the name before is gone then."""
    for path in [*partial.rglob("*"), partial]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, trained: dict[str, Tensor], masks: dict[str, Tensor], state: CheckpointState) -> None:
    from safetensors.torch import save_file

    with whole_folder(folder) as partial:
        save_file(trained, partial / _TRAINED)
        save_file(masks, partial / _MASKS)
        sums = {name: file_sha256(partial / name) for name in (_TRAINED, _MASKS)}
        table: dict[str, Any] = {"format": FORMAT, "state": asdict(state), "sha256": sums}
        (partial / _STATE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _chunks(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[list[str], list[nn.Parameter]]]:
    """Parameters in groups that gather to at most :data:`_GATHER_BYTES` (or one parameter)."""
    names: list[str] = []
    params: list[nn.Parameter] = []
    size = 0
    for name, param in named:
        nbytes = zero3.full_numel(param) * 4
        if params and size + nbytes > _GATHER_BYTES:
            yield names, params
            names, params, size = [], [], 0
        names.append(name)
        params.append(param)
        size += nbytes
    if params:
        yield names, params
