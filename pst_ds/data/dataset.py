"""Read rows of a local file, a saved dataset or a dataset on the hub, and check the columns that a task needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.config.data import PARQUET_BRANCH
from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.file_rows import place_of_row
from pst_ds.errors import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import ChunkedArray

_TSV = ".tsv"
_FORMATS = (".jsonl", ".json", ".csv", _TSV, ".parquet", ".txt")
_SAVED = "state.json"
"""File in the folder of a dataset that ``Dataset.save_to_disk`` wrote."""
_SAVED_SPLITS = "dataset_dict.json"
"""File in the folder of several splits that ``DatasetDict.save_to_disk`` wrote."""
_ROWS_WITH_PATH = 1000
"""Rows in which a path into JSON values must occur."""
_SLICED = re.compile(r"(?P<file>.+)(?P<slice>\[(-?\d+%?)?:(-?\d+%?)?\])")
_QUOTED = r'^"([^"]|"")*"$'
"""A value with quotes around it, and doubled ones inside, if any."""
_QUOTED_INSIDE = r'^"([^"]|"")*""([^"]|"")*"$'
"""The same with doubled quotes inside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInMemory(DataConfig):
    """Data settings with ``rows`` in memory, a selection of what :func:`read_rows` returned."""

    rows: Dataset
    numbers: Sequence[int]
    """Indices of the rows in the split, for messages."""

    @classmethod
    def of(cls, data: DataConfig, rows: Dataset, numbers: Sequence[int]) -> DataInMemory:
        """Return ``data`` with ``rows``, which are the rows ``numbers`` of the split."""
        settings = {field.name: getattr(data, field.name) for field in fields(data)}
        return cls(**settings, rows=rows, numbers=numbers)

    def __post_init__(self) -> None:
        """Skip the checks, which were done when the settings were read."""


def read_rows(data: DataConfig, split: str, columns: Mapping[str, str], *, nested: bool = False) -> Dataset:
    """Read one split.

    A local file may be followed by a slice of its rows, such as "[:80%]". A .txt file has one column, "text", with rows
    by ``data.sample_by``; slices of whole documents count lines. Quotes have no meaning in .tsv files, as in GLUE.
    Values have the types of :func:`read_local`.

    Args:
        columns: required columns, each with the setting of ``data`` that names it.
        nested: allow columns with nested values, and paths into them such as "lex.text", for :func:`values_of`.

    Raises ConfigError for a missing file or column, and for a column with nested values unless ``nested``.
    """
    import datasets

    datasets.disable_progress_bars()
    where = getattr(data, split)
    if not where:
        raise ConfigError(f"data.{split} is not set. Name a file, or a split of data.dataset")
    if isinstance(data, DataInMemory):
        rows = data.rows
    elif data.dataset:
        rows = _read_from_hub(data, where)
    else:
        rows = read_local(where, f"data.{split}", data.sample_by)
    settings = {column: f"data.{setting}" for column, setting in columns.items()}
    require_columns(rows, settings, where, nested=nested, is_local=not data.dataset)
    if not len(rows):
        raise ConfigError(f"data.{split} = {where!r} has no examples. Add a row for each")
    if split == "test" and data.test_rows and not isinstance(data, DataInMemory):
        column, wanted = data.test_rows
        _require_column(rows, column, "data.test_rows", where)
        values = [str(value) for value in values_of(rows, column)]
        if wanted not in values:
            raise ConfigError(
                f"{where}: no row has {wanted!r} in column {column!r}, as data.test_rows asks. Name one of "
                f"{', '.join(sorted(set(values))[:6])}"
            )
        rows = rows.select([row for row, value in enumerate(values) if value == wanted])
    return rows


def require_columns(
    rows: Dataset, columns: Mapping[str, str], where: str, *, nested: bool = False, is_local: bool = True
) -> None:
    """Raise ConfigError unless ``rows`` of ``where`` have ``columns`` of UTF-8 text or plain values.

    ``columns``: each with the setting that names it. ``nested``: as in :func:`read_rows`. ``is_local``: for a file.
    """
    import datasets

    if is_local and Path(file_and_slice(where)[0]).suffix.lower() == _TSV:
        _require_unquoted(rows, [column for column in columns if column in rows.column_names], where)
    for column, setting in columns.items():
        top, *path = _path_of(column, rows) if nested else [column]
        _require_column(rows, top, setting, where)
        _require_utf8(rows, top, where)
        if nested:
            _require_path(rows, top, path, column, setting, where)
        elif not isinstance(rows.features[column], datasets.Value | datasets.ClassLabel):
            nested_values = _nested_values(rows, column, where)
            raise ConfigError(
                f"{where}: column {column!r}, which {setting} names, holds {nested_values}, not a "
                "plain text, number or label in each row. Name another column"
            )


def file_and_slice(where: str) -> tuple[str, str]:
    """Split "a.csv[:80%]" into the file "a.csv" and the slice "[:80%]", or "" without a slice."""
    if Path(where).exists():  # brackets may be part of a file's name
        return where, ""
    sliced = _SLICED.fullmatch(where)
    if sliced is None:
        return where, ""
    return sliced["file"], sliced["slice"]


def values_of(rows: Dataset, column: str) -> Iterable[object]:
    """Yield the values of ``column``, a name or a path, which follows every item of a list."""
    from pst_ds.data.local_dataset import values_of_column

    top, *path = _path_of(column, rows)
    for value in values_of_column(rows, top):
        yield _value_at(value, path)


def _nested_values(rows: Dataset, column: str, where: str) -> str:
    """Return what a column holds, for a message: "a list in line 3"."""
    for row, value in enumerate(values_of(rows, column)):
        if isinstance(value, list):
            return f"a list in {row_place(rows, where, row)}"
        if isinstance(value, dict):
            return f"an object in {row_place(rows, where, row)}"
    return f"{type(rows.features[column]).__name__} values"


def column_types(rows: Dataset, where: str) -> dict[str, str]:
    """Return the Arrow type of each column, "" for nested values. For a column of texts in a file that does not tell
    numbers from texts (all but Parquet), this is the type that all its values could have: "int64", "float64" or "bool".
    """
    types = {name: str(getattr(feature, "dtype", "")) for name, feature in rows.features.items()}
    if Path(file_and_slice(where)[0]).suffix.lower() in (".csv", _TSV, ".jsonl", ".json"):
        for name, arrow_type in list(types.items()):
            if arrow_type == "string":
                types[name] = _possible_type(rows, name)
    return types


def _possible_type(rows: Dataset, column: str) -> str:
    import pyarrow
    import pyarrow.compute as arrow

    values = rows.data.column(column)
    if values.null_count == len(values):
        return "null"
    for kind in ("int64", "float64"):
        try:
            arrow.cast(values, kind)
        except pyarrow.ArrowInvalid:
            continue
        return kind
    is_boolean = arrow.all(arrow.match_substring_regex(values, "^(?i:true|false)$")).as_py()
    return "bool" if is_boolean else "string"


def row_place(rows: Dataset, where: str, row: int) -> str:
    """Return the place of a row of ``where`` in messages: "line 7" of a CSV, TSV or JSON file, or else "row 5".

    ``rows``: all rows of ``where``, a file, a slice of one, or a split. ``row``: an index in them.
    """
    return place_of_row(Path(file_and_slice(where)[0]), first_row(rows, where) + row)


def first_row(rows: Dataset, where: str) -> int:
    """Return the index of the first of ``rows`` in the file that ``where`` names, with or without a slice."""
    import datasets

    _, piece = file_and_slice(where)
    if not piece or rows.info.splits is None:
        return 0
    total = rows.info.splits["train"].num_examples
    (part,) = datasets.ReadInstruction.from_spec(f"train{piece}").to_absolute({"train": total})
    return int(part.from_ or 0)


def place_in_split(data: DataConfig, split: str, rows: Dataset, row: int) -> str:
    """Return the place, as :func:`row_place`, of a row of ``rows``, which :func:`read_rows` returned."""
    if isinstance(data, DataInMemory):
        return f"row {data.numbers[row]}"
    if data.dataset:
        return f"row {row}"
    if split == "test" and data.test_rows:
        return f"row {row} of those that data.test_rows selects"
    return row_place(rows, getattr(data, split), row)


def _path_of(column: str, rows: Dataset) -> list[str]:
    if column in rows.column_names:  # a name may have dots, as columns of flattened tables do
        return [column]
    return column.split(".")


def _value_at(value: object, path: list[str]) -> object:
    if not path:
        return value
    if isinstance(value, list):
        return [_value_at(item, path) for item in value]
    if isinstance(value, dict):
        # A JSON object may lack a field; Arrow stores None for it.
        return _value_at(value.get(path[0]), path[1:])
    return value


def _require_column(rows: Dataset, column: str, setting: str, where: str) -> None:
    if column not in rows.column_names:
        raise ConfigError(
            f"{where} has no column {column!r}, which {setting} names. Columns: {', '.join(rows.column_names)}"
        )


def _require_utf8(rows: Dataset, column: str, where: str) -> None:
    """Check that texts are UTF-8; the reader of Parquet does not."""
    import pyarrow

    first = 0
    for chunk in rows.data.column(column).chunks:
        try:
            chunk.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(
                f"{where}: column {column!r} is not UTF-8 text in the rows from {first} on ({error}). Save the file "
                "in UTF-8"
            ) from None
        first += len(chunk)


def _require_unquoted(rows: Dataset, columns: Iterable[str], where: str) -> None:
    """Reject a .tsv file with CSV quoting: quotes around column names, around all values of a column, or around all
    values that contain quotes."""
    import pyarrow.compute as arrow

    def count(values: ChunkedArray, pattern: str) -> int:
        return arrow.sum(arrow.match_substring_regex(values, pattern)).as_py() or 0  # None for no values

    quoted = ""
    if any(name[:1] == name[-1:] == '"' for name in rows.column_names):
        quoted = "names of columns"
    for column in columns:
        if "string" not in rows.features[column].dtype:
            continue
        values = rows.data.column(column)
        num_quoted = count(values, _QUOTED)
        if not num_quoted:
            continue
        # CSV quotes some values only if they contain quotes, which it doubles; a text may have quotes around it as well
        quotes_as_csv = num_quoted == count(values, '"') and count(values, _QUOTED_INSIDE)
        if num_quoted == len(values) or quotes_as_csv:
            quoted = f"values in column {column!r}"
    if quoted:
        raise ConfigError(
            f"{where} was written with quotes around its {quoted}, but quotes have no meaning in a .tsv file. "
            "Save it without them, or as .csv or .jsonl"
        )


def _require_path(rows: Dataset, top: str, path: list[str], column: str, setting: str, where: str) -> None:
    from pst_ds.data.local_dataset import is_json, values_of_column

    feature = rows.features[top]
    if is_json(feature):
        values: list[object] = list(islice(values_of_column(rows, top), _ROWS_WITH_PATH))
        for part in path:
            values = _objects_in(values)
            if not any(isinstance(value, dict) and part in value for value in values):
                parts: dict[object, None] = {}  # each once, in the order of the file
                for value in values:
                    if isinstance(value, dict):
                        parts |= dict.fromkeys(value)
                there = ", ".join(map(str, parts)) or "no objects"
                raise ConfigError(
                    f"{where}: {setting} = {column!r} has no part {part!r} in the data, which has {there}. Name a part"
                )
            values = [value.get(part) for value in values if isinstance(value, dict)]
        return
    steps: tuple[str | None, ...] = (None, *path)
    for step in steps:
        if step is not None and not (isinstance(feature, dict) and step in feature):
            there = ", ".join(feature) if isinstance(feature, dict) else type(feature).__name__
            raise ConfigError(
                f"{where}: {setting} = {column!r} has no part {step!r} in the data, which has {there}. Name a part"
            )
        if isinstance(feature, dict) and step is not None:
            feature = feature[step]
        while hasattr(feature, "feature"):  # a list of
            feature = feature.feature


def _objects_in(values: Iterable[object]) -> list[object]:
    """Return ``values`` with the items of lists, and of lists in them, in place of the lists."""
    items: list[object] = []
    for value in values:
        if isinstance(value, list):
            items += _objects_in(value)
        else:
            items.append(value)
    return items


def read_local(where: str, setting: str, sample_by: str) -> Dataset:
    """Return the rows of a local file or of a folder of ``save_to_disk``, which ``setting`` names.

    Values of CSV, TSV and text files, and plain values of JSON, are strings as written; None represents null. Parquet
    files and saved datasets keep their types. Raises ConfigError.
    """
    import datasets

    from pst_ds.data.local_dataset import read_local_file

    datasets.disable_progress_bars()
    named = f"{setting} = {where!r}"
    file, piece = file_and_slice(where)
    path = Path(file)
    if path.is_dir():
        return _read_saved(path, named, piece)
    if not path.is_file():
        raise ConfigError(
            f"{named} does not exist (looked in {path.absolute()}). Name a local file, or a split of data.dataset"
        )
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"{named} ends in {path.suffix!r}. Use one of {', '.join(_FORMATS)}")
    is_cut_document = bool(piece) and path.suffix.lower() == ".txt" and sample_by == "document"
    rows = read_local_file(path, named, piece, "line" if is_cut_document else sample_by)
    if is_cut_document and len(rows):  # the lines are one document again
        rows = datasets.Dataset.from_dict({"text": ["\n".join(rows[:]["text"]) + "\n"]})
    return rows


def _read_saved(path: Path, named: str, piece: str) -> Dataset:
    """Return the rows, or a slice of them, of a folder that ``Dataset.save_to_disk`` wrote."""
    import datasets

    if (path / _SAVED_SPLITS).is_file():
        splits = sorted(str(folder) for folder in path.iterdir() if (folder / _SAVED).is_file())
        raise ConfigError(f"{named} is a folder with several splits. Name one: {', '.join(splits)}")
    if not (path / _SAVED).is_file():
        raise ConfigError(
            f"{named} is a folder, but not one of Dataset.save_to_disk. Name a file ({', '.join(_FORMATS)}), or the "
            "folder in data.dataset and its split here"
        )
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ConfigError(f"{named} cannot be read as a saved dataset: {first_line(error)}. Save it again") from error
    if not piece:
        return rows
    (part,) = datasets.ReadInstruction.from_spec(f"train{piece}").to_absolute({"train": len(rows)})
    return rows.select(range(part.from_, part.to))


def _read_from_hub(data: DataConfig, split: str) -> Dataset:
    import datasets

    # the branch of converted files has a folder per subset, and no configurations
    subset = {"data_dir" if data.revision == PARQUET_BRANCH else "name": data.subset or None}
    revision = {}
    if not Path(data.dataset).is_dir():  # a folder has no revisions
        revision = {"revision": data.revision or None}
    try:
        rows = datasets.load_dataset(data.dataset, split=split, **subset, **revision)
    except Exception as error:
        reason = first_line(error)
        fix = "Name a dataset that can be reached or is cached, a folder, or local files without data.dataset"
        if "scripts are no longer supported" in reason:
            fix = f'Try data.revision = "{PARQUET_BRANCH}", where the hub may have converted it'
        raise ConfigError(
            f"data.dataset = {data.dataset!r}, split {split!r}, cannot be loaded: {reason}. {fix}"
        ) from error
    if "__index_level_0__" in rows.column_names:  # pandas turns surplus fields into an index, and shifts the columns
        raise ConfigError(
            f"data.dataset = {data.dataset!r}, split {split!r}, has CSV rows with more fields than columns. Put quotes "
            "around fields that contain a comma, or name the local file without data.dataset, which names the line"
        )
    return rows


def text_column(
    values: Iterable[object], column: str, where: str, place: Callable[[int], str] = "row {}".format
) -> list[str]:
    """Return the texts of rows. Raises ConfigError for a row without text, which ``place`` names by its index."""
    texts = list(values)
    if None in texts:
        raise ConfigError(
            f"{where}: column {column!r} has no text in {place(texts.index(None))}. Add one (an empty one is written "
            '"") or remove the row'
        )
    binary = next((row for row, text in enumerate(texts) if isinstance(text, bytes)), None)
    if binary is not None:
        raise ConfigError(f"{where}: column {column!r} has bytes in {place(binary)}, not a text. Store it as a string")
    return [str(text) for text in texts]
