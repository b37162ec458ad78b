"""Damaged and hostile exports: refused with one message before anything unpacks them, and never a crash."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pst_ds.core.quantization import Grid, grid_of
from pst_ds.data.vocabulary import trim
from pst_ds.errors import InputError
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats import FORMATS
from pst_ds.formats.safetensors_file import TensorFile, TensorFileError, header_and_slots
from pst_ds.storage_format import packed_format
from pst_ds.writing.check import check_export
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import sealed
from tests.exporting import row_bits_by_numpy

TIMES = int(os.environ.get("PST_DS_FUZZ_TIMES", "1"))
RAW, AGREEING, MANIFESTS = 3300 * TIMES, 1320 * TIMES, 600 * TIMES
"""Mutated files of each kind, over all folders: five thousand, and as many times that as are asked for."""
ENCODINGS = {
    "bitmask": {"packing": "bitmask"},
    "2:4": {"packing": "2:4"},
    "csr": {"packing": "csr"},
    "sharded": {"packing": "bitmask", "shard_bytes": 9000},
    "dense": {},
    "int8": {"packing": "2:4", "values": Grid(8), "embeddings": Grid(4)},
    "int4": {"packing": "bitmask", "values": Grid(4), "embeddings": Grid(8), "shard_bytes": 9000},
    "dense int4": {"values": Grid(4)},
    "compressed-tensors": {"packing": "compressed-tensors", "values": Grid(4)},
    "inputs of 8 bits": {"packing": "compressed-tensors-w8a8", "values": Grid(8)},
    "fewer tokens": {"packing": "bitmask", "values": Grid(8), "embeddings": Grid(4), "vocabulary": "abc"},
    "dense, fewer tokens": {"vocabulary": "the film"},
}
"""How each is exported; of a vocabulary the text whose tokens it keeps."""
WITH_MANIFESTS = ("bitmask", "sharded", "int4", "compressed-tensors", "fewer tokens", "dense, fewer tokens")
KINDS = tuple(ENCODINGS)
STRANGE = [
    -1, 0, 1, 2**31, 2**32, 2**47, 2**62, 2**63, 2**64, 10**400, 1.5, None, True, "", "../x", "/etc/passwd", [], {},
    [[]], "pruned", "csr", "BF16", "a" * 3000, "\x00",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(models):
    """A small export of each kind, in memory where the system has a file system there."""
    top = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    made = {}
    for kind in KINDS:
        made[kind] = top / kind.replace(":", "of")
        models["2:4"].export(made[kind], **_with_vocabulary(ENCODINGS[kind], models["2:4"].tokenizer))
        (made[kind] / "README.md").unlink()
        for path in made[kind].glob("tokenizer*"):  # they would only take time
            path.unlink()
        _reseal(made[kind])
        check_export(made[kind])
    yield made
    shutil.rmtree(top)


def _with_vocabulary(how: dict, tokenizer) -> dict:
    if "vocabulary" not in how:
        return how
    return {**how, "vocabulary": trim(tokenizer, tokenizer(how["vocabulary"])["input_ids"])}


def _reseal(folder: Path) -> None:
    """A manifest that agrees with the files about every hash, as an attacker would write it."""
    table = json.loads((folder / MANIFEST_FILE).read_text())
    names = [path.name for path in folder.iterdir() if path.suffix == ".json" and path.name != MANIFEST_FILE]
    table["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    sums = {}
    for path in folder.glob("*.safetensors"):
        try:
            file = TensorFile(path)
        except (TensorFileError, ValueError):
            continue
        sums |= {name: hashlib.sha256(_bytes_of(file, name)).hexdigest() for name in file.slots}
    for entry in table["tensors"]:
        for part in entry["parts"]:
            part["sha256"] = sums.get(part["name"], part["sha256"])
    (folder / MANIFEST_FILE).write_text(json.dumps(sealed(table)))


def _bytes_of(file: TensorFile, name: str) -> bytes:
    slot = file.slots[name]
    return file.path.read_bytes()[slot.offset : slot.offset + slot.nbytes]


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one thing done to it."""
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    some = data[at : min(end, at + 64)]
    match rng.randrange(7):
        case 0:
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + len(some) :]
        case 3:
            return data[:at] + some + data[at:]
        case 4:
            return data[:at] + rng.randbytes(len(some)) + data[at + len(some) :]
        case 5:
            return data[:at] + bytes(len(some)) + data[at + len(some) :]
        case _:  # of the first bytes, where lengths and keys are
            changed = bytearray(data)
            changed[rng.randrange(min(200, len(data)))] = rng.randrange(256)
            return bytes(changed)


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _meaning(folder: Path) -> tuple:
    """What a folder holds: its manifest, and its tensors as another library reads them."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {n: (t.dtype, t.shape, _raw(t)) for n, t in load_file(path).items()}
    return json.loads((folder / MANIFEST_FILE).read_text()), tensors


def _refused(folder: Path) -> bool:
    """Whether the export is refused; any error but an InputError is the test's failure."""
    try:
        check_export(folder)
        message = ""
    except InputError as error:
        message = str(error)
    assert str(folder) in message or not message
    return bool(message)


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_changes_nothing(folders, kind):
    folder, rng = folders[kind], random.Random(kind)
    before, refused = _meaning(folder), 0
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    weights = [path for path in originals if path.suffix == ".safetensors"]
    for _ in range(RAW // len(KINDS)):
        path = rng.choice([*originals, *weights])
        path.write_bytes(_mutated(originals[path], rng))
        if _refused(folder):
            refused += 1
        else:
            assert _meaning(folder) == before, path
        path.write_bytes(originals[path])
    assert refused > 0.9 * (RAW // len(KINDS))
    assert not _refused(folder)


def _hostile_header(data: bytes, rng: random.Random) -> bytes:
    """The file with another header: offsets, shapes, dtypes and names that no writer would write."""
    length = int.from_bytes(data[:8], "little")
    table, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([key for key in table if key != "__metadata__"])
    entry = table[name]
    match rng.randrange(7):
        case 0:
            entry["data_offsets"][rng.randrange(2)] = rng.choice([*STRANGE, rng.randrange(len(body) + 9)])
        case 1:
            entry["shape"] = rng.choice(
                [*STRANGE, [2**40, 2**40], [0, 2**47, 2**47], [-1, 4], entry["shape"][::-1], [[2]]]
            )
        case 2:
            entry["dtype"] = rng.choice(["F16", "BF16", "I8", "F4", "", None, "F64", "U16", "I32"])
        case 3:
            table[rng.choice(["x", "", "\u0000", "a" * 600, "../x", "__metadata__"])] = table.pop(name)
        case 4:
            other = rng.choice([key for key in table if key != "__metadata__"])
            table[name], table[other] = table[other], table[name]
        case 5:
            entry[rng.choice(["x", "shape", "dtype"])] = rng.choice(STRANGE)
        case _:
            text = json.dumps(table)[:-1] + "," + json.dumps({name: entry})[1:]  # the key twice
            return len(text).to_bytes(8, "little") + text.encode() + body
    text = json.dumps(table).encode()
    length = rng.choice([len(text)] * 8 + [2**63, 2**64 - 1, 100_000_001, len(text) + 1, 0])
    return length.to_bytes(8, "little") + text + body


def _hostile_part(data: bytes, rng: random.Random, path: Path) -> bytes:
    """The file with changed values, or another length, of one tensor, written right."""
    tensors = {n: (t.dtype, tuple(t.shape), _raw(t)) for n, t in load_file(path).items()}
    name = rng.choice(sorted(tensors))
    dtype, shape, values = tensors[name]
    match rng.randrange(5):
        case 0:
            changed = bytearray(values)
            changed[rng.randrange(len(values))] ^= 1 << rng.randrange(8)
            values = bytes(changed)
        case 1:
            values = rng.randbytes(len(values))
        case 2 if len(shape) == 1:
            count = rng.randrange(shape[0] + 3)
            values, shape = (values + bytes(3 * dtype.itemsize))[: count * dtype.itemsize], (count,)
        case 3:
            shape = shape[::-1]
        case _:
            other = rng.choice(sorted(tensors))
            tensors[name], (dtype, shape, values) = tensors[other], tensors[name]
            name = other
    tensors[name] = (dtype, shape, values)
    header, slots, _ = header_and_slots({n: (d, s) for n, (d, s, _) in tensors.items()})
    return header + b"".join(tensors[n][2] for n in slots)


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_with_agreeing_hashes_are_refused_or_unpack_to_what_they_say(folders, kind):
    folder, rng = folders[kind], random.Random(f"agreeing {kind}")
    weights, manifest = sorted(folder.glob("*.safetensors")), (folder / MANIFEST_FILE).read_bytes()
    refused = 0
    for turn in range(AGREEING // len(KINDS)):
        path = rng.choice(weights)
        data = path.read_bytes()
        path.write_bytes(_hostile_header(data, rng) if turn % 2 else _hostile_part(data, rng, path))
        _reseal(folder)
        if _refused(folder):
            refused += 1
        else:
            _assert_consistent(folder)
        path.write_bytes(data)
        (folder / MANIFEST_FILE).write_bytes(manifest)
    assert refused > 0.5 * (AGREEING // len(KINDS))


def _assert_consistent(folder: Path) -> None:
    """Every packed tensor, unpacked by numpy, is what the format makes of it."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for entry in json.loads((folder / MANIFEST_FILE).read_text())["tensors"]:
        if entry.get("values"):
            _assert_consistent_codes(entry, tensors)
        if entry["packing"] == "dense" or entry.get("values"):
            continue
        form, module = FORMATS[entry["packing"]], entry["name"].removesuffix(".weight")
        parts = {part: tensors[f"{module}.{part}"] for part in form.part_names}
        values = parts[form.values_name].flatten().view(torch.int32).numpy()
        dense = np.zeros(entry["shape"], np.int32)
        if entry["packing"] == "csr":
            rows = np.repeat(np.arange(dense.shape[0]), np.diff(parts["crow_indices"].numpy()))
            dense[rows, parts["col_indices"].numpy()] = values
        else:
            parts["bitmask"] = torch.tensor(row_bits_by_numpy(parts["bitmask"], dense.shape[0]))
            keep = np.unpackbits(parts["bitmask"].numpy(), axis=1, bitorder="little")[:, : dense.shape[1]]
            dense[keep == 1] = values
        assert np.array_equal(form.unpack(parts).view(torch.int32).numpy(), dense)


def _assert_consistent_codes(entry: dict, tensors: dict[str, torch.Tensor]) -> None:
    """The weight that codes and scales stand for, by loops, is what the format makes of them."""
    form = packed_format(entry["packing"], grid_of(entry["values"], entry["group"]))
    module = entry["name"].removesuffix(".weight")
    parts = {part: tensors[f"{module}.{part}"] for part in form.part_names}
    if entry["packing"] == "compressed-tensors":
        _assert_consistent_words(form.unpack(parts), parts, entry)
        return
    rows, columns = entry["shape"]
    keep = np.ones((rows, columns), np.uint8)
    if "bitmask" in parts:
        parts["bitmask"] = torch.tensor(row_bits_by_numpy(parts["bitmask"], rows))
        keep = np.unpackbits(parts["bitmask"].numpy(), axis=1, bitorder="little")[:, :columns]
    codes, scales = ("weight", "weight_scale") if "weight" in parts else ("codes", "scales")
    data = parts[codes].view(torch.uint8).flatten().tolist()
    dense, at = np.zeros((rows, columns)), 0
    for row in range(rows):
        count = int(keep[row].sum())
        size = count if entry["values"] == "int8" else (count + 1) // 2
        held = data[at : at + size]
        if entry["values"] == "int4":
            held = [half for byte in held for half in (byte % 16, byte // 16)][:count]
        limit = 256 if entry["values"] == "int8" else 16
        signed = [code - limit if code >= limit // 2 else code for code in held]
        dense[row, keep[row] == 1] = np.array(signed) * float(parts[scales][row, 0])
        at += size
    assert at == len(data)
    assert np.array_equal(form.unpack(parts).double().numpy(), dense)


def _assert_consistent_words(weight: torch.Tensor, parts: dict[str, torch.Tensor], entry: dict) -> None:
    """The same of another library's layout: int4 codes plus 8, from the lowest bits of each word on."""
    words = parts["weight_packed"].numpy().view(np.uint32)
    codes = np.stack([(words >> shift & 15).astype(np.int64) - 8 for shift in range(0, 32, 4)], -1)
    rows, columns = entry["shape"]
    dense = codes.reshape(rows, -1)[:, :columns] * parts["weight_scale"].double().numpy()
    assert np.array_equal(weight.double().numpy(), dense)


def _leaves(value, at=()):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*at, key)
            yield from _leaves(value[key], (*at, key))


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", WITH_MANIFESTS)
def test_a_manifest_or_index_of_strange_values_never_crashes(folders, kind):
    folder, rng = folders[kind], random.Random(f"manifest {kind}")
    manifest = (folder / MANIFEST_FILE).read_bytes()
    refused = 0
    for _ in range(MANIFESTS // len(WITH_MANIFESTS)):
        path = rng.choice([folder / MANIFEST_FILE, *folder.glob("*.index.json"), folder / "config.json"])
        original = path.read_bytes()
        table = json.loads(original)
        *parents, last = rng.choice(list(_leaves(table)))
        inner = table
        for key in parents:
            inner = inner[key]
        inner[last] = rng.choice(STRANGE)
        path.write_text(json.dumps(table))
        try:
            _reseal(folder)
        except (AttributeError, TypeError, KeyError, ValueError):  # of a manifest that is not even a table of tables
            (folder / MANIFEST_FILE).write_text(json.dumps(sealed(table)) if path.name == MANIFEST_FILE else "{}")
        refused += _refused(folder)
        path.write_bytes(original)
        (folder / MANIFEST_FILE).write_bytes(manifest)
    assert refused > 0.3 * MANIFESTS / len(WITH_MANIFESTS)
    assert not _refused(folder)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{}", "file not fully covered"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', "invalid JSON"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], '
         b'"data_offsets": [4, 8]}}', "invalid offset for tensor `b`"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "invalid offset for tensor `a`"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', "integer `-2`"),
        (b'{"a": {"dtype": "F32", "shape": [1099511627776, 16777216], "data_offsets": [0, 8]}}', "overflow"),
        (b'{"a": {"dtype": "F32", "shape": [0, 1152921504606846976], "data_offsets": [0, 0]}, "b": {"dtype": "F32", '
         b'"shape": [2], "data_offsets": [0, 8]}}', "a is F32 of shape (0, 115292"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "invalid shape"),
        (b'{"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}', "unknown variant `F33`"),
        (b'{"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}', "a is F8_E8M0"),
        (b'{"a": {"shape": [2], "data_offsets": [0, 8]}}', "missing field `dtype`"),
        (b'{"__metadata__": {"format": 1}}', "expected a string"),
        (b"[" * 5000, "invalid JSON"),
        (b"[1]", "invalid JSON"),
    ],
)  # fmt: skip
def test_every_kind_of_bad_header_has_its_message(tmp_path, header, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(TensorFileError) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(str(path))
    assert reason in str(caught.value)


def test_a_header_longer_than_its_file_is_refused_unread(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(TensorFileError, match="header too large"):
        TensorFile(path)


def test_parts_that_break_an_invariant_are_refused_by_the_tensor_s_name(folders, tmp_path):
    folder = Path(shutil.copytree(folders["csr"], tmp_path / "csr"))
    path, name = folder / "pst_csr.safetensors", "model.layers.0.mlp.up_proj"
    data, slot = bytearray(path.read_bytes()), TensorFile(path).slots[f"{name}.col_indices"]
    data[slot.offset : slot.offset + 2] = (60000).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(ExportError, match=rf"{name}\.col_indices is not what was exported"):
        check_export(folder)
    _reseal(folder)
    with pytest.raises(ExportError, match=rf"{name}\.weight: col_indices has column 60000"):
        check_export(folder)
