"""The portable checkpoint: what training changed, readable by any world size and ZeRO stage.

A folder with

    manifest.json                          the state of the run, and the place of every value
    shard-00001-of-00002.safetensors, ...  one file per rank that wrote it, with four flat tensors: "master", "exp_avg"
                                           and "exp_avg_sq" (fp32) of its part of every trainable parameter, and "mask"
                                           (uint8), the bits of its part of every pruned weight; in a run that
                                           quantises also "scales" (uint8), its part of the bytes of bf16 scales
    SHA256SUMS                             of all the above, as ``sha256sum -c`` reads it

The frozen weights are in the base model and are not copied. The files are safetensors and JSON, never pickle, and a
folder with any other file is rejected. :mod:`pst_ds.checkpoint.writer` writes it.
"""

import hashlib
import json
import math
import os
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from pst_ds.atomic_files import file_sha256
from pst_ds.checkpoint.shards import TENSOR_FILE, ChunkedTensors, files_of, shard_name
from pst_ds.core.bits import pack_shard, part_range, shard_bytes, unpack_shard
from pst_ds.core.quantization import SCALE_DTYPE, Grid, scales_of_bytes
from pst_ds.errors import InputError, first_problem
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, TensorFile, TensorFileError
from pst_ds.parallel.optimizer_state import KINDS, MASTER

FORMAT = 4
READ_FORMATS = (2, 3, 4)
"""2 has no quantisation, 3 no experts on ranks."""
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
MASK = "mask"
SCALES = "scales"
SCALE_BYTES = SCALE_DTYPE.itemsize
_STRICT = ConfigDict(strict=True, extra="forbid")
_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Size = Annotated[int, Field(ge=1, lt=1 << 48)]


class CheckpointError(InputError):
    """A checkpoint that is missing or damaged, or belongs to another model."""


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """The state of a run, without its tensors."""

    __pydantic_config__ = _STRICT
    step: _Count
    """Applied optimizer steps."""
    sparsity: float
    """Requested sparsity of every pruned matrix."""
    masks_frozen: bool
    """True if the masks have reached their final sparsity and are fixed."""
    precision: str
    """Dtype of the model's computation: "bf16" or "fp32"."""
    device_type: str
    """Device of the model's computation: "cpu", "cuda"."""
    base_path: str
    base_fingerprint: str
    labels: list[str]
    """Names of the classes, in the order of their ids."""
    magnitude_scales: Annotated[dict[str, list[float]], Field(alias="weight_scales")]
    """Mean |W0| of the matrices of each PST layer (or ones)."""
    metrics: dict[str, float]
    """Metrics at this step, if the model was evaluated."""
    rounds: bool = False
    """True if the model multiplies with quantised weights."""
    progress: dict[str, Any] = field(default_factory=dict)
    """JSON values from which the run can continue; see :class:`pst_ds.train.resume.RunProgress`."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Tensors of a checkpoint, and how they are divided over its files. Raises ValueError if they do not agree."""

    __pydantic_config__ = _STRICT
    num_shards: _Size
    trained: dict[str, tuple[_Count, ...]]
    """Shape of every trainable parameter, in the order of the files' values."""
    masks: dict[str, _Size]
    """Weights under each mask, by PST layer, in the order of the files' bytes."""
    steps: dict[str, _Count]
    """Adam's step count of each trainable parameter."""
    cuts: list[list[tuple[_Count, _Count, _Count]]] | None = None
    """Chunks of the trainable parameters; None for even ones. See :class:`pst_ds.checkpoint.shards.ChunkedTensors`."""
    grid: tuple[int, _Count] | None = None
    """Bits of quantised weights, and inputs per scale or 0 for a per-row scale; None without quantisation."""
    scales: dict[str, tuple[_Size, _Size]] = field(default_factory=dict)
    """Shape of each PST layer's scales as the weight is stored, in the order of the files' bytes; divided evenly."""
    parts: dict[str, _Size] = field(default_factory=dict)
    """Ranks that divided the experts of a stack among them, by PST layer: its values are divided evenly within a part.
    """

    def __post_init__(self) -> None:
        if set(self.steps) != set(self.trained):
            raise ValueError("steps do not belong to the trained parameters")
        if set(self.scales) != (set(self.masks) if self.value_grid else set()):
            raise ValueError("scales do not belong to the pruned layers")
        for name, num_parts in self.parts.items():
            if self.num_shards % num_parts or self.masks.get(name, 1) % num_parts:
                raise ValueError("parts do not divide the files and the pruned layers")

    @property
    def value_grid(self) -> Grid | None:
        """Quantisation of the pruned layers. Raises ValueError for one that does not exist."""
        if self.grid is None:
            return None
        bits, inputs_per_scale = self.grid
        return Grid(bits, inputs_per_scale or None)


_MOST_HELD_FILES = 512
"""Half of the files that a process may usually have open."""
_STATE = TypeAdapter(CheckpointState)
_CONTENTS = TypeAdapter(Contents)


class Checkpoint:
    """A checkpoint opened for reading; its values are read from disk on request."""

    def __init__(self, folder: Path, state: CheckpointState, contents: Contents):
        self.folder = folder
        self.state = state
        self.contents = contents
        self._tensors = self._place_trained()
        scale_bytes = {name: SCALE_BYTES * math.prod(shape) for name, shape in contents.scales.items()}
        self._scales = ChunkedTensors(scale_bytes, contents.num_shards, parts=contents.parts)
        # A mask has the same offset in every file: each shard is padded to whole bytes, so all have one size.
        self._mask_offsets: dict[str, int] = {}
        self._mask_bytes = 0
        for name, numel in contents.masks.items():
            num_parts = contents.parts.get(name, 1)
            self._mask_offsets[name] = self._mask_bytes
            self._mask_bytes += shard_bytes(numel // num_parts, contents.num_shards // num_parts)
        self._open: dict[int, TensorFile] = {}

    def _place_trained(self) -> ChunkedTensors:
        """Return where the files hold the values of the trained parameters."""
        sizes: dict[str, int] = {}
        parts: dict[str, int] = {}
        for name, shape in self.contents.trained.items():
            sizes[name] = torch.Size(shape).numel()
            layer = name.rpartition(".")[0]
            if layer in self.contents.parts:
                parts[name] = self.contents.parts[layer]
        return ChunkedTensors(sizes, self.contents.num_shards, self.contents.cuts, parts)

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """Whole fp32 masters in their shapes, by name; read at every access."""
        return _OnDemand(self.contents.trained, self._whole_master)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Bits of whole masks in one shard, by layer; read at every access."""
        return _OnDemand(self.contents.masks, lambda name: self.mask_shard(name, 1, 0))

    @property
    def scales(self) -> Mapping[str, Tensor]:
        """Whole bf16 scales in their shapes, by layer; read at every access."""
        return _OnDemand(self.contents.scales, self._whole_scales)

    def values(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Return values [start, stop) of a trainable parameter, (stop - start,) fp32; ``kind`` is one of KINDS."""
        pieces = self._read_pieces(self._tensors, name, key=kind, start=start, stop=stop)
        if not pieces:
            return torch.empty(0)
        if len(pieces) == 1:  # usual on as many ranks as wrote the checkpoint: torch.cat would copy the values
            return pieces[0]
        return torch.cat(pieces)

    def scale_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Return bytes [start, stop) of a layer's scales, uint8."""
        pieces = self._read_pieces(self._scales, name, key=SCALES, start=start, stop=stop)
        return torch.cat([torch.empty(0, dtype=torch.uint8), *pieces])  # torch.cat needs at least one tensor

    def _read_pieces(self, tensors: ChunkedTensors, name: str, *, key: str, start: int, stop: int) -> list[Tensor]:
        """Read values [start, stop) of one of ``tensors`` from the files' tensors ``key``."""
        pieces = []
        for fragment in tensors.fragments(name, start, stop):
            size = fragment.stop - fragment.start
            pieces.append(self._read(fragment.file, key, fragment.offset, fragment.offset + size))
        return pieces

    def _whole_scales(self, name: str) -> Tensor:
        shape = self.contents.scales[name]
        return scales_of_bytes(self.scale_bytes(name, 0, SCALE_BYTES * math.prod(shape)), shape)

    def mask_shard(self, name: str, num_shards: int, index: int, parts: int = 1) -> Tensor:
        """Return the bits of shard ``index`` of a mask in ``num_shards`` shards of ``parts``, divided as by
        :func:`pst_ds.core.bits.part_range`: uint8; padding bits are zero."""
        numel = self.contents.masks[name]
        num_bytes = shard_bytes(numel // parts, num_shards // parts)
        if num_shards == self.contents.num_shards and parts == self.contents.parts.get(name, 1):
            # The file has this very shard: nothing needs to be unpacked.
            offset = self._mask_offsets[name]
            return self._read(index, MASK, offset, offset + num_bytes)
        start, stop = part_range(numel, num_shards, index, parts)
        return pack_shard(self._keep(name, start, stop), num_bytes)

    def mask_bits(self, name: str, start: int, stop: int) -> Tensor:
        """Read the bits of flat weights [start, stop) of a mask; the first is bit 0."""
        return pack_shard(self._keep(name, start, stop), -(-(stop - start) // 8))

    def _keep(self, name: str, start: int, stop: int) -> Tensor:
        """Return the mask of flat weights [start, stop), uint8 with values 0 and 1."""
        numel = self.contents.masks[name]
        num_files = self.contents.num_shards
        num_parts = self.contents.parts.get(name, 1)
        offset = self._mask_offsets[name]
        pieces = [torch.empty(0, dtype=torch.uint8)]  # torch.cat needs at least one tensor
        for file, first, last in files_of(numel, num_files, num_parts, start, stop):
            # Weight i of a file's shard is bit i % 8 of its byte i // 8. The bytes that contain the weights may start
            # with bits of earlier ones, which are dropped.
            start_of_shard, _ = part_range(numel, num_files, file, num_parts)
            first_bit = first - start_of_shard
            last_bit = last - start_of_shard
            first_byte = first_bit // 8
            data = self._read(file, MASK, offset + first_byte, offset + -(-last_bit // 8))
            pieces.append(unpack_shard(data, last_bit - 8 * first_byte)[first_bit % 8 :])
        return torch.cat(pieces)

    def check_file(self, file: int) -> None:
        """Raise CheckpointError unless the tensors of a file have the dtypes and sizes in the manifest."""
        path = self.folder / shard_name(file, self.contents.num_shards)
        wanted = dict.fromkeys(KINDS, ("F32", [self._tensors.length(file)])) | {MASK: ("U8", [self._mask_bytes])}
        if self.contents.scales:
            wanted[SCALES] = ("U8", [self._scales.length(file)])
        stored: dict[str, tuple[str, list[int]]] = {}
        for key, slot in _opened(path).slots.items():
            stored[key] = CODE_OF_DTYPE[slot.dtype], list(slot.shape)
        if stored != wanted:
            raise CheckpointError(f"{path} is damaged: it holds {stored}, and {MANIFEST} says {wanted}")

    def hold(self) -> None:
        """Open all files, so that their values can be read after another process has removed them.

        A network file system keeps removed files for processes of the same host only. If there are very many files,
        none is kept open. Raises CheckpointError.
        """
        if self.contents.num_shards <= _MOST_HELD_FILES:
            for file in range(self.contents.num_shards):
                self._open[file] = _opened(self.folder / shard_name(file, self.contents.num_shards), held=True)

    def _whole_master(self, name: str) -> Tensor:
        shape = torch.Size(self.contents.trained[name])
        return self.values(name, MASTER, 0, shape.numel()).view(shape)

    def _read(self, file: int, key: str, start: int, stop: int) -> Tensor:
        """Return values [start, stop) of the tensor ``key`` of a file."""
        if file not in self._open:
            self._open[file] = _opened(self.folder / shard_name(file, self.contents.num_shards))
        return self._open[file].read_flat(key, start, stop)


def _opened(path: Path, *, held: bool = False) -> TensorFile:
    """Read the header of a file of tensors. Raises CheckpointError for a missing or damaged file."""
    try:
        return TensorFile(path, held=held)
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    except TensorFileError as error:
        raise CheckpointError(str(error)) from None


class _OnDemand(UserDict[str, Tensor]):
    """Names whose values are read at every access."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]):
        super().__init__(dict.fromkeys(names, torch.empty(0)))
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.data:
            raise KeyError(name)
        return self._read(name)


def most_bytes(trained: int, masked: int, scales: int = 0) -> int:
    """Return an upper bound for a checkpoint's bytes: 12 per trained value, 1 bit per masked weight, 2 per scale."""
    return trained * 12 + masked // 8 + scales * SCALE_BYTES + 10**6


def sums_text(sums: Mapping[str, str]) -> str:
    """Return the content of SHA256SUMS for the SHA-256 of each file, by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def manifest_bytes(state: CheckpointState, contents: Contents) -> bytes:
    """Return the content of manifest.json."""
    state_table: dict[str, object] = {}
    for name, value in asdict(state).items():
        # The files keep the older name of the field.
        key = "weight_scales" if name == "magnitude_scales" else name
        state_table[key] = value
    table = {"format": FORMAT, "state": state_table, "contents": asdict(contents)}
    return (json.dumps(table, indent=1) + "\n").encode()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in ``folder``, hold and verify all its files. Raises CheckpointError, naming the file."""
    checkpoint = open_checkpoint(folder)
    checkpoint.hold()
    check_sums(folder, {name: file_sha256(folder / name) for name in listed_files(folder)})
    for file in range(checkpoint.contents.num_shards):
        checkpoint.check_file(file)
    return checkpoint


def check_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise CheckpointError, naming the file, unless SHA256SUMS contains exactly ``sums``."""
    if (folder / SUMS).read_bytes() == sums_text(sums).encode():
        return
    listed = listed_sums(folder)
    for name, digest in sums.items():
        if name in listed and listed[name] != digest:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the one in {SUMS}")
    raise CheckpointError(f"{folder / SUMS} is damaged: it does not list the files of the checkpoint")


def listed_sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file, by name, that SHA256SUMS contains."""
    sums: dict[str, str] = {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if separator:
            sums[name] = digest
    return sums


def listed_files(folder: Path) -> list[str]:
    """Return the names of the manifest and the tensor files. Raises CheckpointError for other files and links."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else []
    names = [entry.name for entry in entries]  # sorted
    for name in (MANIFEST, SUMS):
        if name not in names:
            raise CheckpointError(f"no whole checkpoint in {folder.absolute()}: {name} is missing")
    for entry in entries:  # scandir knows their kinds without a system call for each
        if not entry.is_file(follow_symlinks=False):
            raise CheckpointError(f"{entry.path} is a link or a folder; a checkpoint holds plain files only")
        if entry.name not in (MANIFEST, SUMS) and not TENSOR_FILE.fullmatch(entry.name):
            raise CheckpointError(
                f"{entry.path} does not belong in a checkpoint, which holds {MANIFEST}, {SUMS} and "
                "shard-*.safetensors; it was not opened. Move it elsewhere"
            )
    names.remove(SUMS)
    return names


def open_checkpoint(folder: Path, names: Sequence[str] | None = None) -> Checkpoint:
    """Open the checkpoint in ``folder`` by its manifest; only the names of the other files are checked.

    ``names``: the result of :func:`listed_files`, if it is known. Raises CheckpointError for a manifest that is
    missing, damaged or of another format, and for missing files.
    """
    names = listed_files(folder) if names is None else names
    path = folder / MANIFEST
    data = path.read_bytes()
    # Checked here and not only by read_checkpoint, because everything below relies on the manifest.
    if f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode() not in (folder / SUMS).read_bytes():
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {SUMS}")
    try:
        table = json.loads(data)
        format_number = table.get("format") if isinstance(table, dict) else None
    except (ValueError, RecursionError) as error:  # not JSON or UTF-8, or a number of thousands of digits
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if format_number not in READ_FORMATS:
        known_formats = " and ".join(map(str, READ_FORMATS))
        raise CheckpointError(f"{path} has format {format_number!r}; this version reads {known_formats}")
    try:
        checkpoint = _checkpoint_of_manifest(folder, table)
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {first_problem(error)}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    num_files = checkpoint.contents.num_shards
    files = range(min(num_files, len(names) + 1))  # enough to name one that is missing
    wanted = {MANIFEST, *(shard_name(file, num_files) for file in files)}
    for name in sorted(wanted ^ set(names)):
        problem = "missing" if name in wanted else "not in the manifest"
        raise CheckpointError(f"{folder / name} is {problem}")
    return checkpoint


def _checkpoint_of_manifest(folder: Path, table: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint that a manifest of a known format describes.

    Raises the errors of damaged content: ValidationError, ValueError, KeyError, TypeError, AttributeError, IndexError.
    """
    missing_in_old: dict[str, Any] = {}
    if table["format"] == 2:
        missing_in_old |= {"grid": None, "scales": {}}
    if table["format"] < 4:
        missing_in_old |= {"parts": {}}
    contents = table["contents"] | missing_in_old
    contents_keys = {field_of_contents.name for field_of_contents in fields(Contents)}
    wrong = (set(table) ^ {"format", "state", "contents"}) | (set(contents) ^ contents_keys)
    if wrong:
        raise ValueError(f"its keys differ from a manifest's in {', '.join(sorted(wrong))}")
    # As JSON, because strict types take lists for tuples only there.
    state = _STATE.validate_json(json.dumps(table["state"]))
    return Checkpoint(folder, state, _CONTENTS.validate_json(json.dumps(contents)))
