"""What an export holds, tensor by tensor, and the check that a folder still holds it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pst_ds.errors import InputError

MANIFEST_FILE = "pst_manifest.json"
INDEX_FILE = "model.safetensors.index.json"
FORMAT = 1


class ExportError(InputError):
    """An export that cannot be made, or that is not what its manifest says."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of an export."""

    name: str
    file: str
    shape: list[int]
    dtype: str
    origin: str
    """"base": the pretrained bytes; "trained": from the checkpoint, or W0 + beta U V of an embedding; "pruned":
    M . (W0 + beta U V)."""
    nonzero: int
    pattern: str
    """"dense", or what the zeros were found to be: "2:4" along the inputs, or "unstructured"."""
    pruned_per_matrix: list[int]
    """Of a pruned tensor: zeros in the mask of each of its matrices."""
    matrix_axis: int
    """Storage axis along which the matrices of a fused tensor lie."""
    sha256: str

    def __post_init__(self) -> None:
        if (self.origin == "pruned") != bool(self.pruned_per_matrix):
            raise TypeError(f"{self.name} is {self.origin} with pruned_per_matrix {self.pruned_per_matrix}")


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the values as stored."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data).hexdigest()


def found_pattern(weight: Tensor, *, input_axis: int) -> str:
    """ "2:4" when every 4 consecutive inputs have at most 2 non-zeros, "dense" without zeros, else "unstructured"."""
    nonzero = weight != 0
    if bool(nonzero.all()):
        return "dense"
    along = nonzero if input_axis == 1 else nonzero.t()
    if along.shape[1] % 4 == 0 and int(along.reshape(-1, 4).sum(1).max()) <= 2:
        return "2:4"
    return "unstructured"


def write_manifest(folder: Path, entries: list[TensorEntry], about: dict[str, Any]) -> None:
    table = {"format": FORMAT, **about, "tensors": [asdict(entry) for entry in entries]}
    (folder / MANIFEST_FILE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> tuple[list[TensorEntry], dict[str, Any]]:
    """(entries, everything else) of an export. Raises ExportError when it is missing or not a manifest."""
    path = folder / MANIFEST_FILE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table.pop("format") != FORMAT:
            raise ExportError(f"{path} has a format that this version does not read")
        if "sparsity_asked" not in table:
            raise KeyError("sparsity_asked")
        return [TensorEntry(**entry) for entry in table.pop("tensors")], table
    except FileNotFoundError:
        raise ExportError(f"{folder.absolute()} is not an export: {MANIFEST_FILE} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is damaged: {error!r}") from None


def check_export(folder: Path) -> dict[str, Any]:
    """Read every tensor and hold it against the manifest. Returns counts; raises ExportError naming the tensor.

    Checked: the set of tensors, shape, dtype, hash, non-zeros, that zeros are +0.0, and that every matrix has at least
    the zeros of its mask.
    """
    from safetensors import SafetensorError, safe_open

    entries, about = read_manifest(folder)
    names_in_files: dict[str, set[str]] = {}
    zeros = weights = 0
    for entry in entries:
        path = folder / entry.file
        try:
            with safe_open(path, "pt") as file:
                names_in_files.setdefault(entry.file, set(file.keys()))
                tensor = file.get_tensor(entry.name)
        except FileNotFoundError:
            raise ExportError(f"{path} is missing") from None
        except SafetensorError as error:
            raise ExportError(f"{path} is damaged at {entry.name}: {error}") from None
        _check_tensor(entry, tensor, path)
        if entry.origin == "pruned":
            weights += tensor.numel()
            zeros += tensor.numel() - entry.nonzero
    _check_files(folder, entries)
    unknown = {n for names in names_in_files.values() for n in names} - {entry.name for entry in entries}
    if unknown:
        raise ExportError(f"{folder} holds tensors the manifest does not know: {', '.join(sorted(unknown)[:4])}")
    return {
        "tensors": len(entries),
        "pruned_tensors": sum(entry.origin == "pruned" for entry in entries),
        "sparsity_asked": about["sparsity_asked"],
        "sparsity_counted": zeros / weights if weights else 0.0,
    }


def _check_files(folder: Path, entries: list[TensorEntry]) -> None:
    """Exactly the manifest's weight files, and the index that transformers finds the tensors of several by."""
    files = {entry.file for entry in entries}
    stray = {path.name for path in folder.glob("*.safetensors")} - files
    if stray:
        raise ExportError(f"{folder} holds files the manifest does not know: {', '.join(sorted(stray)[:4])}")
    index = folder / INDEX_FILE
    if len(files) == 1:
        return
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{index} is missing or damaged: {error!r}") from None
    if found != {entry.name: entry.file for entry in entries}:
        raise ExportError(f"{index} does not name the tensors and files of the manifest")


def _check_tensor(entry: TensorEntry, tensor: Tensor, path: Path) -> None:
    if list(tensor.shape) != entry.shape or str(tensor.dtype) != entry.dtype:
        raise ExportError(
            f"{path}: {entry.name} is {tensor.dtype} {list(tensor.shape)}, the manifest says {entry.dtype} "
            f"{entry.shape}"
        )
    if tensor_sha256(tensor) != entry.sha256:
        raise ExportError(f"{path}: {entry.name} is not what was exported: its SHA-256 differs")
    if int(torch.count_nonzero(tensor)) != entry.nonzero:
        raise ExportError(f"{path}: {entry.name} has {int(torch.count_nonzero(tensor))} non-zeros, not {entry.nonzero}")
    if entry.origin != "pruned":
        return
    if bool((torch.signbit(tensor) & (tensor == 0)).any()):
        raise ExportError(f"{path}: {entry.name} has a -0.0 among its zeros")
    matrices = tensor.chunk(len(entry.pruned_per_matrix), dim=entry.matrix_axis)
    for part, (matrix, pruned) in enumerate(zip(matrices, entry.pruned_per_matrix, strict=True)):
        if int((matrix == 0).sum()) < pruned:
            raise ExportError(f"{path}: {entry.name}, matrix {part}, has fewer zeros than the {pruned} of its mask")
