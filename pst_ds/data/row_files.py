"""Convert local files of rows to Arrow tables on disk, which ``datasets`` caches and maps into memory.

The cache is that of ``datasets.load_dataset``: it depends on the file's path and time of change, and on
:data:`READER_VERSION`. Parquet files have types of their own and are read by ``datasets`` itself.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow

from pst_ds.data.rows import BOM, RowError, json_lines, json_list, json_type, lines_of, open_table, text_documents
from pst_ds.errors import first_line

READER_VERSION = "1"
"""Increase it when the same file is read as other rows, so that no older table is found in the cache."""
ROWS_AT_A_TIME = 1000
BLOCK_BYTES = 1 << 20


@dataclass
class RowFileConfig(datasets.BuilderConfig):
    """What to read: one local file. ``datasets`` names its cache by these fields."""

    kind: str = ""
    """"csv", "tsv", "json", "jsonl" or "text"."""
    sample_by: str = "line"
    """Document of a text file."""
    reader_version: str = READER_VERSION


class RowFile(datasets.ArrowBasedBuilder):
    """Reader of one file; :func:`rows_of_file` calls it."""

    BUILDER_CONFIG_CLASS = RowFileConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        (path,) = self.config.data_files["train"]
        return [datasets.SplitGenerator(name="train", gen_kwargs={"path": str(path)})]

    def _generate_tables(self, path: str) -> Iterator[tuple[Any, pyarrow.Table]]:
        kind = self.config.kind
        if kind in ("csv", "tsv"):
            tables = _tables_of_table(path, is_tsv=kind == "tsv")
        elif kind == "text":
            tables = _tables_of_text(path, self.config.sample_by)
        else:
            tables = _tables_of_json(path, is_list=kind == "json")
        for number, table in enumerate(tables):
            yield datasets.builder.Key(0, number), table


def rows_of_file(path: Path, kind: str, *, sample_by: str, piece: str) -> datasets.Dataset:
    """Return the rows of a local file, or those of a slice such as "[:80%]".

    Args:
        kind: as :attr:`RowFileConfig.kind`.
        sample_by: "line", "paragraph" or "document", for text.

    Raises RowError for content that cannot be read, and OSError.
    """
    builder = RowFile(
        dataset_name="rows",
        # Without the escape, "[1]" and "*" in a file's name would be a pattern for other files.
        data_files={"train": [glob.escape(str(path.absolute()))]},
        kind=kind,
        sample_by=sample_by,
        reader_version=READER_VERSION,
    )
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, RowError):
            raise error.__cause__ from None
        raise
    return builder.as_dataset(split=f"train{piece}")


def _tables_of_table(path: str, *, is_tsv: bool) -> Iterator[pyarrow.Table]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        try:
            names, rows = open_table(stream, is_tsv=is_tsv)
            schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
            yield schema.empty_table()  # so that a file without rows has its columns
            for batch in _batched(rows):
                columns = zip(*(fields for _, fields in batch), strict=True)
                yield pyarrow.table([pyarrow.array(column, pyarrow.string()) for column in columns], schema)
        except UnicodeDecodeError as error:
            raise RowError(f"is not UTF-8 text: {error}. Save it in UTF-8") from None


def _tables_of_text(path: str, sample_by: str) -> Iterator[pyarrow.Table]:
    with open(path, "rb") as stream:
        try:
            for batch in _batched(text_documents(_blocks(stream), sample_by)):
                yield pyarrow.table({"text": pyarrow.array(batch, pyarrow.string())})
        except UnicodeDecodeError as error:
            raise RowError(f"is not UTF-8 text: {error}. Save it in UTF-8") from None


def _tables_of_json(path: str, *, is_list: bool) -> Iterator[pyarrow.Table]:
    """Yield the tables of a JSON file in two passes, because the last row may add a column or a nested field."""
    schema = pyarrow.schema([])
    first_places: dict[str, str] = {}
    for batch in _batched(_json_rows(path, is_list=is_list)):
        schema = _with_columns_of(schema, batch, first_places)
    # A column that is null in every row has no text, and the reader of the column says so.
    fields = [(field.name, _without_nulls(field.type)) for field in schema]
    schema = pyarrow.schema(fields)
    yield schema.empty_table()
    for batch in _batched(_json_rows(path, is_list=is_list)):
        yield _table_of_rows(batch, schema)


def _table_of_rows(batch: list[tuple[str, dict[str, object]]], schema: pyarrow.Schema) -> pyarrow.Table:
    """Return rows as a table. Raises RowError for the first nested value of another type than its column's."""
    try:
        return pyarrow.Table.from_pylist([row for _, row in batch], schema)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
        pass
    for place, row in batch:
        for field in schema:
            try:
                pyarrow.array([row.get(field.name)], field.type)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
                raise RowError(
                    f"has nested values in column {field.name!r} of {place} that do not fit those of other rows, of type "
                    f"{field.type} ({first_line(error)}). Give each nested field one type"
                ) from None
    raise AssertionError("each row fits, and all together do not")


def _json_rows(path: str, *, is_list: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the place, such as "line 3", and the row of each object. A .json file may have one object per line, too."""
    with open(path, "rb") as stream:
        if is_list:
            start = stream.read(BLOCK_BYTES).removeprefix(BOM).lstrip()
            stream.seek(0)
            if start.startswith(b"["):
                for number, row in json_list(stream.read()):
                    yield f"item {number}", row
                return
        for line, row in json_lines(lines_of(_blocks(stream))):
            yield f"line {line}", row


def _with_columns_of(
    schema: pyarrow.Schema, batch: list[tuple[str, dict[str, object]]], first_places: dict[str, str]
) -> pyarrow.Schema:
    """Return ``schema`` with the columns and nested fields of more rows. Raises RowError, naming the first place.

    ``first_places``: where each column had its first value; it is extended.
    """
    try:
        return _unified(schema, [row for _, row in batch])
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
        pass
    # Some row of the batch does not fit: find it.
    for place, row in batch:
        for name, value in row.items():
            try:
                schema = _unified(schema, [{name: value}])
            except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
                before = schema.field(name).type if name in schema.names else "none"
                raise RowError(
                    f"has a {json_type(value)} in column {name!r} of {place} that does not fit the values before it, "
                    f"of type {before} ({first_line(error)}). Give the column one type"
                ) from None
    return schema


def _unified(schema: pyarrow.Schema, rows: list[dict[str, object]]) -> pyarrow.Schema:
    """Return ``schema`` with the columns of ``rows``. Raises pyarrow's errors for values of several types."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    types = [(name, pyarrow.infer_type(values)) for name, values in columns.items()]
    return pyarrow.unify_schemas([schema, pyarrow.schema(types)], promote_options="permissive")


def _without_nulls(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type of a column, with text in place of a type that no value told."""
    return pyarrow.string() if pyarrow.types.is_null(kind) else kind


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks of about :data:`BLOCK_BYTES`; each except the last ends with a line."""
    rest = b""
    while data := stream.read(BLOCK_BYTES):
        data = rest + data
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if end:
            yield data[:end]
    if rest:
        yield rest


def _batched(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield lists of up to :data:`ROWS_AT_A_TIME` values."""
    iterator = iter(values)
    while batch := list(itertools.islice(iterator, ROWS_AT_A_TIME)):
        yield batch
