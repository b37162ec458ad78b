"""Stores of tokens: what is written is what is read, piece by piece, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from pst_ds.config.run import ConfigError
from pst_ds.data.tokens.arrays import between
from pst_ds.data.tokens.store import (
    BYTES,
    LEARNED,
    MANIFEST,
    ShardWriter,
    finish_store,
    finished_shard,
    is_store,
    open_store,
    read_manifest,
)
from pst_ds.data.tokens.tokenize import Documents, TokenizerIdentity, identity_of, tokenize

TINY = Path(__file__).resolve().parents[1] / "tiny-llama"
TOKENIZER = AutoTokenizer.from_pretrained(TINY)
END = 2
IDENTITY = TokenizerIdentity(sha256="0" * 64, vocabulary=1000, end=END)
KINDS = frozenset({BYTES, LEARNED})

_documents = st.lists(st.lists(st.integers(3, 999), min_size=1, max_size=9), max_size=8)
_shards = st.lists(_documents, min_size=1, max_size=4)


def _as_documents(rows):
    """Documents that end with END, with made-up bytes and bits that depend on the tokens alone."""
    ended = [[*row, END] for row in rows]
    tokens = np.array([token for row in ended for token in row], dtype=np.int64)
    lengths = np.array([len(row) for row in ended], dtype=np.int64)
    return Documents(tokens, lengths, (tokens % 7).astype(np.uint32), tokens % 3 > 0, closed_by_us=bool(rows))


def write_store(folder, shards, identity=IDENTITY, kinds=KINDS):
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, rows in enumerate(shards):
        with ShardWriter(folder, number, identity, kinds) as shard:
            for row in rows:  # document by document, so that bits of a byte come in different calls
                shard.add(_as_documents([row]), len(row))
            records.append(shard.finish())
    return finish_store(folder, identity, records, {"sources": ["made up"]})


@given(_shards)
def test_a_store_gives_back_what_was_written(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("store")
    manifest = write_store(folder, shards)
    ended = [[*row, END] for rows in shards for row in rows]
    flat = [token for row in ended for token in row]
    expected = flat[:-1]  # the last end is ours, and stands between nothing
    stream = open_store(folder)
    assert stream.tokens[:].tolist() == expected
    assert stream.tokens.dtype == np.uint16
    starts = np.cumsum([0, *map(len, ended)])[:-1].tolist()
    assert between(stream.borders, 0, len(flat)).tolist() == starts
    assert (manifest.counts["tokens"], manifest.counts["documents"]) == (len(flat), len(ended))
    if expected:
        assert stream.num_bytes[:].tolist() == [token % 7 for token in expected]
        assert len(stream.learned) == len(stream)
        assert stream.learned[0 : len(expected)].tolist() == [token % 3 > 0 for token in expected]
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(("shard", "starts", "."))) == []


@given(_shards, st.data())
def test_any_window_is_that_of_the_whole(tmp_path_factory, shards, data):
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, shards)
    stream = open_store(folder)
    whole = stream.tokens[:].tolist()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert stream.tokens[start:stop].tolist() == whole[start:stop]
    assert stream.learned is None or stream.learned[start:stop].tolist() == [
        token % 3 > 0 for token in whole[start:stop]
    ]
    everywhere = between(stream.borders, 0, len(whole))
    inside = [place for place in everywhere.tolist() if start <= place < stop]
    assert between(stream.borders, start, stop).tolist() == inside


def test_the_digest_is_that_of_the_contents_alone(tmp_path):
    shards = [[[5, 6], [7]], [[8]]]
    one, same = write_store(tmp_path / "a", shards), write_store(tmp_path / "b", shards)
    other = write_store(tmp_path / "c", [[[5, 6], [7]], [[9]]])
    assert one.digest == same.digest == open_store(tmp_path / "a").digest
    assert other.digest != one.digest
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert (manifest["tokens"], manifest["documents"], manifest["dtype"]) == (7, 3, "uint16")


def test_large_vocabularies_take_four_bytes(tmp_path):
    dtypes = [TokenizerIdentity(sha256="", vocabulary=count, end=0).dtype for count in (65536, 65537)]
    assert dtypes == [np.uint16, np.uint32]
    identity = TokenizerIdentity(sha256="0" * 64, vocabulary=70000, end=END)
    with ShardWriter(tmp_path, 0, identity) as shard:
        shard.add(Documents(np.array([69999, END]), np.array([2])))
        record = shard.finish()
    finish_store(tmp_path, identity, [record], {})
    assert open_store(tmp_path).tokens[:].tolist() == [69999, END]  # which the tokenizer put there
    assert (tmp_path / "tokens-00000.bin").stat().st_size == 8


def test_nothing_is_left_of_a_shard_that_failed(tmp_path):
    def fail():
        with ShardWriter(tmp_path, 0, IDENTITY) as shard:
            shard.add(_as_documents([[5]]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert finished_shard(tmp_path, 0, IDENTITY.dtype) is None


def test_a_shard_counts_as_finished_when_all_of_it_is_there(tmp_path):
    with ShardWriter(tmp_path, 3, IDENTITY, KINDS) as shard:
        shard.add(_as_documents([[5, 6]]))
        assert finished_shard(tmp_path, 3, IDENTITY.dtype) is None
        record = shard.finish()
    assert finished_shard(tmp_path, 3, IDENTITY.dtype) == record
    (tmp_path / record.file(BYTES)).write_bytes(b"1234")
    assert finished_shard(tmp_path, 3, IDENTITY.dtype) is None


def _damage(folder, name):
    path, table = folder / MANIFEST, json.loads((folder / MANIFEST).read_text())
    match name:
        case "no manifest":
            path.unlink()
        case "no JSON":
            path.write_text("{")
        case "another kind":
            path.write_text("{}")
        case "a list":
            path.write_text("[]")
        case "a later version":
            path.write_text(json.dumps({**table, "version": 9}))
        case "a count changed":
            table["shards"][0]["tokens"] += 1
            path.write_text(json.dumps(table))
        case "a key is missing":
            del table["shards"]
            path.write_text(json.dumps(table))
        case "a shard cut short":
            (folder / "tokens-00001.bin").write_bytes(b"12")
        case "a shard gone":
            (folder / "tokens-00001.bin").unlink()
        case "borders cut short":
            (folder / "documents.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no manifest", ["has no manifest.json", "an unfinished one"]),
        ("no JSON", ["manifest.json is damaged"]),
        ("another kind", ["not the manifest of a token store"]),
        ("a list", ["not the manifest of a token store"]),
        ("a later version", ["has version 9", "reads 1"]),
        ("a count changed", ["was changed", "it states"]),
        ("a key is missing", ["is damaged", "'shards'"]),
        ("a shard cut short", ["tokens-00001.bin has 2 bytes", "says 4"]),
        ("a shard gone", ["tokens-00001.bin cannot be read", "No such file"]),
        ("borders cut short", ["documents.bin has 0 bytes", "says 24"]),
    ],
)
def test_a_store_that_is_not_whole_is_refused(tmp_path, name, words):
    write_store(tmp_path / "s", [[[5, 6], [7]], [[8]]])
    _damage(tmp_path / "s", name)
    with pytest.raises(ConfigError) as caught:
        open_store(tmp_path / "s")
    for word in [
        *words,
        str(tmp_path / "s"),
        ". Name a folder" if "not the manifest of a token store" in words else ". Prepare it again",
    ]:
        assert word in str(caught.value)


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
    write_store(tmp_path / "s", [[[5, 6]]])
    assert is_store(tmp_path / "s")
    open_store(tmp_path / "s", IDENTITY)
    other = TokenizerIdentity(sha256="1" * 64, vocabulary=500, end=END)
    with pytest.raises(ConfigError, match=r"another tokenizer: .* vocabulary of 1000 .*000000.* run's has 500 \(1111"):
        open_store(tmp_path / "s", other)


def test_identities_tell_tokenizers_apart_and_not_their_last_call():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.pad_token = tokenizer.eos_token
    before = identity_of(tokenizer)
    tokenizer(["film plot", "plot"], truncation=True, max_length=2, padding="max_length")
    assert identity_of(tokenizer) == before == identity_of(TOKENIZER)
    assert before.end == END
    assert before.vocabulary == len(tokenizer)
    tokenizer.add_tokens(["quixotic"])
    assert identity_of(tokenizer) != before
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text token"):
        identity_of(tokenizer)


_WORDS = ("film", "plot", "warm", "dull", "the")


@given(st.lists(st.lists(st.sampled_from(_WORDS), max_size=6).map(" ".join), max_size=12))
def test_tokens_without_a_count_are_those_of_the_tokenizers_call(texts):
    fast, counted = tokenize(texts, TOKENIZER), tokenize(texts, TOKENIZER, count=True)
    expected = [[*TOKENIZER(text)["input_ids"], END] for text in texts if text]
    assert fast.tokens.tolist() == counted.tokens.tolist() == [token for row in expected for token in row]
    assert fast.lengths.tolist() == counted.lengths.tolist() == [len(row) for row in expected]
    assert fast.closed_by_us == counted.closed_by_us == bool(expected)
    assert int(counted.num_bytes.sum()) == sum(map(len, texts))


def test_a_tokenizer_that_was_told_to_cut_and_pad_does_not():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["film plot", "plot"], truncation=True, max_length=2, padding="max_length")
    texts = ["the film the plot"]
    assert tokenize(texts, tokenizer).tokens.tolist() == tokenize(texts, TOKENIZER).tokens.tolist()


def test_a_tokenizers_own_end_is_kept(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    documents = tokenize(["film", "plot"], tokenizer)
    words = tokenizer.convert_tokens_to_ids(["film", "plot"])
    assert documents.tokens.tolist() == [words[0], END, words[1], END]
    assert not documents.closed_by_us
    with ShardWriter(tmp_path, 0, identity_of(tokenizer)) as shard:
        shard.add(documents)
        record = shard.finish()
    finish_store(tmp_path, identity_of(tokenizer), [record], {})
    assert open_store(tmp_path, identity_of(tokenizer)).tokens.tolist() == documents.tokens.tolist()
    assert read_manifest(tmp_path).shards[-1].closed_by_us is False
