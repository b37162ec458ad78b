"""``pst-ds prepare``: what it prints, refuses, and leaves on disk."""

from __future__ import annotations

import json

import pytest

from pst_ds.cli.main import main
from pst_ds.data.tokens.store import open_store

TOKENIZER = "tests/data/tiny-llama"


@pytest.fixture
def texts(tmp_path, alone):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in ["the film", "the warm plot"]))
    return path


def test_it_writes_a_store_and_says_so(tmp_path, texts, verb):
    out = tmp_path / "s"
    options = ["--tokenizer", TOKENIZER, "--out", str(out), "--text-column", "body", "--count-bytes", "--quiet"]
    result = verb("prepare", str(texts), *options)
    assert (result["documents"], result["tokens"], result["text_bytes"], result["dtype"]) == (2, 9, 21, "uint16")
    assert result["digest"] == open_store(out).digest
    assert open_store(out).num_bytes.tolist() == [0, 3, 5, 0, 0, 3, 5, 5]
    inspected = verb("inspect", str(out))
    assert inspected["kind"] == f"{out}: a token store"
    assert {inspected[key] == result[key] for key in ("tokens", "documents", "text_bytes", "digest")} == {True}
    assert inspected["sources"] == [str(texts)]
    assert main(["prepare", str(texts), *options, "--workers", "2"]) == 2
    assert verb("prepare", str(texts), *options, "--workers", "2", "--force")["digest"] == result["digest"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokenizer", "tests/data"], ["--tokenizer tests/data has no tokenizer"]),
        (["--tokenizer", "tests/absent"], ["--tokenizer tests/absent has no tokenizer", "looked in"]),
        (["--text-column", "test"], ["a.jsonl: line 1 has no column 'test'", "Columns: body"]),
        (["--workers", "0"], ["--workers", "'0' is not a whole number of at least 1"]),
        (["--out", "tests/data/train.jsonl/s"], ["--out", "is a file, and no folder"]),
    ],
)
def test_wrong_input_is_one_message(tmp_path, texts, options, words, capsys):
    base = ["--tokenizer", TOKENIZER, "--out", str(tmp_path / "s"), "--text-column", "body"]
    try:
        code = main(["prepare", str(texts), *base, *options])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


@pytest.mark.parametrize(("options", "is_noted"), [((), True), (("--sample-by", "document"), False)])
def test_a_book_of_which_each_line_becomes_a_document_is_noted(tmp_path, alone, capsys, options, is_noted):
    book = tmp_path / "book.txt"
    book.write_text("the film was fine and the plot was warm ,\nand the film and the plot were dull .\n\n" * 30)
    (tmp_path / "other.txt").write_text("the film\n" * 30)
    out = ("--tokenizer", "tests/data/tiny-llama", "--out", str(tmp_path / "store"), "--workers", "1")
    assert main(["prepare", str(tmp_path / "other.txt"), str(book), *out, *options]) == 0
    assert (f"note: {book}: its lines are parts of longer texts" in capsys.readouterr().err) is is_noted
