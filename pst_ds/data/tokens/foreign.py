"""Tokens that other programs wrote, read where they lie.

Facts of the formats: OLMo-core writes one-dimensional ``.npy`` by ``numpy.memmap``, so without numpy's header, of the
smallest unsigned type for its vocabulary, with the end-of-text token behind each document (its guide on data loading).
datatrove writes ``.ds``, with ``.ds.index``, the ends of documents in tokens as uint64, and on request ``.ds.loss``, a
byte for each token (its DocumentTokenizer); nanotron reads it. Megatron-LM writes ``.bin`` with ``.idx``: the magic
number, version 1 (uint64), a code of the type (uint8), the numbers of sequences and of document borders (uint64), the
lengths of sequences (int32), where they begin in bytes (int64), and the first sequence of each document, with their
number behind the last (int64).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.borders import AfterEnds, Ends
from pst_ds.data.tokens.identity import TokenizerIdentity
from pst_ds.data.tokens.learned import Bytes
from pst_ds.data.tokens.store import TokenStream, is_store, join_streams, mapped, open_store

_NPY_MAGIC, _MEGATRON_MAGIC = b"\x93NUMPY", b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_ENDINGS = (".npy", ".ds", ".bin")
_WINDOW_BYTES, _WINDOWS = 1 << 16, 64
"""Of a file, so much is read at so many places to know it again."""
_FEWEST_TOKENS = 64
"""Fewer may well look like anything."""
_MOST_HIGH_HALF = 4
"""High halves of tokens of 4 bytes are below it for vocabularies up to 262,144."""
_NUMBERS_AT_A_TIME = 1 << 20


def is_token_source(path: Path) -> bool:
    """Return whether ``path`` is a store of ours, or a file or folder of tokens of another program."""
    return path.is_dir() and (is_store(path) or bool(_files_in(path))) if path.is_dir() else _is_token_file(path)


def open_tokens(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    """Map a store, a file of tokens, or all files of tokens in a folder, by name. Raises ConfigError."""
    if path.is_dir() and is_store(path):
        return open_store(path, tokenizer)
    files = _files_in(path) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{str(path)!r} has no tokens: no manifest.json, .npy, .ds or .bin with .idx; name another")
    return join_streams([_open_file(file, tokenizer) for file in files])


def _is_token_file(path: Path) -> bool:
    return path.suffix in (".npy", ".ds") or (path.suffix == ".bin" and path.with_suffix(".idx").is_file())


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and _is_token_file(file))


def _open_file(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} does not exist (looked in {path.absolute()}); name a file of tokens")
    if not path.stat().st_size:
        raise ConfigError(f"{str(path)!r} is empty; name a file of tokens")
    stream = {".npy": _open_npy, ".ds": _open_datatrove, ".bin": _open_megatron}[path.suffix](path, tokenizer)
    _require_of_tokenizer(path, stream, tokenizer)
    return stream


def _open_npy(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    with path.open("rb") as file:
        has_header = file.read(len(_NPY_MAGIC)) == _NPY_MAGIC
    if has_header:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{str(path)!r} cannot be read as .npy: {error}; name another file") from None
        if array.ndim != 1 or array.dtype.kind not in "ui":
            raise ConfigError(
                f"{str(path)!r} holds {array.dtype} of the shape {array.shape}, and tokens are whole numbers in one "
                "dimension; name another file"
            )
        tokens = np.asarray(array)
    else:
        tokens = _raw(path, tokenizer.dtype)
    return TokenStream(tokens, AfterEnds(tokens, tokenizer.end), fingerprint(path))


def _raw(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ConfigError(
            f"{str(path)!r} has {size} bytes, which is no whole number of tokens of {dtype.itemsize} bytes; it is cut "
            "short, or of another kind"
        )
    return mapped(path, dtype)


def _open_datatrove(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    index, loss, size = path.with_name(f"{path.name}.index"), path.with_name(f"{path.name}.loss"), path.stat().st_size
    if not index.is_file() or not index.stat().st_size:
        tokens = _raw(path, tokenizer.dtype)
        borders: AfterEnds | Ends = AfterEnds(tokens, tokenizer.end)
        digest = fingerprint(path)
    else:
        ends = _raw(index, np.dtype("<u8"))
        count = int(ends[-1])
        if count == 0 or size not in (2 * count, 4 * count):
            raise ConfigError(
                f"{str(path)!r} has {size} bytes, and {index.name} says {count} tokens, of 2 or 4 bytes each; one of "
                "the two files is cut short, or of another"
            )
        ends = ends.view(np.int64)
        _require_ascending(ends, index)
        tokens, borders = mapped(path, np.dtype(f"<u{size // count}")), Ends(ends)
        digest = fingerprint(path, index)
    learned = None
    if loss.is_file():
        if loss.stat().st_size != len(tokens):
            raise ConfigError(
                f"{str(loss)!r} has {loss.stat().st_size} bytes, and {path.name} {len(tokens)} tokens; it is of "
                "another file"
            )
        learned = Bytes(mapped(loss, np.dtype("u1")))
        digest = hashlib.sha256(f"{digest} {fingerprint(loss)}".encode()).hexdigest()
    return TokenStream(tokens, borders, digest, learned=learned)


@dataclass(frozen=True, slots=True, eq=False)
class _MegatronBorders:
    """Borders from an index: documents are runs of sequences."""

    pointers: np.ndarray
    """First byte of each sequence: (sequences,) int64."""
    documents: np.ndarray
    """First sequence of each document, and the number of sequences: (documents + 1,) int64."""
    item_bytes: int

    @property
    def several(self) -> bool:
        return len(self.documents) > 2

    def between(self, start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(self.pointers, [start * self.item_bytes, stop * self.item_bytes])
        begin, end = np.searchsorted(self.documents[:-1], [first, last])
        return np.unique(np.array(self.pointers[self.documents[begin:end]], dtype=np.int64) // self.item_bytes)


def _open_megatron(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    index = path.with_suffix(".idx")
    try:
        data = mapped(index, np.dtype("u1"))
        head = data[:34].tobytes()
        code = head[17]
        sequences, documents = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
        expected = 34 + 12 * sequences + 8 * documents
        whole = head[:9] == _MEGATRON_MAGIC and head[9:17] == (1).to_bytes(8, "little")
    except (OSError, ValueError, IndexError):
        whole = False
    if not whole or code not in _MEGATRON_TYPES or len(data) < expected or not sequences or not documents:
        raise ConfigError(
            f"{str(index)!r} is not a whole index of Megatron (magic number, version 1, a type of whole numbers, "
            f"{path.name} of at least one sequence); write the pair again, or name another file"
        )
    dtype = np.dtype(_MEGATRON_TYPES[code])
    lengths = _at(data, 34, sequences, "<i4")
    borders = _MegatronBorders(
        _at(data, 34 + 4 * sequences, sequences, "<i8"),
        _at(data, 34 + 12 * sequences, documents, "<i8"),
        dtype.itemsize,
    )
    end, size = int(borders.pointers[-1]) + int(lengths[-1]) * dtype.itemsize, path.stat().st_size
    if end != size or int(borders.documents[-1]) != sequences:
        raise ConfigError(
            f"{str(path)!r} has {size} bytes in {sequences} sequences, and {index.name} says {end} in "
            f"{int(borders.documents[-1])}; one of the two files is cut short, or of another"
        )
    _require_ascending(borders.pointers, index)
    _require_ascending(borders.documents, index)
    return TokenStream(mapped(path, dtype), borders, fingerprint(path, index))


def _require_ascending(places: np.ndarray, index: Path) -> None:
    """Raise ConfigError for a negative place, or one below the place before it; equal places are empty documents."""
    before = 0
    for start in range(0, len(places), _NUMBERS_AT_A_TIME):
        window = places[start : start + _NUMBERS_AT_A_TIME]
        previous = np.concatenate([[before], window[:-1]])
        wrong = np.flatnonzero(window < previous)
        if len(wrong):
            at = wrong[0]
            raise ConfigError(
                f"{str(index)!r} does not ascend: offset {start + at} is {window[at]}, after {previous[at]}. Write the "
                "pair again, or name another file"
            )
        before = window[-1]


def _at(data: np.ndarray, place: int, count: int, dtype: str) -> np.ndarray:
    """Return ``count`` numbers from byte ``place`` on, which need not be a multiple of their size."""
    return np.frombuffer(data.data, np.dtype(dtype), count, place)


def fingerprint(*paths: Path) -> str:
    """Return a SHA-256 of the sizes of files and of up to 4 MiB of each, at even distances."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for place in _places(size):
                digest.update(os.pread(file.fileno(), _WINDOW_BYTES, place))
    return digest.hexdigest()


def _places(size: int) -> list[int]:
    count = min(_WINDOWS, -(-size // _WINDOW_BYTES))
    last = max(0, size - _WINDOW_BYTES)
    return [0] if count <= 1 else [last * i // (count - 1) // 8 * 8 for i in range(count)]


def _require_of_tokenizer(path: Path, stream: TokenStream, tokenizer: TokenizerIdentity) -> None:
    """Look at some tokens of a stream; refuse what cannot be those of ``tokenizer``."""
    item, halves = stream.tokens.dtype.itemsize, []
    for place in _places(len(stream) * item)[:: _WINDOWS // 8]:
        window = stream.tokens[place // item : place // item + _WINDOW_BYTES // item]
        largest = int(window.max())
        if largest >= tokenizer.vocabulary or int(window.min()) < 0:
            raise ConfigError(
                f"{str(path)!r} holds the token {largest}, and the run's tokenizer has {tokenizer.vocabulary}; it is "
                f"of another tokenizer, or not of tokens of {item} bytes. Name its tokenizer with model.tokenizer"
            )
        halves.append(item == 2 and _are_halves(window, place // item, tokenizer.end))
    if all(halves):
        raise ConfigError(
            f"{str(path)!r} was read as tokens of 2 bytes, as the tokenizer's {tokenizer.vocabulary} need, and every "
            "second is nearly 0: it holds tokens of 4 bytes. Write it with 2, or with numpy's header"
        )


def _are_halves(window: np.ndarray, place: int, end: int) -> bool:
    """Return whether every second number looks like the upper half of a token; tokens may end documents as often."""
    high, low = window[(place + 1) % 2 :: 2], window[place % 2 :: 2]
    few = len(window) < _FEWEST_TOKENS or bool((high == end).any())
    return not few and int(high.max()) < _MOST_HIGH_HALF <= int(low.max())
