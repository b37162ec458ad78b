"""Texts read as they come: every text once a pass, whoever reads, and from any place on the same."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pst_ds.config.data import DataConfig, DataSource
from pst_ds.config.run import ConfigError
from pst_ds.data.preparation import pieces as pieces_module
from pst_ds.data.preparation import readers
from pst_ds.data.preparation.pieces import Reading, find_pieces
from pst_ds.data.tasks.causal_lm import CausalLM, collate_sequences
from pst_ds.data.tokens.loading import load_sequences
from pst_ds.data.tokens.mixed import MixedReader
from pst_ds.data.tokens.streamed import BEGIN, Place, StreamReader, TextStream
from pst_ds.errors import InputError

TINY = Path(__file__).resolve().parents[1] / "tiny-llama"
TOKENIZER = AutoTokenizer.from_pretrained(TINY)
END = TOKENIZER.eos_token_id
WORDS = ("film", "plot", "warm", "dull", "the")
TEXTS = [" ".join(words) for count in (1, 2, 3) for words in itertools.product(WORDS, repeat=count)]


@pytest.fixture(autouse=True)
def _own_caches(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("PST_DS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_batches(monkeypatch):
    """Seven texts are read at a time."""
    monkeypatch.setattr(readers, "ROWS_AT_A_TIME", 7)


def _jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _stream(path, *, piece_bytes=1 << 20, length=5, apart=True):
    reading = Reading()
    spans = tuple(span for piece in find_pieces([str(path)], reading, piece_bytes) for span in piece)
    return TextStream("texts", spans, reading, TOKENIZER, length, apart)


def _texts(sequences):
    """The tokens of the texts in a row of sequences, of whole ones alone: not the first and the last."""
    tokens = np.concatenate([one.tokens for one in sequences])
    ends = np.flatnonzero(tokens == END)
    return [tuple(tokens[i + 1 : j + 1].tolist()) for i, j in itertools.pairwise(ends)]


def _tokens(text):
    """The tokens of a text with its end."""
    ids = TOKENIZER(text)["input_ids"]
    return tuple(ids if ids[-1] == END else [*ids, END])


def _take(reader, count):
    return [reader.next() for _ in range(count)]


@pytest.mark.parametrize("piece_bytes", [400, 1 << 20], ids=["spans", "texts"])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_text_is_read_once_a_pass(tmp_path, small_batches, piece_bytes, parts):
    stream = _stream(_jsonl(tmp_path / "a.jsonl"), piece_bytes=piece_bytes)
    assert (len(stream.spans) >= 3) == (piece_bytes == 400)
    found = Counter()
    for part in range(parts):
        reader, taken = StreamReader(stream, "0", part, parts, window=1), []
        while reader.place.passes == 0:
            taken.append(reader.next())
        found.update(_texts(taken))
    texts = Counter(map(_tokens, TEXTS))
    missing = texts - found
    assert sum(missing.values()) <= 2 * parts  # the first, and one that an end of the pass cuts, of each part
    assert max((found - texts).values(), default=0) <= parts


def test_a_stream_is_the_text_of_a_store_in_its_order(tmp_path, small_batches):
    path = _jsonl(tmp_path / "a.jsonl")
    stored = load_sequences(DataConfig(train=str(path), max_length=5), "train", TOKENIZER)
    streamed = _take(StreamReader(_stream(path), "0", 0, 1, window=1), len(stored))
    for i, one in enumerate(streamed):
        assert one.tokens.tolist() == stored[i].tokens.tolist()
        assert one.starts.tolist() == stored[i].starts.tolist()
        assert one.predicted.tolist() == stored[i].predicted.tolist()


@given(before=st.integers(0, 150), window=st.sampled_from([1, 4, 9]), parts=st.integers(1, 2))
def test_a_reader_goes_on_from_any_place(tmp_path_factory, before, window, parts):
    stream = _stream(_jsonl(tmp_path_factory.mktemp("stream") / "a.jsonl", TEXTS[:60]), piece_bytes=200)
    reader = StreamReader(stream, "0", parts - 1, parts, window=window)
    _take(reader, before)
    place = Place(*json.loads(json.dumps(reader.place)))
    other = StreamReader(stream, "0", parts - 1, parts, place, window=window)
    for one, again in zip(_take(reader, 20), _take(other, 20), strict=True):
        assert one.tokens.tolist() == again.tokens.tolist()
        assert one.predicted.tolist() == again.predicted.tolist()
    assert other.place == reader.place


def test_windows_and_passes_are_shuffled(tmp_path):
    stream = _stream(_jsonl(tmp_path / "a.jsonl"), piece_bytes=200)
    plain, shuffled = (_take(StreamReader(stream, "0", 0, 1, window=w), 8) for w in (1, 8))
    assert {bytes(one.tokens) for one in plain} == {bytes(one.tokens) for one in shuffled}
    assert [bytes(one.tokens) for one in plain] != [bytes(one.tokens) for one in shuffled]
    other = _take(StreamReader(stream, "1", 0, 1, window=1), 8)
    assert [bytes(one.tokens) for one in plain] != [bytes(one.tokens) for one in other]


def test_documents_that_run_on_have_no_borders(tmp_path):
    one = StreamReader(_stream(_jsonl(tmp_path / "a.jsonl"), apart=False), "0", 0, 1).next()
    assert not len(one.starts)
    assert one.predicted.tolist() == [False, True, True, True, True]


def test_a_mixture_has_its_shares_of_a_stream(tmp_path):
    packed = tmp_path / "streamed.jsonl.gz"
    packed.write_bytes(gzip.compress(_jsonl(tmp_path / "a.jsonl", ["film " * 9] * 40).read_bytes()))
    kept = _jsonl(tmp_path / "b.jsonl", ["plot " * 9] * 40)
    sources = (DataSource(path=str(packed), weight=0.25, stream=True), DataSource(path=str(kept), weight=0.75))
    mixed = load_sequences(DataConfig(sources=sources, max_length=5, document_mask=False), "train", TOKENIZER)
    film = TOKENIZER("film film", add_special_tokens=False)["input_ids"][-1]
    drawn = MixedReader(mixed, 0, 0, 1).take(mixed.ordered(np.arange(40), 0).tolist())
    assert sum(film in one.tokens for one in drawn.sequences) == 10
    batch = collate_sequences(drawn, range(4))
    assert batch["input_ids"].shape == (4, 5)
    task = CausalLM(evaluation=None)
    assert task.has_streams(mixed)
    sample, indices = task.sample(mixed, 8, "calibration")
    assert len(sample) == len(indices) == 8
    assert sample.digest == task.sample(mixed, 8, "calibration")[0].digest


def test_the_assistants_part_of_a_streamed_conversation_is_learned(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = Path("tests/data/chat.jinja").read_text()
    messages = [{"role": "user", "content": "the plot"}, {"role": "assistant", "content": "warm"}]
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps({"messages": messages}) + "\n") * 20)
    data = DataConfig(sources=(DataSource(path=str(path), kind="chat"),), max_length=16)
    stored = load_sequences(data, "train", tokenizer)
    streamed = DataConfig(sources=(DataSource(path=str(path), kind="chat", stream=True),), max_length=16)
    mixed = load_sequences(streamed, "train", tokenizer)
    drawn = MixedReader(mixed, 0, 0, 1, window=1).take(range(3))
    assert drawn.masks_tokens
    assert [drawn[i].predicted.tolist() for i in range(3)] == [stored[i].predicted.tolist() for i in range(3)]


def test_shards_of_the_hub_are_dealt_out(monkeypatch):
    import datasets

    def rows(shards):
        for shard in shards:
            for i in range(20):
                yield {"text": f"{WORDS[shard]} {WORDS[i % 5]} the"}

    def load_hub(name, reading):
        assert (name, reading.subset) == ("owner/name", "part")
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})

    for module in (pieces_module, readers):
        monkeypatch.setattr(module, "load_hub", load_hub)
    data = DataConfig(sources=(DataSource(path="owner/name", stream=True),), subset="part", max_length=4)
    mixed = load_sequences(data, "train", TOKENIZER)
    firsts = []
    for part in range(3):
        reader = MixedReader(mixed, 0, part, 3, window=1)
        firsts.append({text[:-3] for text in _texts(reader.take(range(12)).sequences)})
    assert all(len(of) == 1 for of in firsts)
    assert len(set.union(*firsts)) == 3


def test_the_digest_is_of_names_and_sizes(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl")
    digest = _stream(path).digest
    (tmp_path / "moved").mkdir()
    assert _stream(path.rename(tmp_path / "moved" / "a.jsonl")).digest == digest
    assert _stream(_jsonl(tmp_path / "moved" / "a.jsonl", TEXTS[1:])).digest != digest


def test_a_part_without_text_is_refused(tmp_path):
    stream = _stream(_jsonl(tmp_path / "a.jsonl", ["film", "  "]))
    with pytest.raises(InputError, match=r"texts has no text for reader 2 of 2\. Add text, or start fewer ranks"):
        StreamReader(stream, "0", 1, 2, BEGIN).next()


def test_a_stream_that_cannot_be_read_is_refused_where_it_is_loaded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "film"}\n')
    data = DataConfig(sources=(DataSource(path=str(tmp_path / "a.jsonl"), stream=True),))
    with pytest.raises(InputError, match=r"line 1 has no column 'text', which data\.text_columns names"):
        load_sequences(data, "train", TOKENIZER)


def test_a_stream_among_others_needs_a_weight():
    with pytest.raises(ConfigError, match=r"'a' has stream = true and no weight.*Give all sources a weight"):
        DataConfig(sources=(DataSource(path="a", stream=True), DataSource(path="b")))
