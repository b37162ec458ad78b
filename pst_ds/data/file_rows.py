"""Read the rows of CSV, TSV, JSON and text files with every value as written; refuse unreadable lines by number.

Nothing infers types. A field of a table is its text, so "007" keeps its zeros and "2020-01-01" is not a time. Plain
values of JSON are the text of the file too: 1.10 is "1.10", and true is "true". Lists and objects keep their types.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NoReturn, TypeAlias

from pst_ds.config.settings import ConfigError
from pst_ds.errors import first_line, shortened

OpenFile: TypeAlias = Callable[[], IO[bytes]]
"""Opens a file from its beginning. A file is opened again to find the line of an error."""
JsonRow: TypeAlias = dict[str, object]
LinesBefore: TypeAlias = Callable[[], int]
"""Counts the lines of a file before a piece of it: a function, because only messages need the number."""

READING_VERSION = "2"
"""Part of the names of caches of what was read; a change of what a file is read as needs another."""
MAX_DEPTH = 64
"""Maximum nesting of a JSON value. Python's parser and chat templates recurse."""
_MAX_DIGITS = 4000
"""Maximum digits of an integer; Python refuses longer ones, whose text is kept all the same."""
_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
QUOTED_VALUE = r'"([^"]|"")*"'
"""Pattern of a value with quotes around it, and doubled ones inside, if any."""
VALUE_QUOTED_INSIDE = r'"([^"]|"")*""([^"]|"")*"'
"""The same with doubled quotes inside."""
_QUOTED = re.compile(QUOTED_VALUE)
_QUOTED_INSIDE = re.compile(VALUE_QUOTED_INSIDE)
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def table_rows(name: str, open_file: OpenFile, *, is_tsv: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the fields of each row of a CSV or TSV file: first the names of the columns, then the values.

    Fields are strings, as Python's csv module reads them. A row may have several lines. If the file has one column,
    blank lines are rows with an empty field, except those that end the file; otherwise they are skipped. Columns
    without a name are called "Unnamed: 0" by their index, as in pandas.

    Raises ConfigError, which starts with ``name`` and the line, for a row with more or fewer fields than columns, for
    quotes that are not closed or inside a quoted field, and for bytes that are not UTF-8.
    """
    csv.field_size_limit(sys.maxsize)  # documents are longer than the default of 131,072 characters
    names: list[str] = []
    next_line = 1
    with open_file() as file:
        stream = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        tabs = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        # without "strict", a quote that is never closed makes one field of the rest of the file
        commas = csv.reader(stream, strict=True)
        rows = tabs if is_tsv else commas
        # kept until a row follows: those that end the file are not rows
        blank_lines: list[int] = []
        try:
            for fields in rows:
                line = next_line
                next_line = rows.line_num + 1
                if not fields:
                    blank_lines.append(line)
                    continue
                if not names:
                    names = _column_names(fields, name, line, is_tsv=is_tsv)
                    yield line, names
                    blank_lines.clear()
                    continue
                if blank_lines:
                    if len(names) == 1:
                        for blank in blank_lines:
                            yield blank, [""]
                    blank_lines.clear()
                if len(fields) != len(names):
                    _refuse_fields(fields, names, name, line, is_tsv=is_tsv)
                yield line, fields
        except csv.Error as error:
            raise ConfigError(
                f"{name}: line {next_line} cannot be read: its quotes are wrong, or are not closed ({error}). Double "
                'each quote inside a quoted field, as in "a ""b"" c", and close the field'
            ) from None
        except UnicodeDecodeError as error:
            _refuse_encoding(name, open_file, error)


def _column_names(fields: list[str], name: str, line: int, *, is_tsv: bool) -> list[str]:
    """Return the names of the columns. Raises ConfigError for equal names, and for another separator."""
    if len(fields) == 1:
        expected = "\t" if is_tsv else ","
        for separator, plural in _SEPARATORS.items():
            if separator != expected and separator in fields[0]:
                raise ConfigError(
                    f"{name} looks separated by {plural}: line {line} is {fields[0][:80]!r}. Save it as .csv, "
                    "separated by commas, or as .tsv, separated by tabs"
                )
    names: list[str] = []
    for index, field in enumerate(fields):
        column = field or f"Unnamed: {index}"
        if column in names:
            raise ConfigError(f"{name}: line {line} has several columns {column!r}. Give each another name")
        names.append(column)
    return names


def _refuse_fields(fields: list[str], names: list[str], name: str, line: int, *, is_tsv: bool) -> NoReturn:
    """Raise ConfigError for a row whose fields are not as many as the columns ``names``."""
    if is_tsv:
        fix = "Quotes have no meaning in a .tsv file, so no field may contain a tab or a line break"
    elif len(fields) > len(names):
        fix = 'Put quotes around each field that contains a comma, as in "good, but long"'
    else:
        fix = "Write a comma for each field, also for empty ones"
    raise ConfigError(
        f"{name}: line {line} has {_counted(len(fields), 'field')}, but the file has "
        f"{_counted(len(names), 'column')} ({shortened(names, 6)}). {fix}"
    )


def _counted(count: int, noun: str) -> str:
    """Return "1 field" or "2 fields"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"


@dataclass(kw_only=True, slots=True)
class QuoteCounts:
    """Counts of values in a column of a .tsv file, which tell whether it was written with quotes as CSV has them."""

    values: int = 0
    with_quotes: int = 0
    """Values with a quote anywhere."""
    quoted: int = 0
    """Values with quotes around them, and doubled ones inside, if any."""
    quoted_inside: int = 0
    """Values with quotes around them and doubled ones inside."""

    def add(self, value: str) -> None:
        """Count a value."""
        self.values += 1
        if '"' in value:
            self.with_quotes += 1
            self.quoted += _QUOTED.fullmatch(value) is not None
            self.quoted_inside += _QUOTED_INSIDE.fullmatch(value) is not None

    @property
    def is_quoted_as_csv(self) -> bool:
        """True if all values have quotes around them, or exactly those that contain quotes, which are doubled."""
        if not self.quoted:
            return False
        # CSV quotes some values only if they contain quotes, which it doubles; a text may have quotes around it as well
        is_minimal = self.quoted == self.with_quotes and self.quoted_inside > 0
        return self.quoted == self.values or is_minimal


def has_quoted_names(names: Iterable[str]) -> bool:
    """Return whether a column of a .tsv file has a name with quotes around it."""
    return any(name[:1] == name[-1:] == '"' for name in names)


def quoted_tsv(name: str, quoted: str) -> ConfigError:
    """Return the error for a .tsv file with quotes around ``quoted``."""
    return ConfigError(
        f"{name} was written with quotes around its {quoted}, but quotes have no meaning in a .tsv file. "
        "Save it without them, or as .csv or .jsonl"
    )


def _refuse_encoding(name: str, open_file: OpenFile, error: UnicodeDecodeError) -> NoReturn:
    """Raise ConfigError, which names the first line that is not UTF-8."""
    # read again, because the places in ``error`` count from the start of the decoder's buffer
    with open_file() as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as of_line:
                raise ConfigError(f"{name}: line {number} is not UTF-8 text: {of_line}. Save it in UTF-8") from None
    raise ConfigError(f"{name} is not UTF-8 text: {error}. Save it in UTF-8") from None


def byte_blocks(file: IO[bytes], start: int = 0, stop: int = -1) -> Iterator[bytes]:
    """Yield the bytes from ``start`` to ``stop`` (-1: the end) in blocks; each except the last ends with a line."""
    if start:
        file.seek(start)
    remaining = sys.maxsize
    if stop >= 0:
        remaining = stop - start
    # parts of a line longer than a block: joining them with each block would take quadratic time
    unfinished: list[bytes] = []
    while remaining > 0:
        data = file.read(min(_BLOCK_BYTES, remaining))
        if not data:
            break
        remaining -= len(data)
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*unfinished, data[:end]])
            unfinished = [data[end:]]
        else:
            unfinished.append(data)
    last = b"".join(unfinished)
    if last:
        yield last


def json_lines(
    name: str, blocks: Iterable[bytes], lines_before: LinesBefore | None = None
) -> Iterator[tuple[int, JsonRow]]:
    """Yield the number and the object of each line that is not blank, counted from 1 at the first of ``blocks``.

    ``lines_before`` returns the lines of the file before these, for messages; None if there are none.

    Raises ConfigError, which starts with ``name`` and the line, for what is not a JSON object in UTF-8, and for objects
    that no program reads alike: with a name twice, with half of a surrogate pair, or nested deeper than MAX_DEPTH.
    """
    number = 0
    for block in blocks:
        for line in block.splitlines():
            number += 1
            if number == 1 and lines_before is None:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            try:
                row = _parsed(line)
                if not isinstance(row, dict):
                    raise _NotReadable(f"is not a JSON object (it is a {_json_type(row)}). Write one per line")
            except _NotReadable as error:
                line_number = number + _count_of(lines_before)
                raise ConfigError(f"{name}: line {line_number} {error}") from None
            yield number, _as_written(row)


def _count_of(lines_before: LinesBefore | None) -> int:
    """Return the lines of the file before a piece of it."""
    if lines_before is None:
        return 0
    return lines_before()


def json_file(name: str, open_file: OpenFile) -> tuple[str, Iterator[tuple[int, JsonRow]]]:
    """Return the unit and the numbered objects of a .json file: lines as :func:`json_lines`, the rows of one list, or
    of one object with a list per column. Raises ConfigError."""
    with open_file() as file:
        block = file.read(_BLOCK_BYTES)
        is_one_value = _starts_one_value(block, is_all=len(block) < _BLOCK_BYTES)
        # only a file of one value is read into memory at once
        whole = b""
        if is_one_value:
            whole = block + file.read()
    if not is_one_value:
        return "line", _lines_of(name, open_file)
    try:
        content = _parsed(whole.removeprefix(_BOM))
    except _NotReadable as error:
        raise ConfigError(f"{name} {error}") from None
    if isinstance(content, dict):
        content = _rows_of_columns(content) or content
    if not isinstance(content, list):
        raise ConfigError(
            f"{name} is a JSON {_json_type(content)}, but a list of objects is needed. Write a list, or .jsonl"
        )
    return "row", _objects_of(content, name)


def _starts_one_value(block: bytes, *, is_all: bool) -> bool:
    """Return whether a .json file is one value, not a value per line, by its first ``block``.

    ``is_all``: the block is the whole file.
    """
    content = block.removeprefix(_BOM).lstrip()
    if content.startswith(b"["):
        return True
    first_line_of_file, line_break, _ = content.partition(b"\n")
    # An object that is longer than a block and has no line break in it would have to be parsed to know. The file has
    # one line then, or lines of that length, and both can be read line by line.
    if not line_break and not is_all:
        return False
    # the first line of a file of lines is a value by itself; that of an object over several lines is not
    return not _is_json(first_line_of_file)


def _rows_of_columns(table: JsonRow) -> list[object]:
    """Return the rows of an object with a list for each column, as pandas writes it with orient="list".

    Empty unless all values are lists of one length.
    """
    columns: list[list[object]] = []
    for values in table.values():
        if not isinstance(values, list):
            return []
        columns.append(values)
    if len({len(values) for values in columns}) != 1:
        return []
    rows: list[object] = []
    for values_of_row in zip(*columns, strict=True):
        rows.append(dict(zip(table, values_of_row, strict=True)))
    return rows


def _lines_of(name: str, open_file: OpenFile) -> Iterator[tuple[int, JsonRow]]:
    """Yield the number and the object of each line of a file."""
    with open_file() as file:
        yield from json_lines(name, byte_blocks(file))


def _objects_of(content: list[object], name: str) -> Iterator[tuple[int, JsonRow]]:
    """Yield the index of each row of a list, and the row. Raises ConfigError for one that is not an object."""
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise ConfigError(
                f"{name}: row {number} is a {_json_type(row)}, not an object with columns. Write one for each row"
            )
        yield number, _as_written(row)


def _is_json(text: bytes) -> bool:
    """Return whether a text is a JSON value."""
    with suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


def _without_repeated_names(pairs: list[tuple[str, object]]) -> JsonRow:
    """Return a JSON object. Raises ValueError for a name that is there twice, of which Python would use the last."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    # the usual object has no repeated name, so that this search costs nothing
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"the name {name!r} is there twice")
        seen.add(name)
    return fields


class _WrittenInt(int):
    """An integer that knows its text in the file."""

    text: str


class _WrittenFloat(float):
    """A number with a fraction or an exponent, or NaN, that knows its text in the file."""

    text: str


def _int(text: str) -> _WrittenInt | _WrittenFloat:
    if len(text) > _MAX_DIGITS:
        return _float(text)  # infinite, which nothing reads: only the text is used
    number = _WrittenInt(text)
    number.text = text
    return number


def _float(text: str) -> _WrittenFloat:
    number = _WrittenFloat(text)
    number.text = text
    return number


def _constant(text: str) -> _WrittenFloat | None:
    """Return the value of "NaN", "Infinity" or "-Infinity", which JSON does not have but Python's module writes."""
    # json.dumps writes NaN for the missing values of pandas: as a text, it would be a class or a word
    if text == "NaN":
        return None
    return _float(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_repeated_names, parse_int=_int, parse_float=_float, parse_constant=_constant
)


def _json_type(value: object) -> str:
    """Return JSON's name for the type of a value."""
    # bool before int, of which it is a subclass
    names = {bool: "boolean", str: "string", list: "list", dict: "object", int: "number", float: "number"}
    for python_type, json_name in names.items():
        if isinstance(value, python_type):
            return json_name
    return "null"


def _as_written(row: JsonRow) -> JsonRow:
    """Return a row with the text of the file in place of each plain value; null is None."""
    return {name: _written(value) for name, value in row.items()}


def _written(value: object) -> object:
    """Return the text of a plain value in the file; lists, objects, texts and None are unchanged."""
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, _WrittenInt | _WrittenFloat):
        return value.text
    return value


class _NotReadable(ValueError):
    """A JSON text cannot be read. The message is the end of a sentence that starts with the place, and has the fix."""


def _parsed(text: bytes) -> object:
    """Return a JSON value. Raises _NotReadable."""
    try:
        value: object = _DECODER.decode(text.decode())
        # few rows have this many brackets, so that the depth of most is never counted
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        # half of a surrogate pair can only come from an escape, and cannot be encoded
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _NotReadable(
            f"is nested more than {MAX_DEPTH} levels deep. Remove the nested values, or write them as text"
        ) from None
    except UnicodeEncodeError:
        raise _NotReadable(
            "has half of a surrogate pair (\\ud800 to \\udfff), which is not a character. Remove it"
        ) from None
    except UnicodeDecodeError as error:
        raise _NotReadable(f"is not UTF-8 text: {error}. Save it in UTF-8") from None
    except ValueError as error:
        raise _NotReadable(f"is not a JSON object ({first_line(error)}). Repair it") from None
    return value


def _depth(value: object) -> int:
    """Return the number of lists and objects around the innermost value, without recursion."""
    depth = 0
    level = [value]
    while level:
        children: list[object] = []
        has_nested = False
        for item in level:
            if isinstance(item, dict):
                has_nested = True
                children += item.values()
            elif isinstance(item, list):
                has_nested = True
                children += item
        if has_nested:
            depth += 1
        level = children
    return depth


def plain_documents(
    name: str, blocks: Iterable[bytes], sample_by: str, lines_before: LinesBefore | None = None
) -> Iterator[str]:
    """Yield the documents of a text file: its lines, its paragraphs, or the whole ("document").

    All line breaks (LF, CR LF, CR) are equal. Lines that are empty or only white space separate paragraphs and are not
    part of them. ``blocks`` are as from :func:`byte_blocks`, ``lines_before`` as in :func:`json_lines`. Raises
    ConfigError, which starts with ``name`` and the line, for bytes that are not UTF-8.
    """
    texts = _decoded_blocks(name, blocks, lines_before)
    if sample_by == "document":
        document = "".join(texts)
        if document:
            yield document
        return
    lines = _lines_of_texts(texts)
    if sample_by == "paragraph":
        yield from _paragraphs(lines)
    else:
        yield from lines


def _decoded_blocks(name: str, blocks: Iterable[bytes], lines_before: LinesBefore | None) -> Iterator[str]:
    """Yield the text of blocks, with LF as the only line break. Raises ConfigError for bytes that are not UTF-8."""
    lines_read = 0
    for number, block in enumerate(blocks):
        if number == 0 and lines_before is None:
            block = block.removeprefix(_BOM)
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            line_in_block = len(block[: error.start + 1].splitlines())
            line = _count_of(lines_before) + lines_read + line_in_block
            raise ConfigError(f"{name}: line {line} is not UTF-8 text: {error}. Save it in UTF-8") from None
        lines_read += block.count(b"\n")
        # blocks end with a line, so that no CR LF lies across two of them
        yield text.replace("\r\n", "\n").replace("\r", "\n")


def _lines_of_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of texts, each of which ends with a line, without their breaks."""
    for text in texts:
        # a block with only a byte order mark is not an empty line
        if text:
            # not splitlines, which also splits at form feeds and Unicode's separators
            yield from text.removesuffix("\n").split("\n")


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines between blank ones, joined again."""
    paragraph: list[str] = []
    for line in lines:
        # editors leave spaces in lines that look empty
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def place_of_row(path: Path, row: int) -> str:
    """Return "line 7" for row 5 of a CSV, TSV or JSON file whose first rows can be read; "row 5" of other files."""
    suffix = path.suffix.lower()
    name = str(path)

    def open_file() -> IO[bytes]:
        return path.open("rb")

    # a message must not fail because the file has changed or a row before this one cannot be read
    with suppress(ConfigError, OSError):
        if suffix in (".csv", ".tsv"):
            rows = table_rows(name, open_file, is_tsv=suffix == ".tsv")
            line, _ = next(islice(rows, row + 1, None))  # after the names of the columns
            return f"line {line}"
        if suffix == ".jsonl":
            line, _ = next(islice(_lines_of(name, open_file), row, None))
            return f"line {line}"
        if suffix == ".json":
            unit, objects = json_file(name, open_file)
            number, _ = next(islice(objects, row, None))
            return f"{unit} {number}"
    return f"row {row}"
