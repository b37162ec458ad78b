"""``pst_manifest.json``: the contents of an export, tensor by tensor and file by file."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticKnownError
from torch import Tensor

from pst_ds.atomic_files import file_sha256
from pst_ds.core.bits import INT_OF_SIZE
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.errors import problem_with_value
from pst_ds.file_names import CARD_FILE, MANIFEST_FILE
from pst_ds.formats.safetensors_file import DTYPE_OF_CODE, tensor_bytes
from pst_ds.storage_format import PLAIN_STEM, storage_formats
from pst_ds.writing.encoding import ExportError, encoding_of
from pst_ds.writing.plan import Origin, TensorSpec

FORMAT = 2
"""Version of manifests without quantised tensors."""
QUANTIZED_FORMAT = 3
"""Version of manifests that have ``values``, ``group`` and ``rounding_error`` of tensors."""
MAX_BYTES = 1 << 30
"""Largest manifest or index that is read."""
_QUANTIZED_KEYS = {"values", "group", "rounding_error"}

Facts = dict[str, Any]
"""Facts about a whole export: the manifest without its tensors.

    kind, values, group, embeddings, embedding_group    format and quantisation, see :class:`Encoding`
    architecture, base_model, base_fingerprint, run     model class, base model, resolved run file
    pruned_from                                         model from which the base was fine-tuned or pruned
    step, computed_in, metrics, sparsity_requested      of the run; computed_in: its precision
    experts_removed                                     requested share of the experts, if some were removed
    tokens_kept                                         old id of each token, if tokens were removed
    left_alone                                          linear layers that are not quantised, for compressed-tensors
    sparsity_measured, *_bytes, *bits_per_weight, rounded_tensors, largest_rounding_error    measured
    refilled                                            linear weights without pruned values in a pruned model folder
    files, files_in_folders                             SHA-256 of every file but manifest and model card, by name, or
                                                        FOLDER/NAME; older versions omit weight files and folders
"""
_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_UNHASHED = (MANIFEST_FILE, CARD_FILE)


def _require_kind(kind: str) -> str:
    """Return a storage format that manifests name. Raises pydantic's error of a literal for another."""
    known = [storage.name for storage in storage_formats() if storage.has_manifest]
    if kind not in known:
        raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, known))})
    return kind


def _require_weight_file(name: str) -> str:
    """Return the name of a weight file of an export. Raises pydantic's error of a pattern for another."""
    stems = {PLAIN_STEM}
    # checked here, because formats of other packages are known only once the registry is asked
    for storage in storage_formats():
        if storage.has_manifest:
            stems.add(storage.stem)
    pattern = rf"(?:{'|'.join(map(re.escape, sorted(stems)))})(?:-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors"
    if re.fullmatch(pattern, name) is None:
        raise PydanticKnownError("string_pattern_mismatch", {"pattern": pattern})
    return name


_Kind = Annotated[str, AfterValidator(_require_kind)]


class StoredPart(BaseModel):
    """A tensor in a weight file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(max_length=512)]
    file: Annotated[str, AfterValidator(_require_weight_file)]
    sha256: _Sha256


class ExportedTensor(BaseModel):
    """A tensor of an export, as the manifest describes it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    shape: Annotated[tuple[_Count, ...], Field(strict=False)]
    dtype: Literal[tuple(DTYPE_OF_CODE)]  # type: ignore[valid-type]
    origin: Origin
    nonzero: _Count
    pattern: str
    """Sparsity pattern of a linear layer's weight; "dense" for other tensors."""
    pruned_per_matrix: Annotated[tuple[_Count, ...], Field(strict=False)]
    """Weights that the mask prunes, for each matrix of a pruned tensor."""
    matrix_axis: Literal[0, 1]
    """Storage axis along which the matrices of a fused tensor are concatenated."""
    packing: _Kind
    transposed: bool
    parts: Annotated[tuple[StoredPart, ...], Field(strict=False)]
    values: str = ""
    """"int8", "int4", or "" for values in the model's dtype."""
    group: int | str = ""
    rounding_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Norm of the quantisation error, relative to the norm of the kept weights."""

    @cached_property
    def spec(self) -> TensorSpec:
        """Shape, dtype, packing and quantisation."""
        return TensorSpec(
            name=self.name,
            shape=self.shape,
            dtype=DTYPE_OF_CODE[self.dtype],
            origin=self.origin,
            packing=self.packing,
            grid=self.grid,
            transposed=self.transposed,
        )

    @property
    def grid(self) -> Grid | None:
        """Quantisation of the values; None if they have the model's dtype."""
        if not self.values:
            return None
        return grid_of(self.values, self.group)

    @property
    def numel(self) -> int:
        return self.spec.numel

    @model_validator(mode="after")
    def _require_consistent(self) -> Self:
        is_matrix = len(self.shape) in (2, 3)
        needs_matrix = self.spec.form or self.pruned_per_matrix or self.transposed
        part_names = [part.name for part in self.parts]
        holds_for_field = {
            "values": bool(self.values) == bool(self.group),
            "pruned_per_matrix": bool(self.pruned_per_matrix) == (self.origin == "pruned"),
            "shape": is_matrix or not needs_matrix,
            # a part under another tensor's name would be read in its place
            "parts": part_names == self.spec.part_names(),
        }
        for field, holds in holds_for_field.items():
            if not holds:
                raise ValueError(f"{self.name[:80]} has an impossible value of {field}")
        return self


_Share = Annotated[float, Field(ge=0, le=1)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Run(BaseModel):
    """The keys of a resolved run file that readers of a manifest use; it may have others."""

    model_config = ConfigDict(strict=True)

    method: str = ""
    data: dict[str, Any] = {}


class _Manifest(BaseModel):
    """All values of a manifest that this version knows; a newer version may add others.

    Keys with a default are missing in manifests of older versions, or of exports that they do not describe.
    """

    model_config = ConfigDict(strict=True)

    # before the tensors, so that a format that is not installed is named first
    kind: _Kind
    tensors: list[ExportedTensor]
    values: str | None = None
    group: int | str | None = None
    embeddings: str | None = None
    embedding_group: int | str | None = None
    architecture: str | None = None
    base_model: str | None = None
    base_fingerprint: str | None = None
    pruned_from: str | None = None
    run: _Run | None = None
    step: _Count | None = None
    computed_in: str | None = None
    metrics: dict[str, float | None] | None = None
    sparsity_requested: _Share | None
    sparsity_measured: _Share | None = None
    experts_removed: _Share | None = None
    files: dict[str, _Sha256]
    files_in_folders: dict[str, _Sha256] = {}
    left_alone: list[str] = []
    refilled: list[str] = []
    tokens_kept: list[_Count] | None = None
    dense_bf16_bytes: _Count | None = None
    weight_bytes: _Count | None = None
    file_bytes: _Count | None = None
    bits_per_weight: _NotNegative | None = None
    packed_bits_per_weight: _NotNegative | None = None
    rounded_tensors: _Count | None = None
    largest_rounding_error: _NotNegative | None = None

    @model_validator(mode="after")
    def _require_consistent(self) -> Self:
        names: list[str] = []
        for tensor in self.tensors:
            names += {tensor.name, *tensor.spec.part_names()}  # a tensor that is not packed is its only part
        if len(set(names)) != len(names):
            raise ValueError("two tensors have the same name")
        # names become paths inside the folder, and must not lead out of it
        if not all(map(_is_plain_name, self.files)):
            raise ValueError("files must map plain names to SHA-256")
        for name in self.files_in_folders:
            if name.count("/") != 1 or not all(map(_is_plain_name, name.split("/"))):
                raise ValueError("files_in_folders must map FOLDER/NAME to SHA-256")
        if not set(self.refilled) <= set(names):
            raise ValueError("refilled names other tensors")
        kept = self.tokens_kept
        # ascending, so that no token has two rows; readers compare the last one, the largest, with the model's rows
        if kept is not None and not (kept and all(token < following for token, following in pairwise(kept))):
            raise ValueError("tokens_kept does not ascend")
        return self


def _is_plain_name(name: str) -> bool:
    """Return whether ``name`` is the name of a file, without folders."""
    return name not in ("", ".", "..") and Path(name).name == name


def file_sums(folder: Path) -> Facts:
    """Return ``files`` and ``files_in_folders`` of the manifest of a folder, which are all files but the model card.

    Users may edit the card. A folder inside is, for example, ``1_Pooling`` of sentence-transformers.
    """
    sums: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in _UNHASHED:
            sums[path.name] = file_sha256(path)
    sums_in_folders: dict[str, str] = {}
    for path in folder.glob("*/*"):
        if path.is_file():
            # with "/" on every system, since an export may be verified on another one
            sums_in_folders[path.relative_to(folder).as_posix()] = file_sha256(path)
    facts: Facts = {"files": sums}
    if sums_in_folders:
        facts["files_in_folders"] = dict(sorted(sums_in_folders.items()))
    return facts


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor.detach().cpu().contiguous())).hexdigest()


def count_nonzero(tensor: Tensor) -> int:
    """Count the values that are not zero; for dtypes that torch cannot count in, those with any bit set."""
    try:
        return int(torch.count_nonzero(tensor))
    except (RuntimeError, NotImplementedError):  # torch has no kernel for it, such as for fp8
        return int(torch.count_nonzero(tensor.view(INT_OF_SIZE[tensor.element_size()])))


def write_manifest(folder: Path, tensors: Sequence[ExportedTensor], facts: Facts) -> None:
    """Write the manifest into ``folder``."""
    is_quantized = any(tensor.values for tensor in tensors)
    version = QUANTIZED_FORMAT
    omitted: set[str] | None = None
    if not is_quantized:
        # readers of the first version reject unknown keys
        version = FORMAT
        omitted = _QUANTIZED_KEYS
    rows = [tensor.model_dump(mode="json", exclude=omitted) for tensor in tensors]
    table = {"format": version, **facts, "tensors": rows}
    text = json.dumps(sealed(table), indent=1, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def sealed(table: dict[str, object]) -> dict[str, object]:
    """Return ``table`` with the SHA-256 of its other values as the last value."""
    unsealed = {key: value for key, value in table.items() if key != "sha256"}
    # sorted and without spaces, so that the file's layout does not matter, only its values
    text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"))
    return {**unsealed, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(folder: Path) -> tuple[list[ExportedTensor], Facts]:
    """Return the tensors and the facts of an export. Raises ExportError for a missing or damaged manifest."""
    path = folder / MANIFEST_FILE
    table = read_table(path, f"{folder.absolute()} is not an export: {MANIFEST_FILE} is missing")
    if table.get("format") not in (FORMAT, QUANTIZED_FORMAT):
        raise ExportError(
            f"{path} has format {str(table.get('format'))[:40]}, and this version reads {FORMAT} and "
            f"{QUANTIZED_FORMAT}. Export the run again"
        )
    if table.get("sha256") != sealed(table)["sha256"]:
        raise ExportError(f"{path} is damaged: its own SHA-256 differs. Export the model again")
    try:
        manifest = _Manifest.model_validate(table)
        encoding_of(manifest.kind, table)
    except ValidationError as error:
        raise ExportError(f"{path} is damaged: {_first_problem(error)}. Export the model again") from None
    except ValueError as error:
        raise ExportError(f"{path} is damaged: {error!r}. Export the model again") from None
    # from the table, because the model has defaults for keys that the manifest does not have
    facts = {key: value for key, value in table.items() if key not in ("format", "sha256", "tensors")}
    return manifest.tensors, facts


def _first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found: its key, the value unless it is missing, and the reason."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part)[:80] for part in first["loc"])
    if first["type"] == "missing":
        return f"{place}: {first['msg']}"
    if first["type"] == "value_error":  # of a validator of ours, which names the value
        problem = first["msg"].removeprefix("Value error, ")
        if not place:  # of the whole manifest
            return problem
        return f"{place}: {problem}"
    return f"{place} = {problem_with_value(first)}"


def read_table(path: Path, missing: str) -> dict[str, Any]:
    """Read the JSON object in a plain file. Raises ExportError, with the message ``missing`` without a file."""
    require_plain(path, missing)
    if path.stat().st_size > MAX_BYTES:
        raise ExportError(f"{path} is damaged: it is larger than {MAX_BYTES:,} bytes")
    try:
        table = json.loads(path.read_bytes())
        json.dumps(table, allow_nan=False).encode()  # rejects lone surrogates and NaN
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number with thousands of digits
        raise ExportError(f"{path} is damaged: {error}. Write it again") from None
    if not isinstance(table, dict):
        raise ExportError(f"{path} is damaged: expected a JSON object. Write it again")
    return table


def require_plain(path: Path, missing: str) -> None:
    """Raise ExportError unless ``path`` is a regular file and not a link."""
    # a link would let a folder from elsewhere show the content of a file outside it
    if path.is_symlink():
        raise ExportError(f"{path} is a link; an export must have plain files only")
    if not path.is_file():
        raise ExportError(missing)
