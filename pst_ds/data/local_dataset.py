"""Turn a local file into Arrow tables with the values as written, cached on disk by ``datasets`` and mapped to memory.

The builders of ``datasets`` infer types: "007" becomes 7.0, "2020-01-01" a time, and a column of numbers that ends in a
word cannot be read. Here all columns are strings, see :mod:`pst_ds.data.file_rows`. A column of a JSON file with lists
or objects has the feature ``Json``: its values are kept as JSON texts, which :func:`values_of_column` parses. Parquet
files keep their types.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import pyarrow
import pyarrow.parquet

from pst_ds.config.settings import ConfigError
from pst_ds.data.file_rows import (
    READING_VERSION,
    JsonRow,
    byte_blocks,
    json_file,
    json_lines,
    plain_documents,
    table_rows,
)
from pst_ds.errors import first_line

if TYPE_CHECKING:
    from pyarrow import DataType


# Maximum rows and characters of a table, before the row that reaches them.
_ROWS = 20_000
_CHARACTERS = 1 << 24
_STRING = pyarrow.string()
_JSON = pyarrow.json_()
Types: TypeAlias = dict[str, "DataType"]


@dataclass
class LocalFileConfig(datasets.BuilderConfig):
    """A file, and what tells its versions apart."""

    path: str = ""
    kind: str = ""
    """The suffix of the file, in lower case."""
    sample_by: str = ""
    size: int = 0
    modified_ns: int = 0
    changed_ns: int = 0


class _OtherTypes(Exception):
    """A row of a JSON file has other columns or types than the rows before it."""


class LocalFile(datasets.ArrowBasedBuilder):
    """Builder of the split "train" of a file."""

    BUILDER_CONFIG_CLASS = LocalFileConfig
    label = ""
    """Start of messages."""
    types: Types | None = None
    """Types of the columns of a JSON file; None until the first rows have been read."""

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        if self.config.kind == ".parquet":
            schema = pyarrow.parquet.read_schema(self.config.path)
            names: set[str] = set()
            for name in schema.names:
                # a table of datasets would have the last of them
                if name in names:
                    raise ConfigError(f"{self.label} has several columns {name!r}. Give each another name")
                names.add(name)
            self.info.features = datasets.Features.from_arrow_schema(schema)
        return [datasets.SplitGenerator(name="train")]

    def _generate_shards(self) -> Iterator[str]:
        yield self.config.path

    def _generate_tables(self) -> Iterator[tuple[datasets.builder.Key, pyarrow.Table]]:
        count = 0
        for number, table in enumerate(self._tables()):
            count += len(table)
            yield datasets.builder.Key(0, number), table
        # datasets itself would write a cache without columns
        if not count:
            is_blank = not Path(self.config.path).read_bytes().strip(b"\xef\xbb\xbf \t\r\n")
            problem = "has no examples"
            if is_blank:
                problem = "is empty"
            raise ConfigError(f"{self.label} {problem}. Add a row for each example")

    def _tables(self) -> Iterator[pyarrow.Table]:
        path = Path(self.config.path)
        kind = self.config.kind
        if kind in (".csv", ".tsv"):
            yield from _tables_of_fields(table_rows(self.label, lambda: path.open("rb"), is_tsv=kind == ".tsv"))
        elif kind in (".jsonl", ".json"):
            yield from self._tables_of_objects(path)
        elif kind == ".parquet":
            schema = self.info.features.arrow_schema
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_ROWS):
                yield datasets.table.table_cast(pyarrow.Table.from_batches([batch]), schema)
        else:
            with path.open("rb") as file:
                documents = plain_documents(self.label, byte_blocks(file), self.config.sample_by)
                rows = ((document,) for document in documents)
                for batch in _batches(rows):
                    texts = [document for (document,) in batch]
                    yield pyarrow.table({"text": pyarrow.array(texts, _STRING)})

    def _tables_of_objects(self, path: Path) -> Iterator[pyarrow.Table]:
        for batch in _batches_of_objects(self.label, path):
            types = _types_of(batch)
            if self.types is None:
                self.types = types
            elif _merged(self.types, types) != self.types:
                # all tables of a file need one schema: the file is read again with the types of all
                raise _OtherTypes
            columns: dict[str, pyarrow.Array] = {}
            for name, kind in self.types.items():
                # a row may lack a column, which is null then
                columns[name] = _array([row.get(name) for row in batch], kind)
            if not columns:
                raise ConfigError(f"{self.label} has rows without columns. Write an object with a text for each row")
            yield pyarrow.table(columns)


def _batches(rows: Iterable[Sequence[str]]) -> Iterator[list[Sequence[str]]]:
    """Yield rows of texts in lists that end at _ROWS rows, or with the row that reaches _CHARACTERS."""
    batch: list[Sequence[str]] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(map(len, row))
        if len(batch) >= _ROWS or characters >= _CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _tables_of_fields(rows: Iterator[tuple[int, list[str]]]) -> Iterator[pyarrow.Table]:
    """Yield tables of the rows of :func:`table_rows`, which are numbered and start with the names of the columns."""
    _, names = next(rows, (0, []))
    for batch in _batches(fields for _, fields in rows):
        columns = [pyarrow.array(values, _STRING) for values in zip(*batch, strict=True)]
        yield pyarrow.table(columns, names=names)


def _rows_of_objects(label: str, path: Path) -> Iterator[JsonRow]:
    """Yield the objects of a .jsonl or .json file. Raises ConfigError."""
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            for _, row in json_lines(label, byte_blocks(file)):
                yield row
    else:
        _, rows = json_file(label, lambda: path.open("rb"))
        for _, row in rows:
            yield row


def _batches_of_objects(label: str, path: Path) -> Iterator[list[JsonRow]]:
    """Yield the objects of a .jsonl or .json file in lists, as :func:`_batches`. Raises ConfigError."""
    batch: list[JsonRow] = []
    characters = 0
    for row in _rows_of_objects(label, path):
        batch.append(row)
        for value in row.values():
            if isinstance(value, str):
                characters += len(value)
        if len(batch) >= _ROWS or characters >= _CHARACTERS:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _types_of(rows: Sequence[JsonRow]) -> Types:
    """Return the type of each column in the order of first appearance; rows may lack columns."""
    types: Types = {}
    for row in rows:
        for name, value in row.items():
            # texts, unless a row has a list or an object
            if isinstance(value, dict | list):
                types[name] = _JSON
            else:
                types.setdefault(name, _STRING)
    return types


def _merged(first: Types, second: Types) -> Types:
    """Return the types of columns of which some rows have ``first`` and others ``second``."""
    merged: Types = {}
    for name in [*first, *second]:
        merged[name] = _STRING
        if _JSON in (first.get(name), second.get(name)):
            merged[name] = _JSON
    return merged


def _array(values: Sequence[Any], kind: DataType) -> pyarrow.Array:
    """Return the values of a column as texts, or as JSON texts; None is null in both."""
    if kind != _JSON:
        return pyarrow.array(values, kind)
    texts: list[str | None] = []
    for value in values:
        if value is None:
            texts.append(None)
        else:
            texts.append(json.dumps(value, ensure_ascii=False))
    return pyarrow.ExtensionArray.from_storage(_JSON, pyarrow.array(texts, _STRING))


def read_local_file(path: Path, label: str, piece: str, sample_by: str) -> datasets.Dataset:
    """Return the rows of a file, or those of the slice ``piece``. A file is converted once, into the datasets cache.

    Raises ConfigError, which starts with ``label``, for what cannot be read.
    """
    about = path.stat()
    kind = path.suffix.lower()
    sample_by_of_cache = ""
    if kind == ".txt":
        # only text files are read in several ways
        sample_by_of_cache = sample_by

    def rows(types: Types | None) -> datasets.Dataset:
        # name, settings and version identify the cached tables, so that a changed file is read anew
        builder = LocalFile(
            dataset_name="local_file",
            hash=READING_VERSION,
            path=str(path.absolute()),
            kind=kind,
            sample_by=sample_by_of_cache,
            size=about.st_size,
            modified_ns=about.st_mtime_ns,
            changed_ns=about.st_ctime_ns,
        )
        builder.label = label
        builder.types = types
        builder.download_and_prepare()
        return builder.as_dataset(split=f"train{piece}")

    try:
        try:
            return rows(None)
        except datasets.exceptions.DatasetGenerationError as error:
            if not isinstance(error.__cause__, _OtherTypes):
                raise
            types: Types = {}
            for batch in _batches_of_objects(label, path):
                types = _merged(types, _types_of(batch))
            return rows(types)
    except Exception as error:  # datasets wraps what its builder raises, and Arrow has errors of many types
        cause = error.__cause__ or error
        if isinstance(cause, ConfigError):
            raise ConfigError(*cause.args) from None
        if "corresponds to no data" in str(cause):
            raise ConfigError(f"{label} has no examples: the slice is empty. Name another") from None
        raise ConfigError(
            f"{label} cannot be read as {kind[1:]}: {first_line(cause)}. Repair it, or name another file"
        ) from error


def is_json(feature: object) -> bool:
    """Return whether the values of a column are JSON texts."""
    return isinstance(feature, datasets.Json)


def values_of_column(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """Yield the values of a column exactly; ``datasets`` itself rounds the numbers of ``Json`` values."""
    if not is_json(rows.features[column]):
        yield from rows[column]
        return
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        for text in table[column].to_pylist():
            if isinstance(text, str):
                yield json.loads(text)
            else:
                yield text
