"""Read the token files of Megatron-LM and Megatron Core, NAME.bin with NAME.idx, which NeMo and datatrove write too.

The .bin file has the tokens of all sequences, one after another. All numbers of the .idx file are little-endian:

    9 bytes                   "MMIDIDX" and two zeros
    uint64                    version, 1
    uint8                     code of the tokens' type
    uint64                    number of sequences, S
    uint64                    number of document borders, D: the documents plus 1
    int32[S]                  tokens of each sequence
    int64[S]                  place of its first byte in the .bin file
    int64[D]                  first sequence of each document; the last is S
    int8[S]                   modes of sequences, in multimodal files only
"""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.store import mapped
from pst_ds.data.tokens.token_files import TokenFile, TokenFormat, fingerprint, starts_of_lengths
from pst_ds.data.tokens.tokenize import TokenizerIdentity

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)
"""Codes of float64 and float32, which cannot be tokens."""
_SEQUENCES_AT_A_TIME = 1 << 22


class Megatron(TokenFormat):
    """Megatron's indexed datasets."""

    name = "Megatron"
    ending = ".bin"
    index_ending = ".idx"

    def open(self, path: Path, tokenizer: TokenizerIdentity) -> TokenFile:
        index_path = self.index_of(path)
        index = _read_index(index_path)
        num_bytes = path.stat().st_size
        end = int(index.pointers[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
        if end != num_bytes:
            raise ConfigError(
                f"{str(path)!r} has {num_bytes} bytes, but {index_path.name} says {end}. One of the two files is "
                "truncated, or belongs to another. Copy or write both again"
            )
        return TokenFile(mapped(path, index.dtype), partial(_starts, index), fingerprint(path, index_path))


MEGATRON = Megatron()


class _Index:
    """The arrays of an index, mapped, and the type of the tokens."""

    def __init__(self, path: Path, data: np.ndarray, dtype: np.dtype, *, num_sequences: int, num_borders: int):
        self.path = path
        self.dtype = dtype
        after_lengths = _HEAD.size + 4 * num_sequences
        after_pointers = after_lengths + 8 * num_sequences
        # numpy reads numbers at any place, also where it is not a multiple of their size
        self.lengths = np.frombuffer(data.data, "<i4", num_sequences, _HEAD.size)
        self.pointers = np.frombuffer(data.data, "<i8", num_sequences, after_lengths)
        self.documents = np.frombuffer(data.data, "<i8", num_borders, after_pointers)


def _read_index(path: Path) -> _Index:
    """Map an index and check its head, its size and its last numbers. Raises ConfigError."""
    size = path.stat().st_size
    lead = f"{str(path)!r} is not an index of Megatron"
    if size < _HEAD.size:
        raise ConfigError(f"{lead}: it has only {size} bytes. Copy or write it again")
    data = mapped(path, np.dtype("u1"))
    magic, version, code, num_sequences, num_borders = _HEAD.unpack(data[: _HEAD.size].tobytes())
    if magic != _MAGIC:
        raise ConfigError(f"{lead}: it starts with {magic!r}, not with {_MAGIC!r}. Name another file")
    if version != 1:
        raise ConfigError(f"{lead} that pst-ds reads: it has version {version}, not 1. Write it again")
    if code in _FLOATS or code not in _DTYPES:
        raise ConfigError(
            f"{str(path)!r} has the type code {code}, but tokens have one of {', '.join(map(str, _DTYPES))}. Write the "
            "tokens as integers"
        )
    wanted = _HEAD.size + 12 * num_sequences + 8 * num_borders
    if size not in (wanted, wanted + num_sequences) or not num_sequences or num_borders < 2:
        raise ConfigError(
            f"{str(path)!r} has {size} bytes, but {num_sequences} sequences and {num_borders} document borders take "
            f"{wanted}. It is truncated or damaged. Copy or write it again"
        )
    index = _Index(path, data, np.dtype(_DTYPES[code]), num_sequences=num_sequences, num_borders=num_borders)
    if int(index.documents[-1]) != num_sequences:
        raise ConfigError(
            f"{str(path)!r} is damaged: its documents end at sequence {int(index.documents[-1])} of {num_sequences}. "
            "Copy or write it again"
        )
    return index


def _starts(index: _Index) -> np.ndarray:
    """Return the document starts. Raises ConfigError unless the sequences follow each other without gaps."""
    item = index.dtype.itemsize
    documents = np.array(index.documents)
    if documents[0] != 0 or (np.diff(documents) < 0).any():
        raise ConfigError(f"{str(index.path)!r} is damaged: its document borders do not ascend. Write it again")
    end = 0
    for first in range(0, len(index.lengths), _SEQUENCES_AT_A_TIME):
        window = slice(first, first + _SEQUENCES_AT_A_TIME)
        lengths = np.array(index.lengths[window], dtype=np.int64)
        # (sequences + 1,): the first byte of each, and the end of the last
        places = end + item * np.concatenate([[0], np.cumsum(lengths)])
        if (lengths < 0).any() or not np.array_equal(index.pointers[window], places[:-1]):
            raise ConfigError(
                f"{str(index.path)!r} is damaged: its sequences do not follow each other without gaps. Write it again"
            )
        end = int(places[-1])
    num_tokens = end // item
    # the border after the last document has no sequence
    places = np.append(index.pointers, end) // item
    return starts_of_lengths(places[documents[:-1]], num_tokens)
