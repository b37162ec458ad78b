"""Text into one stream of tokens, and the stream into sequences: nothing lost but what is documented."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from pst_ds.train import packing
from pst_ds.train.config import ConfigError, DataConfig
from pst_ds.train.packing import Sequences, collate_sequences, load_sequences, token_stream

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny-llama"
TOKENIZER = AutoTokenizer.from_pretrained(TINY)
START, END = 1, 2
WORDS = {word: TOKENIZER.convert_tokens_to_ids(word) for word in ("film", "plot", "warm", "dull", "the")}
DOCUMENTS = ["the warm film", "the dull plot, the film", "NA", "plot"]

_texts = st.lists(st.lists(st.sampled_from(sorted(WORDS)), max_size=6).map(" ".join), max_size=12)
_streams = st.integers(0, 60).map(lambda count: np.arange(100, 100 + count, dtype=np.int32))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _data(path, **settings):
    return DataConfig(**{"train": str(path), "validation": str(path), "max_length": 4, **settings})


def _write(path, texts, column="text"):
    import datasets

    rows = datasets.Dataset.from_dict({column: texts, "n": list(range(len(texts)))})
    if path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    else:
        getattr(rows, {".csv": "to_csv", ".parquet": "to_parquet"}[path.suffix])(path)
    return path


def _refusal(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


@given(_texts, st.integers(1, 5))
def test_the_stream_is_the_texts_with_the_end_token_between_two(texts, at_a_time):
    batches = [texts[i : i + at_a_time] for i in range(0, len(texts), at_a_time)]
    stream = token_stream(batches, TOKENIZER)
    expected: list[int] = []
    for text in filter(None, texts):
        expected += ([END] if expected else []) + [START] + [WORDS[word] for word in text.split()]
    assert stream.dtype == np.int32
    assert stream.tolist() == expected


def test_white_space_alone_is_no_document():
    assert token_stream([["", " \n\t"], ["film", "  ", "plot"], []], TOKENIZER).tolist() == [
        START, WORDS["film"], END, START, WORDS["plot"],
    ]  # fmt: skip
    assert token_stream([["", " "]], TOKENIZER).tolist() == []


def test_a_tokenizer_that_ends_texts_by_itself_gets_no_second_end():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    assert token_stream([["film", "plot"]], tokenizer).tolist() == [WORDS["film"], END, WORDS["plot"], END]


@given(_streams, st.integers(2, 9))
def test_training_sequences_are_the_stream_less_than_a_sequence_short(stream, length):
    sequences = Sequences(stream, length)
    pieces = [sequences[i] for i in range(len(sequences))]
    assert sequences.lengths == [len(piece) for piece in pieces] == [length] * (len(stream) // length)
    together = np.concatenate([*pieces, stream[len(pieces) * length :]])
    assert together.tolist() == stream.tolist()
    assert len(stream) - length * len(pieces) < length


@given(_streams, st.integers(2, 9))
def test_evaluation_sequences_predict_every_token_but_the_first_once(stream, length):
    sequences = Sequences(stream, length, overlap=1)
    pieces = [sequences[i] for i in range(len(sequences))]
    assert sequences.lengths == [len(piece) for piece in pieces]
    assert all(2 <= len(piece) <= length for piece in pieces)
    assert [len(piece) for piece in pieces[:-1]] == [length] * (len(pieces) - 1)
    predicted = [token for piece in pieces for token in piece[1:].tolist()]
    assert predicted == stream[1:].tolist()
    assert all(one[-1] == other[0] for one, other in pairwise(pieces))


@given(_streams, st.integers(2, 9), st.sampled_from([0, 1]), st.integers(1, 8))
def test_the_first_sequences_are_the_first(stream, length, overlap, count):
    sequences = Sequences(stream, length, overlap)
    first = sequences.first(count)
    assert len(first) == min(count, len(sequences))
    assert [first[i].tolist() for i in range(len(first))] == [sequences[i].tolist() for i in range(len(first))]


def test_labels_are_the_input_and_nothing_is_padded():
    batch = collate_sequences(Sequences(np.arange(10, 30, dtype=np.int32), 5), [3, 0])
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[25, 26, 27, 28, 29], [10, 11, 12, 13, 14]]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_every_format_gives_the_same_stream(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(packing, "_ROWS_AT_A_TIME", 3)
    path = _write(tmp_path / f"texts.{ending}", DOCUMENTS)
    expected = token_stream([DOCUMENTS], TOKENIZER).tolist()
    train, validation = (load_sequences(_data(path), split, TOKENIZER) for split in ("train", "validation"))
    assert train.tokens.tolist() == validation.tokens.tolist() == expected
    assert (train.overlap, validation.overlap) == (0, 1)
    assert len(train) == len(expected) // 4
    assert sum(validation.lengths) - len(validation) == len(expected) - 1


def test_a_column_of_another_name(tmp_path):
    path = _write(tmp_path / "texts.jsonl", DOCUMENTS, column="body")
    tokens = load_sequences(_data(path, text_columns=("body",)), "train", TOKENIZER).tokens
    assert tokens.tolist() == token_stream([DOCUMENTS], TOKENIZER).tolist()
    message = _refusal(load_sequences, _data(path), "train", TOKENIZER)
    assert f"{path} has no column 'text', which data.text_columns names. Columns: body" in message


@pytest.mark.parametrize(
    ("sample_by", "documents"),
    [
        ("line", ["the film", "is warm", "the plot", "is dull"]),
        ("paragraph", ["the film\nis warm", "the plot\nis dull"]),
        ("document", ["the film\nis warm\n\nthe plot\nis dull\n"]),
    ],
)
def test_what_a_document_of_a_text_file_is(tmp_path, sample_by, documents):
    (tmp_path / "texts.txt").write_text("the film\nis warm\n\nthe plot\nis dull\n", encoding="utf-8")
    data = _data(tmp_path / "texts.txt", sample_by=sample_by)
    assert load_sequences(data, "train", TOKENIZER).tokens.tolist() == token_stream([documents], TOKENIZER).tolist()


def test_too_little_text_is_refused_with_its_tokens(tmp_path):
    path = _write(tmp_path / "texts.jsonl", ["film", "plot"])  # <s> film </s> <s> plot
    message = _refusal(load_sequences, _data(path, max_length=6), "train", TOKENIZER)
    assert message.startswith(f"{path}: the text of column 'text' has 5 tokens in all, fewer than one sequence of ")
    assert "data.max_length = 6; lower it, or give more text" in message
    assert load_sequences(_data(path, max_length=6), "validation", TOKENIZER).lengths == [5]
    path = _write(tmp_path / "empty.jsonl", ["", "  "])
    for split in ("train", "validation"):
        assert "has 0 tokens in all, fewer than" in _refusal(load_sequences, _data(path), split, TOKENIZER)


def test_a_row_without_text_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_ROWS_AT_A_TIME", 2)
    path = _write(tmp_path / "texts.jsonl", ["film", "plot", "warm", None])
    message = _refusal(load_sequences, _data(path), "train", TOKENIZER)
    assert message.startswith(f"{path}: column 'text' has no text in row 3;")


def test_files_that_are_not_there_or_not_read(tmp_path):
    assert "does not exist" in _refusal(load_sequences, _data(tmp_path / "no.txt"), "train", TOKENIZER)
    (tmp_path / "texts.pdf").write_text("film")
    assert "known are .jsonl, .json, .csv, .tsv, .parquet, .txt" in _refusal(
        load_sequences, _data(tmp_path / "texts.pdf"), "train", TOKENIZER
    )
    (tmp_path / "empty.txt").write_text("")
    message = _refusal(load_sequences, _data(tmp_path / "empty.txt"), "train", TOKENIZER)
    assert str(tmp_path / "empty.txt") in message
