"""Write a token store shard by shard. Each shard and its record are written atomically."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import numpy as np

from pst_ds.atomic_files import partial_name, sync, write_text_atomic
from pst_ds.data.tokens.store import BYTES, LEARNED, MANIFEST, STARTS, STARTS_FILE, TOKENS, Manifest, ShardRecord
from pst_ds.data.tokens.tokenize import Documents, TokenizerIdentity

_COPY_BYTES = 1 << 22


class _HashedFile:
    """A file that is hashed while it is written, under a temporary name until :meth:`finish`."""

    def __init__(self, path: Path):
        self._path, self._partial = path, partial_name(path)
        self._stream: IO[bytes] = self._partial.open("wb")
        self._digest = hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data.cast("B") if values.size else b""
        self._stream.write(data)
        self._digest.update(data)

    def finish(self) -> str:
        self._stream.close()
        sync(self._partial)
        self._partial.replace(self._path)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        self._stream.close()
        self._partial.unlink(missing_ok=True)


class ShardWriter:
    """Writer of one shard of the store in ``folder``; as a context manager it removes the files after an error.

    ``kinds`` names optional files: BYTES, LEARNED. Tokens and document starts are always written.
    """

    def __init__(self, folder: Path, number: int, tokenizer: TokenizerIdentity, kinds: frozenset[str] = frozenset()):
        self._folder, self._tokenizer = folder, tokenizer
        self._record = ShardRecord(number=number, tokens=0, documents=0, text_bytes=0, closed_by_us=False, sha256={})
        self._files = {k: _HashedFile(folder / self._record.file(k)) for k in sorted({TOKENS, STARTS, *kinds})}
        self._bits: np.ndarray = np.empty(0, bool)
        """Mask of the last tokens, which do not fill a byte yet."""

    def add(self, documents: Documents, text_bytes: int = 0) -> None:
        """Append documents, which represent ``text_bytes`` bytes of text."""
        record = self._record = replace(self._record, text_bytes=self._record.text_bytes + text_bytes)
        if not len(documents.lengths):
            return
        assert int(documents.tokens.max()) < self._tokenizer.vocabulary, "the tokenizer gave an unknown token"
        self._files[TOKENS].write(documents.tokens.astype(self._tokenizer.dtype))
        starts = np.cumsum(documents.lengths) - documents.lengths + record.tokens
        self._files[STARTS].write(starts.astype("<i8"))
        if BYTES in self._files:
            assert documents.num_bytes is not None, "bytes were not counted"
            self._files[BYTES].write(documents.num_bytes.astype("<u4"))
        if LEARNED in self._files:
            learned = np.ones(len(documents.tokens), bool) if documents.learned is None else documents.learned
            bits = np.concatenate([self._bits, learned])
            filled = len(bits) // 8 * 8
            self._files[LEARNED].write(np.packbits(bits[:filled], bitorder="little"))
            self._bits = bits[filled:]
        self._record = replace(
            record,
            tokens=record.tokens + len(documents.tokens),
            documents=record.documents + len(documents.lengths),
            closed_by_us=documents.closed_by_us,
        )

    def finish(self) -> ShardRecord:
        """Write the rest of the shard and its record, and return the record."""
        if LEARNED in self._files:
            self._files[LEARNED].write(np.packbits(self._bits, bitorder="little"))
        record = replace(self._record, sha256={kind: file.finish() for kind, file in self._files.items()})
        write_text_atomic(record_path(self._folder, record.number), json.dumps(asdict(record)) + "\n")
        return record

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for file in self._files.values():
                file.abandon()


def record_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's record, which exists until the store is finished."""
    return folder / f"shard-{number:05d}.json"


def finished_shard(folder: Path, number: int, dtype: np.dtype) -> ShardRecord | None:
    """Return the record of a complete shard; None for an incomplete one."""
    try:
        record = ShardRecord(**json.loads(record_path(folder, number).read_text()))
        sizes = {kind: (folder / record.file(kind)).stat().st_size for kind in record.sha256}
    except (OSError, TypeError, ValueError):
        return None
    whole = all(size == record.num_file_bytes(kind, dtype) for kind, size in sizes.items())
    return record if whole else None


def finish_store(
    folder: Path, tokenizer: TokenizerIdentity, records: list[ShardRecord], source: dict[str, object]
) -> Manifest:
    """Merge the document starts of all shards into one file, remove empty shards and write the manifest."""
    documents = _HashedFile(folder / STARTS_FILE)
    first, kept = 0, []
    for record in records:
        with (folder / record.file(STARTS)).open("rb") as file:
            while data := file.read(_COPY_BYTES):
                documents.write(np.frombuffer(data, "<i8") + first)
        first += record.tokens
        if record.tokens:
            kept.append(replace(record, sha256={kind: of for kind, of in record.sha256.items() if kind != STARTS}))
    manifest = Manifest(tokenizer=tokenizer, shards=tuple(kept), starts_sha256=documents.finish(), source=source)
    write_text_atomic(folder / MANIFEST, manifest.text())
    clean_up(folder, manifest)
    return manifest


def clean_up(folder: Path, manifest: Manifest) -> None:
    """Remove from a finished store what its shards were made with."""
    files = {MANIFEST, STARTS_FILE, *(shard.file(kind) for shard in manifest.shards for kind in shard.sha256)}
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
