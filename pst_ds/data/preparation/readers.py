"""Read the documents of a span in batches, without loading a whole file (except a .json file with one list)."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import IO, TYPE_CHECKING, cast

from pst_ds.data.conversations import columns_of_chat, row_of_chat, tokenize_chats
from pst_ds.data.file_rows import (
    QuoteCounts,
    byte_blocks,
    has_quoted_names,
    json_file,
    json_lines,
    plain_documents,
    quoted_tsv,
    table_rows,
)
from pst_ds.data.preparation.pieces import Reading, Span, load_hub, open_file
from pst_ds.data.tokens.tokenize import Documents, tokenize
from pst_ds.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ROWS_AT_A_TIME = 1000
BYTES_AT_A_TIME = 1 << 20
"""Characters of text per batch."""


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
    """Yield texts in lists that end at ROWS_AT_A_TIME texts, or with the text that reaches BYTES_AT_A_TIME."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) >= ROWS_AT_A_TIME or size >= BYTES_AT_A_TIME:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _open(span: Span) -> IO[bytes]:
    """Open the decompressed file of a span."""
    file = open_file(span.path)
    if not span.compression:
        return file
    if span.compression == "zstd":
        import pyarrow

        # not fsspec's, which needs a package, and stops at the end of the first frame: pzstd and cat write several
        return cast("IO[bytes]", pyarrow.CompressedInputStream(file, "zstd"))
    import fsspec.compression

    return fsspec.compression.compr[span.compression](file, mode="rb")


def _blocks(span: Span) -> Iterator[bytes]:
    """Yield the bytes of a span in blocks; each except the last ends with a line."""
    with _open(span) as file:
        yield from byte_blocks(file, span.start, span.stop)


def _lines_before(span: Span) -> Callable[[], int] | None:
    """Return a function that counts the lines of the file before the span; None at the start of the file."""
    if not span.start:
        return None
    return lambda: sum(block.count(b"\n") for block in _blocks(replace(span, start=0, stop=span.start)))


def _json_lines(span: Span, reading: Reading) -> Iterator[str]:
    lines_before = _lines_before(span)

    def place(number: int) -> str:
        if lines_before is not None:
            number += lines_before()
        return f"line {number}"

    for number, row in json_lines(span.path, _blocks(span), lines_before):
        yield _text(row, number, span, reading, place)


def _json_file(span: Span, reading: Reading) -> Iterator[str]:
    unit, rows = json_file(span.path, lambda: _open(span))
    for number, row in rows:
        yield _text(row, number, span, reading, lambda number: f"{unit} {number}")


def _row_place(number: int) -> str:
    return f"row {number}"


def _text(
    row: Mapping[str, object], number: int, span: Span, reading: Reading, place: Callable[[int], str] = _row_place
) -> str:
    """Return the document of a row. Raises InputError, which calls ``place`` for the row's place in the file."""
    if reading.kind == "chat":
        try:
            return row_of_chat(row, reading.column, span.path)
        except InputError:  # once more with the place, which may take a while to find
            return row_of_chat(row, reading.column, f"{span.path}: {place(number)}")
    if reading.column not in row:
        raise _without_column(f"{span.path}: {place(number)}", row, reading)
    value = row[reading.column]
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, dict | list | tuple | bytes):
        content = "no text"
        if value is not None:
            content = f"a {type(value).__name__}"
        raise InputError(
            f"{span.path}: column {reading.column!r} has {content} in {place(number)}. Add one (an empty one is "
            'written "") or remove the row'
        )
    # a number of a Parquet file or a dataset
    return str(value)


def _plain(span: Span, reading: Reading) -> Iterator[str]:
    yield from plain_documents(span.path, _blocks(span), reading.sample_by, _lines_before(span))


def _table(span: Span, reading: Reading) -> Iterator[str]:
    is_tsv = span.kind == "tsv"
    rows = table_rows(span.path, lambda: _open(span), is_tsv=is_tsv)
    _, names = next(rows, (0, list[str]()))
    if is_tsv and has_quoted_names(names):
        raise quoted_tsv(span.path, "names of columns")
    if reading.column not in names:
        raise _without_column(span.path, names, reading)
    column = names.index(reading.column)
    counts = QuoteCounts()
    for _, fields in rows:
        text = fields[column]
        counts.add(text)
        yield text
    # known only at the end, since a text may have quotes; the error keeps the shard from being finished
    if is_tsv and counts.is_quoted_as_csv:
        raise quoted_tsv(span.path, f"values in column {reading.column!r}")


def _parquet(span: Span, reading: Reading) -> Iterator[str]:
    import pyarrow.parquet

    with _open(span) as file:
        seekable: IO[bytes] = file
        if span.compression:
            # the reader seeks, which would decompress from the start each time
            seekable = io.BytesIO(file.read())
        source = pyarrow.parquet.ParquetFile(seekable)
        columns = _columns(source.schema_arrow.names, span, reading)
        groups = range(source.num_row_groups)
        if span.stop >= 0:
            groups = range(span.start, span.stop)
        batches = source.iter_batches(batch_size=ROWS_AT_A_TIME, row_groups=list(groups), columns=columns)
        # messages count rows from the start of the file, also in a span that starts inside it
        number = sum(source.metadata.row_group(group).num_rows for group in range(groups.start))
        for batch in batches:
            # the reader does not check that texts are UTF-8
            batch.validate(full=True)
            for row in batch.to_pylist():
                yield _text(row, number, span, reading)
                number += 1


def _saved(span: Span, reading: Reading) -> Iterator[str]:
    import datasets

    rows = datasets.load_from_disk(span.path)
    # other columns, such as images, would be decoded
    rows = rows.select_columns(_columns(rows.column_names, span, reading))
    for number in range(span.start, span.stop):
        yield _text(rows[number], number, span, reading)


def _hub(span: Span, reading: Reading) -> Iterator[str]:
    rows = load_hub(span.path, reading)
    if rows.num_shards > 1:
        rows = rows.shard(rows.num_shards, span.start)
    for number, row in enumerate(rows):
        yield _text(row, number, span, reading)


def _columns(names: list[str], span: Span, reading: Reading) -> list[str]:
    """Return the columns to read. Raises InputError for missing columns."""
    if reading.kind == "chat":
        columns = columns_of_chat(names, reading.column)
        if columns:
            return columns
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
