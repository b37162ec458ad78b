"""Files of a stranger with values of other types: a verb that reads them works, or has one message and exit code 2."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pst_ds.checkpoint.user_store import INDEX, Common, UserStore
from pst_ds.cli.main import build_parser, main
from pst_ds.core.packings import ONNX_FILE
from pst_ds.errors import InputError
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.nn.folder_facts import data_of_run, origin_of, read_facts, sparsity_of
from pst_ds.writing.manifest import sealed
from tests.inference.encoder.conftest import encoders, sentences
from tests.pairs import every_pair

__all__ = ["encoders"]
DATA = Path(__file__).resolve().parents[1] / "data"
TIMES = int(os.environ.get("PST_DS_FUZZ_TIMES", "1"))
STRANGE = [None, True, 5, -1, 1.5, 10**400, "x", [], ["x"], [5], {}, {"a": 1}]
LAYER = "model.layers.0.mlp.up_proj"
FACTS = {
    "base_model": "base",
    "base_fingerprint": "ab",
    "sparsity_measured": 0.5,
    "run": {"data": {"max_length": 48, "text_columns": ["text"]}},
}


def _sealed(table):
    return json.dumps(sealed(table) if isinstance(table, dict) else table)


@pytest.fixture(scope="module")
def top(tmp_path_factory, encoders):
    """The folders "packed" and "int8" of language models and "embedder", all with :data:`FACTS`, a "store" of a user,
    and "data.jsonl"."""
    top = tmp_path_factory.mktemp("strange")
    shutil.copytree(DATA / "tiny-llama", top / "dense")
    tensors = load_file(top / "dense" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[::2] = 0.0
    save_file(tensors, top / "dense" / "model.safetensors", {"format": "pt"})
    bitmask = ("--format", "bitmask")
    assert main(["export", str(top / "dense"), *bitmask, "--out", str(top / "packed")]) == 0
    assert main(["export", str(top / "dense"), *bitmask, "--values", "int8", "--out", str(top / "int8")]) == 0
    assert main(["export", str(encoders / "embedder"), *bitmask, "--out", str(top / "embedder")]) == 0
    (top / "embedder" / "sentence_bert_config.json").write_text('{"max_seq_length": 40, "do_lower_case": false}')
    for folder in ("packed", "int8", "embedder"):
        path = top / folder / MANIFEST_FILE
        path.write_text(_sealed(json.loads(path.read_text()) | FACTS))
    (top / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(3)))
    rows, columns = tensors[f"{LAYER}.weight"].shape
    common = Common(
        form="beside", task="causal_lm", labels=[], base_path="base", base_fingerprint="ab", masks_sha256={},
        shared_sha256="ef", beta=1.0, dtype="fp32",
        shapes={f"{LAYER}.personal_U": [rows, 2], f"{LAYER}.personal_V": [2, columns]},
    )  # fmt: skip
    store = UserStore.create(top / "store", common)
    store.add("Ann", {name: torch.ones(shape) for name, shape in common.shapes.items()}, rows=7, steps=3, loss=0.5)
    return top


def _places(value, at=()):
    """The places of all values in a JSON file, but only two of a list, and its own."""
    yield at
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(min(len(value), 2)):
            yield from _places(value[key], (*at, key))


def _replaced(table, place, value):
    if not place:
        return value
    copied = json.loads(json.dumps(table))
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copied


def _strange_files(path, count, *, without=()):
    """Yield ``count`` times what was replaced in the file at ``path``, which holds it meanwhile."""
    original = path.read_bytes()
    table = json.loads(original)
    known = {key: value for key, value in table.items() if key not in without} if isinstance(table, dict) else table
    changes = [(place, value) for place in _places(known) for value in STRANGE]
    random.Random(path.name).shuffle(changes)
    write = _sealed if path.name == MANIFEST_FILE else json.dumps
    for place, value in changes[: count * TIMES]:
        path.write_text(write(_replaced(table, place, value)))
        try:
            yield place, value
        finally:
            path.write_bytes(original)


def _ends(capsys, words):
    """Exit code of a verb, which says one thing if it refuses its input."""
    capsys.readouterr()
    code = main(list(map(str, words)))
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    return code


FILES_OF_GENERATE = [
    *((folder, name) for folder in ("packed", "int8") for name in ("config.json", "tokenizer_config.json")),
    *(("packed", name) for name in (MANIFEST_FILE, "generation_config.json")),
    ("store", INDEX),
]


@pytest.mark.parametrize(("folder", "name"), FILES_OF_GENERATE)
def test_generate_has_text_or_one_message(top, capsys, folder, name):
    model = top / folder if folder != "store" else top / "packed"
    words = ["generate", model, "--prompt", "the film is", "--max-new-tokens", "2", "--threads", "1"]
    if name in (MANIFEST_FILE, INDEX):
        words += ["--store", top / "store", "--user", "Ann"]
    assert _ends(capsys, words) == 0
    codes = {_ends(capsys, words) for _ in _strange_files(top / folder / name, 40, without=("tensors", "files"))}
    assert 2 in codes


@pytest.mark.parametrize(
    "name", [MANIFEST_FILE, "config.json", "sentence_bert_config.json", "modules.json", "1_Pooling/config.json"]
)
def test_predict_has_embeddings_or_one_message(top, capsys, name):
    words = ["predict", top / "embedder", "--data", top / "data.jsonl", "--out", top / "out.jsonl", "--threads", "1"]
    assert _ends(capsys, words) == 0
    codes = {_ends(capsys, words) for _ in _strange_files(top / "embedder" / name, 40, without=("tensors", "files"))}
    assert 2 in codes


@pytest.mark.parametrize(
    ("folder", "name"),
    [("store", INDEX), ("int8", "config.json"), ("packed", "generation_config.json"), ("embedder", MANIFEST_FILE)],
)
def test_serve_starts_or_has_one_message(top, monkeypatch, folder, name):
    pytest.importorskip("fastapi")
    from pst_ds.cli.serve import service
    from pst_ds.inference.serve.batches import Batches
    from pst_ds.inference.serve.encoders import Batcher
    from pst_ds.inference.serve.slots import Slots

    for worker in (Slots, Batches, Batcher):
        monkeypatch.setattr(worker, "start", lambda worker: None)
    words = ["serve", str(top / folder), "--threads", "1", "--memory", "0.01", "--engine", "auto"]
    if folder == "store":
        words = ["serve", str(top / "packed"), "--threads", "1", "--store", str(top / "store")]
    elif folder != "int8":
        words = ["serve", str(top / folder), "--threads", "1"]

    def is_refused():
        args = build_parser("serve").parse_args(words)
        try:
            service.service_of(args, *service.opened(args))
        except InputError:
            return True
        return False

    assert not is_refused()
    refused = [is_refused() for _ in _strange_files(top / folder / name, 20, without=("tensors", "files"))]
    assert any(refused)


@every_pair
@pytest.mark.parametrize("place", [*_places(FACTS)])
@pytest.mark.parametrize("value", STRANGE, ids=ascii)
def test_facts_have_their_types_or_the_file_is_named(tmp_path, place, value):
    """Everything that is read of a manifest, for each of its readers."""
    path = tmp_path / MANIFEST_FILE
    path.write_text(json.dumps(_replaced(FACTS, place, value)))
    try:
        facts = read_facts(tmp_path)
    except InputError:
        for read in (read_facts, data_of_run, sparsity_of, lambda folder: origin_of(str(folder))):
            with pytest.raises(InputError, match=f"^{re.escape(str(path))} is damaged: "):
                read(tmp_path)
        return
    assert isinstance(facts.base_fingerprint, str | None)
    assert isinstance(origin_of(str(tmp_path)), str)
    assert isinstance(sparsity_of(tmp_path), float)
    data = data_of_run(tmp_path)
    assert data.max_length is None or type(data.max_length) is int
    assert data.text_columns is None or all(type(name) is str for name in data.text_columns)


@pytest.mark.parametrize("text", ["[]", "{", "5", '{"activation_bits": "8"}', '{"operators": 5}'])
def test_the_metadata_of_a_graph_have_their_types(tmp_path, text):
    from pst_ds.export.verify.onnx import _written_in

    with pytest.raises(InputError, match=r"model\.onnx: its metadata is damaged"):
        _written_in(tmp_path / ONNX_FILE, text)


def test_a_list_of_users_is_read_or_refused(top, capsys):
    words = ["users", "list", top / "store"]
    assert _ends(capsys, words) == 0
    assert {_ends(capsys, words) for _ in _strange_files(top / "store" / INDEX, 400)} == {0, 2}
