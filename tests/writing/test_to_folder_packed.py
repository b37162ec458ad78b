"""Packed exports: every format from a run and from every other, to the bit."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pst_ds.writing import write
from pst_ds.writing.check import check_export, check_model
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import read_manifest
from tests.exporting import export_folder, row_bits_by_numpy

FILES = {"dense": "model", "bitmask": "pst_bitmask", "2:4": "pst_2of4", "csr": "pst_csr"}
HAVE = {"llama": ["bitmask", "csr"], "2:4": ["bitmask", "2:4", "csr"], "bf16": ["bitmask", "csr"],
        "gpt2": ["bitmask", "csr"]}  # fmt: skip
CASES = [(name, packing) for name, packings in HAVE.items() for packing in packings]


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _unpacked_by_numpy(folder: Path, packing: str) -> dict[str, np.ndarray]:
    """(O, I) of every packed weight, its values as unsigned integers, by code that is not ours."""
    tensors, dense = _stored(folder), {}
    for name in [name for name in tensors if name.endswith(".shape")]:
        module = name.removesuffix(".shape")
        rows, columns = tensors[name].flatten().tolist()
        values = tensors[f"{module}.{'values' if packing == 'csr' else 'compressed'}"]
        values = values.view(torch.int16 if values.element_size() == 2 else torch.int32).numpy()
        if packing == "csr":
            parts = (values, tensors[f"{module}.col_indices"].numpy(), tensors[f"{module}.crow_indices"].numpy())
            dense[module] = np.asarray(csr_matrix(parts, shape=(rows, columns)).todense())
            continue
        bits = row_bits_by_numpy(tensors[f"{module}.bitmask"], rows)
        keep = np.unpackbits(bits, axis=1, bitorder="little")[:, :columns]
        assert keep.sum() == values.size
        dense[module] = np.zeros((rows, columns), values.dtype)
        dense[module][keep == 1] = values.reshape(-1)
    return dense


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t.view(torch.uint8), other[n].view(torch.uint8))
        for n, t in one.items()
    )


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory):
    """Folder of every model in every format that it has, by (name, format)."""
    top = tmp_path_factory.mktemp("exports")
    made = {}
    for name, pruned in models.items():
        for packing in ["dense", *HAVE[name]]:
            made[name, packing] = top / f"{name}-{packing}".replace(":", "of")
            pruned.export(made[name, packing], packing=packing)
    return made


@pytest.mark.parametrize(("name", "packing"), CASES)
def test_parts_hold_what_the_masked_model_multiplied_with(models, exports, name, packing):
    folder = exports[name, packing]
    expected = models[name].masked_weights()
    unpacked = _unpacked_by_numpy(folder, packing)
    assert unpacked.keys() == {weight.removesuffix(".weight") for weight in expected}
    for weight, tensor in expected.items():
        tensor = tensor.t() if name == "gpt2" else tensor
        as_int = tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()
        assert np.array_equal(unpacked[weight.removesuffix(".weight")], as_int), weight
    others = {n: t for n, t in _stored(exports[name, "dense"]).items() if n not in expected}
    assert _same(others, {n: t for n, t in _stored(folder).items() if n in others})
    assert check_export(folder)["packed_tensors"] == len(expected)
    check_model(folder)


@pytest.mark.parametrize(("name", "packing"), CASES)
def test_the_folder_is_named_so_that_plain_transformers_finds_no_weights(exports, name, packing):
    folder = exports[name, packing]
    assert [path.name for path in folder.glob("*.safetensors")] == [f"{FILES[packing]}.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    compressed = any(t.dim() == 1 for n, t in _stored(folder).items() if n.endswith(".bitmask"))
    assert compressed == ((name, packing) == ("bf16", "bitmask"))  # the others are too small, or at 50 %
    assert config["quantization_config"] == {
        "quant_method": "pst_ds", "format": packing, "format_version": 3 if compressed else 1,
        "weights_file": f"{FILES[packing]}.safetensors",
    }  # fmt: skip
    with safe_open(folder / f"{FILES[packing]}.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not list(folder.glob("model*"))


@pytest.mark.parametrize(
    ("name", "first", "second"), [(n, a, b) for n, fs in HAVE.items() for a, b in product(["dense", *fs], fs)]
)
def test_every_format_becomes_every_other_and_dense_again_to_the_bit(exports, tmp_path, name, first, second):
    export_folder(exports[name, first], tmp_path / "second", packing=second)
    export_folder(tmp_path / "second", tmp_path / "dense")
    assert _same(_stored(tmp_path / "dense"), _stored(exports[name, "dense"]))
    for folder in (tmp_path / "second", tmp_path / "dense"):
        said, before = check_export(folder), check_export(exports[name, "dense"])
        assert {said[k] for k in ("pruned_tensors", "sparsity_measured")} == {
            before[k] for k in ("pruned_tensors", "sparsity_measured")
        }
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "dense", exports[name, "dense"]))
    assert config == before
    _, about = read_manifest(tmp_path / "dense")
    assert (about["step"], about["base_fingerprint"], about["metrics"]) == (3, "f00d", {"loss": 1.5})


@pytest.mark.parametrize(("name", "packing"), [("bf16", "bitmask"), ("gpt2", "dense"), ("2:4", "2:4")])
def test_shards_hold_whole_tensors_and_the_index_names_them(models, exports, tmp_path, name, packing):
    out, stem = tmp_path / "sharded", FILES[packing]
    models[name].export(out, packing=packing, shard_bytes=6000)
    tensors = _stored(out)
    assert _same(tensors, _stored(exports[name, packing]))
    index = json.loads((out / f"{stem}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for file in {*index["weight_map"].values()}:
        held = load_file(out / file)
        assert {n for n, at in index["weight_map"].items() if at == file} == held.keys()
        assert sum(t.nbytes for t in held.values()) <= 6000 or len({n.rpartition(".")[0] for n in held}) == 1
    check_export(out)
    if packing != "dense":
        weights_file = json.loads((out / "config.json").read_text())["quantization_config"]["weights_file"]
        assert weights_file == f"{stem}.safetensors.index.json"
    export_folder(out, tmp_path / "again")
    assert _same(_stored(tmp_path / "again"), _stored(exports[name, "dense"]))


@pytest.mark.parametrize("packing", ["dense", "csr"])
def test_an_error_midway_leaves_the_older_export(models, tmp_path, monkeypatch, packing):
    models["llama"].export(tmp_path / "out", packing="bitmask")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "detect_pattern", fail)
    with pytest.raises(KeyboardInterrupt):
        models["llama"].export(tmp_path / "out", packing=packing)
    assert calls
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(models, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(ExportError, match=r"out needs [\d,]+ bytes, and the disk has 1,000 free. Free space"):
        models["llama"].export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_four_of_another_model_is_refused_and_of_a_mixed_one_packs_what_fits(models, tmp_path, exports):
    with pytest.raises(ExportError, match=r'no weight would be smaller as 2:4.*Train with pst.pattern = "2:4"'):
        models["llama"].export(tmp_path / "out", packing="2:4")
    with pytest.raises(ExportError, match="no weight would be smaller as 2:4"):
        export_folder(exports["llama", "bitmask"], tmp_path / "out", packing="2:4")
    assert list(tmp_path.iterdir()) == []
    model = AutoModelForCausalLM.from_pretrained(exports["2:4", "dense"])
    spoiled = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        weight = model.get_parameter(spoiled)
        weight[0, :4] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    model.save_pretrained(tmp_path / "mixed")
    said = export_folder(tmp_path / "mixed", tmp_path / "out", packing="2:4")
    assert said["stay_dense"] == [spoiled]
    assert (said["packed_tensors"], spoiled in _stored(tmp_path / "out")) == (13, True)
    assert torch.equal(_stored(tmp_path / "out")[spoiled], weight)


def test_a_model_without_zeros_is_not_packed(models, tmp_path):
    for packing in ("bitmask", "csr"):
        with pytest.raises(ExportError, match=f"no weight would be smaller as {packing}"):
            export_folder(models["llama"].base, tmp_path / "out", packing=packing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sparsity", "wanted"), [(0.5, {"bitmask": 0.564, "csr": 1.0}),
                                                  ("2:4", {"bitmask": 0.544, "2:4": 0.5625}),
                                                  (0.8, {"bitmask": 0.248, "csr": 0.40}),
                                                  (0.9, {"bitmask": 0.132, "csr": 0.20})])  # fmt: skip
def test_files_are_as_small_as_the_design_says(tmp_path, sparsity, wanted):
    """Of a Llama with 2048 inputs, since a row's offset has 8 bytes whatever its length; with next to no vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=2048, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.fill_(0.5)
                order = torch.rand(module.weight.numel() // 4, 4).argsort(1).view_as(module.weight)
                pruned = order < 2 if sparsity == "2:4" else torch.rand_like(module.weight.float()) < sparsity
                module.weight.masked_fill_(pruned, 0)
    model.save_pretrained(tmp_path / "pruned")
    dense = (tmp_path / "pruned" / "model.safetensors").stat().st_size
    for packing, share in wanted.items():
        said = export_folder(tmp_path / "pruned", tmp_path / packing, packing=packing)
        size = sum(path.stat().st_size for path in (tmp_path / packing).glob("*.safetensors"))
        assert size == said["file_bytes"]
        assert size / dense == pytest.approx(share, rel=0.01), packing
        assert abs(said["dense_bf16_bytes"] - dense) < 10_000


def test_card_and_manifest_say_what_is_in_the_folder(models, exports, tmp_path):
    folder = exports["bf16", "bitmask"]
    entries, about = read_manifest(folder)
    weight = next(e for e in entries if e.name == "model.layers.1.mlp.down_proj.weight")
    expected = models["bf16"].masked_weights()[weight.name]
    assert weight.nonzero == int(torch.count_nonzero(expected))
    assert weight.pruned_per_matrix == (math.floor(0.8 * expected.numel()),)
    assert (weight.packing, weight.origin, weight.spec.dtype) == ("bitmask", "pruned", torch.bfloat16)
    assert about["file_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert about["dense_bf16_bytes"] == 2 * sum(t.numel() for t in _stored(exports["bf16", "dense"]).values())
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- sparse\n")
    for words in (
        "import pst_ds.hf",
        "AutoModelForCausalLM.from_pretrained",
        "| loss | 1.5 |",
        f"{about['file_bytes']:,} bytes",
        "pst-ds verify",
    ):
        assert words in card
    dense = (exports["bf16", "dense"] / "README.md").read_text()
    assert "import pst_ds.hf" not in dense
    run = {"task": "causal-lm", "pst": {"pattern": "matrix"}}
    models["bf16"].export(tmp_path / "with-run", packing="csr", run=run)
    assert read_manifest(tmp_path / "with-run")[1]["run"] == run
