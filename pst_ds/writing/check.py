"""Verify that a folder still holds exactly what was exported."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pst_ds.atomic_files import file_sha256
from pst_ds.errors import shortened
from pst_ds.file_names import CARD_FILE, MANIFEST_FILE
from pst_ds.formats import FormatError, with_row_bits
from pst_ds.formats.base_weights import saved_tensors, tensors_lacking
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, TensorFile, TensorFileError
from pst_ds.progress import Progress
from pst_ds.writing.encoding import Encoding, ExportError, encoding_of
from pst_ds.writing.from_folder import CONFIG_FILE, model_of
from pst_ds.writing.manifest import (
    ExportedTensor,
    Facts,
    count_nonzero,
    read_manifest,
    read_table,
    require_plain,
    tensor_sha256,
)
from pst_ds.writing.refilled import measured_sparsity
from pst_ds.writing.to_folder import storage_facts, tensor_counts

_LOADED_ENDINGS = (".safetensors", ".bin", ".index.json", ".py", ".pt", ".onnx")
"""Endings of files that programs load from a model folder."""


def check_export(folder: Path) -> Facts:
    """Read every tensor of an export and compare it with the manifest.

    Checks the set of files (no others, no links) and their SHA-256; headers, index and config; the set of tensors with
    their shapes, dtypes and SHA-256; all invariants of packed tensors; the numbers of non-zeros; that pruned weights
    are +0.0, and that every matrix has at least the sparsity of its mask.

    Returns counts, sizes and sparsity, and in "without_sha256" the weight files of which an older manifest has only the
    SHA-256 of each tensor. Raises ExportError, naming the tensor.
    """
    tensors, facts = read_manifest(folder)
    if not tensors:
        # every check below is per tensor, and would accept an empty folder
        raise ExportError(
            f"{folder / MANIFEST_FILE} is damaged: tensors = [], but every export has tensors. Export the model again"
        )
    encoding = encoding_of(facts["kind"], facts)
    _check_files(folder, tensors, facts, encoding)
    files = _open_weights(folder, tensors)
    _check_index(folder, tensors, files, encoding)
    sizes: list[int] = []
    for tensor in tensors:
        sizes.append(sum(files[part.file].slots[part.name].nbytes for part in tensor.parts))
    with Progress("check", sum(sizes), "bytes") as shown:
        for tensor, nbytes in zip(tensors, sizes, strict=True):
            _check_tensor(folder, tensor, files)
            shown.add(nbytes)
    # last, because the checks above name the tensor that differs
    weight_sums: dict[str, str] = {}
    without_sha256: list[str] = []
    for name in files:
        if name in facts["files"]:
            weight_sums[name] = facts["files"][name]
        else:
            without_sha256.append(name)
    check_sums(folder, weight_sums)
    refilled = facts.get("refilled", [])
    return {
        **tensor_counts(tensors),
        "kind": facts["kind"],
        **encoding.facts(),
        **storage_facts(tensors, sizes),
        "sparsity_requested": facts["sparsity_requested"],
        "sparsity_measured": measured_sparsity(tensors, refilled),
        "refilled": refilled,
        "without_sha256": without_sha256,
    }


def check_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise ExportError unless the files of a folder are plain files with these SHA-256."""
    for name, sha256 in sums.items():
        require_plain(folder / name, f"{folder / name} is missing")
        if file_sha256(folder / name) != sha256:
            raise ExportError(f"{folder / name} is not what was exported: its SHA-256 differs. Export the model again")


def check_model(folder: Path) -> None:
    """Compare the names and shapes of a checked export with the model of its config.json. Raises ExportError."""
    tensors, _ = read_manifest(folder)
    model = model_of(folder)
    # with Parameters, not detached copies: tied tensors are recognised as one object
    in_model = model.state_dict(keep_vars=True)
    in_model |= saved_tensors(model, in_model)  # exports have the names in the model, or those of saved files
    for tensor in tensors:
        known = in_model.get(tensor.name)
        if known is not None and tuple(known.shape) != tensor.shape:
            raise ExportError(
                f"{folder}: {tensor.name} has shape {list(tensor.shape)}, and {list(known.shape)} in the model"
            )
        if known is None and tensor.spec.form is not None:
            raise ExportError(f"{folder}: {tensor.name} is packed, and the model has no such tensor")
    lacking = tensors_lacking(model, {tensor.name for tensor in tensors})
    if lacking:
        raise ExportError(
            f"{folder} lacks {shortened(lacking)}, which a {type(model).__name__}, the class in config.json, has: "
            "transformers would initialise them randomly. Export the model again, from files that have all its tensors"
        )


def _check_files(folder: Path, tensors: Sequence[ExportedTensor], facts: Facts, encoding: Encoding) -> None:
    """Require exactly the files of the manifest, their SHA-256 except for weights, and its format in config.json."""
    weights: set[str] = set()
    for tensor in tensors:
        weights.update(part.file for part in tensor.parts)
    others = {name: sha256 for name, sha256 in facts["files"].items() if name not in weights}
    check_sums(folder, others | facts.get("files_in_folders", {}))
    for name in sorted(weights):
        require_plain(folder / name, f"{folder / name} is missing")
    known = {*weights, *others, MANIFEST_FILE, CARD_FILE}
    loaded: list[str] = []
    for path in sorted(folder.iterdir()):
        # other files are harmless, such as notes or a .gitattributes
        if path.name not in known and path.name.endswith(_LOADED_ENDINGS):
            loaded.append(path.name)
    if loaded:
        raise ExportError(f"{folder} has files that the manifest does not list: {shortened(loaded)}. Remove them")
    _check_config(folder / CONFIG_FILE, len(weights), facts, encoding)
    # the config has one format for all tensors, and the manifest one for each
    for tensor in tensors:
        has_known_grid = tensor.grid in (encoding.values, encoding.embeddings, None)
        has_known_packing = tensor.packing == encoding.packing or not tensor.spec.is_packed
        if not has_known_grid or not has_known_packing:
            raise ExportError(
                f"{folder}: {tensor.name} is {tensor.packing}, {tensor.grid or 'not quantised'}, but by the manifest "
                f"the export is {encoding}"
            )


def _check_config(path: Path, num_files: int, facts: Facts, encoding: Encoding) -> None:
    """Require the entry "quantization_config" that programs need to load the weights. Raises ExportError."""
    entry = read_table(path, f"{path} is missing").get("quantization_config")
    left_alone = facts.get("left_alone", ())
    plain = encoding.quantization_config(num_files, left_alone, compressed=False)
    accepted = [plain]
    if encoding.storage.compresses_bitmask:
        # the header of a file, not its config, says whether its bitmasks are compressed
        accepted.append(encoding.quantization_config(num_files, left_alone, compressed=True))
    if entry not in accepted:
        raise ExportError(f"{path}: quantization_config = {str(entry)[:200]}, but {encoding} weights need {plain}")


def _open_weights(folder: Path, tensors: Sequence[ExportedTensor]) -> dict[str, TensorFile]:
    """Open the weight files, and require exactly the tensors of the manifest in their headers."""
    wanted: dict[str, set[str]] = {}
    for tensor in tensors:
        for part in tensor.parts:
            wanted.setdefault(part.file, set()).add(part.name)
    files: dict[str, TensorFile] = {}
    for name, parts in wanted.items():
        try:
            files[name] = TensorFile(folder / name)
        except TensorFileError as error:
            raise ExportError(str(error)) from None
        in_header = set(files[name].slots)
        unknown = in_header - parts
        if unknown:
            raise ExportError(f"{folder} has tensors that the manifest does not list: {shortened(sorted(unknown))}")
        lacking = parts - in_header
        if lacking:
            raise ExportError(f"{folder / name} lacks {shortened(sorted(lacking))}")
    return files


def _check_index(
    folder: Path, tensors: Sequence[ExportedTensor], files: dict[str, TensorFile], encoding: Encoding
) -> None:
    """Check the index through which transformers finds tensors in several files; a single file has no index."""
    path = folder / encoding.weights_file(2)
    # transformers looks for names with this stem, and would not find others
    if any(not name.startswith(encoding.stem) for name in files):
        raise ExportError(f"{folder} is {encoding}, but its tensors are in {shortened(sorted(files), 2)}")
    if len(files) == 1:
        if path.exists():
            raise ExportError(f"{path} is an index, but there is only one weight file. Remove it")
        return
    index = read_table(path, f"{path} is missing")
    total = 0
    for file in files.values():
        total += sum(slot.nbytes for slot in file.slots.values())
    where: dict[str, str] = {}
    for tensor in tensors:
        where |= {part.name: part.file for part in tensor.parts}
    if index != {"metadata": {"total_size": total}, "weight_map": where}:
        raise ExportError(f"{path} does not list the tensors and files of the manifest. Export the model again")


def _check_tensor(folder: Path, tensor: ExportedTensor, files: dict[str, TensorFile]) -> None:
    """Read a tensor; compare its bytes with the manifest, and check all invariants of its parts and values."""
    parts: list[Tensor] = []
    spec = tensor.spec
    place = f"{folder / tensor.parts[-1].file}: {tensor.name}"
    try:
        for part in tensor.parts:
            parts.append(files[part.file].read(part.name))
            if tensor_sha256(parts[-1]) != part.sha256:
                raise ExportError(f"{folder / part.file}: {part.name} is not what was exported: its SHA-256 differs")
        if spec.form is None:
            _check_values(tensor, parts[0], place)
            return
        by_part = with_row_bits(place, dict(zip(spec.form.part_names, parts, strict=True)), spec.matrix)
        spec.form.check(place, by_part, spec.matrix)
    except (TensorFileError, FormatError) as error:
        raise ExportError(str(error)) from None
    _check_values(tensor, spec.as_in_model(spec.form.unpack(by_part)), place)


def _check_values(tensor: ExportedTensor, values: Tensor, place: str) -> None:
    """Check the tensor in the model's shape: dtype, number of non-zeros, and for pruned weights sign and sparsity."""
    if tuple(values.shape) != tensor.shape or (tensor.grid is None and values.dtype != tensor.spec.dtype):
        raise ExportError(
            f"{place} is {CODE_OF_DTYPE[values.dtype]} {list(values.shape)}, the manifest says "
            f"{tensor.dtype} {list(tensor.shape)}"
        )
    # after unpacking, so that a wrong bitmask shows
    nonzero = count_nonzero(values)
    if nonzero != tensor.nonzero:
        raise ExportError(f"{place} has {nonzero} non-zeros, not {tensor.nonzero}")
    if tensor.origin != "pruned":
        return
    # a pruned weight that an update made negative must not leave its sign behind
    if bool((torch.signbit(values) & (values == 0)).any()):
        raise ExportError(f"{place} has a -0.0 where pruned weights must be +0.0")
    matrices = _matrices(tensor, values, place)
    for index, (matrix, pruned) in enumerate(zip(matrices, tensor.pruned_per_matrix, strict=True)):
        if int((matrix == 0).sum()) < pruned:
            raise ExportError(f"{place}, matrix {index}, has fewer zeros than the {pruned} of its mask")


def _matrices(tensor: ExportedTensor, values: Tensor, place: str) -> list[Tensor]:
    """Split a pruned tensor into its matrices; a stack of experts expert by expert."""
    count = len(tensor.pruned_per_matrix)
    width = tensor.shape[tensor.matrix_axis - 2]  # the axis counts without that of the experts
    experts = [values]
    if values.dim() == 3:
        experts = list(values)
    per_expert = count // len(experts) if experts else 0
    divides = per_expert * len(experts) == count
    if not divides or not per_expert or width % per_expert:
        raise ExportError(f"{place} cannot be {count} matrices: {list(values.shape)} does not divide")
    if not width:
        return [values] * count  # split would return a single matrix
    matrices: list[Tensor] = []
    for expert in experts:
        matrices += expert.split(width // per_expert, dim=tensor.matrix_axis)
    return matrices
