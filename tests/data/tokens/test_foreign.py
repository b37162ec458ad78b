"""Tokens of other programs, written here by the byte as their formats say."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens import foreign
from pst_ds.data.tokens.foreign import is_token_source, open_tokens
from pst_ds.data.tokens.tokenize import TokenizerIdentity

END = 2
SMALL = TokenizerIdentity(sha256="0" * 64, vocabulary=1000, end=END)
LARGE = TokenizerIdentity(sha256="0" * 64, vocabulary=100_000, end=END)
DOCUMENTS = [[5, 6, END], [7, END], [8, 999, 10, END]]

_documents = st.lists(st.lists(st.integers(3, 999), max_size=6).map(lambda row: [*row, END]), min_size=1, max_size=9)


def _pack(letter, numbers):
    return struct.pack(f"<{len(numbers)}{letter}", *numbers)


def _write_olmo(path, documents, letter="H"):
    path.write_bytes(_pack(letter, [token for row in documents for token in row]))
    return path


def _write_numpy(path, documents, letter="H"):
    np.save(path, np.array([token for row in documents for token in row], dtype={"H": "<u2", "I": "<u4"}[letter]))
    return path


def _write_datatrove(path, documents, letter="H"):
    path.write_bytes(_pack(letter, [token for row in documents for token in row]))
    ends = [sum(map(len, documents[: i + 1])) for i in range(len(documents))]
    path.with_name(f"{path.name}.index").write_bytes(_pack("Q", ends))
    path.with_name(f"{path.name}.metadata").write_text(f"gpt2\n{ends[-1]}\n")
    return path


def _write_megatron(path, documents, letter="H", sequences=None):
    """``sequences``: lists of lists, the sequences of each document; a document is one sequence if not given."""
    by_document = sequences or [[row] for row in documents]
    flat = [row for rows in by_document for row in rows]
    size = struct.calcsize(f"<{letter}")
    path.write_bytes(b"".join(_pack(letter, row) for row in flat))
    pointers = [size * sum(map(len, flat[:i])) for i in range(len(flat))]
    borders = [sum(map(len, by_document[:i])) for i in range(len(by_document) + 1)]
    code = {"H": 8, "i": 4}[letter]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(flat), len(borders))
    index = head + _pack("i", list(map(len, flat))) + _pack("q", pointers) + _pack("q", borders)
    path.with_suffix(".idx").write_bytes(index)
    return path


WRITERS = {"a.npy": _write_olmo, "header.npy": _write_numpy, "a.ds": _write_datatrove, "a.bin": _write_megatron}


@pytest.mark.parametrize("name", WRITERS)
@given(documents=_documents, data=st.data())
def test_tokens_and_borders_are_those_written(tmp_path_factory, name, documents, data):
    path = WRITERS[name](tmp_path_factory.mktemp("tokens") / name, documents)
    assert is_token_source(path)
    stream = open_tokens(path, SMALL)
    flat = [token for row in documents for token in row]
    assert stream.tokens[:].tolist() == flat
    starts = [sum(map(len, documents[:i])) for i in range(len(documents))]
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert stream.borders.between(0, len(flat)).tolist() == starts
    assert stream.borders.between(start, stop).tolist() == [place for place in starts if start <= place < stop]


@pytest.mark.parametrize(("name", "letter"), [("a.npy", "I"), ("header.npy", "I"), ("a.ds", "I"), ("a.bin", "i")])
def test_tokens_of_four_bytes(tmp_path, name, letter):
    documents = [[70_000, END], [5, 99_999, END]]
    stream = open_tokens(WRITERS[name](tmp_path / name, documents, letter), LARGE)
    assert stream.tokens[:].tolist() == [token for row in documents for token in row]


def test_a_document_of_several_sequences(tmp_path):
    path = _write_megatron(tmp_path / "a.bin", None, sequences=[[[5, 6], [7, END]], [[8, END]], [[9], [10], [END]]])
    stream = open_tokens(path, SMALL)
    assert stream.tokens[:].tolist() == [5, 6, 7, END, 8, END, 9, 10, END]
    assert stream.borders.between(0, 9).tolist() == [0, 4, 6]
    assert stream.borders.between(1, 6).tolist() == [4]


def test_bytes_of_the_loss_say_what_is_learned(tmp_path):
    path = _write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    assert open_tokens(path, SMALL).learned is None
    before = open_tokens(path, SMALL).digest
    (tmp_path / "a.ds.loss").write_bytes(bytes([0, 0, 1, 1, 1, 0, 1, 0, 1]))
    stream = open_tokens(path, SMALL)
    assert stream.learned[1:6].tolist() == [False, True, True, True, False]
    assert stream.digest != before


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_is_its_files_by_name(tmp_path, name):
    write, ending = WRITERS[name], name.rpartition(".")[2]
    for i, documents in enumerate([DOCUMENTS, [[4, END]], [[3, 4, END], [END]]]):
        write(tmp_path / f"{i}.{ending}", documents)
    (tmp_path / "notes.txt").write_text("")
    assert is_token_source(tmp_path)
    stream = open_tokens(tmp_path, SMALL)
    assert stream.tokens[:].tolist() == [5, 6, END, 7, END, 8, 999, 10, END, 4, END, 3, 4, END, END]
    assert stream.borders.between(0, 15).tolist() == [0, 3, 5, 9, 11, 14]
    assert stream.borders.between(4, 12).tolist() == [5, 9, 11]


@pytest.mark.thorough
def test_the_digest_notices_a_change_and_a_copy_has_the_same(tmp_path):
    many = [[i % 900 + 3, END] for i in range(90_000)]
    one, same = _write_olmo(tmp_path / "a.npy", many), _write_olmo(tmp_path / "b.npy", many)
    assert open_tokens(one, SMALL).digest == open_tokens(same, SMALL).digest
    changed = [[4, END], *many[1:]]
    assert open_tokens(_write_olmo(tmp_path / "c.npy", changed), SMALL).digest != open_tokens(one, SMALL).digest
    assert open_tokens(_write_olmo(tmp_path / "d.npy", many[:-1]), SMALL).digest != open_tokens(one, SMALL).digest


def _damaged(folder, name):
    match name:
        case "half a token":
            (folder / "a.npy").write_bytes(b"123")
            return folder / "a.npy"
        case "empty":
            (folder / "a.npy").write_bytes(b"")
            return folder / "a.npy"
        case "not there":
            return folder / "a.npy"
        case "another vocabulary":
            return _write_olmo(folder / "a.npy", [[5, 1000, END]])
        case "four bytes for two":
            return _write_olmo(folder / "a.npy", [[5, 6, 7, 8, 9, 10, 11]] * 9, "I")
        case "fractions":
            np.save(folder / "a.npy", np.ones(4))
            return folder / "a.npy"
        case "a table":
            np.save(folder / "a.npy", np.ones((4, 2), np.uint16))
            return folder / "a.npy"
        case "another index":
            path = _write_datatrove(folder / "a.ds", DOCUMENTS)
            path.write_bytes(path.read_bytes()[:-2])
            return path
        case "another loss":
            path = _write_datatrove(folder / "a.ds", DOCUMENTS)
            (folder / "a.ds.loss").write_bytes(b"12")
            return path
        case "no magic":
            path = _write_megatron(folder / "a.bin", DOCUMENTS)
            path.with_suffix(".idx").write_bytes(b"x" * 99)
            return path
        case "a short index":
            path = _write_megatron(folder / "a.bin", DOCUMENTS)
            path.with_suffix(".idx").write_bytes(path.with_suffix(".idx").read_bytes()[:-1])
            return path
        case "a short file":
            path = _write_megatron(folder / "a.bin", DOCUMENTS)
            path.write_bytes(path.read_bytes()[:-2])
            return path
        case "a type of fractions":
            path = _write_megatron(folder / "a.bin", DOCUMENTS)
            data = bytearray(path.with_suffix(".idx").read_bytes())
            data[17] = 6
            path.with_suffix(".idx").write_bytes(data)
            return path
    return folder  # an empty folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("half a token", ["has 3 bytes", "of 2 bytes", "cut short"]),
        ("empty", ["is empty"]),
        ("not there", ["does not exist (looked in"]),
        ("another vocabulary", ["holds the token 1000", "tokenizer has 1000", "another tokenizer"]),
        ("four bytes for two", ["every second is nearly 0", "tokens of 4 bytes"]),
        ("fractions", ["holds float64", "whole numbers"]),
        ("a table", ["of the shape (4, 2)", "one dimension"]),
        ("another index", ["has 16 bytes", "a.ds.index says 9 tokens"]),
        ("another loss", ["a.ds.loss' has 2 bytes", "9 tokens"]),
        ("no magic", ["a.idx' is not a whole index", "magic number"]),
        ("a short index", ["a.idx' is not a whole index"]),
        ("a short file", ["has 16 bytes in 3 sequences", "a.idx says 18"]),
        ("a type of fractions", ["a.idx' is not a whole index", "whole numbers"]),
        ("nothing", ["has no tokens", "manifest.json"]),
    ],
)
def test_what_is_not_whole_or_not_of_the_model_is_refused(tmp_path, name, words):
    path = _damaged(tmp_path, name)
    with pytest.raises(ConfigError) as caught:
        open_tokens(path, SMALL)
    for word in [str(path.parent if path.suffix else path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([4, 3, 9], "offset 1 is 3, after 4"),
        ([2**64 - 5, 3, 9], "offset 0 is -5, after 0"),
        ([3, 2**63, 9], f"offset 1 is {-(2**63)}, after 3"),
        ([3, 10, 9], "offset 2 is 9, after 10"),
    ],
)
def test_an_index_of_datatrove_that_descends_is_refused(tmp_path, ends, words):
    path = _write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    (tmp_path / "a.ds.index").write_bytes(_pack("Q", ends))
    with pytest.raises(ConfigError, match=r"a\.ds\.index' does not ascend") as caught:
        open_tokens(path, SMALL)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("place", "letter", "value"), [(46, "q", -2), (54, "q", -6), (54, "q", 99), (78, "q", -1), (78, "q", 99)]
)
def test_an_index_of_megatron_that_descends_is_refused(tmp_path, place, letter, value):
    """Pointers to sequences, and borders of documents."""
    path = _write_megatron(tmp_path / "a.bin", DOCUMENTS)
    data = bytearray(path.with_suffix(".idx").read_bytes())
    struct.pack_into(f"<{letter}", data, place, value)
    path.with_suffix(".idx").write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.idx' does not ascend"):
        open_tokens(path, SMALL)


def test_an_index_is_looked_at_across_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "_NUMBERS_AT_A_TIME", 2)
    path = _write_datatrove(tmp_path / "a.ds", [[5, END]] * 7)
    assert open_tokens(path, SMALL).borders.several
    for i in range(1, 6):
        ends = [2, 4, 6, 8, 10, 12, 14]
        ends[i] = ends[i - 1] - 1
        (tmp_path / "a.ds.index").write_bytes(_pack("Q", ends))
        with pytest.raises(ConfigError, match=f"offset {i} is {ends[i]}, after {ends[i - 1]}"):
            open_tokens(path, SMALL)
