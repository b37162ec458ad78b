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
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pst_ds.config.data import DataConfig, EvalConfig
from pst_ds.config.run import ConfigError
from pst_ds.data.tasks.causal_lm import CausalLM, collate_sequences
from pst_ds.data.tokens import loading
from pst_ds.data.tokens.loading import load_sequences
from pst_ds.data.tokens.mixed import MixedSequences
from pst_ds.data.tokens.sequences import Sequences
from pst_ds.data.tokens.tokenize import tokenize

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny-llama"
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


def _stream(batches, tokenizer, count=False):
    """The tokens of texts as a run has them, and the bytes and the starts of documents: nothing behind the last."""
    parts = [tokenize(texts, tokenizer, count=count) for texts in batches]
    filled = [part for part in parts if len(part.lengths)]
    length = sum(len(part.tokens) for part in filled) - bool(filled and filled[-1].closed_by_us)
    tokens = np.concatenate([np.empty(0, np.int64), *(part.tokens for part in filled)])[:length]
    num_bytes = np.concatenate([np.empty(0, int), *(part.num_bytes for part in filled)])[:length] if count else None
    ends = np.cumsum([0, *(length for part in filled for length in part.lengths)])
    return tokens, num_bytes, ends[:-1]


def _refusal(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


@given(_texts, st.integers(1, 5))
def test_the_stream_is_the_texts_with_the_end_token_between_two(texts, at_a_time):
    batches = [texts[i : i + at_a_time] for i in range(0, len(texts), at_a_time)]
    stream, _, _ = _stream(batches, TOKENIZER)
    expected: list[int] = []
    for text in filter(None, texts):
        expected += ([END] if expected else []) + [START] + [WORDS[word] for word in text.split()]
    assert stream.tolist() == expected


def test_white_space_alone_is_no_document():
    assert _stream([["", " \n\t"], ["film", "  ", "plot"], []], TOKENIZER)[0].tolist() == [
        START, WORDS["film"], END, START, WORDS["plot"],
    ]  # fmt: skip
    assert _stream([["", " "]], TOKENIZER)[0].tolist() == []


def test_a_tokenizer_that_ends_texts_by_itself_gets_no_second_end():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    assert _stream([["film", "plot"]], tokenizer)[0].tolist() == [WORDS["film"], END, WORDS["plot"], END]


@given(_streams, st.integers(2, 9))
def test_training_sequences_are_the_stream_less_than_a_sequence_short(stream, length):
    sequences = Sequences(stream, length)
    pieces = [sequences[i].tokens for i in range(len(sequences))]
    assert sequences.lengths.tolist() == [len(piece) for piece in pieces] == [length] * (len(stream) // length)
    together = np.concatenate([*pieces, stream[len(pieces) * length :]])
    assert together.tolist() == stream.tolist()
    assert len(stream) - length * len(pieces) < length


@given(_streams, st.integers(2, 9))
def test_evaluation_sequences_predict_every_token_but_the_first_once(stream, length):
    sequences = Sequences(stream, length, overlap=1)
    pieces = [sequences[i].tokens for i in range(len(sequences))]
    assert sequences.lengths.tolist() == [len(piece) for piece in pieces]
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
    assert [first[i].tokens.tolist() for i in range(len(first))] == [
        sequences[i].tokens.tolist() for i in range(len(first))
    ]


def test_labels_are_the_input_and_nothing_is_padded():
    batch = collate_sequences(Sequences(np.arange(10, 30, dtype=np.int32), 5), [3, 0])
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[25, 26, 27, 28, 29], [10, 11, 12, 13, 14]]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_every_format_gives_the_same_stream(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(loading, "_ROWS_AT_A_TIME", 3)
    path = _write(tmp_path / f"texts.{ending}", DOCUMENTS)
    expected = _stream([DOCUMENTS], TOKENIZER)[0].tolist()
    train, validation = (load_sequences(_data(path), split, TOKENIZER) for split in ("train", "validation"))
    assert train.tokens.tolist() == validation.tokens.tolist() == expected
    assert (train.overlap, validation.overlap) == (0, 1)
    assert len(train) == len(expected) // 4
    assert sum(validation.lengths) - len(validation) == len(expected) - 1


def test_a_column_of_another_name(tmp_path):
    path = _write(tmp_path / "texts.jsonl", DOCUMENTS, column="body")
    tokens = load_sequences(_data(path, text_columns=("body",)), "train", TOKENIZER).tokens
    assert tokens.tolist() == _stream([DOCUMENTS], TOKENIZER)[0].tolist()
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
    assert load_sequences(data, "train", TOKENIZER).tokens.tolist() == _stream([documents], TOKENIZER)[0].tolist()


def test_too_little_text_is_refused_with_its_tokens(tmp_path):
    path = _write(tmp_path / "texts.jsonl", ["film", "plot"])  # <s> film </s> <s> plot
    message = _refusal(load_sequences, _data(path, max_length=6), "train", TOKENIZER)
    assert message.startswith(f"{path} has 5 tokens in all, fewer than one sequence of ")
    assert "data.max_length = 6. Lower it, or add text" in message
    assert load_sequences(_data(path, max_length=6), "validation", TOKENIZER).lengths.tolist() == [5]
    path = _write(tmp_path / "empty.jsonl", ["", "  "])
    for split in ("train", "validation"):
        assert "has 0 tokens in all, fewer than" in _refusal(load_sequences, _data(path), split, TOKENIZER)


def test_a_row_without_text_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_ROWS_AT_A_TIME", 2)
    path = _write(tmp_path / "texts.jsonl", ["film", "plot", "warm", None])
    message = _refusal(load_sequences, _data(path), "train", TOKENIZER)
    assert message.startswith(f"{path}: column 'text' has no text in line 4. Add one")


def test_files_that_are_not_there_or_not_read(tmp_path):
    assert "does not exist" in _refusal(load_sequences, _data(tmp_path / "no.txt"), "train", TOKENIZER)
    (tmp_path / "texts.pdf").write_text("film")
    assert "Use one of .jsonl, .json, .csv, .tsv, .parquet, .txt" in _refusal(
        load_sequences, _data(tmp_path / "texts.pdf"), "train", TOKENIZER
    )
    (tmp_path / "empty.txt").write_text("")
    message = _refusal(load_sequences, _data(tmp_path / "empty.txt"), "train", TOKENIZER)
    assert str(tmp_path / "empty.txt") in message


# --- bytes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE, which cuts letters of several bytes into several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the warm film", "the plot of the film is dull"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@given(st.lists(st.text(st.sampled_from("the fılm é漢字😀\u0301 \n"), max_size=12), max_size=4))
def test_the_bytes_of_a_document_add_up_to_its_length(byte_level, texts):
    texts = [text for text in texts if text.strip()]
    tokens, num_bytes, _ = _stream([texts], byte_level, count=True)
    assert tokens.tolist() == _stream([texts], byte_level)[0].tolist()
    assert len(num_bytes) == len(tokens)
    ends = [i for i, token in enumerate(tokens.tolist()) if token == 0]
    assert [int(num_bytes[i]) for i in ends] == [0] * max(0, len(texts) - 1)
    pieces = np.split(num_bytes, ends) if texts else []
    assert [int(piece.sum()) for piece in pieces] == [len(text.encode("utf-8")) for text in texts]


def test_which_token_has_which_bytes(byte_level):
    tokens, num_bytes, _ = _stream([["the é"]], byte_level, count=True)
    # é is two tokens of one byte each; both end behind the letter, so the first has its bytes
    assert (len(tokens), num_bytes.tolist()[-2:], int(num_bytes.sum())) == (len(num_bytes), [2, 0], 6)
    tokens, num_bytes, _ = _stream([[" film  plot ", "warm"]], TOKENIZER, count=True)
    assert tokens.tolist() == [START, WORDS["film"], WORDS["plot"], END, START, WORDS["warm"]]
    assert num_bytes.tolist() == [0, 5, 7, 0, 0, 4]  # white space belongs to the next word, the last to the last


def test_a_tokenizer_without_places_spreads_the_bytes():
    class Slow:
        eos_token_id, is_fast = END, False

        def __call__(self, texts, **options):
            assert not options["return_offsets_mapping"]
            return {"input_ids": [[5, 6, 7] for _ in texts]}

    _, num_bytes, _ = _stream([["äöüß", "abcdefg"]], Slow(), count=True)
    assert num_bytes.tolist() == [2, 3, 3, 0, 2, 2, 3]


@given(st.integers(2, 30), st.integers(2, 9), st.integers(1, 8))
def test_the_first_token_s_bytes_are_not_predicted(count, length, first):
    num_bytes = np.arange(1, count + 1, dtype=np.int32)
    sequences = Sequences(np.zeros(count, dtype=np.int32), length, 1, num_bytes)
    assert sequences.predicted_bytes == sum(range(2, count + 1))
    some = sequences.first(first)
    assert some.predicted_bytes == sum(range(2, len(some.tokens) + 1))
    assert len(some.num_bytes) == len(some.tokens)
    assert Sequences(sequences.tokens, length).predicted_bytes is None


def test_only_evaluation_counts_bytes(tmp_path):
    path = _write(tmp_path / "texts.jsonl", DOCUMENTS)
    train, validation = (load_sequences(_data(path), split, TOKENIZER) for split in ("train", "validation"))
    assert train.predicted_bytes is None
    assert validation.predicted_bytes == sum(len(text) for text in DOCUMENTS)  # a start token comes before the first


@given(_texts, st.integers(2, 9), st.sampled_from([0, 1]))
def test_positions_begin_anew_with_each_document_and_its_first_token_is_not_predicted(texts, length, overlap):
    tokens, _, starts = _stream([texts], TOKENIZER)
    sequences = Sequences(tokens, length, overlap, borders=starts)
    predicted = 0
    for index in range(len(sequences)):
        batch = collate_sequences(sequences, [index])
        tokens, expected, position = batch["input_ids"][0].tolist(), [], 0
        for place, token in enumerate(tokens):
            position = 0 if token == START or place == 0 else position + 1  # the tokenizer begins every text with it
            expected.append(position)
        assert batch["position_ids"].tolist() == [expected]
        labels = [-100 if position == 0 else token for token, position in zip(tokens, expected, strict=True)]
        assert batch["labels"].tolist() == [labels]
        counted = sum(label != -100 for label in labels)
        predicted += counted
        if not overlap:
            assert CausalLM(EvalConfig()).num_targets(sequences, [index]) == counted
    assert sequences.num_predicted == predicted


def test_predicted_bytes_leave_out_the_first_token_of_each_document():
    tokens, num_bytes, starts = _stream([["film plot", "warm", "dull the"]], TOKENIZER, count=True)
    together = Sequences(tokens, 4, 1, num_bytes)
    apart = Sequences(tokens, 4, 1, num_bytes, starts)
    assert together.predicted_bytes == apart.predicted_bytes == len("film plotwarmdull the")  # <s> has no bytes
    without_start = Sequences(np.arange(5), 4, 1, np.array([3, 1, 4, 1, 5]), np.array([0, 2]))
    assert without_start.predicted_bytes == 1 + 1 + 5


def test_the_digest_tells_whether_documents_run_on(tmp_path):
    path = _write(tmp_path / "texts.jsonl", DOCUMENTS)
    apart, run_on = (load_sequences(_data(path, document_mask=mask), "train", TOKENIZER) for mask in (True, False))
    assert apart.digest != run_on.digest
    assert collate_sequences(run_on, [0]).keys() == {"input_ids", "labels"}


def test_what_is_drawn_of_a_mixture_has_its_weights():
    large, small = (Sequences(np.arange(4 * n), 4, borders=np.array([0])) for n in (90, 10))
    task = CausalLM(evaluation=None)
    drawn = task.sample(MixedSequences((large, small), (0.75, 0.25)), 40, 0)[1]
    assert sum(index >= 90 for index in drawn) == 10  # all of the small one, before any comes again
    assert len(set(drawn)) == 40
    assert drawn == task.sample(MixedSequences((large, small), (0.75, 0.25)), 40, 0)[1]
    assert drawn != task.sample(MixedSequences((large, small), (0.75, 0.25)), 40, 1)[1]
    as_they_are = task.sample(MixedSequences((large, small)), 100, 0)[1]
    assert sorted(as_they_are) == list(range(100))
