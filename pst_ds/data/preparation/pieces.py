"""Cut sources of text into pieces of similar size. Each becomes one shard, regardless of which worker tokenises it."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pst_ds.core.layout import runs_of
from pst_ds.errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import IterableDataset

FORMATS = {
    ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text",
    ".text": "text", ".md": "text",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
LINE_FORMATS = ("jsonl", "text")
"""Formats that can be cut between lines."""
_KNOWN = f"{', '.join(FORMATS)}, also followed by {', '.join(COMPRESSIONS)}"
_LOOK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Settings to read documents from files."""

    column: str = "text"
    """Column with the text, or with the messages of conversations."""
    kind: str = "text"
    """"text" or "chat"."""
    chat_template_sha256: str = ""
    """SHA-256 of the chat template."""
    setting: str = "Reading.column"
    """Setting that names the column, for messages."""
    sample_by: str = "line"
    """Document of a plain text file: "line", "paragraph" or "document"."""
    split: str = "train"
    """Split of a dataset on the hub."""
    subset: str = ""
    revision: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A part of a file or dataset that one process reads."""

    path: str
    kind: str
    """A value of FORMATS, "saved" for a folder of ``save_to_disk``, or "hub"."""
    start: int = 0
    """First byte, row group, row or shard, depending on the kind."""
    stop: int = -1
    """End of the range; -1 is the end of the file."""
    compression: str = ""
    num_bytes: int = 0
    """Approximate bytes, for progress and to balance pieces."""


Piece = tuple[Span, ...]


def find_pieces(sources: Sequence[str], reading: Reading, piece_bytes: int) -> list[Piece]:
    """Return the pieces of all sources in order, determined by names, sizes and contents only. A source is a file, a
    folder, a pattern, a URL supported by fsspec, or a dataset on the hub. Raises InputError."""
    spans: list[Span] = []
    for source in sources:
        spans += _spans(source, reading, piece_bytes)
    # small files share a piece
    runs = runs_of([span.num_bytes for span in spans], piece_bytes)
    return [tuple(spans[run.start : run.stop]) for run in runs]


def _spans(source: str, reading: Reading, piece_bytes: int) -> Iterator[Span]:
    """Yield the parts of a source, in order. Raises InputError for one that does not exist or has nothing to read."""
    path = Path(source)
    if path.is_dir() and (path / "state.json").is_file():
        yield from _saved_spans(source, piece_bytes)
        return
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        raise InputError(
            f"{source} holds several splits (save_to_disk of a DatasetDict). Name one, such as {path / reading.split}"
        )
    if path.is_dir():
        files = _files_in(path)
        if not files:
            raise InputError(f"{source} has no file of a known kind ({_KNOWN}). Name another folder")
    elif path.is_file() or "://" in source:
        # before patterns: a file may have brackets in its name
        files = [source]
    elif glob.has_magic(source):
        files = sorted(file for file in glob.glob(source, recursive=True) if Path(file).is_file())
        if not files:
            raise InputError(f"{source!r} matches no file (looked from {Path.cwd()}). Name files, folders or patterns")
    elif source.count("/") == 1 and not source.startswith((".", "/")) and not format_of(source):
        for shard in range(load_hub(source, reading).num_shards):
            yield Span(path=source, kind="hub", start=shard, stop=shard + 1, num_bytes=1)
        return
    else:
        raise InputError(
            f"{source!r} does not exist (looked in {path.absolute()}). Name a file, a folder, a pattern or a dataset "
            "on the hub (owner/name)"
        )
    for file in files:
        yield from _file_spans(file, reading, piece_bytes)


def _files_in(folder: Path) -> list[str]:
    """Return the files of known kinds in a folder and its subfolders, sorted by path.

    Hidden files and folders are omitted, as in patterns: copies of notebooks (.ipynb_checkpoints), caches of the hub.
    So is README.md at the top of files with rows: it is the card of a dataset, not a document.
    """
    files: list[str] = []
    has_rows = False
    for file in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        file_format = format_of(file.name)
        if is_hidden or file_format is None or not file.is_file():
            continue
        kind, _ = file_format
        has_rows = has_rows or kind != "text"
        files.append(str(file))
    card = str(folder / "README.md")
    if has_rows and card in files:
        files.remove(card)
    return sorted(files)


def format_of(name: str) -> tuple[str, str] | None:
    """Return the format and the compression of a file by its name; None for unknown kinds."""
    path = Path(name.lower())
    compression = COMPRESSIONS.get(path.suffix, "")
    if compression:
        path = path.with_suffix("")
    kind = FORMATS.get(path.suffix)
    if kind is None:
        return None
    return kind, compression


def _file_spans(file: str, reading: Reading, piece_bytes: int) -> Iterator[Span]:
    """Yield the parts of a file, or the whole where only reading it from its start tells rows apart."""
    file_format = format_of(file)
    if file_format is None:
        raise InputError(f"{file!r} is of an unknown kind. Use one of {_KNOWN}")
    kind, compression = file_format
    size = open_size(file)
    whole = Span(path=file, kind=kind, compression=compression, num_bytes=size)
    if kind == "parquet" and not compression:
        yield from _row_groups(whole, piece_bytes)
    elif compression or kind not in LINE_FORMATS or (kind == "text" and reading.sample_by == "document"):
        yield whole
    elif kind == "text" and reading.sample_by == "paragraph":
        yield from _line_spans(whole, b"\n\n", piece_bytes)
    else:
        yield from _line_spans(whole, b"\n", piece_bytes)


def _line_spans(whole: Span, ending: bytes, piece_bytes: int) -> Iterator[Span]:
    """Cut a file after the first ``ending`` after each multiple of ``piece_bytes``."""
    start = 0
    size = whole.num_bytes
    with open_file(whole.path) as file:
        while start < size:
            stop = size
            if start + piece_bytes < size:
                stop = _behind(file, ending, place=start + piece_bytes, size=size)
            yield Span(path=whole.path, kind=whole.kind, start=start, stop=stop, num_bytes=stop - start)
            start = stop


def _behind(file: IO[bytes], ending: bytes, place: int, size: int) -> int:
    """Return the offset after the first ``ending`` that starts after ``place``, or ``size``."""
    file.seek(place)
    data = b""
    at = place
    while at + len(data) < size:
        more = file.read(_LOOK_BYTES)
        if not more:
            break
        data += more
        # from 1: an ending at ``place`` belongs to a line that ends exactly there
        found = data.find(ending, 1)
        if found >= 0:
            return at + found + len(ending)
        # an ending may lie across two reads
        num_kept = len(ending)
        at += len(data[:-num_kept])
        data = data[-num_kept:]
    return size


def _row_groups(whole: Span, piece_bytes: int) -> Iterator[Span]:
    """Yield parts of a Parquet file that have at least ``piece_bytes``, and the rest. Raises InputError."""
    import pyarrow.parquet

    try:
        with open_file(whole.path) as file:
            about = pyarrow.parquet.ParquetFile(file).metadata
            sizes = [about.row_group(group).total_byte_size for group in range(about.num_row_groups)]
    except Exception as error:  # damaged files raise various errors of Arrow
        raise InputError(f"{whole.path} cannot be read as parquet: {first_line(error)}. Name another file") from None
    first = 0
    num_bytes = 0
    for stop, size in enumerate(sizes, 1):
        num_bytes += size
        if num_bytes >= piece_bytes or stop == len(sizes):
            yield Span(path=whole.path, kind="parquet", start=first, stop=stop, num_bytes=num_bytes)
            first = stop
            num_bytes = 0


def _saved_spans(folder: str, piece_bytes: int) -> Iterator[Span]:
    """Yield ranges of rows, as long as each other, of a folder of ``save_to_disk``. Raises InputError."""
    import datasets

    try:
        rows = datasets.load_from_disk(folder)
    except Exception as error:  # damaged files raise errors of Arrow, JSON and datasets
        raise InputError(f"{folder} cannot be read as a saved dataset: {first_line(error)}. Save it again") from None
    size = max(1, rows.data.nbytes)
    num_spans = max(1, round(size / piece_bytes))
    for number in range(min(num_spans, len(rows))):
        start = len(rows) * number // num_spans
        stop = len(rows) * (number + 1) // num_spans
        yield Span(path=folder, kind="saved", start=start, stop=stop, num_bytes=size // num_spans)


def load_hub(name: str, reading: Reading) -> "IterableDataset":
    """Open a dataset on the hub as a stream. Raises InputError."""
    import datasets

    revision = reading.revision or None
    try:
        return datasets.load_dataset(
            name, reading.subset or None, split=reading.split, streaming=True, revision=revision
        )
    except Exception as error:  # the connection, or the builder of the dataset, may raise anything
        raise InputError(
            f"{name!r} is not a local file or folder, and the dataset of that name, split {reading.split!r}, cannot be "
            f"opened: {first_line(error)}. Name files, or a dataset on the hub that can be reached"
        ) from None


def open_file(path: str) -> IO[bytes]:
    """Open a local file, or a URL supported by fsspec, for reading bytes. Raises InputError."""
    try:
        if "://" not in path:
            return open(path, "rb")
        # only for URLs: it imports a client per protocol
        import fsspec

        return fsspec.open(path, "rb").open()
    except (OSError, ImportError, ValueError) as error:
        raise InputError(f"{path!r} cannot be opened: {first_line(error)}. Name a readable file") from None


def open_size(path: str) -> int:
    """Return the size of a file or URL in bytes; 0 if a server does not say. Raises InputError."""
    with open_file(path) as file, suppress(ValueError):
        return file.seek(0, os.SEEK_END)
    return 0
