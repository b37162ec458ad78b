"""Token streams in memory-mapped files, and opening the stores of ``pst-ds prepare``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.arrays import Array, FileArray, joined, parts_of
from pst_ds.data.tokens.borders import Borders, JoinedBorders, Starts
from pst_ds.data.tokens.identity import TokenizerIdentity
from pst_ds.data.tokens.learned import All, Bits, JoinedLearned, Learned
from pst_ds.data.tokens.manifest import BYTES, LEARNED, MANIFEST, STARTS_FILE, TOKENS, Manifest, read_manifest
from pst_ds.data.tokens.tokenize import Documents


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """Concatenated tokens of documents, in memory-mapped files or in memory."""

    tokens: Array
    """(tokens,) uint16, uint32 or int32."""
    borders: Borders
    digest: str
    """SHA-256 of the contents, or of a sample of them."""
    num_bytes: Array | None = None
    """Bytes of text that each token represents: (tokens,). None if not counted."""
    learned: Learned | None = None
    """Mask of the tokens that are trained on. None for all."""

    def __len__(self) -> int:
        return len(self.tokens)


def join_streams(streams: Sequence[TokenStream]) -> TokenStream:
    """Concatenate streams; byte counts are kept only if all streams have them."""
    if len(streams) == 1:
        return streams[0]
    starts = np.cumsum([0, *map(len, streams)])
    arrays = [part for stream in streams for part in parts_of(stream.tokens)]
    counts = [stream.num_bytes for stream in streams]
    learned = None
    if any(stream.learned is not None for stream in streams):
        learned = JoinedLearned([stream.learned or All() for stream in streams], starts)
    return TokenStream(
        tokens=joined(arrays),
        borders=JoinedBorders(tuple(stream.borders for stream in streams), starts),
        digest=hashlib.sha256(" ".join(stream.digest for stream in streams).encode()).hexdigest(),
        num_bytes=None
        if any(c is None for c in counts)
        else joined([p for c in counts if c is not None for p in parts_of(c)]),
        learned=learned,
    )


def stream_of_documents(documents: Documents) -> TokenStream:
    """Return documents in memory as a stream, without the last end-of-text token if we added it, as in a store."""
    count = len(documents.tokens) - documents.closed_by_us
    tokens, num_bytes = documents.tokens[:count].astype(np.int32), documents.num_bytes
    starts = np.cumsum(documents.lengths) - documents.lengths
    digest = hashlib.sha256(tokens.tobytes() + starts.tobytes()).hexdigest()
    return TokenStream(tokens, Starts(starts), digest, None if num_bytes is None else num_bytes[:count])


def is_store(folder: Path) -> bool:
    """Return whether ``folder`` has a manifest."""
    return (folder / MANIFEST).is_file()


def open_store(folder: Path, tokenizer: TokenizerIdentity | None = None) -> TokenStream:
    """Map the files of a store; only their sizes are checked.

    The end-of-text token after the last document is omitted unless the tokenizer added it, because it separates
    documents. Raises ConfigError for an incomplete store, or one of another tokenizer than ``tokenizer``.
    """
    manifest = read_manifest(folder)
    if tokenizer is not None:
        require_tokenizer(folder, manifest, tokenizer)
    length = manifest.tokens - manifest.closed_by_us
    parts = [mapped(folder / shard.file(TOKENS), manifest.tokenizer.dtype) for shard in manifest.shards]
    starts = FileArray(folder / STARTS_FILE, np.dtype("<i8"))
    counts = learned = None
    if BYTES in manifest.has:
        counts = joined([mapped(folder / shard.file(BYTES), np.dtype("<u4")) for shard in manifest.shards])
    if LEARNED in manifest.has:
        bits = [Bits(mapped(folder / shard.file(LEARNED), np.dtype("u1"))) for shard in manifest.shards]
        learned = JoinedLearned(bits, np.cumsum([0, *(shard.tokens for shard in manifest.shards)]))
    return TokenStream(
        tokens=_first(joined(parts), length) if parts else np.empty(0, manifest.tokenizer.dtype),
        borders=Starts(starts),
        digest=manifest.digest,
        num_bytes=None if counts is None else _first(counts, length),
        learned=learned,
    )


def require_tokenizer(folder: Path, manifest: Manifest, tokenizer: TokenizerIdentity) -> None:
    """Raise ConfigError if a store has tokens of another tokenizer."""
    ours = manifest.tokenizer
    if ours.sha256 == tokenizer.sha256:
        return
    other = f"the run's has {tokenizer.vocabulary}" if ours.vocabulary != tokenizer.vocabulary else "the run's differs"
    raise ConfigError(
        f"{str(folder)!r} holds tokens of another tokenizer: its manifest has a vocabulary of {ours.vocabulary} and "
        f"the hash {ours.sha256[:12]}, and {other} ({tokenizer.sha256[:12]}). Prepare the text with the run's "
        "tokenizer (pst-ds prepare --tokenizer), or name the store's with model.tokenizer"
    )


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-map a non-empty file."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _first(array: Array, count: int) -> Array:
    if count == len(array):
        return array
    return array[:count] if isinstance(array, np.ndarray) else array.first(count)
