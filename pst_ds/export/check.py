"""The check that a folder still holds what was exported, and that nothing in it is other than it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pst_ds.atomic_files import file_sha256
from pst_ds.errors import shortened
from pst_ds.export import manifest
from pst_ds.export.encoding import Encoding
from pst_ds.export.export import measured_sparsity, storage_facts
from pst_ds.export.from_folder import CONFIG_FILE, model_of
from pst_ds.export.manifest import (
    DENSE,
    About,
    ExportError,
    JsonTable,
    TensorEntry,
    encoding_by,
    read_manifest,
    read_table,
)
from pst_ds.export.model_card import CARD_FILE
from pst_ds.formats import FormatError
from pst_ds.formats.base_weights import saved_tensors, tensors_lacking
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, TensorFile, TensorFileError
from pst_ds.progress import Progress


def check_export(folder: Path) -> JsonTable:
    """Read every tensor and hold it against the manifest. Returns counts; raises ExportError naming the tensor.

    Checked: that there are these files and no others, none of them a link; their SHA-256; headers, index and config;
    the set of tensors, their shapes, dtypes and SHA-256; every invariant of the packed ones; non-zeros; that zeros of
    pruned tensors are +0.0, and that every matrix has at least the zeros of its mask.
    """
    entries, about = read_manifest(folder)
    encoding = encoding_by(about)
    _check_files(folder, entries, about, encoding)
    _check_grids(folder, entries, encoding)
    files = _opened(folder, entries)
    _check_index(folder, entries, files, encoding)
    sizes = [sum(files[part.file].slots[part.name].nbytes for part in entry.parts) for entry in entries]
    with Progress("check", sum(sizes), "bytes") as shown:
        for entry, nbytes in zip(entries, sizes, strict=True):
            _check_entry(folder, entry, files)
            shown.add(nbytes)
    return {
        "tensors": len(entries),
        "pruned_tensors": sum(entry.origin == "pruned" for entry in entries),
        "packed_tensors": sum(entry.packing != DENSE for entry in entries),
        "kind": about["kind"],
        **encoding.facts(),
        **storage_facts(entries, sizes),
        "sparsity_requested": about["sparsity_requested"],
        "sparsity_measured": measured_sparsity(entries),
    }


def check_model(folder: Path) -> None:
    """Hold names and shapes of a checked export against the model of its config, and its against the export's.

    Raises ExportError.
    """
    entries, model = read_manifest(folder)[0], model_of(folder)
    tensors = model.state_dict(keep_vars=True)
    tensors |= saved_tensors(model, tensors)
    for entry in entries:
        known = tensors.get(entry.name)
        if known is not None and list(known.shape) != entry.shape:
            raise ExportError(f"{folder}: {entry.name} is {entry.shape}, and {list(known.shape)} in the model")
        if known is None and entry.form is not None:
            raise ExportError(f"{folder}: {entry.name} is packed, and the model has no such tensor")
    lacking = tensors_lacking(model, {entry.name for entry in entries})
    if lacking:
        raise ExportError(
            f"{folder} lacks {shortened(lacking)}, which a {type(model).__name__} has, as config.json names it: "
            "transformers would load initial values there. Export the model again, from files that have all its tensors"
        )


def _check_files(folder: Path, entries: Sequence[TensorEntry], about: About, encoding: Encoding) -> None:
    """Require exactly the manifest's files; all but the weights byte by byte."""
    weights = {part.file for entry in entries for part in entry.parts}
    beside: dict[str, str] = about["files"]
    for name, digest in beside.items():
        manifest.require_plain(folder / name, f"{folder / name} is missing")
        if file_sha256(folder / name) != digest:
            raise ExportError(f"{folder / name} is not what was exported: its SHA-256 differs")
    for name in sorted(weights):
        manifest.require_plain(folder / name, f"{folder / name} is missing")
    known = weights | set(beside) | {manifest.MANIFEST_FILE, CARD_FILE}
    stray = {path.name for path in folder.iterdir()} - known
    loaded = sorted(n for n in stray if n.endswith((".safetensors", ".bin", ".index.json", ".py", ".pt")))
    if loaded:
        raise ExportError(f"{folder} holds files the manifest does not know: {', '.join(loaded[:4])}")
    _check_config(folder, encoding, len(weights), about.get("left_alone", ()))


def _check_grids(folder: Path, entries: Sequence[TensorEntry], encoding: Encoding) -> None:
    """Every tensor's grid must be one of the two that the manifest names for all."""
    known = {encoding.values, encoding.embeddings, None}
    for entry in entries:
        if entry.grid not in known or entry.packing not in (DENSE, encoding.packing):
            raise ExportError(
                f"{folder}: {entry.name} is {entry.packing}, {entry.grid or 'as it is'}; by the manifest the export is "
                f"{encoding}"
            )


def _check_config(folder: Path, encoding: Encoding, num_files: int, left_alone: Sequence[str]) -> None:
    """config.json must send transformers to the weights of the manifest."""
    path = folder / CONFIG_FILE
    found = read_table(path, f"{path} is missing").get("quantization_config")
    wanted = encoding.quantization_config(num_files, left_alone)
    if found != wanted:
        raise ExportError(f"{path} has quantization_config {str(found)[:200]}, and {encoding} weights need {wanted}")


def _opened(folder: Path, entries: Sequence[TensorEntry]) -> dict[str, TensorFile]:
    """The weight files, whose headers name the tensors of the manifest and no others."""
    wanted: dict[str, set[str]] = {}
    for entry in entries:
        for part in entry.parts:
            wanted.setdefault(part.file, set()).add(part.name)
    files = {}
    for name, parts in wanted.items():
        try:
            files[name] = TensorFile(folder / name)
        except TensorFileError as error:
            raise ExportError(str(error)) from None
        unknown, lacking = sorted(set(files[name].slots) - parts), sorted(parts - set(files[name].slots))
        if unknown:
            raise ExportError(f"{folder} holds tensors the manifest does not know: {', '.join(unknown[:4])}")
        if lacking:
            raise ExportError(f"{folder / name} lacks {', '.join(lacking[:4])}")
    return files


def _check_index(
    folder: Path, entries: Sequence[TensorEntry], files: dict[str, TensorFile], encoding: Encoding
) -> None:
    """The index that transformers finds the tensors of several files by; of one file there is none."""
    path = folder / encoding.weights_file(2)
    if any(not name.startswith(encoding.stem) for name in files):
        raise ExportError(f"{folder} is {encoding}, and has its tensors in {', '.join(sorted(files)[:2])}")
    if len(files) == 1:
        if path.exists():
            raise ExportError(f"{path} is an index, and there is one file")
        return
    found = read_table(path, f"{path} is missing")
    total = sum(slot.nbytes for file in files.values() for slot in file.slots.values())
    where = {part.name: part.file for entry in entries for part in entry.parts}
    if found != {"metadata": {"total_size": total}, "weight_map": where}:
        raise ExportError(f"{path} does not name the tensors and files of the manifest")


def _check_entry(folder: Path, entry: TensorEntry, files: dict[str, TensorFile]) -> None:
    parts: dict[str, Tensor] = {}
    for part in entry.parts:
        path = folder / part.file
        try:
            tensor = files[part.file].read(part.name)
        except TensorFileError as error:
            raise ExportError(str(error)) from None
        if manifest.tensor_sha256(tensor) != part.sha256:
            raise ExportError(f"{path}: {part.name} is not what was exported: its SHA-256 differs")
        parts[part.name] = tensor
    _check_tensor(entry, _dense(entry, parts, path), path)


def _dense(entry: TensorEntry, parts: dict[str, Tensor], path: Path) -> Tensor:
    """The tensor in the model's shape, from parts that hold every invariant of their format."""
    form = entry.form
    if form is None:
        return parts[entry.name]
    by_part = {part: parts[name] for part, name in zip(form.part_names, entry.part_names(), strict=True)}
    try:
        form.check(f"{path}: {entry.name}", by_part, entry.matrix)
    except FormatError as error:
        raise ExportError(str(error)) from None
    dense = form.unpack(by_part)
    return entry.as_in_model(dense)


def _check_tensor(entry: TensorEntry, tensor: Tensor, path: Path) -> None:
    if list(tensor.shape) != entry.shape or (not entry.values and CODE_OF_DTYPE[tensor.dtype] != entry.dtype):
        raise ExportError(
            f"{path}: {entry.name} is {CODE_OF_DTYPE[tensor.dtype]} {list(tensor.shape)}, the manifest says "
            f"{entry.dtype} {entry.shape}"
        )
    nonzero = manifest.count_nonzero(tensor)
    if nonzero != entry.nonzero:
        raise ExportError(f"{path}: {entry.name} has {nonzero} non-zeros, not {entry.nonzero}")
    if entry.origin != "pruned":
        return
    if bool((torch.signbit(tensor) & (tensor == 0)).any()):
        raise ExportError(f"{path}: {entry.name} has a -0.0 among its zeros")
    for part, (matrix, pruned) in enumerate(zip(_matrices(entry, tensor, path), entry.pruned_per_matrix, strict=True)):
        if int((matrix == 0).sum()) < pruned:
            raise ExportError(f"{path}: {entry.name}, matrix {part}, has fewer zeros than the {pruned} of its mask")


def _matrices(entry: TensorEntry, tensor: Tensor, path: Path) -> list[Tensor]:
    """The matrices of a pruned tensor; of a stack of experts those of the first, then those of the next."""
    count, width = len(entry.pruned_per_matrix), entry.shape[entry.matrix_axis - 2]
    experts = [tensor] if tensor.dim() == 2 else list(tensor)
    per_expert, rest = divmod(count, len(experts)) if experts else (0, count)
    if rest or not per_expert or width % per_expert:
        raise ExportError(f"{path}: {entry.name} cannot be {count} matrices: {list(tensor.shape)} does not divide")
    if not width:
        return [tensor] * count
    return [matrix for expert in experts for matrix in expert.split(width // per_expert, dim=entry.matrix_axis)]
