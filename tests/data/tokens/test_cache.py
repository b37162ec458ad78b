"""Token stores at an address are copied once per host, checked, and read from the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pst_ds.config.data import DataConfig
from pst_ds.config.run import ConfigError
from pst_ds.data.preparation.pieces import Reading
from pst_ds.data.preparation.prepare import plan_store, prepare_store
from pst_ds.data.tokens.loading import load_sequences, require_named_tokenizer
from pst_ds.remote_folder import RemoteFolder

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).resolve().parents[1] / "tiny-llama")
TEXTS = ["the warm film", "the dull plot, the film", "plot", "a dull film of the plot"] * 5


@pytest.fixture
def store(alone, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare_store(plan_store([str(path)], TOKENIZER, Reading(), piece_bytes=200), TOKENIZER, tmp_path / "store")
    return tmp_path / "store"


def _load(tmp_path, where):
    return load_sequences(DataConfig(train=str(where), max_length=4, cache=str(tmp_path / "cache")), "train", TOKENIZER)


def test_a_store_at_an_address_is_fetched_once(store, tmp_path, monkeypatch):
    fetched = []
    get = RemoteFolder.get

    def counted(self, name, path):
        fetched.append(name)
        return get(self, name, path)

    monkeypatch.setattr(RemoteFolder, "get", counted)
    for _ in range(2):
        sequences = _load(tmp_path, f"file://{store}")
        assert sequences.digest == _load(tmp_path, store).digest
    assert len(fetched) == len(set(fetched)) == len(list(store.iterdir())) - 1
    # a file that was damaged in the cache comes again
    (cached,) = (tmp_path / "cache" / "tokens").glob("copy-*/documents.bin")
    cached.write_bytes(b"")
    _load(tmp_path, f"file://{store}")
    assert fetched[-1] == "documents.bin"


def test_damage_at_the_address_is_refused(store, tmp_path):
    documents = store / "documents.bin"
    data = documents.read_bytes()
    for changed, said in ((data[:-1], "has .* bytes there, but manifest.json says"), (b"\1" + data[1:], "SHA-256")):
        documents.write_bytes(changed)
        with pytest.raises(ConfigError, match=f"data.train = 'file://.*documents.bin .*{said}"):
            _load(tmp_path, f"file://{store}")


def test_an_address_without_tokens_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no manifest\.json and no files of tokens"):
        _load(tmp_path, f"file://{tmp_path}/empty")


def test_token_files_need_a_named_tokenizer(tmp_path):
    (tmp_path / "a.ds").write_bytes(b"\1\0")
    (tmp_path / "a.ds.index").write_bytes(b"\1" + bytes(7))
    data = DataConfig(train=str(tmp_path / "a.ds"))
    with pytest.raises(ConfigError, match=r"a\.ds is a file of datatrove, .* with model\.tokenizer"):
        require_named_tokenizer(data, "")
    require_named_tokenizer(data, "somewhere")
