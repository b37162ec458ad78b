"""Read the documents of a span in batches, without loading a whole file (except a .json file with one list)."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import IO, TYPE_CHECKING

from pst_ds.data.conversations import columns_of_chat, row_of_chat, tokenize_chats
from pst_ds.data.preparation.pieces import Reading, Span, load_hub, open_file
from pst_ds.data.tokens.tokenize import Documents, tokenize
from pst_ds.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ROWS_AT_A_TIME = 1000
BYTES_AT_A_TIME = 1 << 20
"""Characters of text per batch."""
_BLOCK_BYTES = 1 << 20


def texts_of(span: Span, reading: Reading) -> Iterator[list[str]]:
    """Yield the documents of ``span`` in batches. Raises InputError for unreadable files and rows without text."""
    rows = _READERS[span.kind](span, reading)
    try:
        yield from _batches(rows)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{span.path} is not UTF-8 text: {error}. Save it in UTF-8") from None
    except Exception as error:
        raise InputError(f"{span.path} cannot be read: {first_line(error)}. Repair it, or name another") from error


def tokenize_texts(
    texts: list[str], reading: Reading, tokenizer: "Tokenizer", where: str, *, count: bool = False
) -> Documents:
    """Return the tokens of a batch of :func:`texts_of`, with byte counts if ``count``. Raises InputError."""
    if reading.kind == "chat":
        return tokenize_chats(texts, tokenizer, where)
    return tokenize(texts, tokenizer, count=count)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) >= ROWS_AT_A_TIME or size >= BYTES_AT_A_TIME:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open(span: Span) -> IO[bytes]:
    """Open the decompressed file of a span."""
    file = open_file(span.path)
    if not span.compression:
        return file
    import fsspec.compression

    unpack = fsspec.compression.compr.get(span.compression)
    if unpack is None:
        raise InputError(f"{span.path} needs a package for decompression. Run pip install zstandard")
    return unpack(file, mode="rb")


def _blocks(span: Span) -> Iterator[bytes]:
    """Yield the bytes of a span in blocks; each except the last ends with a line."""
    with _open(span) as file:
        if span.start:
            file.seek(span.start)
        left = span.stop - span.start if span.stop >= 0 else sys.maxsize
        rest = b""
        while left > 0 and (data := file.read(min(_BLOCK_BYTES, left))):
            left -= len(data)
            data = rest + data
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if end:
                yield data[:end]
        if rest:
            yield rest


def _json_lines(span: Span, reading: Reading) -> Iterator[str]:
    number = 0
    for block in _blocks(span):
        for line in block.splitlines() if b"\r" in block else block.split(b"\n"):
            number += 1
            if span.start == 0 and number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{span.path}: {_place(span, number)} is not JSON ({error}). Repair it") from None
            yield _text(row, span, reading, number)


def _place(span: Span, number: int) -> str:
    """Return the line, or for formats without lines the row; ``number`` counts from the start of the span."""
    if span.kind not in ("jsonl", "json"):
        return f"row {number}"
    before = _blocks(replace(span, start=0, stop=span.start)) if span.start else ()
    lines_before = sum(block.count(b"\n") for block in before)
    return f"line {lines_before + number}"


def _text(row: object, span: Span, reading: Reading, number: int) -> str:
    if not isinstance(row, dict):
        raise InputError(f"{span.path}: {_place(span, number)} is a {type(row).__name__}, not an object with columns")
    if reading.kind == "chat":
        return row_of_chat(row, reading.column, f"{span.path}: {_place(span, number)}")
    if reading.column not in row:
        raise _without_column(f"{span.path}: {_place(span, number)}", row, reading)
    value = row[reading.column]
    if isinstance(value, str):
        return value
    what = "no text" if value is None else f"a {type(value).__name__}"
    if value is None or isinstance(value, dict | list | tuple | bytes):
        raise InputError(
            f"{span.path}: column {reading.column!r} has {what} in {_place(span, number)}. Add one (an empty one is "
            'written "") or remove the row'
        )
    return str(value)


def _json_file(span: Span, reading: Reading) -> Iterator[str]:
    with _open(span) as file:
        begin = file.read(_BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not begin.startswith(b"["):
            yield from _json_lines(span, reading)
            return
        rows = json.loads(begin + file.read())
    for number, row in enumerate(rows, 1):
        yield _text(row, span, reading, number)


def _plain(span: Span, reading: Reading) -> Iterator[str]:
    """Yield documents as ``datasets`` does: all line breaks are equal, and empty paragraphs are skipped."""
    rest = ""
    for block in _blocks(span):
        text = block.decode().replace("\r\n", "\n").replace("\r", "\n")
        if reading.sample_by == "line":
            yield from text.removesuffix("\n").split("\n")
            continue
        rest += text
        if reading.sample_by == "paragraph":
            *whole, rest = rest.split("\n\n")
            yield from filter(None, whole)
    if rest:
        yield rest


def _table(span: Span, reading: Reading) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    with _open(span) as file:
        stream = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.reader(stream, "excel-tab", quoting=csv.QUOTE_NONE) if span.kind == "tsv" else csv.reader(stream)
        names = next(rows, [])
        if reading.column not in names:
            raise _without_column(span.path, names, reading)
        column = names.index(reading.column)
        for row in rows:
            if row and len(row) != len(names):
                raise InputError(
                    f"{span.path}: the row in line {rows.line_num} has {len(row)} fields, but there are {len(names)} "
                    "columns. Repair it"
                )
            if row:
                yield row[column]


def _parquet(span: Span, reading: Reading) -> Iterator[str]:
    import pyarrow.parquet

    with _open(span) as file:
        source = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if span.compression else file)
        columns = _columns(source.schema_arrow.names, span, reading)
        groups = range(span.start, span.stop) if span.stop >= 0 else range(source.num_row_groups)
        batches = source.iter_batches(batch_size=ROWS_AT_A_TIME, row_groups=list(groups), columns=columns)
        number = 0
        for batch in batches:
            batch.validate(full=True)
            for row in batch.to_pylist():
                number += 1
                yield _text(row, span, reading, number)


def _saved(span: Span, reading: Reading) -> Iterator[str]:
    import datasets

    rows = datasets.load_from_disk(span.path)
    rows = rows.select_columns(_columns(rows.column_names, span, reading))
    for number in range(span.start, span.stop):
        yield _text(rows[number], span, reading, number + 1)


def _hub(span: Span, reading: Reading) -> Iterator[str]:
    rows = load_hub(span.path, reading)
    rows = rows.shard(rows.num_shards, span.start) if rows.num_shards > 1 else rows
    for number, row in enumerate(rows, 1):
        yield _text(row, span, reading, number)


def _columns(names: list[str], span: Span, reading: Reading) -> list[str]:
    """Return the columns to read. Raises InputError for missing columns."""
    if reading.kind == "chat" and (found := columns_of_chat(names, reading.column)):
        return found
    if reading.column not in names:
        raise _without_column(span.path, names, reading)
    return [reading.column]


def _without_column(where: str, names: Iterable[object], reading: Reading) -> InputError:
    columns = ", ".join(map(str, names))
    return InputError(f"{where} has no column {reading.column!r}, which {reading.setting} names. Columns: {columns}")


_READERS = {
    "jsonl": _json_lines, "json": _json_file, "text": _plain, "csv": _table, "tsv": _table, "parquet": _parquet,
    "saved": _saved, "hub": _hub,
}  # fmt: skip
