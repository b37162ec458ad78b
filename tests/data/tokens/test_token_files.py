"""Tokens of Megatron-LM and datatrove, written here by the byte as their formats say."""

from __future__ import annotations

import struct

import pytest

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.cache import cached_file
from pst_ds.data.tokens.token_files import open_token_files, token_files
from pst_ds.data.tokens.tokenize import TokenizerIdentity

IDENTITY = TokenizerIdentity(sha256="0" * 64, vocabulary=100_000, end=2)
DOCUMENTS = [[5, 6, 2], [7, 2], [8, 999, 10, 2]]
FLAT = [5, 6, 2, 7, 2, 8, 999, 10, 2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PST_DS_CACHE", str(tmp_path / "cache"))


def _pack(letter, numbers):
    return struct.pack(f"<{len(numbers)}{letter}", *numbers)


def _megatron(prefix, letter="H", code=8, documents=DOCUMENTS):
    size = struct.calcsize(letter)
    prefix.with_name(f"{prefix.name}.bin").write_bytes(b"".join(_pack(letter, row) for row in documents))
    pointers = [size * sum(map(len, documents[:i])) for i in range(len(documents))]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    lengths = _pack("i", [len(row) for row in documents])
    index = head + lengths + _pack("q", pointers) + _pack("q", range(len(documents) + 1))
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    return prefix


def _datatrove(path, letter="H"):
    path.write_bytes(b"".join(_pack(letter, row) for row in DOCUMENTS))
    ends = [sum(map(len, DOCUMENTS[: i + 1])) for i in range(len(DOCUMENTS))]
    path.with_name(f"{path.name}.index").write_bytes(_pack("Q", ends))
    path.with_name(f"{path.name}.metadata").write_text(f"gpt2|{struct.calcsize(letter)}\n9\n9 T")
    return path


def _open(where):
    return open_token_files(token_files(str(where)), IDENTITY, str(where), cached_file_of_test)


def cached_file_of_test(name, what, build):
    return cached_file(name, what, "", build)


@pytest.mark.parametrize(("letter", "code"), [("H", 8), ("h", 3), ("i", 4), ("q", 5)])
def test_megatron_by_prefix_file_and_folder(tmp_path, letter, code):
    (tmp_path / "corpus").mkdir()
    prefix = _megatron(tmp_path / "corpus" / "a", letter, code)
    for where in (prefix, f"{prefix}.bin", tmp_path / "corpus", tmp_path / "corpus" / "*"):
        stream = _open(where)
        assert stream.tokens[:].tolist() == FLAT
        assert stream.borders.tolist() == [0, 3, 5]


@pytest.mark.parametrize("letter", ["H", "I"])
def test_datatrove(tmp_path, letter):
    path = _datatrove(tmp_path / "a.ds", letter)
    stream = _open(path)
    assert stream.tokens[:].tolist() == FLAT
    assert stream.borders.tolist() == [0, 3, 5]
    assert stream.learned is None
    (tmp_path / "a.ds.loss").write_bytes(bytes([0, 0, 1, 1, 1, 0, 1, 0, 1]))
    assert _open(path).learned[1:4].tolist() == [0, 1, 1]


def test_several_prefixes_are_one_stream(tmp_path):
    for name in ("b", "a"):
        _megatron(tmp_path / name)
    stream = _open(tmp_path / "[ab]")
    assert stream.tokens[:].tolist() == FLAT * 2
    assert stream.borders.tolist() == [0, 3, 5, 9, 12, 14]


def test_empty_documents_have_no_start(tmp_path):
    assert _open(_megatron(tmp_path / "a", documents=[[], [5, 2], [], [7, 2], []])).borders.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("a.bin", lambda data: data[:-1], "One of the two files is truncated"),
        ("a.idx", lambda data: data[:-1], "It is truncated or damaged"),
        ("a.idx", lambda data: data[:20], "it has only 20 bytes"),
        ("a.idx", lambda data: b"X" + data[1:], "not an index of Megatron"),
        ("a.idx", lambda data: data[:9] + b"\2" + data[10:], "it has version 2"),
        ("a.idx", lambda data: data[:17] + b"\6" + data[18:], "type code 6"),
        ("a.idx", lambda data: data[:50] + b"\1" + data[51:], "do not follow each other"),
        ("a.ds", lambda data: data[:-1], "is truncated, or belongs to another"),
        ("a.ds.index", lambda data: data[:-1], "not a multiple of 8"),
        ("a.ds.metadata", lambda data: b"gpt2|4\n9\n9 T", "do not belong together"),
        ("a.bin", lambda data: b"", "is empty"),
    ],
)
def test_damage_is_refused(tmp_path, name, change, said):
    where = _datatrove(tmp_path / "a.ds") if name.startswith("a.ds") else _megatron(tmp_path / "a")
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=said):
        _open(where)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    where = _megatron(tmp_path / "a", "i", 4, [[5, 100_000]])
    with pytest.raises(ConfigError, match="holds the token 100000, but the run's tokenizer has 100000"):
        _open(where)
