"""Open the data of a run as token streams: stores, token files of other programs, or text. Text is tokenised
once per host into a cached store, which all ranks and later runs map."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.atomic_files import LOCK, atomic_folder, file_sha256, only_writer, require_writable
from pst_ds.config.data import DataConfig, DataSource
from pst_ds.config.run import ConfigError
from pst_ds.data.dataset import DataInMemory, file_and_slice, place_in_split, read_rows, text_column
from pst_ds.data.file_rows import READING_VERSION
from pst_ds.data.preparation.pieces import COMPRESSIONS, Reading
from pst_ds.data.preparation.prepare import plan_store, write_pieces
from pst_ds.data.tokens.cache import CACHE, cache_folder, cached_file, local_copy
from pst_ds.data.tokens.mixed import MixedSequences
from pst_ds.data.tokens.sequences import Sequences
from pst_ds.data.tokens.store import (
    BYTES,
    VERSION,
    ShardWriter,
    TokenStream,
    finish_store,
    is_store,
    open_store,
    stream_of_documents,
)
from pst_ds.data.tokens.token_files import open_token_files, token_files
from pst_ds.data.tokens.tokenize import TokenizerIdentity, bytes_of_texts, identity_of, tokenize
from pst_ds.remote_folder import is_address

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_ROWS_AT_A_TIME = 100


def load_sequences(data: DataConfig, split: str, tokenizer: Tokenizer) -> Sequences | MixedSequences:
    """Return the sequences of one split: without overlap for "train", with an overlap of one token for others.

    Raises InputError for a missing file or column, a row without text, tokens of another tokenizer, and less text than
    one sequence.
    """
    if split == "train" and data.sources:
        sources: list[Sequences] = []
        for source in data.sources:
            stream = _stream_of_source(data, source, tokenizer)
            sources.append(_cut(data, "train", stream, where=source.path))
        weights: tuple[float, ...] = ()
        # all sources have a weight, or none
        if data.sources[0].weight:
            weights = tuple(source.weight for source in data.sources)
        return MixedSequences(sources, weights)
    return _cut(data, split, _stream_of_split(data, split, tokenizer), getattr(data, split))


def _cut(data: DataConfig, split: str, stream: TokenStream, where: str) -> Sequences:
    """Return the sequences of a stream. Raises ConfigError, naming ``where``, for less text than one."""
    trains = split == "train"
    length = data.max_length
    # one user's examples may be shorter than a sequence
    if isinstance(data, DataInMemory):
        length = min(length, max(2, len(stream)))
    sequences = Sequences.of(stream, length, trains=trains, apart=data.keeps_documents_apart)
    if not len(sequences):
        needed = "2, one of which is predicted"
        fix = "Add text"
        if trains:
            needed = f"one sequence of data.max_length = {data.max_length}"
            fix = "Lower it, or add text"
        raise ConfigError(f"{where} has {len(sequences.tokens)} tokens in all, fewer than {needed}. {fix}")
    return sequences


def fetch_sources(data: DataConfig) -> None:
    """Fetch all data for training and validation that lies at an address, so that loading it takes no time.

    Raises InputError.
    """
    for setting, where in _settings_with_tokens(data, ("train", "validation")):
        if is_address(where):
            local_copy(where, setting, data.cache)


def has_addresses(data: DataConfig) -> bool:
    """Return whether :func:`fetch_sources` has something to fetch."""
    return any(is_address(where) for _, where in _settings_with_tokens(data, ("train", "validation")))


def require_named_tokenizer(data: DataConfig, tokenizer: str) -> None:
    """Raise ConfigError if the run reads files that do not identify a tokenizer, and names no ``tokenizer``."""
    if tokenizer:
        return
    for setting, where in _settings_with_tokens(data, ("train", "validation", "test")):
        if is_address(where) or is_store(Path(where)):
            continue
        for token_format, path in token_files(where)[:1]:
            raise ConfigError(
                f"{setting} = {where!r}: {path.name} is a file of {token_format.name}, which does not say what "
                "tokenizer made it. Name that tokenizer with model.tokenizer"
            )


def _settings_with_tokens(data: DataConfig, splits: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (setting, value) for what may name tokens: sources, and splits that are not those of a dataset."""
    for source in data.sources:
        yield "data.sources.path", source.path
    for split in splits:
        where = getattr(data, split)
        if where and not data.dataset:
            yield f"data.{split}", where


def _stream_of_tokens(data: DataConfig, setting: str, where: str, tokenizer: Tokenizer) -> TokenStream | None:
    """Map the tokens at ``where``: a store, or files of another program; None if it has neither."""
    path = Path(where)
    if is_address(where):
        path = local_copy(where, setting, data.cache)
    identity = identity_of(tokenizer)
    if is_store(path):
        return open_store(path, identity)
    files = token_files(str(path))
    if not files:
        return None
    return open_token_files(files, identity, where, partial(cached_file, cache=data.cache))


def _stream_of_source(data: DataConfig, source: DataSource, tokenizer: Tokenizer) -> TokenStream:
    """Return the tokens of one source of a mixture. Raises InputError."""
    stream = _stream_of_tokens(data, "data.sources.path", source.path, tokenizer)
    if stream is not None:
        return stream
    return _stream_of_files(data, source.path, tokenizer, count=False, kind=source.kind)


def _stream_of_split(data: DataConfig, split: str, tokenizer: Tokenizer) -> TokenStream:
    """Return the tokens that a split names: a store, token files, several files of text, or one. Raises InputError."""
    column = data.text_columns[0]
    where = getattr(data, split)
    # bytes are for metrics, which training does not have
    count = split != "train"

    def texts() -> Iterator[list[str]]:
        rows = read_rows(data, split, {column: "text_columns"}).select_columns([column])
        for start in range(0, len(rows), _ROWS_AT_A_TIME):

            def place(row: int, start: int = start) -> str:
                return place_in_split(data, split, rows, start + row)

            yield text_column(rows[start : start + _ROWS_AT_A_TIME][column], column, where, place)

    if isinstance(data, DataInMemory):
        in_memory: list[str] = []
        for batch in texts():
            in_memory += batch
        return stream_of_documents(tokenize(in_memory, tokenizer, count=count))
    file = where
    piece = ""
    if not data.dataset:
        file, piece = file_and_slice(where)
    path = Path(file)
    if file and not data.dataset:
        is_several = _is_several(file)
        stream = None
        # a folder with a slice is refused before its content is read
        if not (piece and is_several):
            stream = _stream_of_tokens(data, f"data.{split}", file, tokenizer)
        if piece and (stream is not None or is_several):
            raise ConfigError(
                f"data.{split} = {where!r}: only a single file of text can be sliced, uncompressed. Name two stores or "
                "two sets of files instead"
            )
        if stream is not None:
            return stream
        if is_several:
            return _stream_of_files(data, file, tokenizer, count=count)
    # what determines the tokens, apart from the tokenizer: the name of the cached store
    contents: list[str] = []
    if not data.dataset and path.is_file():
        contents.append(_hash_of_file(path))
    else:
        # a dataset of the hub has no file to hash
        contents.append(_hash_of_texts(texts()))
    contents += [column, data.sample_by]
    if piece:
        contents.append(piece)
    if split == "test":
        contents += data.test_rows
    return _cached_tokens(contents, texts(), tokenizer, count=count, what=where, cache=data.cache)


def _is_several(where: str) -> bool:
    """Return whether ``where`` is a folder, a pattern or a compressed file, not a file that all tasks read."""
    path = Path(where)
    if path.exists():
        return path.is_dir() or path.suffix in COMPRESSIONS
    return bool(glob.glob(where))


def _stream_of_files(
    data: DataConfig, where: str, tokenizer: Tokenizer, *, count: bool, kind: str = "text"
) -> TokenStream:
    """Map the tokens of the files at ``where``, found and read as in ``pst-ds prepare``."""
    column = data.text_columns[0]
    if kind == "chat":
        column = "messages"
    reading = Reading(column=column, kind=kind, sample_by=data.sample_by, setting="data.text_columns")
    plan = plan_store([where], tokenizer, reading, count_bytes=count)
    files: list[Path] = []
    for name in dict.fromkeys(span.path for piece in plan.pieces for span in piece):
        path = Path(name)
        if not path.exists():
            raise ConfigError(
                f"{name!r} is not on this machine and would be downloaded at every start. Write a store with "
                "pst-ds prepare, and name it"
            )
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.is_file())
        else:
            files.append(path)
    contents = [*map(_hash_of_file, files), *map(str, asdict(plan.reading).values()), f"count {count}"]
    return _cached_store(
        contents, plan.tokenizer, lambda folder: write_pieces(plan, tokenizer, folder), where, data.cache
    )


def _cached_tokens(
    contents: list[str], texts: Iterable[list[str]], tokenizer: Tokenizer, *, count: bool, what: str, cache: str
) -> TokenStream:
    """Return the tokens of ``texts``, which ``contents`` identify, from the cache or tokenised into it."""
    identity = identity_of(tokenizer)
    kinds: set[str] = set()
    if count:
        kinds = {BYTES}

    def build(folder: Path) -> None:
        with ShardWriter(folder, 0, identity, frozenset(kinds)) as shard:
            for batch in texts:
                shard.add(tokenize(batch, tokenizer, count=count), bytes_of_texts(batch))
            record = shard.finish()
        finish_store(folder, identity, [record], {"sources": [what]})

    return _cached_store([*contents, f"count {count}"], identity, build, what, cache)


def _cached_store(
    contents: list[str], identity: TokenizerIdentity, build: Callable[[Path], None], what: str, cache: str
) -> TokenStream:
    """Return the cached store for ``contents`` and ``identity``; call ``build`` with an empty folder if there is none.
    One process per host builds it and the others wait."""
    about = json.dumps([VERSION, READING_VERSION, asdict(identity), contents])
    folder = cache_folder(cache) / hashlib.sha256(about.encode()).hexdigest()[:32]
    stream = _complete(folder, identity)
    if stream is not None:
        return stream
    require_writable(folder, f"the cache of {what} (data.cache or {CACHE})")
    with only_writer(folder.with_name(f".{folder.name}{LOCK}"), f"tokenize {what}"):
        # again: another process may have built it while this one waited
        if _complete(folder, identity) is None:
            with atomic_folder(folder) as unfinished:
                build(unfinished)
    return open_store(folder, identity)


def _complete(folder: Path, identity: TokenizerIdentity) -> TokenStream | None:
    """Map a cached store; None if it is missing or damaged."""
    with suppress(ConfigError):
        if is_store(folder):
            return open_store(folder, identity)
    return None


def _hash_of_file(path: Path) -> str:
    """Return the suffix and SHA-256 of a file, which determine its texts."""
    return f"{path.suffix.lower()} {file_sha256(path)}"


def _hash_of_texts(batches: Iterable[list[str]]) -> str:
    """Return the SHA-256 of texts, and of how they are cut into batches."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()
