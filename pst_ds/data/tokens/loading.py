"""Open the training and evaluation data of a run as token streams: stores, tokens of other programs, or cached text."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.config.data import DataConfig, DataSource
from pst_ds.config.run import ConfigError
from pst_ds.data.dataset import DataInMemory, file_and_slice, read_rows, text_column
from pst_ds.data.preparation.pieces import COMPRESSIONS, Reading
from pst_ds.data.preparation.prepare import plan_store, write_pieces
from pst_ds.data.tokens.cache import cached_store, cached_tokens, hash_of_file, hash_of_texts
from pst_ds.data.tokens.foreign import is_token_source, open_tokens
from pst_ds.data.tokens.mixed import MixedSequences
from pst_ds.data.tokens.sequences import Sequences
from pst_ds.data.tokens.store import TokenStream, stream_of_documents
from pst_ds.data.tokens.streamed import PIECE_BYTES, StreamReader, TextStream
from pst_ds.data.tokens.tokenize import identity_of, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_ROWS_AT_A_TIME = 100


def load_sequences(data: DataConfig, split: str, tokenizer: Tokenizer) -> Sequences | MixedSequences:
    """Return the sequences of one split: without overlap for "train", with an overlap of one token for others.

    Raises InputError for a missing file or column, a row without text, tokens of another tokenizer, and less text than
    one sequence.
    """
    if split == "train" and data.sources:
        sources = tuple(_source(data, of, tokenizer) for of in data.sources)
        weights = tuple(of.weight for of in data.sources) if data.sources[0].weight else ()
        if data.streams and not weights:
            weights = (1.0,)
        return MixedSequences(sources, weights, tuple(of.epochs for of in data.sources) if weights else ())
    return _cut(data, split, _stream_of_split(data, split, tokenizer), getattr(data, split))


def _source(data: DataConfig, source: DataSource, tokenizer: Tokenizer) -> Sequences | TextStream:
    if not source.stream:
        return _cut(data, "train", _stream_of_source(data, source, tokenizer), source.path)
    reading = replace(_reading(data, source.kind), subset=data.subset, revision=data.revision)
    plan = plan_store([source.path], tokenizer, reading, piece_bytes=PIECE_BYTES)
    spans = tuple(span for piece in plan.pieces for span in piece)
    what = f"data.sources.path = {source.path!r}"
    stream = TextStream(what, spans, plan.reading, tokenizer, data.max_length, data.keeps_documents_apart)
    StreamReader(stream, "", 0, 1, window=1).next()  # reject unreadable data before a model is loaded
    return stream


def _cut(data: DataConfig, split: str, stream: TokenStream, where: str) -> Sequences:
    trains = split == "train"
    is_given = isinstance(data, DataInMemory)  # one user's examples may be shorter than a sequence
    length = min(data.max_length, max(2, len(stream))) if is_given else data.max_length
    sequences = Sequences.of(stream, length, trains=trains, apart=data.keeps_documents_apart)
    if not len(sequences):
        needed = f"one sequence of data.max_length = {data.max_length}" if trains else "2, one of which is predicted"
        raise ConfigError(
            f"{where} has {len(sequences.tokens)} tokens in all, fewer than {needed}. "
            + ("Lower it, or add text" if trains else "Add text")
        )
    return sequences


def _stream_of_source(data: DataConfig, source: DataSource, tokenizer: Tokenizer) -> TokenStream:
    path = Path(source.path)
    if source.kind == "tokens" or (source.kind == "auto" and is_token_source(path)):
        if not path.exists():
            raise ConfigError(
                f"data.sources.path = {source.path!r} does not exist (looked in {path.absolute()}). Name a store of "
                "pst-ds prepare, or tokens of another program"
            )
        return open_tokens(path, identity_of(tokenizer))
    return _stream_of_files(data, source.path, tokenizer, count=False, kind=source.kind)


def _stream_of_split(data: DataConfig, split: str, tokenizer: Tokenizer) -> TokenStream:
    column, where, count = data.text_columns[0], getattr(data, split), split != "train"
    is_given = isinstance(data, DataInMemory)
    file, piece = (where, "") if data.dataset else file_and_slice(where)
    if not is_given and not data.dataset and where:
        is_tokens = is_token_source(Path(file))
        if piece and (is_tokens or _is_several(file)):
            raise ConfigError(
                f"data.{split} = {where!r}: only a single file of text can be sliced, uncompressed. Name two stores or "
                "two sets of files instead"
            )
        if is_tokens:
            return open_tokens(Path(file), identity_of(tokenizer))
        if _is_several(file):
            return _stream_of_files(data, file, tokenizer, count=count)

    def texts() -> Iterator[list[str]]:
        rows = read_rows(data, split, {column: "text_columns"}).select_columns([column])
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            yield text_column(rows[start : start + _ROWS_AT_A_TIME][column], column, where, first_row=start)

    if is_given:
        found = [text for batch in texts() for text in batch]
        return stream_of_documents(tokenize(found, tokenizer, count=count))
    is_file = not data.dataset and Path(file).is_file()
    contents = [hash_of_file(Path(file)) if is_file else hash_of_texts(texts()), column, data.sample_by]
    if piece:
        contents.append(piece)
    if split == "test":
        contents += data.test_rows
    return cached_tokens(contents, texts, tokenizer, count=count, what=where)


def _is_several(where: str) -> bool:
    """Return whether ``where`` is a folder, a pattern or a compressed file, not a file that all tasks read."""
    path = Path(where)
    return (
        path.is_dir()
        or (path.is_file() and path.suffix in COMPRESSIONS)
        or bool(glob.glob(where) and not path.exists())
    )


def _stream_of_files(
    data: DataConfig, where: str, tokenizer: Tokenizer, *, count: bool, kind: str = "text"
) -> TokenStream:
    """Map the tokens of the files at ``where``, found and read as in ``pst-ds prepare``."""
    plan = plan_store([where], tokenizer, _reading(data, kind), count_bytes=count)
    paths = dict.fromkeys(span.path for piece in plan.pieces for span in piece)
    remote = next((path for path in paths if not Path(path).exists()), None)
    if remote is not None:
        raise ConfigError(
            f"{remote!r} is not on this machine and would be downloaded at every start. Write a store with "
            "pst-ds prepare, and name it"
        )
    files = (file for path in paths for file in _files_of(Path(path)))
    contents = [*map(hash_of_file, files), *map(str, asdict(plan.reading).values()), f"count {count}"]
    return cached_store(contents, plan.tokenizer, lambda folder: write_pieces(plan, tokenizer, folder), where)


def _reading(data: DataConfig, kind: str) -> Reading:
    column, kind = ("messages", "chat") if kind == "chat" else (data.text_columns[0], "text")
    return Reading(column=column, kind=kind, sample_by=data.sample_by, setting="data.text_columns")


def _files_of(path: Path) -> Iterable[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
