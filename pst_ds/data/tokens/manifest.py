"""The manifest of a token store: its tokenizer, counts, and the SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.identity import TokenizerIdentity
from pst_ds.json_text import json_of

MANIFEST = "manifest.json"
KIND, VERSION = "pst-ds tokens", 1
TOKENS, BYTES, LEARNED, STARTS = "tokens", "bytes", "learned", "starts"
"""Kinds of files: tokens, bytes per token, mask of trained tokens (one bit each), and document starts."""
STARTS_FILE = "documents.bin"
_ITEM: dict[str, np.dtype] = {BYTES: np.dtype("<u4"), STARTS: np.dtype("<i8")}
_AGAIN = "Prepare it again (pst-ds prepare)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard: files ``KIND-NNNNN.bin`` for each kind in ``sha256``."""

    number: int
    tokens: int
    documents: int
    text_bytes: int
    closed_by_us: bool
    """Whether we, not the tokenizer, added the last end-of-text token."""
    sha256: dict[str, str]

    def file(self, kind: str) -> str:
        """Return the name of the file of a kind."""
        return f"{kind}-{self.number:05d}.bin"

    def num_file_bytes(self, kind: str, dtype: np.dtype) -> int:
        """Return the bytes of the file of a kind, with tokens of ``dtype``."""
        if kind == LEARNED:
            return -(-self.tokens // 8)
        count = self.documents if kind == STARTS else self.tokens
        return count * (dtype if kind == TOKENS else _ITEM[kind]).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Contents of a store's manifest."""

    tokenizer: TokenizerIdentity
    shards: tuple[ShardRecord, ...]
    starts_sha256: str
    source: dict[str, object] = field(default_factory=dict)
    """Sources and settings of the preparation, for information only."""

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of text that the tokens represent."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def has(self) -> frozenset[str]:
        """Kinds of files of each shard."""
        return frozenset(self.shards[0].sha256) if self.shards else frozenset()

    @property
    def closed_by_us(self) -> bool:
        """Whether we, not the tokenizer, added the last end-of-text token."""
        return bool(self.shards) and self.shards[-1].closed_by_us

    @property
    def digest(self) -> str:
        """SHA-256 of the contents, from those of the files; independent of ``source``."""
        about = [asdict(self.tokenizer), [asdict(shard) for shard in self.shards], self.starts_sha256]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def text(self) -> str:
        """Return the manifest as JSON."""
        counts = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        about = {"kind": KIND, "version": VERSION, "dtype": self.tokenizer.dtype.name, **counts, "digest": self.digest}
        return json_of({**about, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store and check the sizes of its files. Raises ConfigError."""
    path = folder / MANIFEST
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or table.get("kind") != KIND:
            raise ConfigError(f"{path} is not the manifest of a token store. Name a folder of pst-ds prepare")
        if table.get("version") != VERSION:
            raise ConfigError(
                f"{path} has version {table.get('version')!r} of the format, but this pst-ds reads {VERSION}. {_AGAIN}"
            )
        manifest = Manifest(
            tokenizer=TokenizerIdentity(**table["tokenizer"]),
            shards=tuple(ShardRecord(**shard) for shard in table["shards"]),
            starts_sha256=table["starts_sha256"],
            source=table["source"],
        )
        stated = table["digest"]
    except FileNotFoundError:
        raise ConfigError(
            f"{str(folder)!r} has no {MANIFEST}: it is not a token store, or an unfinished one. {_AGAIN}"
        ) from None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}). {_AGAIN}") from None
    if manifest.digest != stated:
        raise ConfigError(f"{path} was changed: its digest is {manifest.digest}, but it states {stated}. {_AGAIN}")
    _check_sizes(folder, manifest)
    return manifest


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    dtype = manifest.tokenizer.dtype
    expected = {
        shard.file(kind): shard.num_file_bytes(kind, dtype) for shard in manifest.shards for kind in shard.sha256
    }
    for name, size in {**expected, STARTS_FILE: manifest.documents * _ITEM[STARTS].itemsize}.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise ConfigError(f"{folder / name} cannot be read: {error.strerror}. {_AGAIN}") from None
        if found != size:
            raise ConfigError(f"{folder / name} has {found} bytes, but its manifest says {size}. {_AGAIN}")
