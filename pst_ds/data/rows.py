"""Read the rows of CSV, TSV, JSON and text files with every value as it is written.

Nothing guesses types: a field of a table is its text, so "007" keeps its zeros and "2020-01-01" is no timestamp. Scalars of
JSON become the text of the file, too; only nested values keep their types. ``pst-ds prepare`` and runs read files by
these functions, so both see the same documents.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

BOM = b"\xef\xbb\xbf"
"""Byte order mark that some programs write at the start of UTF-8 files."""
OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""What separates the columns of files that are named .csv and are not."""

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class RowError(ValueError):
    """A part of a file cannot be read. The message names the line and says what to do, but not the file."""


class _WrittenInt(int):
    """An integer that knows its text in the file."""

    text: str


class _WrittenFloat(float):
    """A number with a fraction or an exponent, or NaN, that knows its text in the file."""

    text: str


def open_table(stream: TextIO, *, is_tsv: bool) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the column names of a table, and an iterator of the line and the fields of each row.

    ``stream``: opened with ``newline=""``. Quotes follow the csv module in strict mode; in TSV files they are ordinary
    characters. Empty lines are skipped, except in a table of one column: there they are empty texts, unless they end the
    file. Raises RowError for repeated column names, a row with another number of fields, and malformed quotes.
    """
    csv.field_size_limit(sys.maxsize)
    if is_tsv:
        reader = csv.reader(stream, "excel-tab", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(stream, strict=True)
    names = next(_records(reader), (1, []))[1]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise RowError(f"has several columns {min(repeated)!r} in line 1. Rename all but one")
    return names, _rows_of_table(reader, names)


def _records(reader: csv._reader) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the fields of each record; an empty line has no fields."""
    while True:
        first_line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RowError(
                f"has malformed quotes in the row of line {first_line} ({error}). Write a quote inside a quoted field "
                "twice, and close every quoted field"
            ) from None
        yield first_line, fields


def _rows_of_table(reader: csv._reader, names: list[str]) -> Iterator[tuple[int, list[str]]]:
    empty_lines: list[int] = []
    for line, fields in _records(reader):
        if not fields:
            empty_lines.append(line)
            continue
        if len(names) == 1:
            # A line without characters is how a table of one column writes an empty text.
            for empty_line in empty_lines:
                yield empty_line, [""]
        empty_lines.clear()
        if len(fields) != len(names):
            raise RowError(_wrong_number_of_fields(line, fields, names))
        yield line, fields


def _wrong_number_of_fields(line: int, fields: list[str], names: list[str]) -> str:
    columns = "1 column" if len(names) == 1 else f"{len(names)} columns"
    problem = f"has {len(fields)} fields in the row of line {line}, but {columns}"
    separator = other_separator(names)
    if separator:
        return f"{problem}: it looks separated by {separator}. Save it with commas"
    if len(fields) > len(names):
        return f"{problem}. Put quotes around a field that contains a comma, and remove surplus separators"
    return f"{problem}. Add the missing fields"


def other_separator(names: Iterable[str]) -> str:
    """Return what seems to separate the columns of a table that was read with commas; "" if commas do."""
    names = list(names)
    if len(names) != 1:
        return ""
    return next((words for character, words in OTHER_SEPARATORS.items() if character in names[0]), "")


def json_row(text: bytes | str, place: str) -> dict[str, object]:
    """Return a JSON object whose scalars are the text in the file, and None for null.

    Nested lists and objects keep the types of JSON. ``place``: such as "line 3", for messages. Raises RowError.
    """
    row = parsed_json(text, place)
    if not isinstance(row, dict):
        raise RowError(f"is not a JSON object in {place} (it is a {json_type(row)}). Write one object per line")
    return as_written(row)


def as_written(row: dict[str, object]) -> dict[str, object]:
    """Return a row of :func:`parsed_json` with the text of the file in place of each scalar."""
    return {name: _written(value) for name, value in row.items()}


def _written(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, _WrittenInt | _WrittenFloat):
        return value.text
    return value


def json_type(value: object) -> str:
    """Return what JSON calls a value of :func:`parsed_json`."""
    if value is None:
        return "null"
    names = {bool: "boolean", str: "string", list: "list", dict: "object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "number")


def parsed_json(text: bytes | str, place: str) -> object:
    """Return a JSON value, whose numbers know their text. Raises RowError, naming ``place``."""
    try:
        content = text if isinstance(text, str) else text.decode()
        value = json.loads(content, parse_int=_int, parse_float=_float, parse_constant=_float)
        if _ESCAPED_SURROGATE.search(content):
            # Arrow stores UTF-8, which has no unpaired surrogates.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(f"has an unpaired surrogate in {place}, which is not a character. Remove it") from None
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 text in {place} ({error}). Save it in UTF-8") from None
    except RecursionError:
        raise RowError(f"has values nested too deeply in {place}. Flatten them") from None
    except ValueError as error:
        raise RowError(f"is not JSON in {place} ({error}). Repair it") from None
    return value


def _int(text: str) -> _WrittenInt | _WrittenFloat:
    # Python refuses integers of more than 4,300 digits; the text is what counts.
    if len(text) > 4000:
        return _float(text)
    number = _WrittenInt(text)
    number.text = text
    return number


def _float(text: str) -> _WrittenFloat:
    number = _WrittenFloat(text)
    number.text = text
    return number


def lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of blocks that end with a line, without line breaks (LF, CR LF, CR)."""
    for block in blocks:
        if b"\r" in block:
            yield from block.splitlines()
        else:
            yield from block.removesuffix(b"\n").split(b"\n")


def json_lines(lines: Iterable[bytes], first_line: int = 1) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the line and the row of each JSON object of a file with one per line. Empty lines are skipped.

    ``first_line``: number of the first of ``lines``. Raises RowError.
    """
    for line, text in enumerate(lines, first_line):
        content = text.removeprefix(BOM) if line == 1 else text
        if content.strip():
            yield line, json_row(content, f"line {line}")


def json_list(text: bytes) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the number, from 1, and the row of each object of a file with one list of objects. Raises RowError."""
    rows = parsed_json(text.removeprefix(BOM), "the file")
    if not isinstance(rows, list):
        raise RowError(f"is a JSON {json_type(rows)}. Write a list of objects, or one object per line")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RowError(f"is not a list of JSON objects: item {number} is a {json_type(row)}. Repair it")
        yield number, as_written(row)


def text_documents(blocks: Iterable[bytes], sample_by: str) -> Iterator[str]:
    """Yield the documents of a plain text file: lines, paragraphs between empty lines, or the whole file.

    All line breaks are equal (LF, CR LF, CR). Empty paragraphs are skipped, empty lines are documents. ``blocks``: the
    bytes of the file, each block ending with a line except the last. Raises UnicodeDecodeError.
    """
    rest = ""
    for number, block in enumerate(blocks):
        content = block.removeprefix(BOM) if number == 0 else block
        text = content.decode().replace("\r\n", "\n").replace("\r", "\n")
        if sample_by == "line":
            yield from text.removesuffix("\n").split("\n")
            continue
        rest += text
        if sample_by == "paragraph":
            *paragraphs, rest = rest.split("\n\n")
            yield from filter(None, paragraphs)
    if rest:
        yield rest
