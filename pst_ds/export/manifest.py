"""``pst_manifest.json``: what an export holds, tensor by tensor and file by file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from pst_ds.core.bits import INT_OF_SIZE
from pst_ds.core.packings import DENSE, FOR_COMPRESSED_TENSORS, PACKINGS
from pst_ds.core.quantization import Grid, grid_of
from pst_ds.errors import InputError
from pst_ds.export.encoding import STEMS, Encoding, encoding_of
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats import PackedFormat, packed_format
from pst_ds.formats.safetensors_file import DTYPE_OF_CODE, tensor_bytes, unique_json

FORMAT, QUANTIZED_FORMAT = 2, 3
"""Of manifests: the second has ``values``, ``group`` and ``rounding_error`` of tensors, the first knows none."""
KINDS = (DENSE, *PACKINGS, *FOR_COMPRESSED_TENSORS)
ORIGINS = ("base", "trained", "pruned", "model")
MOST_BYTES = 1 << 30
"""The limit for a manifest or an index."""
_OF_QUANTIZED = ("values", "group", "rounding_error")
_DIGEST = re.compile(r"[0-9a-f]{64}")

JsonTable = dict[str, Any]
About = JsonTable
"""A manifest's facts of the whole export."""


def encoding_by(about: About) -> Encoding:
    """Return how an export is stored, by what its manifest says."""
    return encoding_of(about["kind"], about)


_WEIGHT_FILE = re.compile(rf"(?:{'|'.join(STEMS)})(?:-\d{{5}}-of-\d{{5}})?\.safetensors")


class ExportError(InputError):
    """An export that cannot be made, or that is not what its manifest says."""


@dataclass(frozen=True, slots=True)
class PartEntry:
    """One tensor of a file."""

    name: str
    """In the file."""
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the model."""

    name: str
    shape: list[int]
    """As the model has it."""
    dtype: str
    """The model's, as safetensors spells it: "BF16"."""
    origin: str
    """"base": the pretrained bytes; "trained": from the checkpoint, or W0 + beta U V of an embedding; "pruned":
    M . (W0 + beta U V); "model": from a model folder."""
    nonzero: int
    pattern: str
    """The pattern of the zeros of a linear layer's weight; "dense" for other tensors."""
    pruned_per_matrix: list[int]
    """Zeros in the mask of each matrix of a pruned tensor."""
    matrix_axis: int
    """Storage axis along which the matrices of a fused tensor lie."""
    packing: str
    """The format that it is packed in, or "dense"."""
    transposed: bool
    """True where the model has it as (I, O), and a packed part as (O, I)."""
    parts: list[PartEntry]
    values: str = ""
    """"int8" or "int4" where its values are codes on a grid."""
    group: int | str = ""
    """Inputs that share a scale: 32, 64, 128 or "row"."""
    rounding_error: float = 0.0
    """Norm of what rounding to the grid changed, over the norm of the kept weights."""

    def __post_init__(self) -> None:
        """Raise ValueError for impossible values."""
        for name, hint in get_type_hints(TensorEntry).items():
            known = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
            if type(getattr(self, name)) not in known:
                raise ValueError(f"{name} of {str(self.name)[:80]} is {str(getattr(self, name))[:80]!r}")
        _require(bool(self.pruned_per_matrix) <= (self.origin == "pruned"), self.name, "pruned_per_matrix")
        _require(self.origin in ORIGINS, self.name, "origin")
        _require(self.origin != "pruned" or bool(self.pruned_per_matrix), self.name, "pruned_per_matrix")
        _require(all(type(n) is int and 0 <= n < 1 << 48 for n in (*self.shape, self.nonzero)), self.name, "shape")
        _require(all(type(n) is int and n >= 0 for n in self.pruned_per_matrix), self.name, "pruned_per_matrix")
        _require(self.matrix_axis in (0, 1), self.name, "matrix_axis")
        _require(self.dtype in DTYPE_OF_CODE, self.name, "dtype")
        _require(self.packing in KINDS, self.name, "packing")
        _require(bool(self.values) == bool(self.group) and 0 <= self.rounding_error < math.inf, self.name, "values")
        form = self.form
        _require(len(self.parts) == (len(form.part_names) if form else 1), self.name, "parts")
        if form or self.pruned_per_matrix or self.transposed:
            _require(len(self.shape) in (2, 3), self.name, "shape")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(O, I) of a matrix, (E*O, I) of a stack of experts."""
        *stacked, rows, columns = self.shape
        outputs, inputs = (columns, rows) if self.transposed else (rows, columns)
        return math.prod(stacked) * outputs, inputs

    def as_in_model(self, matrix: Tensor) -> Tensor:
        """Return a view of ``matrix``, which is as :attr:`matrix` says, in the model's shape."""
        *stacked, rows, columns = self.shape
        if self.transposed:
            return matrix.view(*stacked, columns, rows).transpose(-1, -2)
        return matrix.view(self.shape)

    @property
    def grid(self) -> Grid | None:
        """Raises ValueError for values or groups that there are not."""
        return grid_of(self.values, self.group) if self.values else None

    @property
    def form(self) -> PackedFormat | None:
        """The format of its parts; None for a tensor that is stored as it is."""
        grid = self.grid
        return packed_format(self.packing, grid) if grid or self.packing != DENSE else None

    def part_names(self) -> list[str]:
        """The names that its parts must have, in their order."""
        form = self.form
        if form is None:
            return [self.name]
        module = self.name.removesuffix(".weight")
        return [f"{module}.{part}" for part in form.part_names]


def _require(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} has {what} that cannot be")


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the values as stored."""
    return hashlib.sha256(tensor_bytes(tensor.detach().cpu().contiguous())).hexdigest()


def count_nonzero(tensor: Tensor) -> int:
    """Values that are not zero; of dtypes that torch does not count in, those with a bit set."""
    try:
        return int(torch.count_nonzero(tensor))
    except (RuntimeError, NotImplementedError):
        return int(torch.count_nonzero(tensor.view({1: torch.int8, **INT_OF_SIZE}[tensor.element_size()])))


def write_manifest(folder: Path, entries: list[TensorEntry], about: About) -> None:
    is_quantized = any(entry.values for entry in entries)
    rows = [asdict(entry) for entry in entries]
    if not is_quantized:  # as versions before this one read it
        rows = [{key: value for key, value in row.items() if key not in _OF_QUANTIZED} for row in rows]
    table = {"format": QUANTIZED_FORMAT if is_quantized else FORMAT, **about, "tensors": rows}
    text = json.dumps(sealed(table), indent=1, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def sealed(table: JsonTable) -> JsonTable:
    """``table`` with the SHA-256 of all its other values as its last one."""
    rest = {key: value for key, value in table.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(folder: Path) -> tuple[list[TensorEntry], About]:
    """(entries, everything else) of an export. Raises ExportError when it is missing or not a manifest."""
    path = folder / MANIFEST_FILE
    table = read_table(path, f"{folder.absolute()} is not an export: {MANIFEST_FILE} is missing")
    if table.get("format") not in (FORMAT, QUANTIZED_FORMAT):
        raise ExportError(
            f"{path} has format {str(table.get('format'))[:40]}, and this version reads {FORMAT} and "
            f"{QUANTIZED_FORMAT}; export the run again"
        )
    if table.get("sha256") != sealed(table)["sha256"]:
        raise ExportError(
            f"{path} is damaged: it was changed after it was written, its own SHA-256 says; export the model again"
        )
    try:
        return _entries(table.pop("tensors")), _about(table)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path} is damaged: {error!r}") from None


def read_table(path: Path, missing: str) -> JsonTable:
    """A JSON object of a plain file. Raises ExportError, with the text ``missing`` if it is not there."""
    require_plain(path, missing)
    if path.stat().st_size > MOST_BYTES:
        raise ExportError(f"{path} is damaged: it is larger than {MOST_BYTES:,} bytes")
    try:
        table = unique_json(path.read_bytes())
        json.dumps(table, allow_nan=False).encode()  # no lone surrogates, no NaN
    except ValueError as error:  # no JSON, no UTF-8, a key twice, or a number of thousands of digits
        raise ExportError(f"{path} is damaged: {error}; it must be written again") from None
    if not isinstance(table, dict):
        raise ExportError(f"{path} is damaged: it is no JSON object")
    return table


def require_plain(path: Path, missing: str) -> None:
    """Raise ExportError unless ``path`` is a file, and no link to one."""
    if path.is_symlink():
        raise ExportError(f"{path} is a link; an export holds plain files only")
    if not path.is_file():
        raise ExportError(missing)


def _entries(table: Any) -> list[TensorEntry]:
    entries = []
    for row in table:
        parts = [PartEntry(**part) for part in row["parts"]]
        entry = TensorEntry(**{**row, "parts": parts})
        for part in parts:
            _require_part(part)
        _require([part.name for part in parts] == entry.part_names(), entry.name, "parts")
        entries.append(entry)
    names = [name for entry in entries for name in {entry.name, *entry.part_names()}]
    if len(set(names)) != len(names):
        raise ValueError("two tensors have the same name")
    return entries


def _require_part(part: PartEntry) -> None:
    if not all(isinstance(getattr(part, f.name), str) for f in fields(part)) or not _DIGEST.fullmatch(part.sha256):
        raise ValueError(f"{str(part.name)[:80]} has no SHA-256")
    if not _WEIGHT_FILE.fullmatch(part.file):
        raise ValueError(f"{part.name} would be in {part.file[:80]!r}, which is no weight file of an export")


def _about(table: JsonTable) -> JsonTable:
    kind, files = table["kind"], table["files"]
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}")
    encoding_of(kind, table)  # which refuses grids that there are not
    if "sparsity_requested" not in table:
        raise ValueError("sparsity_requested is missing")
    left_alone = table.get("left_alone", [])
    if not isinstance(left_alone, list) or not all(isinstance(name, str) for name in left_alone):
        raise ValueError("left_alone is no list of names")
    if not isinstance(files, dict) or not all(Path(n).name == n and isinstance(sha, str) for n, sha in files.items()):
        raise ValueError("files are not plain names with a SHA-256")
    kept = table.get("tokens_kept")
    if kept is not None and not (isinstance(kept, list) and _are_ascending(kept)):
        raise ValueError(f"tokens_kept is no list of ascending ids: {str(kept)[:80]}")
    return {key: value for key, value in table.items() if key not in ("format", "sha256")}


def _are_ascending(ids: list[Any]) -> bool:
    are_ids = bool(ids) and all(type(token) is int and 0 <= token < 1 << 48 for token in ids)
    return are_ids and all(one < two for one, two in pairwise(ids))
