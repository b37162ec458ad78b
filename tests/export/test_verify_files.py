"""``verify`` refuses an export of any format as soon as one byte of one of its files differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pst_ds.cli.main import main
from pst_ds.errors import InputError
from pst_ds.export.verify import verify
from pst_ds.file_names import CARD_FILE, MANIFEST_FILE
from pst_ds.inference.onnx import folder as onnx_folder
from pst_ds.writing.manifest import sealed

PRODUCTS = {
    "dense": [],
    "sharded": ["--format", "bitmask", "--shard-bytes", "30000"],
    "int8": ["--format", "bitmask", "--values", "int8", "--embeddings", "int8"],
    "model.gguf": ["--format", "gguf", "--values", "int8"],
    "onnx": ["--format", "onnx"],
}
"""Options of the export, by the name of its folder or file."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama with zeros, and files of sentence-transformers next to it."""
    path = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".layers." in name and param.dim() == 2:
                param[torch.rand(param.shape) < 0.5] = 0.0
    model.save_pretrained(path)
    letters = Tokenizer(BPE({letter: number for number, letter in enumerate("abcdefghij")}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(path)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return path


@pytest.fixture(scope="module")
def products(source, tmp_path_factory):
    """One export per product; those whose libraries are missing are left out."""
    top = tmp_path_factory.mktemp("products")
    exported = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, options in PRODUCTS.items():
            if "onnx" in name and not (_has("onnxruntime") and any(map(shutil.which, ("c++", "g++", "clang++")))):
                continue
            if name.endswith(".gguf") and not _has("gguf"):
                continue
            patch.setattr(onnx_folder, "EXTERNAL_BYTES", 0)
            assert main(["export", str(source), *options, "--out", str(top / name), "--quiet"]) == 0
            verify(top / name)
            exported[name] = top / name
    return exported


def _has(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def _files(product: Path) -> list[Path]:
    """All files of a product but the card, which users may edit."""
    files = [product] if product.is_file() else sorted(path for path in product.rglob("*") if path.is_file())
    return [path for path in files if path.name != CARD_FILE]


def test_every_format_has_its_weight_files(products):
    assert {path.name for product in products.values() for path in _files(product)} >= {
        "model.safetensors",
        "pst_bitmask-00001-of-00003.safetensors",
        *(["model.gguf"] if "model.gguf" in products else []),
        *(["model.onnx", "model.onnx.data"] if "onnx" in products else []),
    }


def _is_same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_byte_that_differs_anywhere_is_refused(products, data):
    product = products[data.draw(st.sampled_from(sorted(products)))]
    path = data.draw(st.sampled_from(_files(product)))
    content = path.read_bytes()
    offset = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 400_000))
    xor = data.draw(st.integers(0, 255))
    damaged = bytearray(content)
    if xor:
        damaged[offset] ^= xor
    else:
        damaged[offset : offset + length] = bytes(len(damaged[offset : offset + length]))
    assume(damaged != content)
    path.write_bytes(damaged)
    try:
        if path.name == MANIFEST_FILE and _is_same_json(damaged, content):
            return  # white space, which changes no value
        with pytest.raises(InputError) as refusal:
            verify(product)
        assert str(product) in str(refusal.value)
    finally:
        path.write_bytes(content)


def test_a_file_that_is_cut_or_longer_is_refused(products):
    for product in products.values():
        for path in _files(product):
            content = path.read_bytes()
            for changed in (content[:-2], content + b"\0", b""):
                path.write_bytes(changed)
                with pytest.raises(InputError):
                    verify(product)
            path.write_bytes(content)


def _without_weight_sums(product: Path, target: Path) -> Path:
    """Copy an export, with a manifest as earlier versions wrote it: without the SHA-256 of weight files."""
    shutil.copytree(product, target)
    table = json.loads((target / MANIFEST_FILE).read_text())
    weights = (".safetensors", ".onnx", ".data")
    table["files"] = {name: sha256 for name, sha256 in table["files"].items() if not name.endswith(weights)}
    table.pop("files_in_folders", None)
    (target / MANIFEST_FILE).write_text(json.dumps(sealed(table)))
    return target


@pytest.mark.parametrize("name", ["sharded", "onnx"])
def test_files_of_which_an_older_manifest_has_no_sha256_are_named(products, tmp_path, capsys, name):
    if name not in products:
        pytest.skip("needs ONNX Runtime and a C++ compiler")
    assert main(["verify", str(products[name])]) == 0
    assert "NOT VERIFIED" not in capsys.readouterr().out
    assert main(["verify", str(_without_weight_sums(products[name], tmp_path / "older"))]) == 0
    printed = capsys.readouterr().out
    assert "NOT VERIFIED" in printed
    assert ("pst_bitmask-00001" if name == "sharded" else "model.onnx, model.onnx.data") in printed


def test_a_graph_next_to_other_weights_is_refused(products, tmp_path):
    folder = shutil.copytree(products["dense"], tmp_path / "dense")
    (folder / "model.onnx").write_bytes(b"anything")
    with pytest.raises(InputError, match=r"does not list: model\.onnx"):
        verify(folder)


def test_a_gguf_file_without_a_sha256_is_refused(products, tmp_path):
    if "model.gguf" not in products:
        pytest.skip("needs the package gguf")
    content = products["model.gguf"].read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(content.replace(b"pst_ds.sha256", b"pst_ds.sha255"))
    with pytest.raises(InputError, match=r"has no pst_ds\.sha256"):
        verify(other)
    other.write_bytes(b"a text")
    with pytest.raises(InputError, match="is not a GGUF file"):
        verify(other)
    with pytest.raises(InputError, match="does not exist"):
        verify(tmp_path / "missing.gguf")
    with pytest.raises(InputError, match=r"^against = .*llama\.cpp computes .*Omit it"):
        verify(products["model.gguf"], against="runs/mine")
