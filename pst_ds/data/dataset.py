"""Read rows of a local file, a saved dataset or a dataset on the hub, and check the columns that a task needs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.config.data import PARQUET_BRANCH
from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.file_rows import (
    QUOTED_VALUE,
    VALUE_QUOTED_INSIDE,
    QuoteCounts,
    has_quoted_names,
    place_of_row,
    quoted_tsv,
)
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
    settings: dict[str, str] = {}
    for column, setting in columns.items():
        settings[column] = f"data.{setting}"
    require_columns(rows, settings, where, nested=nested, is_local=not data.dataset)
    if not len(rows):
        raise ConfigError(f"data.{split} = {where!r} has no examples. Add a row for each")
    # rows in memory have been selected before
    if split == "test" and data.test_rows and not isinstance(data, DataInMemory):
        column, wanted = data.test_rows
        return _rows_with_value(rows, column, wanted, where)
    return rows


def _rows_with_value(rows: Dataset, column: str, wanted: str, where: str) -> Dataset:
    """Return the rows whose value in ``column`` is written ``wanted``. Raises ConfigError if there are none."""
    _require_column(rows, column, "data.test_rows", where)
    selected: list[int] = []
    values: set[str] = set()
    for row, value in enumerate(values_of(rows, column)):
        # the run file has a text, the column perhaps numbers
        text = str(value)
        values.add(text)
        if text == wanted:
            selected.append(row)
    if not selected:
        raise ConfigError(
            f"{where}: no row has {wanted!r} in column {column!r}, as data.test_rows asks. Name one of "
            f"{', '.join(sorted(values)[:6])}"
        )
    return rows.select(selected)


def require_columns(
    rows: Dataset, columns: Mapping[str, str], where: str, *, nested: bool = False, is_local: bool = True
) -> None:
    """Raise ConfigError unless ``rows`` of ``where`` have ``columns`` of UTF-8 text or plain values.

    ``columns``: each with the setting that names it. ``nested``: as in :func:`read_rows`. ``is_local``: for a file.
    """
    import datasets

    if is_local and _suffix(where) == _TSV:
        _require_unquoted(rows, [column for column in columns if column in rows.column_names], where)
    for column, setting in columns.items():
        # the column, and the parts of its values
        top, *path = [column]
        if nested:
            top, *path = _path_of(column, rows)
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


def _suffix(where: str) -> str:
    """Return the suffix of the file that ``where`` names, with or without a slice, in lower case."""
    file, _ = file_and_slice(where)
    return Path(file).suffix.lower()


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
    if _suffix(where) in (".csv", _TSV, ".jsonl", ".json"):
        for name, arrow_type in list(types.items()):
            if arrow_type == "string":
                types[name] = _possible_type(rows, name)
    return types


def _possible_type(rows: Dataset, column: str) -> str:
    """Return the type that all texts of a column could have: "null", "int64", "float64", "bool" or "string"."""
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
    # Arrow's own cast to booleans also takes 0 and 1
    is_boolean = arrow.all(arrow.match_substring_regex(values, "^(?i:true|false)$")).as_py()
    if is_boolean:
        return "bool"
    return "string"


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
    # the split's size is that of the whole file; a slice may start at a percentage or from the end
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
    """Return the name of a column, followed by the parts of its values that a path such as "lex.text" names."""
    # a name may have dots, as columns of flattened tables do
    if column in rows.column_names:
        return [column]
    return column.split(".")


def _value_at(value: object, path: list[str]) -> object:
    """Return the part of a value at ``path``, or a list of the parts of its items."""
    if not path:
        return value
    if isinstance(value, list):
        return [_value_at(item, path) for item in value]
    if isinstance(value, dict):
        # A JSON object may lack a field; Arrow stores None for it.
        return _value_at(value.get(path[0]), path[1:])
    return value


def _require_column(rows: Dataset, column: str, setting: str, where: str) -> None:
    """Raise ConfigError, which names ``setting``, unless ``rows`` have a column."""
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
        # the sum of no values is None
        return arrow.sum(arrow.match_substring_regex(values, pattern)).as_py() or 0

    if has_quoted_names(rows.column_names):
        raise quoted_tsv(where, "names of columns")
    for column in columns:
        if "string" not in rows.features[column].dtype:
            continue
        values = rows.data.column(column)
        counts = QuoteCounts(
            values=len(values),
            with_quotes=count(values, '"'),
            quoted=count(values, f"^{QUOTED_VALUE}$"),
            quoted_inside=count(values, f"^{VALUE_QUOTED_INSIDE}$"),
        )
        if counts.is_quoted_as_csv:
            raise quoted_tsv(where, f"values in column {column!r}")


def _require_path(rows: Dataset, top: str, path: list[str], column: str, setting: str, where: str) -> None:
    """Raise ConfigError unless the values of column ``top`` have the part at ``path``.

    ``column``: both as ``setting`` writes them, such as "lex.text".
    """
    from pst_ds.data.local_dataset import is_json, values_of_column

    lead = f"{where}: {setting} = {column!r}"
    feature = rows.features[top]
    if is_json(feature):
        first_values = list(islice(values_of_column(rows, top), _ROWS_WITH_PATH))
        _require_path_in_values(first_values, path, lead)
    else:
        _require_path_in_feature(feature, path, lead)


def _without_part(lead: str, part: str, present: str) -> ConfigError:
    return ConfigError(f"{lead} has no part {part!r} in the data, which has {present}. Name a part")


def _require_path_in_values(values: list[object], path: Sequence[str], lead: str) -> None:
    """Raise ConfigError, starting with ``lead``, unless one value at least has the part at ``path``.

    JSON objects have no schema: rows may lack a part.
    """
    for part in path:
        objects: list[dict[object, object]] = []
        for value in _items_of(values):
            if isinstance(value, dict):
                objects.append(value)
        if not any(part in fields_of_object for fields_of_object in objects):
            # each name once, in the order of the file
            names: dict[object, None] = {}
            for fields_of_object in objects:
                names |= dict.fromkeys(fields_of_object)
            raise _without_part(lead, part, ", ".join(map(str, names)) or "no objects")
        values = [fields_of_object.get(part) for fields_of_object in objects]


def _require_path_in_feature(feature: Any, path: Sequence[str], lead: str) -> None:
    """Raise ConfigError, starting with ``lead``, unless values of a feature have the part at ``path``."""
    for part in path:
        feature = _feature_of_items(feature)
        if not isinstance(feature, dict):
            raise _without_part(lead, part, type(feature).__name__)
        if part not in feature:
            raise _without_part(lead, part, ", ".join(feature))
        feature = feature[part]


def _feature_of_items(feature: Any) -> Any:
    """Return the feature of the innermost items of a list, or the feature itself for another."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature


def _items_of(values: Iterable[object]) -> list[object]:
    """Return ``values`` with the items of lists, and of lists in them, in place of the lists."""
    items: list[object] = []
    for value in values:
        if isinstance(value, list):
            items += _items_of(value)
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
    if not is_cut_document:
        return read_local_file(path, named, piece, sample_by)
    # a slice of the only row would be all or nothing: the slice is of lines, which are one document again
    lines = read_local_file(path, named, piece, "line")
    if not len(lines):
        return lines
    document = "\n".join(lines[:]["text"]) + "\n"
    return datasets.Dataset.from_dict({"text": [document]})


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
    except Exception as error:  # damaged files raise errors of Arrow, JSON and datasets
        raise ConfigError(f"{named} cannot be read as a saved dataset: {first_line(error)}. Save it again") from error
    if not piece:
        return rows
    (part,) = datasets.ReadInstruction.from_spec(f"train{piece}").to_absolute({"train": len(rows)})
    return rows.select(range(part.from_, part.to))


def _read_from_hub(data: DataConfig, split: str) -> Dataset:
    """Return the rows of a split of ``data.dataset``, on the hub or in a folder of its layout. Raises ConfigError."""
    import datasets

    options: dict[str, str | None] = {"name": data.subset or None}
    if data.revision == PARQUET_BRANCH:
        # the branch of converted files has a folder per subset, and no configurations
        options = {"data_dir": data.subset or None}
    # a folder has no revisions
    if not Path(data.dataset).is_dir():
        options["revision"] = data.revision or None
    try:
        rows = datasets.load_dataset(data.dataset, split=split, **options)
    except Exception as error:  # the builder of the dataset, or the connection, may raise anything
        reason = first_line(error)
        fix = "Name a dataset that can be reached or is cached, a folder, or local files without data.dataset"
        if "scripts are no longer supported" in reason:
            fix = f'Try data.revision = "{PARQUET_BRANCH}", where the hub may have converted it'
        raise ConfigError(
            f"data.dataset = {data.dataset!r}, split {split!r}, cannot be loaded: {reason}. {fix}"
        ) from error
    # pandas turns surplus fields into an index, and shifts the columns
    if "__index_level_0__" in rows.column_names:
        raise ConfigError(
            f"data.dataset = {data.dataset!r}, split {split!r}, has CSV rows with more fields than columns. Put quotes "
            "around fields that contain a comma, or name the local file without data.dataset, which names the line"
        )
    return rows


def appearance(text: str) -> str:
    """Return what a reader sees of a short text: composed accents, single spaces, nothing without width.

    Two classes, or users, with the same appearance were meant to be one.
    """
    composed = unicodedata.normalize("NFC", text)
    # byte order marks, zero-width spaces and joiners, from web pages and spreadsheets
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


def text_column(
    values: Iterable[object], column: str, where: str, place: Callable[[int], str] = "row {}".format
) -> list[str]:
    """Return the texts of rows. Raises ConfigError for a row without text, which ``place`` names by its index."""
    texts: list[str] = []
    for row, value in enumerate(values):
        if value is None:
            raise ConfigError(
                f"{where}: column {column!r} has no text in {place(row)}. Add one (an empty one is written "
                '"") or remove the row'
            )
        # their str() would be the text "b'...'"
        if isinstance(value, bytes):
            raise ConfigError(f"{where}: column {column!r} has bytes in {place(row)}, not a text. Store it as a string")
        texts.append(str(value))
    return texts
