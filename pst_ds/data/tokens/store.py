"""Token stores of ``pst-ds prepare``: the manifest, token streams in memory-mapped files, and writing shard by shard.
Each shard and its record are written atomically."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pst_ds.atomic_files import partial_name, sync, write_text_atomic
from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.arrays import Array, Bits, joined
from pst_ds.data.tokens.tokenize import Documents, TokenizerIdentity
from pst_ds.errors import first_problem
from pst_ds.json_text import json_of

MANIFEST = "manifest.json"
KIND = "pst-ds tokens"
VERSION = 1
TOKENS = "tokens"
"""Kind of file with tokens, in the type of :attr:`TokenizerIdentity.dtype`."""
BYTES = "bytes"
"""Kind of file with the bytes of text of each token."""
LEARNED = "learned"
"""Kind of file with the mask of trained tokens, one bit each."""
STARTS = "starts"
"""Kind of file with document starts, which a finished store has in STARTS_FILE only."""
STARTS_FILE = "documents.bin"
_ITEM: dict[str, np.dtype] = {BYTES: np.dtype("<u4"), STARTS: np.dtype("<i8")}
"""Types of two other kinds, little-endian on any machine."""
_COPY_BYTES = 1 << 22
"""Bytes that are read at once when starts are merged; a multiple of the size of a start."""
_AGAIN = "Prepare it again (pst-ds prepare)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard: files ``KIND-NNNNN.bin`` for each kind in ``sha256``."""

    number: int
    tokens: int
    documents: int
    text_bytes: int
    closed_by_us: bool
    """True if pst-ds, not the tokenizer, added the last end-of-text token."""
    sha256: dict[str, str]

    def file(self, kind: str) -> str:
        """Return the name of the file of a kind."""
        return f"{kind}-{self.number:05d}.bin"

    def num_file_bytes(self, kind: str, dtype: np.dtype) -> int:
        """Return the bytes of the file of a kind, with tokens of ``dtype``."""
        if kind == LEARNED:
            return -(-self.tokens // 8)  # rounded up
        if kind == TOKENS:
            return self.tokens * dtype.itemsize
        if kind == STARTS:
            return self.documents * _ITEM[STARTS].itemsize
        return self.tokens * _ITEM[kind].itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Contents of a store's manifest."""

    tokenizer: TokenizerIdentity
    shards: tuple[ShardRecord, ...]
    starts_sha256: str
    source: dict[str, object] = field(default_factory=dict)
    """Sources and settings of the preparation, for information only."""

    @property
    def counts(self) -> dict[str, int]:
        """Tokens, documents, and UTF-8 bytes of text ("text_bytes") in all shards."""
        counts = {"tokens": 0, "documents": 0, "text_bytes": 0}
        for shard in self.shards:
            counts["tokens"] += shard.tokens
            counts["documents"] += shard.documents
            counts["text_bytes"] += shard.text_bytes
        return counts

    @property
    def has(self) -> frozenset[str]:
        """Kinds of files of each shard."""
        if not self.shards:
            return frozenset()
        return frozenset(self.shards[0].sha256)  # all shards have the same

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """(bytes, SHA-256) of each file but the manifest, by name."""
        starts_bytes = self.counts["documents"] * _ITEM[STARTS].itemsize
        files = {STARTS_FILE: (starts_bytes, self.starts_sha256)}
        for shard in self.shards:
            for kind, sha256 in shard.sha256.items():
                files[shard.file(kind)] = (shard.num_file_bytes(kind, self.tokenizer.dtype), sha256)
        return files

    @property
    def digest(self) -> str:
        """SHA-256 over the tokenizer and the SHA-256 of every file; independent of ``source``."""
        about = [asdict(self.tokenizer), [asdict(shard) for shard in self.shards], self.starts_sha256]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def text(self) -> str:
        """Return the manifest as JSON."""
        about = {"kind": KIND, "version": VERSION, "dtype": self.tokenizer.dtype.name, **self.counts}
        return json_of({**about, "digest": self.digest, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store and check the sizes of its files. Raises ConfigError."""
    path = folder / MANIFEST
    try:
        manifest = manifest_of(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{str(folder)!r} has no {MANIFEST}: it is not a token store, or an unfinished one. {_AGAIN}"
        ) from None
    # Sizes only: hashing a store of billions of tokens would delay every start.
    for name, (size, _) in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError as error:
            raise ConfigError(f"{folder / name} cannot be read: {error.strerror}. {_AGAIN}") from None
        if num_bytes != size:
            raise ConfigError(f"{folder / name} has {num_bytes} bytes, but its manifest says {size}. {_AGAIN}")
    return manifest


def manifest_of(data: bytes, path: str) -> Manifest:
    """Return the manifest whose file, at ``path``, has the bytes ``data``. Raises ConfigError."""
    try:
        table = json.loads(data.decode())
        if not isinstance(table, dict) or table.get("kind") != KIND:
            raise ConfigError(f"{path} is not the manifest of a token store. Name a folder of pst-ds prepare")
        if table.get("version") != VERSION:
            raise ConfigError(
                f"{path} has version {table.get('version')!r} of the format, but this pst-ds reads {VERSION}. {_AGAIN}"
            )
        stated = table["digest"]
        manifest = TypeAdapter(Manifest).validate_python(table)
        for shard in manifest.shards:
            # kinds become names of files, which could lie outside the folder
            for kind in set(shard.sha256) - {TOKENS, BYTES, LEARNED}:
                raise KeyError(kind)
    except ValidationError as error:
        raise ConfigError(f"{path} is damaged ({first_problem(error)}). {_AGAIN}") from None
    except (KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}). {_AGAIN}") from None
    if manifest.digest != stated:
        raise ConfigError(f"{path} was changed: its digest is {manifest.digest}, but it states {stated}. {_AGAIN}")
    return manifest


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """Concatenated tokens of documents, in memory-mapped files or in memory."""

    tokens: Array
    """(tokens,) uint16, uint32 or int32."""
    borders: np.ndarray
    """Document starts, the indices of first tokens: (documents,) int64, ascending."""
    digest: str
    """SHA-256 of the contents."""
    num_bytes: Array | None = None
    """Bytes of text that each token represents: (tokens,). None if not counted."""
    learned: Array | None = None
    """Mask of the tokens that are trained on: (tokens,), 0 is False. None for all."""

    def __len__(self) -> int:
        return len(self.tokens)


def stream_of_documents(documents: Documents) -> TokenStream:
    """Return documents in memory as a stream, without the last end-of-text token if we added it, as in a store."""
    count = len(documents.tokens) - documents.closed_by_us
    tokens = documents.tokens[:count].astype(np.int32)
    num_bytes = documents.num_bytes
    starts = np.cumsum(documents.lengths) - documents.lengths
    digest = hashlib.sha256(tokens.tobytes() + starts.tobytes()).hexdigest()
    if num_bytes is not None:
        num_bytes = num_bytes[:count]
    return TokenStream(tokens=tokens, borders=starts, digest=digest, num_bytes=num_bytes)


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
        _require_tokenizer(folder, manifest.tokenizer, tokenizer)

    def column(kind: str, dtype: np.dtype) -> list[np.ndarray]:
        return [mapped(folder / shard.file(kind), dtype) for shard in manifest.shards]

    def without_separator(parts: list[np.ndarray]) -> Array:
        # Only the last document's separator is left off: the others lie between two documents of the stream.
        if manifest.shards[-1].closed_by_us:
            parts[-1] = parts[-1][:-1]
        return joined(parts)

    num_bytes: Array | None = None
    if BYTES in manifest.has:
        num_bytes = without_separator(column(BYTES, _ITEM[BYTES]))
    learned: Array | None = None
    if LEARNED in manifest.has:
        learned = _joined_bits(manifest.shards, column(LEARNED, np.dtype("u1")))
    dtype = manifest.tokenizer.dtype
    # an empty file cannot be mapped
    tokens: Array = np.empty(0, dtype)
    if manifest.shards:
        tokens = without_separator(column(TOKENS, dtype))
    starts = np.empty(0, _ITEM[STARTS])
    if manifest.counts["documents"]:
        starts = mapped(folder / STARTS_FILE, starts.dtype)
    return TokenStream(tokens=tokens, borders=starts, digest=manifest.digest, num_bytes=num_bytes, learned=learned)


def _require_tokenizer(folder: Path, made_with: TokenizerIdentity, tokenizer: TokenizerIdentity) -> None:
    """Raise ConfigError if the store in ``folder`` was made with another tokenizer."""
    if made_with.sha256 == tokenizer.sha256:
        return
    other = f"the run's has {tokenizer.vocabulary}"
    if made_with.vocabulary == tokenizer.vocabulary:
        other = "the run's differs"
    raise ConfigError(
        f"{str(folder)!r} holds tokens of another tokenizer: its manifest has a vocabulary of "
        f"{made_with.vocabulary} and the hash {made_with.sha256[:12]}, and {other} ({tokenizer.sha256[:12]}). "
        "Prepare the text with the run's tokenizer (pst-ds prepare --tokenizer), or name the store's with "
        "model.tokenizer"
    )


def _joined_bits(shards: Sequence[ShardRecord], files: Sequence[np.ndarray]) -> Array:
    """Return the masks of all shards as one array, without the bit of the last document's separator."""
    parts: list[Bits] = []
    for shard, values in zip(shards, files, strict=True):
        # the last byte may have more bits
        length = shard.tokens
        if shard is shards[-1] and shard.closed_by_us:
            length -= 1
        parts.append(Bits(values, length))
    return joined(parts)


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-map a non-empty file."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class _HashedFile:
    """A file that is hashed while it is written, under a temporary name until :meth:`finish`."""

    def __init__(self, path: Path):
        self._path = path
        self._partial = partial_name(path)
        self._stream: IO[bytes] = self._partial.open("wb")
        self._digest = hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        """Append the bytes of an array."""
        # a memoryview of an empty array cannot be cast
        if not values.size:
            return
        data = np.ascontiguousarray(values).data.cast("B")
        self._stream.write(data)
        self._digest.update(data)

    def finish(self) -> str:
        """Give the file its name, and return its SHA-256."""
        self._stream.close()
        # before the rename: a crash must not leave the final name on a file without its contents
        sync(self._partial)
        self._partial.replace(self._path)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Remove the file."""
        self._stream.close()
        self._partial.unlink(missing_ok=True)


class ShardWriter:
    """Writer of one shard of the store in ``folder``; as a context manager it removes the files after an error.
    ``kinds`` names optional files: BYTES, LEARNED. Tokens and document starts are always written."""

    def __init__(self, folder: Path, number: int, tokenizer: TokenizerIdentity, kinds: frozenset[str] = frozenset()):
        self._folder = folder
        self._tokenizer = tokenizer
        self._record = ShardRecord(number=number, tokens=0, documents=0, text_bytes=0, closed_by_us=False, sha256={})
        self._files: dict[str, _HashedFile] = {}
        for kind in sorted({TOKENS, STARTS, *kinds}):
            self._files[kind] = _HashedFile(folder / self._record.file(kind))
        self._bits: np.ndarray = np.empty(0, bool)
        """Mask of the last tokens, which do not fill a byte yet."""

    def add(self, documents: Documents, text_bytes: int = 0) -> None:
        """Append documents, which represent ``text_bytes`` bytes of text."""
        record = replace(self._record, text_bytes=self._record.text_bytes + text_bytes)
        self._record = record
        # texts without tokens; whether the last document is closed is still what the documents before said
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
            learned = documents.learned
            if learned is None:
                learned = np.ones(len(documents.tokens), bool)
            bits = np.concatenate([self._bits, learned])
            # Whole bytes only: the next documents may fill the last byte.
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

    def __enter__(self) -> Self:
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
    for kind, size in sizes.items():
        if size != record.num_file_bytes(kind, dtype):
            return None
    return record


def finish_store(
    folder: Path, tokenizer: TokenizerIdentity, records: list[ShardRecord], source: dict[str, object]
) -> Manifest:
    """Merge the document starts of all shards into one file, remove empty shards and write the manifest."""
    documents = _HashedFile(folder / STARTS_FILE)
    first = 0
    shards: list[ShardRecord] = []
    for record in records:
        with (folder / record.file(STARTS)).open("rb") as file:
            # in parts: the starts of a large corpus need not fit in memory
            while data := file.read(_COPY_BYTES):
                documents.write(np.frombuffer(data, "<i8") + first)
        first += record.tokens
        if record.tokens:
            # The starts of a shard count from the shard's first token. They are superseded by the merged file.
            sha256 = {kind: digest for kind, digest in record.sha256.items() if kind != STARTS}
            shards.append(replace(record, sha256=sha256))
    manifest = Manifest(tokenizer=tokenizer, shards=tuple(shards), starts_sha256=documents.finish(), source=source)
    # the manifest last: a store without one is unfinished, and what its shards were made with is still there
    write_text_atomic(folder / MANIFEST, manifest.text())
    clean_up(folder, manifest)
    return manifest


def clean_up(folder: Path, manifest: Manifest) -> None:
    """Remove from a finished store what its shards were made with."""
    files = {MANIFEST, *manifest.files}
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
