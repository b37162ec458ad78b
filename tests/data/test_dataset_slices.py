"""Slices of local files, "a.csv[:80%]": the same rows for every task, and nothing twice or lost between two of them."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.dataset import file_and_slice, read_rows
from pst_ds.data.tokens.loading import load_sequences
from tests.pairs import every_pair

TOKENIZER = AutoTokenizer.from_pretrained("tests/data/tiny-llama")
FORMATS = (".jsonl", ".csv", ".tsv", ".parquet", ".txt")


def _file(folder, ending, count=10):
    import datasets

    path, texts = folder / f"rows{ending}", [f"film {i}" for i in range(count)]
    rows = datasets.Dataset.from_dict({"text": texts})
    match ending:
        case ".txt":
            path.write_text("".join(f"{text}\n" for text in texts))
        case ".jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        case ".parquet":
            rows.to_parquet(path)
        case _:
            rows.to_csv(path, sep="\t" if ending == ".tsv" else ",")
    return path


def _numbers(where, **settings):
    rows = read_rows(DataConfig(train=str(where), **settings), "train", {"text": "text_columns"})
    return [int(text.split()[1]) for text in rows["text"]]


@every_pair
@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    ("piece", "rows"),
    [
        ("[:80%]", range(8)),
        ("[80%:]", range(8, 10)),
        ("[:3]", range(3)),
        ("[-2:]", range(8, 10)),
        ("[10%:-10%]", range(1, 9)),
        ("[:]", range(10)),
        ("[5:900]", range(5, 10)),
    ],
)
def test_a_slice_is_of_rows(tmp_path, ending, piece, rows):
    assert _numbers(f"{_file(tmp_path, ending)}{piece}") == list(rows)


@every_pair
@pytest.mark.parametrize("count", [7, 10])
@pytest.mark.parametrize("percent", [24, 50, 78])
def test_two_slices_are_the_whole(tmp_path, count, percent):
    path = _file(tmp_path, ".jsonl", count)
    assert _numbers(f"{path}[:{percent}%]") + _numbers(f"{path}[{percent}%:]") == list(range(count))


def test_a_file_that_is_called_like_a_slice_is_that_file(tmp_path):
    path = _file(tmp_path, ".csv")
    odd = path.rename(tmp_path / "rows.csv[:80%]")
    assert file_and_slice(str(odd)) == (str(odd), "")
    assert file_and_slice("rows[0-9].csv") == ("rows[0-9].csv", "")


@pytest.mark.parametrize(
    ("piece", "words"), [("[10:]", "has no examples"), ("[80%]", "does not exist"), ("[::2]", "does not exist")]
)
def test_a_slice_without_rows_or_of_another_form_is_refused(tmp_path, piece, words):
    with pytest.raises(ConfigError, match=words):
        _numbers(f"{_file(tmp_path, '.csv')}{piece}")


@pytest.mark.parametrize("ending", FORMATS)
def test_sequences_of_a_slice(tmp_path, ending):
    """The cache of tokens tells slices apart, and the digest that a resumed run compares does too."""
    path = _file(tmp_path, ending)
    found = {
        piece: load_sequences(DataConfig(train=f"{path}{piece}", max_length=3), "train", TOKENIZER)
        for piece in ("", "[:80%]", "[80%:]")
    }
    first, rest = (found[piece].tokens.tolist() for piece in ("[:80%]", "[80%:]"))
    whole = found[""].tokens.tolist()
    assert (whole[: len(first)], whole[-len(rest) :]) == (first, rest)
    assert len({of.digest for of in found.values()}) == 3


@pytest.mark.parametrize(("sample_by", "documents"), [("line", 8), ("paragraph", 4), ("document", 1)])
def test_a_slice_of_a_plain_text(tmp_path, sample_by, documents):
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(b"%d the film\r\n%s" % (i, b"\r\n" * (i % 2)) for i in range(10)))
    read = {piece: DataConfig(train=f"{path}{piece}", sample_by=sample_by) for piece in ("", "[:80%]", "[80%:]")}
    texts = {piece: list(read_rows(data, "train", {})["text"]) for piece, data in read.items()}
    join = "" if sample_by == "document" else "\n"
    assert len([text for text in texts["[:80%]"] if text]) == documents
    assert join.join(texts["[:80%]"] + texts["[80%:]"]) == join.join(texts[""])


def test_what_is_not_one_file_cannot_be_sliced(tmp_path):
    _file(tmp_path, ".jsonl")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    for name in (str(tmp_path), f"{tmp_path}/*.jsonl", f"{tmp_path}/store"):
        with pytest.raises(ConfigError, match="only a single file of text can be sliced") as caught:
            load_sequences(DataConfig(train=f"{name}[:80%]", max_length=3), "train", TOKENIZER)
        assert f"data.train = '{name}[:80%]'" in str(caught.value)
