"""Rows of a local file or of a dataset on the hub, with the columns that a task needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pst_ds.train.config import ConfigError, DataConfig

_FORMATS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip


def read_rows(data: DataConfig, split: str, columns: Mapping[str, str]) -> Any:
    """One split as a ``datasets.Dataset`` that has ``columns``: of each, the setting of ``data`` that names it.

    A .txt file has the one column "text", and ``data.sample_by`` says what a row of it is. Raises ConfigError for a
    file or column that is missing, and for a column that holds no plain values.
    """
    import datasets

    datasets.disable_progress_bars()
    where = getattr(data, split)
    if not where:
        raise ConfigError(f"data.{split} is not set; name a file, or a split of data.dataset")
    rows = _read_from_hub(data, where) if data.dataset else _read_local(where, split, data.sample_by)
    for column, setting in columns.items():
        if column not in rows.column_names:
            raise ConfigError(
                f"{where} has no column {column!r}, which data.{setting} names. Columns: {', '.join(rows.column_names)}"
            )
        if not isinstance(rows.features[column], datasets.Value | datasets.ClassLabel):
            raise ConfigError(
                f"{where}: column {column!r}, which data.{setting} names, holds {type(rows.features[column]).__name__} "
                "values; only a plain text, number or label in each row can be read"
            )
    if not len(rows):
        raise ConfigError(f"{where} has no examples")
    return rows


def _read_local(where: str, split: str, sample_by: str) -> Any:
    import datasets

    setting = f"data.{split}"
    path = Path(where)
    if not path.is_file():
        raise ConfigError(f"{setting} = {where!r} does not exist (looked in {path.absolute()})")
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{setting} = {where!r} ends in {path.suffix!r}; known are {', '.join(_FORMATS)}")
    options: dict[str, Any] = {}
    if kind == "csv":  # pandas takes words such as "NA", "null" or "None" for empty fields; here they are texts
        options = {"sep": "\t" if path.suffix.lower() == ".tsv" else ",", "keep_default_na": False}
    elif kind == "text":
        options = {"sample_by": sample_by}
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{setting} = {where!r} cannot be read as {kind}: {reason}") from error


def _read_from_hub(data: DataConfig, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(data.dataset, data.subset or None, split=split)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"data.dataset = {data.dataset!r}, split {split!r}, cannot be loaded: {reason}") from error


def texts_of(values: Iterable[Any], column: str, where: str, first_row: int = 0) -> list[str]:
    """The texts of consecutive rows of ``column``, counted from ``first_row``; ConfigError for a row without one."""
    texts = list(values)
    if None in texts:
        raise ConfigError(
            f"{where}: column {column!r} has no text in row {first_row + texts.index(None)}; give it one (an "
            'empty one is written "") or take the row out'
        )
    return [str(text) for text in texts]
