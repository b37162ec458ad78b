"""Cache of tokenised text: tokenised once per host into a store that all ranks and later runs map."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.atomic_files import LOCK, atomic_folder, file_sha256, only_writer, require_writable
from pst_ds.config.run import ConfigError
from pst_ds.core.kernels.library_cache import cache_folder as private_folder
from pst_ds.data.tokens.store import BYTES, VERSION, TokenStream, is_store, open_store
from pst_ds.data.tokens.tokenize import TokenizerIdentity, identity_of, tokenize
from pst_ds.data.tokens.writer import ShardWriter, finish_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CACHE = "PST_DS_CACHE"
Build = Callable[[Path], None]
"""Function that writes a store into an empty folder."""


def cache_folder() -> Path:
    """Return the folder of all cached stores: $PST_DS_CACHE/tokens, or pst-ds/tokens next to the hub's cache."""
    from huggingface_hub.constants import HF_HOME

    try:
        return Path(os.environ.get(CACHE) or Path(HF_HOME) / "pst-ds").expanduser() / "tokens"
    except RuntimeError:  # neither HOME nor a passwd entry
        return private_folder() / "tokens"


def cached_tokens(
    contents: Iterable[str],
    texts: Callable[[], Iterable[Sequence[str]]],
    tokenizer: Tokenizer,
    *,
    count: bool,
    what: str,
) -> TokenStream:
    """Return the tokens of ``texts``, from the cache or tokenised into it.

    One process per host tokenises and the others wait. Raises InputError.

    Args:
        contents: hashes of files, and settings, that identify the texts.
        count: whether to count the bytes that each token represents.
        what: name of the text in messages.
    """
    identity = identity_of(tokenizer)

    def build(folder: Path) -> None:
        with ShardWriter(folder, 0, identity, frozenset({BYTES} if count else ())) as shard:
            for batch in texts():
                size = sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
                shard.add(tokenize(batch, tokenizer, count=count), size)
            record = shard.finish()
        finish_store(folder, identity, [record], {"sources": [what]})

    return cached_store([*contents, f"count {count}"], identity, build, what)


def cached_store(contents: Iterable[str], identity: TokenizerIdentity, build: Build, what: str) -> TokenStream:
    """Return the cached store for ``contents`` and ``identity``; call ``build`` if there is none."""
    about = json.dumps([VERSION, asdict(identity), list(contents)])
    folder = cache_folder() / hashlib.sha256(about.encode()).hexdigest()[:32]
    if (found := _whole(folder, identity)) is not None:
        return found
    require_writable(folder, f"the cache of {what} ({CACHE})")
    with only_writer(folder.with_name(f".{folder.name}{LOCK}"), f"tokenize {what}"):
        if (found := _whole(folder, identity)) is not None:
            return found
        with atomic_folder(folder) as partial:
            build(partial)
    return open_store(folder, identity)


def _whole(folder: Path, identity: TokenizerIdentity) -> TokenStream | None:
    """Map a cached store; None if it is missing or damaged."""
    try:
        return open_store(folder, identity) if is_store(folder) else None
    except ConfigError:
        return None


def hash_of_file(path: Path) -> str:
    """Return the suffix and SHA-256 of a file, which determine its texts."""
    return f"{path.suffix.lower()} {file_sha256(path)}"


def hash_of_texts(batches: Iterable[Sequence[object]]) -> str:
    """Return the SHA-256 of texts that are not in a single file."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(json.dumps([str(text) for text in batch]).encode())
    return digest.hexdigest()
