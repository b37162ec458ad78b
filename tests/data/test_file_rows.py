"""Files of rows against Python's csv and json modules: the same texts and labels, or a refusal that names the line."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import datasets
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given

from pst_ds.config.run import ConfigError
from pst_ds.data import local_dataset
from pst_ds.data.dataset import column_types, read_local, values_of
from pst_ds.data.file_rows import place_of_row
from pst_ds.data.preparation.pieces import Reading, find_pieces
from pst_ds.data.preparation.readers import texts_of
from pst_ds.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

SPECIAL = ["", " ", "007", "1e3", "1.10", "TRUE", "NA", "null", "None", "nan", "inf", "-1", "2020-01-01", "0x1F", "1_0"]
CHARACTERS = st.sampled_from([*"ab,;\t\"'\\ |\n\r", "é", "\x00", "\x0b", "\x85", "\u2028", "\ufeff", "😀"])
VALUES = st.sampled_from(SPECIAL) | st.text(CHARACTERS, max_size=8)
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8)
PLACE = re.compile(r"\b(line|row) (\d+)\b")
NAMES = ["text", "label"]


@contextmanager
def _file(name, content):
    """A file in a folder of its own, with the cache of datasets in it."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(local_dataset, "_ROWS", 3)  # several tables
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def _rows(path, sample_by="line"):
    """The rows, or the message that refuses them."""
    try:
        rows = read_local(str(path), "data.train", sample_by)
    except ConfigError as error:
        return str(error)
    columns = [list(values_of(rows, name)) for name in rows.column_names]
    return rows.column_names, [tuple(row) for row in zip(*columns, strict=True)]


def _prepared(path, column="text"):
    """The documents that ``pst-ds prepare`` reads, or the message."""
    try:
        reading = Reading(column=column)
        pieces = find_pieces([str(path)], reading, 1 << 20)
        return [text for piece in pieces for span in piece for batch in texts_of(span, reading) for text in batch]
    except InputError as error:
        return str(error)


def _without_line_breaks(pairs):
    return [tuple(re.sub("[\t\r\n]", " ", value) for value in pair) for pair in pairs]


@given(PAIRS, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.booleans())
def test_a_csv_file_is_read_as_it_was_written(pairs, line_break, quoting, has_bom):
    if any(re.search("[\r\n]", value) for pair in pairs for value in pair):
        quoting = csv.QUOTE_ALL  # Python's writer quotes only the line break that it writes itself
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator=line_break, quoting=quoting).writerows([NAMES, *pairs])
    content = stream.getvalue().encode("utf-8-sig" if has_bom else "utf-8")
    with _file("rows.csv", content) as path:
        assert _rows(path) == (NAMES, pairs)
        assert _prepared(path) == [text for text, _ in pairs]


@given(PAIRS)
def test_a_tsv_file_is_read_as_it_was_written(pairs):
    pairs = _without_line_breaks(pairs)
    with _file("rows.tsv", "".join("\t".join(row) + "\n" for row in [NAMES, *pairs]).encode()) as path:
        assert _rows(path) == (NAMES, pairs)
        prepared = _prepared(path)
        if "written with quotes" not in prepared:
            assert prepared == [text for text, _ in pairs]


SCALARS = VALUES | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
NESTED = st.recursive(
    SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(VALUES, of, max_size=3), max_leaves=6
)


def _as_text(value):
    """A plain value as json.dumps writes it, and any other unchanged."""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


@given(
    st.lists(st.fixed_dictionaries({"text": VALUES}, optional={"label": NESTED}), min_size=1, max_size=8), st.booleans()
)
def test_json_is_read_as_python_reads_it(rows, is_list):
    names = list(dict.fromkeys(name for row in rows for name in row))
    wanted = [tuple(_as_text(row.get(name)) for name in names) for row in rows]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    name, content = ("rows.json", json.dumps(rows)) if is_list else ("rows.jsonl", lines)
    with _file(name, content.encode()) as path:
        assert _rows(path) == (names, wanted)
        assert _prepared(path) == [row["text"] for row in rows]


@given(PAIRS)
def test_parquet_is_read_as_arrow_wrote_it(pairs):
    with _file("rows.parquet", b"") as path:
        columns = zip(*pairs, strict=True)
        pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(of, pyarrow.string()) for of in columns], NAMES), path)
        assert _rows(path) == (NAMES, pairs)
        assert _prepared(path) == [text for text, _ in pairs]


@given(st.text(CHARACTERS, min_size=1), st.sampled_from(["line", "paragraph", "document"]))
def test_text_is_split_as_python_splits_it(text, sample_by):
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    paragraphs = [part.strip("\n") for part in re.split(r"\n(?:[^\S\n]*\n)+", f"\n\n{plain}\n\n") if part.strip()]
    lines = io.StringIO(plain).read().removesuffix("\n").split("\n") if plain else []
    wanted = {"line": lines, "paragraph": paragraphs, "document": [plain] if plain else []}
    with _file("rows.txt", text.encode()) as path:
        found = _rows(path, sample_by)
        if wanted[sample_by] and not isinstance(found, str):
            assert found == (["text"], [(document,) for document in wanted[sample_by]])
        else:
            assert not "".join(wanted[sample_by]).strip()


CSV_BYTES = st.lists(
    st.sampled_from(
        [b"text", b"label", b"a", b"007", b",", b",", b"\n", b"\n", b'"', b'""', b"\r", b";", b"\xff", b"\xc3"]
    )
).map(b"".join)


def _reference_table(content, delimiter):
    """The rows of Python's csv module, None if it refuses them, and the lines where rows end."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    stream = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
    try:
        return list(csv.reader(stream, delimiter=delimiter, quoting=quoting))
    except (csv.Error, UnicodeDecodeError):
        return None


def _require_same_table(path, content, delimiter):
    found = _rows(path)
    if isinstance(found, str):
        is_about_the_whole = re.search("is empty|has no examples|looks separated|quotes around its", found)
        assert PLACE.search(found) or is_about_the_whole, found
        return
    rows = _reference_table(content, delimiter)
    names, values = found
    assert rows is not None
    header, *others = (
        [row for row in rows if row] if len(names) > 1 else rows[next(i for i, of in enumerate(rows) if of) :]
    )
    while others and not others[-1]:
        others.pop()
    assert [tuple(row or [""]) for row in others] == values
    assert names == [name or f"Unnamed: {index}" for index, name in enumerate(header)]


@given(CSV_BYTES)
def test_any_csv_is_read_as_python_reads_it_or_refused_by_line(content):
    with _file("rows.csv", content) as path:
        _require_same_table(path, content, ",")


@given(CSV_BYTES.map(lambda content: content.replace(b",", b"\t")))
def test_any_tsv_is_read_as_python_reads_it_or_refused_by_line(content):
    with _file("rows.tsv", content) as path:
        _require_same_table(path, content, "\t")


JSON_BYTES = st.lists(
    st.sampled_from([
        b'{"text": "a", "label": 1}', b'{"text": 1.10}', b'{"label": true}', b"\n", b"\n", b"\r", b" ", b"[1]",
        b'{"text"',
        b"{}", b'{"text": "a", "text": "b"}', b'"\\ud800"', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[" * 99,
        b"]" * 99, b'{"text": NaN}', b'{"text": 123456789012345678901234567890}', b'{"text": {"a": [1, 2.5, "x"]}}',
    ])
).map(b"".join)  # fmt: skip


@given(JSON_BYTES)
def test_any_jsonl_is_read_as_python_reads_it_or_refused_by_line(content):
    with _file("rows.jsonl", content) as path:
        found = _rows(path)
    if isinstance(found, str):
        assert PLACE.search(found) or re.search("is empty|has no examples|without columns", found), found
        return
    lines = [line for line in content.splitlines() if line.strip()]
    names, values = found
    for line, of_row in zip(lines, values, strict=True):
        row = json.loads(line)
        as_written = json.loads(line, parse_float=str, parse_int=str, parse_constant={"NaN": None}.get)
        for name, value in zip(names, of_row, strict=True):
            if isinstance(row.get(name), dict):
                assert value == row[name]
            else:
                assert value == ("true" if row.get(name) is True else as_written.get(name))


def test_paragraphs_are_separated_by_lines_of_white_space(tmp_path):
    """Editors and converters leave spaces in empty lines: the whole file would be one paragraph."""
    path = tmp_path / "rows.txt"
    path.write_text("\n one\ntwo\n \nthree\n\t\n\n\x0c\nfour\n\n\nfive\n \n")
    wanted = [" one\ntwo", "three", "four", "five"]
    assert read_local(str(path), "data.train", "paragraph")["text"][:] == wanted
    reading = Reading(sample_by="paragraph")
    pieces = find_pieces([str(path)], reading, 1)
    assert len(pieces) > 1
    assert [text for piece in pieces for span in piece for batch in texts_of(span, reading) for text in batch] == wanted


def test_nan_of_pythons_json_is_a_missing_value(tmp_path):
    """As pandas and json.dumps write it: the label of that row was a third class "NaN"."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": 1.5}) + "\n" for text in ("a", math.nan)))
    assert read_local(str(path), "data.train", "line")[:] == {"text": ["a", None], "label": ["1.5", "1.5"]}
    with pytest.raises(InputError, match="column 'text' has no text in line 2"):
        list(texts_of(find_pieces([str(path)], Reading(), 1 << 20)[0][0], Reading()))


@pytest.mark.parametrize("start", ["", "\n", "\ufeff"])
def test_a_large_json_file_is_read_as_a_small_one(tmp_path, start):
    """The first line decides whether lines are rows, and it is in the part that is looked at."""
    path = tmp_path / "rows.json"
    texts = [f"{number} " + "film " * 50_000 for number in range(6)]
    path.write_text(start + json.dumps({"text": texts}, indent=1))
    assert read_local(str(path), "data.train", "line")["text"][:] == texts
    path.write_text(start + "\n".join(json.dumps({"text": text}) for text in texts))
    assert read_local(str(path), "data.train", "line")["text"][:] == texts
    path.write_text(start + json.dumps({"text": "film " * 300_000}))
    assert read_local(str(path), "data.train", "line")["text"][:] == ["film " * 300_000]


def test_places_and_types_of_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,n,x,is,empty\n"a\nb",007,1e3,TRUE,\n\nc,8,2,false,\n')
    assert [place_of_row(path, row) for row in range(2)] == ["line 2", "line 5"]
    rows = read_local(str(path), "data.train", "line")
    types = {"text": "string", "n": "int64", "x": "float64", "is": "bool", "empty": "string"}
    assert column_types(rows, str(path)) == types
    assert rows[0] == {"text": "a\nb", "n": "007", "x": "1e3", "is": "TRUE", "empty": ""}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".txt"])
def test_a_name_with_signs_of_a_pattern_is_the_name_of_a_file(tmp_path, suffix):
    texts = {"g*": "this", "g1": "other", "h[1]": "this", "h1": "other", "p?": "this", "p1": "other"}
    for name, text in texts.items():
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
        else:
            path.write_text({".csv": f"text\n{text}\n", ".jsonl": json.dumps({"text": text}), ".txt": text}[suffix])
    for name in ("g*", "h[1]", "p?"):
        assert read_local(str(tmp_path / f"{name}{suffix}"), "data.train", "line")["text"][:] == ["this"]


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "rows.csv"
    for text in ("one", "two"):
        path.write_text(f"text\n{text}\n")
        os.utime(path, (0, 0))
        assert read_local(str(path), "data.train", "line")["text"][:] == [text]


def test_a_column_of_numbers_that_ends_in_a_word_is_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "7\n" * 25_000 + "film\n")
    assert set(read_local(str(path), "data.train", "line")["text"]) == {"7", "film"}


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]})
    rows.save_to_disk(tmp_path / "saved")
    assert read_local(f"{tmp_path}/saved[1:]", "data.train", "line").to_dict() == {"text": ["b", "c"], "label": [0, 1]}
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        ConfigError, match=rf"several splits. Name one: {tmp_path}/splits/test, {tmp_path}/splits/train"
    ):
        read_local(str(tmp_path / "splits"), "data.train", "line")
    with pytest.raises(ConfigError, match="is a folder, but not one of Dataset"):
        read_local(str(tmp_path), "data.train", "line")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", "text,label\nfilm,good,\n", "line 2 has 3 fields, but the file has 2 columns"),
        ("rows.csv", "text,label\nWell, cast clever,good\n", "line 2 has 3 fields"),
        ("rows.csv", "text;label\nfilm;good\n", "looks separated by semicolons"),
        ("rows.tsv", "text,label\nfilm,good\n", "looks separated by commas"),
        ("rows.csv", "text,text\na,b\n", "several columns 'text'"),
        ("rows.csv", 'text\na\n"b\nc\n', "line 3 cannot be read: its quotes are wrong"),
        ("rows.jsonl", '{"text": "a", "x": ' + "[" * 5000 + "]" * 5000 + "}", "line 1 is nested more than 64 levels"),
    ],
)
def test_a_refusal_names_the_line_and_the_fix(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        read_local(str(path), "data.train", "line")
    assert str(caught.value).startswith(f"data.train = '{path}'")
    with pytest.raises(InputError, match=re.escape(words)):
        list(texts_of(find_pieces([str(path)], Reading(), 1 << 20)[0][0], Reading()))
