"""Models of the hub by name, on a local server: what is downloaded in which state of the cache, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pst_ds.errors import InputError
from pst_ds.formats import hub
from pst_ds.formats.base_weights import BaseWeights
from tests.hub_server import files_of, serving, use_hub
from tests.pairs import every_pair

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="session")
def repositories(tmp_path_factory):
    """A tiny Llama as one safetensors file next to what nobody needs, in three shards, and as a PyTorch file only."""
    top = tmp_path_factory.mktemp("repositories")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tests/data/tiny-llama")
    nbytes = sum(param.numel() * param.element_size() for param in model.parameters())
    for name in ("whole", "sharded", "pytorch", "empty"):
        shutil.copytree(ROOT / "tests/data/tiny-llama", top / name)
    for name in ("sharded", "pytorch", "empty"):
        (top / name / "model.safetensors").unlink()
    model.save_pretrained(top / "sharded", max_shard_size=nbytes // 2)
    torch.save(model.state_dict(), top / "pytorch" / "pytorch_model.bin")
    (top / "whole" / "onnx").mkdir()
    for name in ("pytorch_model.bin", "model.h5", "flax_model.msgpack", "onnx/model.onnx", "onnx/config.json"):
        (top / "whole" / name).write_bytes(b"not needed")
    (top / "whole" / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1-of-2.bin"}}')
    (top / "whole" / "1_Pooling").mkdir()
    (top / "whole" / "1_Pooling" / "config.json").write_text("{}")
    return top


@pytest.fixture
def server(repositories):
    with serving() as server:
        server.repositories |= {f"who/{path.name}": path for path in repositories.iterdir()}
        yield server


@pytest.fixture
def online(server, tmp_path, monkeypatch):
    use_hub(monkeypatch, tmp_path / "cache", server.url)
    return server


def _weights(repositories, name):
    return {file for file in files_of(repositories / name) if file.startswith("model") and "safetensors" in file}


def _own(received, name):
    return {file.removeprefix(f"who/{name}/") for file in received}


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_an_empty_cache_gets_one_format_of_the_weights_and_small_files_once(online, repositories, name):
    weights = BaseWeights(f"who/{name}", "model")
    more = {"1_Pooling/config.json"} if name == "whole" else set()
    wanted = SMALL | more | _weights(repositories, name)
    assert _own(online.received(), name) == wanted == set(files_of(weights.folder))
    expected = load_file(ROOT / "tests/data/tiny-llama/model.safetensors")
    assert expected.keys() == set(weights.names)
    assert all(torch.equal(weights.read(key), tensor) for key, tensor in expected.items())
    online.sent.clear()
    assert BaseWeights(f"who/{name}", "model").folder == weights.folder
    assert not online.sent


def test_weights_that_are_only_a_pytorch_file_are_downloaded(online):
    assert "pytorch_model.bin" in files_of(BaseWeights("who/pytorch", "model", reads_values=False).folder)


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_headers_are_read_without_the_values(online, name):
    remote = BaseWeights(f"who/{name}", "model", reads_values=False)
    assert not list(remote.folder.glob("*.safetensors"))
    local = BaseWeights(ROOT / "tests/data/tiny-llama", "model")
    assert set(remote.names) == set(local.names)
    assert all(remote.size(key) == local.size(key) for key in local.names)
    assert remote.find("embed_tokens.weight") == local.find("embed_tokens.weight")


def _partial(server, state, monkeypatch, cache):
    """Fill the cache with a part of who/sharded."""
    use_hub(monkeypatch, cache, server.url)
    folder = hub.downloaded("who/sharded")
    shards = sorted(folder.glob("model-*.safetensors"))
    removed = {
        "nothing": [],
        "a shard": shards[1:2],
        "the weights": [*shards, folder / "model.safetensors.index.json"],
        "everything": [path for path in folder.iterdir() if path.is_file()],
    }[state]
    for path in removed:
        path.resolve().unlink()
        path.unlink()
    server.sent.clear()
    return folder, removed


@pytest.mark.parametrize("state", ["nothing", "a shard", "the weights"])
def test_only_missing_files_are_downloaded(server, state, tmp_path, monkeypatch):
    folder, removed = _partial(server, state, monkeypatch, tmp_path / "cache")
    assert hub.downloaded("who/sharded") == folder
    assert _own(server.received(), "sharded") == {path.name for path in removed}
    assert not hub.missing_weights(folder)


@every_pair
@pytest.mark.parametrize("without", ["the setting", "the network"])
@pytest.mark.parametrize("state", ["nothing", "a shard", "the weights", "everything"])
def test_a_machine_without_the_hub_names_the_first_missing_file_and_the_command(
    server, state, without, tmp_path, monkeypatch
):
    folder, removed = _partial(server, state, monkeypatch, tmp_path / "cache")
    use_hub(monkeypatch, tmp_path / "cache", None)
    if without == "the network":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if not removed:
        assert hub.downloaded("who/sharded") == folder
        assert hub.remote_headers("who/sharded") is None
        return
    first = {"a shard": removed[0].name, "the weights": "model.safetensors", "everything": "config.json"}[state]
    reason = (
        "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" if without == "the setting" else "the hub cannot be reached"
    )
    for look in (hub.downloaded, hub.remote_headers):
        with pytest.raises(hub.NotDownloadedError) as caught:
            look("who/sharded")
        assert str(caught.value).startswith(f"{first} of who/sharded is not in the hub's cache, and {reason}")
        assert "Run hf download who/sharded where" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("who/nobody", "who/nobody is not on the hub, or is private"),
        ("who/whole", "who/whole is gated. Accept its terms"),
        ("who/empty", "who/empty has no model.safetensors or pytorch_model.bin on the hub"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_message(online, name, message):
    online.gated.add("who/whole")
    with pytest.raises(InputError, match=message) as caught:
        hub.downloaded(name)
    assert not isinstance(caught.value, hub.NotDownloadedError)


def test_a_newer_revision_is_downloaded_as_a_whole(online, repositories, tmp_path):
    before = hub.downloaded("who/sharded")
    online.repositories["who/sharded"] = shutil.copytree(repositories / "sharded", tmp_path / "newer")
    config = json.loads((tmp_path / "newer" / "config.json").read_text())
    (tmp_path / "newer" / "config.json").write_text(json.dumps(config | {"note": "newer"}))
    hub.require_file("who/sharded", "config.json")  # as transformers does for every command
    after = hub.downloaded("who/sharded")
    assert after != before
    assert set(files_of(after)) == set(files_of(before))


def test_safetensors_come_before_pytorch_files_as_in_transformers(repositories):
    weights = BaseWeights(repositories / "whole", "model")  # which has an index of PyTorch files too
    assert weights.read("model.norm.weight").shape == (32,)
