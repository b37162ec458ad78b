"""Read token files of other programs: OLMo-core and numpy (.npy), datatrove (.ds) and Megatron-LM (.bin with .idx).

* OLMo-core writes one-dimensional ``.npy`` files with ``numpy.memmap``, so without numpy's header. Tokens have the
  smallest unsigned type for the vocabulary, and the end-of-text token follows each document.
* datatrove writes ``.ds`` (DocumentTokenizer), with the document ends as uint64 in ``.ds.index``, and on request one
  byte per token in ``.ds.loss``. nanotron reads this format.
* Megatron-LM writes ``.bin`` with ``.idx``: the magic number, version 1 (uint64), a code of the type (uint8), the
  number of sequences and of document borders (uint64), the length of each sequence (int32), its first byte (int64),
  and the first sequence of each document, followed by the number of sequences (int64).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.arrays import AfterEnds, Borders, JoinedArray, Starts
from pst_ds.data.tokens.store import TokenStream, is_store, join_streams, mapped, open_store
from pst_ds.data.tokens.tokenize import TokenizerIdentity

_NPY_MAGIC, _MEGATRON_MAGIC = b"\x93NUMPY", b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_WINDOW_BYTES, _WINDOWS = 1 << 16, 64
"""Bytes per window, and windows, of a file that determine its fingerprint."""
_FEWEST_TOKENS = 64
"""Minimum tokens in a window for a guess about their size."""
_MOST_HIGH_HALF = 4
"""Bound on the high half of 4-byte tokens, for vocabularies up to 262,144."""
_NUMBERS_AT_A_TIME = 1 << 20


def is_token_source(path: Path) -> bool:
    """Return whether ``path`` is a store of ours, or a file or folder of tokens of another program."""
    return is_store(path) or bool(_files_in(path)) if path.is_dir() else _is_token_file(path)


def open_tokens(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    """Map a store, a file of tokens, or all files of tokens in a folder, by name. Raises ConfigError."""
    if is_store(path):
        return open_store(path, tokenizer)
    files = _files_in(path) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{str(path)!r} has no tokens: no manifest.json, .npy, .ds or .bin with .idx. Name another")
    return join_streams([_open_file(file, tokenizer) for file in files])


def _is_token_file(path: Path) -> bool:
    return path.suffix in (".npy", ".ds") or (path.suffix == ".bin" and path.with_suffix(".idx").is_file())


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and _is_token_file(file))


def _open_file(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} does not exist (looked in {path.absolute()}). Name a file of tokens")
    if not path.stat().st_size:
        raise ConfigError(f"{str(path)!r} is empty. Name a file of tokens")
    stream = {".npy": _open_npy, ".ds": _open_datatrove, ".bin": _open_megatron}[path.suffix](path, tokenizer)
    _require_of_tokenizer(path, stream, tokenizer)
    return stream


def _open_npy(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    with path.open("rb") as file:
        has_header = file.read(len(_NPY_MAGIC)) == _NPY_MAGIC
    if has_header:
        try:
            tokens = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, OSError) as error:
            raise ConfigError(f"{str(path)!r} cannot be read as .npy: {error}. Name another file") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ConfigError(
                f"{str(path)!r} holds {tokens.dtype} of the shape {tokens.shape}, but tokens are whole numbers in one "
                "dimension. Name another file"
            )
    else:
        tokens = _raw(path, tokenizer.dtype)
    return TokenStream(tokens, AfterEnds(tokens, tokenizer.end), fingerprint(path))


def _raw(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ConfigError(
            f"{str(path)!r} has {size} bytes, not a multiple of {dtype.itemsize}, the size of its numbers: tokens of "
            f"{dtype.itemsize} bytes, or offsets. It is cut short, or of another kind. Write it again"
        )
    return mapped(path, dtype)


def _open_datatrove(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    index, loss, size = path.with_name(f"{path.name}.index"), path.with_name(f"{path.name}.loss"), path.stat().st_size
    if not index.is_file() or not index.stat().st_size:
        tokens = _raw(path, tokenizer.dtype)
        borders: Borders = AfterEnds(tokens, tokenizer.end)
        digest = fingerprint(path)
    else:
        ends = _raw(index, np.dtype("<u8"))
        count = int(ends[-1])
        if count == 0 or size not in (2 * count, 4 * count):
            raise ConfigError(
                f"{str(path)!r} has {size} bytes, but {index.name} says {count} tokens, of 2 or 4 bytes each. One of "
                "the two files is cut short, or belongs to another. Write the pair again"
            )
        ends = ends.view(np.int64)
        _require_ascending(ends, index)
        tokens, borders = (
            mapped(path, np.dtype(f"<u{size // count}")),
            Starts(JoinedArray([np.zeros(1, int), ends[:-1]])),
        )
        digest = fingerprint(path, index)
    learned = None
    if loss.is_file():
        learned = mapped(loss, np.dtype("u1"))
        if len(learned) != len(tokens):
            raise ConfigError(
                f"{str(loss)!r} has {len(learned)} bytes, but {path.name} {len(tokens)} tokens. It belongs to another "
                "file. Write it again, or remove it"
            )
        digest = hashlib.sha256(f"{digest} {fingerprint(loss)}".encode()).hexdigest()
    return TokenStream(tokens, borders, digest, learned=learned)


class _MegatronStarts:
    """Document starts as an array that reads an index slice by slice; documents are runs of sequences.

    Args:
        pointers: First byte of each sequence: (sequences,) int64.
        documents: First sequence of each document: (documents,) int64.
    """

    def __init__(self, pointers: np.ndarray, documents: np.ndarray, item_bytes: int):
        self._pointers, self._documents, self._item_bytes = pointers, documents, item_bytes

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, place: slice) -> np.ndarray:
        return np.asarray(self._pointers[self._documents[place]]) // self._item_bytes


def _open_megatron(path: Path, tokenizer: TokenizerIdentity) -> TokenStream:
    index = path.with_suffix(".idx")
    try:
        data = mapped(index, np.dtype("u1"))
        head = data[:34].tobytes()
        dtype = np.dtype(_MEGATRON_TYPES[head[17]])
        num_sequences, num_borders = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
        is_complete = head[:9] == _MEGATRON_MAGIC and head[9:17] == (1).to_bytes(8, "little")
        is_complete &= num_sequences > 0 and num_borders > 0 and len(data) >= 34 + 12 * num_sequences + 8 * num_borders
    except (OSError, ValueError, LookupError):
        is_complete = False
    if not is_complete:
        raise ConfigError(
            f"{str(index)!r} is not a whole index of Megatron (magic number, version 1, a type of whole numbers, "
            f"{path.name} of at least one sequence). Write the pair again, or name another file"
        )
    # offsets in the index need not be multiples of the size of its numbers
    lengths = np.frombuffer(data.data, "<i4", num_sequences, 34)
    pointers = np.frombuffer(data.data, "<i8", num_sequences, 34 + 4 * num_sequences)
    documents = np.frombuffer(data.data, "<i8", num_borders, 34 + 12 * num_sequences)
    end, size = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize, path.stat().st_size
    if end != size or int(documents[-1]) != num_sequences:
        raise ConfigError(
            f"{str(path)!r} has {size} bytes in {num_sequences} sequences, but {index.name} says {end} in "
            f"{int(documents[-1])}. One of the two files is cut short, or belongs to another. Write the pair again"
        )
    _require_ascending(pointers, index)
    _require_ascending(documents, index)
    filled = documents[: np.searchsorted(documents, num_sequences)]  # without empty documents at the end
    borders = Starts(_MegatronStarts(pointers, filled, dtype.itemsize))
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
    """Raise ConfigError if some tokens of a stream show that ``tokenizer`` did not make it."""
    item, halves = stream.tokens.dtype.itemsize, []
    for place in _places(len(stream) * item)[:: _WINDOWS // 8]:
        window = stream.tokens[place // item : place // item + _WINDOW_BYTES // item]
        largest = int(window.max())
        if largest >= tokenizer.vocabulary or int(window.min()) < 0:
            raise ConfigError(
                f"{str(path)!r} holds the token {largest}, but the run's tokenizer has {tokenizer.vocabulary}. The "
                f"file belongs to another tokenizer, or its tokens do not have {item} bytes. Name its tokenizer with "
                "model.tokenizer"
            )
        halves.append(item == 2 and _are_halves(window, place // item, tokenizer.end))
    if all(halves):
        raise ConfigError(
            f"{str(path)!r} was read as tokens of 2 bytes, which the tokenizer's {tokenizer.vocabulary} need, but "
            "every second is nearly 0: it holds tokens of 4 bytes. Write it with 2, or with numpy's header"
        )


def _are_halves(window: np.ndarray, place: int, end: int) -> bool:
    """Return whether every second number looks like the upper half of a token; tokens may end documents as often."""
    high, low = window[(place + 1) % 2 :: 2], window[place % 2 :: 2]
    few = len(window) < _FEWEST_TOKENS or bool((high == end).any())
    return not few and int(high.max()) < _MOST_HIGH_HALF <= int(low.max())
