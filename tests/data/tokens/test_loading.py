"""What a run file names becomes a mapped stream, tokenised once a host, and a mixture in a fixed order."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.config.toml import dump_run, run_from_table
from pst_ds.data.preparation.pieces import Reading
from pst_ds.data.preparation.prepare import plan_store, prepare_store
from pst_ds.data.tasks.causal_lm import SequenceBatches, collate_sequences
from pst_ds.data.tokens import loading as cache_module
from pst_ds.data.tokens.arrays import Bits
from pst_ds.data.tokens.loading import load_sequences
from pst_ds.data.tokens.mixed import MixedSequences
from pst_ds.data.tokens.sequences import Sequences
from pst_ds.data.tokens.tokenize import identity_of
from pst_ds.errors import InputError

TINY = Path(__file__).resolve().parents[1] / "tiny-llama"
TOKENIZER = AutoTokenizer.from_pretrained(TINY)
TEXTS = ["the warm film", "the dull plot, the film", "plot", "a dull film of the plot"] * 5


@pytest.fixture(autouse=True)
def _own_caches(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("PST_DS_CACHE", str(tmp_path / "cache"))


def _jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _data(path, **settings):
    return DataConfig(**{"train": str(path), "validation": str(path), "max_length": 4, **settings})


def _mix(*sources, **settings):
    return DataConfig(**{"sources": run_sources(sources), "max_length": 4, **settings})


def run_sources(sources):
    from pst_ds.config.data import DataSource

    return tuple(DataSource(**source) for source in sources)


def _prepare(path, out, **options):
    plan = plan_store([str(path)], TOKENIZER, Reading(), **options)
    prepare_store(plan, TOKENIZER, out)
    return out


def _never(*_, **__):
    raise AssertionError("it was tokenised again")


def test_a_store_gives_the_sequences_of_its_text(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl")
    out = _prepare(path, tmp_path / "s", count_bytes=True, piece_bytes=50)
    for split in ("train", "validation"):
        text, store = (load_sequences(_data(where), split, TOKENIZER) for where in (path, out))
        assert len(text) == len(store) > 5
        for i in range(len(text)):
            assert text[i].tokens.tolist() == store[i].tokens.tolist()
            assert text[i].starts.tolist() == store[i].starts.tolist()
        assert text.predicted_bytes == store.predicted_bytes
        assert text.num_predicted == store.num_predicted


def test_text_is_tokenised_once(tmp_path, monkeypatch):
    path = _jsonl(tmp_path / "a.jsonl")
    first = load_sequences(_data(path), "train", TOKENIZER)
    monkeypatch.setattr(cache_module, "tokenize", _never)
    again = load_sequences(_data(path), "train", TOKENIZER)
    assert first.digest == again.digest
    moved = path.rename(tmp_path / "moved.jsonl")
    assert load_sequences(_data(moved, max_length=6), "train", TOKENIZER).tokens.tolist() == first.tokens.tolist()
    with pytest.raises(AssertionError, match="again"):  # its bytes are counted
        load_sequences(_data(moved), "validation", TOKENIZER)


@pytest.mark.parametrize("change", ["text", "column", "tokenizer", "sample_by"])
def test_the_cache_knows_other_texts_settings_and_tokenizers(tmp_path, change):
    (tmp_path / "a.txt").write_text("the film\n\nthe plot\nwarm film\n" * 4)
    before = load_sequences(_data(tmp_path / "a.txt"), "train", TOKENIZER).digest
    tokenizer, settings, path = TOKENIZER, {}, tmp_path / "a.txt"
    match change:
        case "text":
            path.write_text("the film\n\nthe plot\ndull film\n" * 4)
        case "column":
            path = _jsonl(tmp_path / "a.jsonl")
            load_sequences(_data(path), "train", TOKENIZER)
            with pytest.raises(ConfigError, match="no column 'body'"):
                load_sequences(_data(path, text_columns=("body",)), "train", TOKENIZER)
            return
        case "tokenizer":
            tokenizer = AutoTokenizer.from_pretrained(TINY)
            tokenizer.add_tokens(["warm film"])
        case "sample_by":
            settings = {"sample_by": "paragraph"}
    assert load_sequences(_data(path, **settings), "train", tokenizer).digest != before


def test_a_damaged_cache_is_made_again(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl")
    first = load_sequences(_data(path), "train", TOKENIZER)
    (store,) = (tmp_path / "cache" / "tokens").iterdir()
    (store / "tokens-00000.bin").write_bytes(b"12")
    assert load_sequences(_data(path), "train", TOKENIZER).digest == first.digest


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PST_DS_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"PST_DS_CACHE.*is a file"):
        load_sequences(_data(_jsonl(tmp_path / "a.jsonl")), "train", TOKENIZER)


@pytest.mark.zero3
def test_one_rank_tokenises_for_all(run_ranks, tmp_path):
    path = _jsonl(tmp_path / "a.jsonl")

    def load():
        calls = []
        tokenize = cache_module.tokenize
        cache_module.tokenize = lambda *a, **k: calls.append(os.getpid()) or tokenize(*a, **k)
        return load_sequences(_data(path), "train", TOKENIZER).digest, len(calls)

    found = run_ranks(load, 3)
    assert len({digest for digest, _ in found}) == 1
    assert sorted(calls for _, calls in found)[:2] == [0, 0]
    assert sum(calls for _, calls in found) == 1


def test_many_files_are_read_as_prepare_reads_them(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl(tmp_path / "a.jsonl", TEXTS[:9]).read_bytes()))
    _jsonl(folder / "b.jsonl", TEXTS[9:])
    whole = load_sequences(_data(_jsonl(tmp_path / "all.jsonl")), "train", TOKENIZER)
    for where in (folder, folder / "*.jsonl*"):
        assert load_sequences(_data(where), "train", TOKENIZER).tokens[:].tolist() == whole.tokens[:].tolist()
    with pytest.raises(InputError, match=r"no column 'body', which data\.text_columns names"):
        load_sequences(_data(folder, text_columns=("body",)), "train", TOKENIZER)


# --- mixtures -----------------------------------------------------------------------------------------------------


def _sequences(count, length=4, first=0):
    return Sequences(np.arange(first, first + count * length), length, borders=np.array([0]))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 99), st.data())
def test_without_weights_every_sequence_comes_once_in_an_epoch(counts, seed, data):
    mixed = MixedSequences(tuple(_sequences(count) for count in counts))
    epoch = data.draw(st.integers(0, 5))
    numbers = np.arange(epoch * len(mixed), (epoch + 1) * len(mixed))
    assert sorted(mixed.ordered(numbers, seed).tolist()) == list(range(sum(counts)))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 99), st.data()
)
def test_with_weights_each_source_is_gone_through_pass_by_pass(sources, seed, data):
    counts, weights = [count for count, _ in sources], [float(weight) for _, weight in sources]
    mixed = MixedSequences(tuple(_sequences(count) for count in counts), tuple(weights))
    found = mixed.ordered(np.arange(400), seed)
    starts = np.cumsum([0, *counts])
    for i, (count, weight) in enumerate(sources):
        own = found[(found >= starts[i]) & (found < starts[i + 1])]
        assert abs(len(own) - 400 * weight / sum(weights)) < 1
        for first in range(0, len(own), count):
            part = own[first : first + count].tolist()
            assert len(set(part)) == len(part)
    first = data.draw(st.integers(0, 399))
    assert mixed.ordered(np.arange(first, 400), seed).tolist() == found[first:].tolist()


@given(st.integers(3, 60), st.integers(1, 3), st.integers(0, 9))
def test_batches_are_the_same_wherever_a_run_goes_on_and_for_every_world_size(count, ranks, first):
    sequences = _sequences(count)
    batches = SequenceBatches(sequences.lengths, 6, 7, sequences=sequences) if count >= 6 else None
    if batches is None:
        return
    whole = [batch for batch, _ in zip(batches.after(0), range(20), strict=False)]
    later = [batch for batch, _ in zip(batches.after(first), range(20 - first), strict=False)]
    assert later == whole[first:]
    for batch in whole:
        cut = [batches.micro_batches(batch, rank, ranks, 1) for rank in range(ranks)]
        assert [i for micro in cut for indices in micro for i in indices] == batch
    taken = [i for batch in whole for i in batch]
    for start in range(0, len(taken) - count, count):
        assert sorted(taken[start : start + count]) == list(range(count))


def test_a_mixture_of_a_store_and_text(tmp_path):
    text = _jsonl(tmp_path / "a.jsonl", TEXTS[:8])
    store = _prepare(_jsonl(tmp_path / "b.jsonl", TEXTS[8:]), tmp_path / "s")
    sources = ({"path": str(text), "weight": 0.25}, {"path": str(store), "weight": 0.75})
    mixed = load_sequences(_mix(*sources), "train", TOKENIZER)
    parts = [load_sequences(_data(path), "train", TOKENIZER) for path in (text, store)]
    assert len(mixed) == len(parts[0]) + len(parts[1])
    for i in range(len(mixed)):
        part, inside = (parts[0], i) if i < len(parts[0]) else (parts[1], i - len(parts[0]))
        assert mixed[i].tokens.tolist() == part[inside].tokens.tolist()
        assert mixed[i].starts.tolist() == part[inside].starts.tolist()
    batch = collate_sequences(mixed, [0, len(parts[0])])
    assert batch["input_ids"].tolist() == [mixed[0].tokens.tolist(), mixed[len(parts[0])].tokens.tolist()]
    other = ({**sources[0], "weight": 0.5}, {**sources[1], "weight": 0.5})
    assert load_sequences(_mix(*other), "train", TOKENIZER).digest != mixed.digest
    assert load_sequences(_mix(*sources), "train", TOKENIZER).digest == mixed.digest


def test_tokens_that_are_not_learned_have_no_label():
    bits = Bits(np.packbits([0, 1, 1, 0, 1, 1, 0, 0], bitorder="little"), 8)
    sequences = Sequences(np.arange(10, 18), 4, borders=np.array([0, 5]), learned=bits)
    batch = collate_sequences(sequences, [0, 1])
    assert batch["labels"].tolist() == [[-100, 11, 12, -100], [-100, -100, -100, -100]]
    assert sequences.num_predicted == 2
    evaluated = Sequences(np.arange(10, 18), 4, 1, borders=np.array([0, 5]), learned=bits)
    labels = [collate_sequences(evaluated, [i])["labels"][0].tolist() for i in range(len(evaluated))]
    assert evaluated.num_predicted == sum(label != -100 for row in labels for label in row)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([{"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.4}], ["[0.5, 0.4]", "sum is 0.9", "add up to 1"]),
        ([{"path": "a", "weight": 1.0}, {"path": "b"}], ["[1.0, 0.0]", "above 0"]),
        ([{"path": "a", "weight": -1.0}], ["weight = -1.0", "at least 0"]),
        ([{"path": ""}], ["data.sources.path", "empty"]),
        ([{"path": "a", "kind": "pictures"}], ["kind = 'pictures'", "'chat'"]),
        ([{"pth": "a"}], ["unknown key", "Did you mean 'path'"]),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(sources, words):
    table = {
        "output_dir": "r", "task": "causal-lm", "model": {"path": str(TINY)}, "data": {"sources": sources},
        "train": {"num_steps": 1, "batch_size": 1},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        run_from_table(table)
    for word in words:
        assert word in str(caught.value)


def test_sources_survive_the_run_file_and_go_with_one_task():
    import tomllib

    table = {
        "output_dir": "r", "task": "causal-lm", "model": {"path": str(TINY)},
        "train": {"num_steps": 1, "batch_size": 1},
        "data": {"sources": [{"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.5}]},
    }  # fmt: skip
    run = run_from_table(table)
    assert run_from_table(tomllib.loads(dump_run(run))) == run
    with pytest.raises(ConfigError, match=r"data\.sources are for task 'causal-lm', not for 'classification'"):
        run_from_table({**table, "task": "classification"})
    with pytest.raises(ConfigError, match=r"with data\.sources"):
        run_from_table({**table, "data": {**table["data"], "train": "a.jsonl"}})


def test_sources_that_are_not_there_are_named():
    with pytest.raises(InputError, match="'no' does not exist"):
        load_sequences(_mix({"path": "no"}), "train", TOKENIZER)


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
    out = _prepare(_jsonl(tmp_path / "a.jsonl"), tmp_path / "s")
    other = AutoTokenizer.from_pretrained(TINY)
    other.add_tokens(["warm film"])
    with pytest.raises(ConfigError, match=f"another tokenizer: .* vocabulary of {identity_of(TOKENIZER).vocabulary}"):
        load_sequences(_data(out), "train", other)
