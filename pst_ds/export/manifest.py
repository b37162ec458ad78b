"""``pst_manifest.json``: the contents of an export, tensor by tensor and file by file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Required, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from pst_ds.core.bits import INT_OF_SIZE
from pst_ds.core.packings import DENSE, FOR_COMPRESSED_TENSORS, PACKINGS, WHOLE_ROW
from pst_ds.core.quantization import grid_of
from pst_ds.export.encoding import STEMS, Encoding, ExportError, QuantisationFacts, encoding_of
from pst_ds.export.tensor_spec import Origin, TensorSpec
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, DTYPE_OF_CODE, tensor_bytes, unique_json

FORMAT, QUANTIZED_FORMAT = 2, 3
"""Versions of the manifest: only the second has ``values``, ``group`` and ``rounding_error`` of tensors."""
KINDS = (DENSE, *PACKINGS, *FOR_COMPRESSED_TENSORS)
MAX_BYTES = 1 << 30
"""Largest manifest or index that is read."""
_QUANTIZED_KEYS = ("values", "group", "rounding_error")


class StoredPart(BaseModel):
    """A tensor in a weight file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(max_length=512)]
    file: Annotated[str, Field(pattern=rf"^(?:{'|'.join(STEMS)})(?:-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedTensor(TensorSpec):
    """A tensor of an export, with what was measured while it was written."""

    nonzero: int
    pattern: str
    """Sparsity pattern of a linear layer's weight; "dense" for other tensors."""
    pruned_per_matrix: tuple[int, ...]
    """Weights that the mask prunes, for each matrix of a pruned tensor."""
    matrix_axis: int
    """Storage axis along which the matrices of a fused tensor are concatenated."""
    parts: tuple[StoredPart, ...]
    rounding_error: float = 0.0
    """Norm of the quantisation error, relative to the norm of the kept weights."""

    @property
    def values(self) -> str:
        """ "int8", "int4", or "" for values in the model's dtype."""
        return self.grid.values if self.grid else ""


_Count = Annotated[int, Field(ge=0, lt=1 << 48)]


class _Row(BaseModel):
    """A tensor as the manifest has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    shape: list[_Count]
    dtype: Literal[tuple(DTYPE_OF_CODE)]  # type: ignore[valid-type]
    origin: Origin
    nonzero: _Count
    pattern: str
    pruned_per_matrix: list[Annotated[int, Field(ge=0)]]
    matrix_axis: Literal[0, 1]
    packing: Literal[KINDS]  # type: ignore[valid-type]
    transposed: bool
    parts: list[StoredPart]
    values: str = ""
    group: int | str = ""
    rounding_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


_ROWS = TypeAdapter(list[_Row])


class ExportFacts(QuantisationFacts, total=False):
    """Facts about a whole export, as its manifest has them."""

    kind: Required[str]
    """Format of the weights."""
    sparsity_requested: Required[float | None]
    architecture: str
    step: int | None
    base_model: str | None
    base_fingerprint: str | None
    pruned_from: str
    """Model that ``pst-ds prune`` started from, if ``base_model`` was pruned."""
    computed_in: str | None
    """Precision of the run."""
    metrics: dict[str, float | None]
    prompt: dict[str, object] | None
    run: dict[str, object] | None
    """The resolved run file."""
    tokens_kept: list[int] | None
    """Old id of each token, of an export with fewer tokens."""
    left_alone: list[str]
    """Linear layers that are not quantised, for compressed-tensors."""
    sparsity_measured: float
    dense_bf16_bytes: int
    weight_bytes: int
    file_bytes: int
    bits_per_weight: float
    packed_bits_per_weight: float
    rounded_tensors: int
    largest_rounding_error: float
    files: dict[str, str]
    """SHA-256 of every other file, by name."""


def encoding_by(facts: ExportFacts) -> Encoding:
    """Return how an export is stored, given the facts in its manifest."""
    return encoding_of(facts["kind"], facts)


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor.detach().cpu().contiguous())).hexdigest()


def count_nonzero(tensor: Tensor) -> int:
    """Count the values that are not zero; for dtypes that torch cannot count in, those with any bit set."""
    try:
        return int(torch.count_nonzero(tensor))
    except (RuntimeError, NotImplementedError):
        return int(torch.count_nonzero(tensor.view({1: torch.int8, **INT_OF_SIZE}[tensor.element_size()])))


def write_manifest(folder: Path, tensors: Sequence[ExportedTensor], facts: ExportFacts) -> None:
    """Write the manifest into ``folder``."""
    is_quantized = any(tensor.grid for tensor in tensors)
    rows = [_row_of(tensor) for tensor in tensors]
    if not is_quantized:  # readers of the first version reject unknown keys
        rows = [{key: value for key, value in row.items() if key not in _QUANTIZED_KEYS} for row in rows]
    table = {"format": QUANTIZED_FORMAT if is_quantized else FORMAT, **facts, "tensors": rows}
    text = json.dumps(sealed(table), indent=1, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _row_of(tensor: ExportedTensor) -> dict[str, object]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": CODE_OF_DTYPE[tensor.dtype],
        "origin": tensor.origin,
        "nonzero": tensor.nonzero,
        "pattern": tensor.pattern,
        "pruned_per_matrix": list(tensor.pruned_per_matrix),
        "matrix_axis": tensor.matrix_axis,
        "packing": tensor.packing,
        "transposed": tensor.transposed,
        "parts": [part.model_dump() for part in tensor.parts],
        "values": tensor.values,
        "group": (tensor.grid.group or WHOLE_ROW) if tensor.grid else "",
        "rounding_error": tensor.rounding_error,
    }


def sealed(table: dict[str, object]) -> dict[str, object]:
    """Return ``table`` with the SHA-256 of its other values as the last value."""
    rest = {key: value for key, value in table.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(folder: Path) -> tuple[list[ExportedTensor], ExportFacts]:
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
        return _tensors(table.pop("tensors")), _facts(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part)[:80] for part in ("tensors", *first["loc"]))
        raise ExportError(f"{path} is damaged: {place}: {first['msg']}. Export the model again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path} is damaged: {error!r}. Export the model again") from None


def read_table(path: Path, missing: str) -> dict[str, Any]:
    """Read the JSON object in a plain file. Raises ExportError, with the message ``missing`` if there is no file."""
    require_plain(path, missing)
    if path.stat().st_size > MAX_BYTES:
        raise ExportError(f"{path} is damaged: it is larger than {MAX_BYTES:,} bytes")
    try:
        table = unique_json(path.read_bytes())
        json.dumps(table, allow_nan=False).encode()  # rejects lone surrogates and NaN
    except ValueError as error:  # not JSON, not UTF-8, a repeated key, or a number with thousands of digits
        raise ExportError(f"{path} is damaged: {error}. Write it again") from None
    if not isinstance(table, dict):
        raise ExportError(f"{path} is damaged: expected a JSON object. Write it again")
    return table


def require_plain(path: Path, missing: str) -> None:
    """Raise ExportError unless ``path`` is a regular file and not a link."""
    if path.is_symlink():
        raise ExportError(f"{path} is a link; an export must have plain files only")
    if not path.is_file():
        raise ExportError(missing)


def _tensors(table: object) -> list[ExportedTensor]:
    """Validate the rows of a manifest. Raises ValueError."""
    tensors = [_tensor_of(row) for row in _ROWS.validate_python(table)]
    names = [name for tensor in tensors for name in {tensor.name, *tensor.part_names()}]
    if len(set(names)) != len(names):
        raise ValueError("two tensors have the same name")
    return tensors


def _tensor_of(row: _Row) -> ExportedTensor:
    """Convert a row, and check that its values fit each other. Raises ValueError."""
    name = row.name
    _require(bool(row.values) == bool(row.group), name, "values")
    tensor = ExportedTensor(
        name=name,
        shape=tuple(row.shape),
        dtype=DTYPE_OF_CODE[row.dtype],
        origin=row.origin,
        packing=row.packing,
        grid=grid_of(row.values, row.group) if row.values else None,
        transposed=row.transposed,
        nonzero=row.nonzero,
        pattern=row.pattern,
        pruned_per_matrix=tuple(row.pruned_per_matrix),
        matrix_axis=row.matrix_axis,
        parts=tuple(row.parts),
        rounding_error=row.rounding_error,
    )
    _require(bool(tensor.pruned_per_matrix) == (tensor.origin == "pruned"), name, "pruned_per_matrix")
    if tensor.form or tensor.pruned_per_matrix or tensor.transposed:
        _require(len(tensor.shape) in (2, 3), name, "shape")
    _require([part.name for part in tensor.parts] == tensor.part_names(), name, "parts")
    return tensor


def _require(holds: bool, name: str, field: str) -> None:
    if not holds:
        raise ValueError(f"{name[:80]} has an impossible value of {field}")


def _facts(table: dict[str, object]) -> ExportFacts:
    """Check the facts that reading relies on. Raises ValueError and KeyError."""
    kind, files = table["kind"], table["files"]
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}")
    encoding_of(kind, table)  # rejects unknown quantisation
    if "sparsity_requested" not in table:
        raise ValueError("sparsity_requested is missing")
    left_alone = table.get("left_alone", [])
    if not isinstance(left_alone, list) or not all(isinstance(name, str) for name in left_alone):
        raise ValueError("left_alone is not a list of names")
    if not isinstance(files, dict) or not all(Path(n).name == n and isinstance(sha, str) for n, sha in files.items()):
        raise ValueError("files must map plain names to SHA-256")
    kept = table.get("tokens_kept")
    if kept is not None and not (isinstance(kept, list) and _are_ascending(kept)):
        raise ValueError(f"tokens_kept is not a list of ascending ids: {str(kept)[:80]}")
    return cast(ExportFacts, {key: value for key, value in table.items() if key not in ("format", "sha256")})


def _are_ascending(ids: list[object]) -> bool:
    known = [token for token in ids if type(token) is int and 0 <= token < 1 << 48]
    return bool(ids) and len(known) == len(ids) and all(one < two for one, two in pairwise(known))
