"""Exports of models that others pruned: plain folders with zeros, whatever names and forms their files have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from pst_ds.errors import InputError
from pst_ds.writing.check import check_export, check_model
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import read_manifest
from tests.exporting import export_folder

ROOT = Path(__file__).resolve().parents[2]


def _prune(model, amount=0.75):
    """As people do it with torch, by magnitude; the linear layers inside the blocks."""
    torch.manual_seed(3)
    names = []
    for name, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and any(part.isdigit() for part in name.split(".")):
            prune.l1_unstructured(module, "weight", amount)
            prune.remove(module, "weight")
            names.append(name)
    return names


def _stored(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(folder, names of pruned layers) of a pruned GPT-2 with a tied head."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=20, n_layer=2, n_head=2, n_positions=32))
    folder = tmp_path_factory.mktemp("gpt2")
    names = _prune(model)
    model.save_pretrained(folder)
    return folder, names


@pytest.mark.parametrize("packing", ["bitmask", "csr"])
def test_what_torch_pruned_is_packed_and_comes_back(gpt2, tmp_path, packing):
    folder, names = gpt2
    said = export_folder(folder, tmp_path / "packed", packing=packing)
    assert (said["packed_tensors"], said["pruned_tensors"]) == (len(names), 0)
    assert said["sparsity_measured"] == pytest.approx(0.75, abs=1e-3)
    assert said["sparsity_requested"] is None
    modules = {n.removesuffix(".shape") for n in _stored(tmp_path / "packed") if n.endswith(".shape")}
    assert modules == set(names)
    assert "transformer.wte.weight" in _stored(tmp_path / "packed")  # tied to the head, and an embedding
    entries, about = read_manifest(tmp_path / "packed")
    assert {e.origin for e in entries} == {"model"}
    assert {e.name.removesuffix(".weight") for e in entries if e.transposed and e.packing == packing} == set(names)
    assert about["step"] is about["base_fingerprint"] is about["run"] is None
    check_export(tmp_path / "packed")
    check_model(tmp_path / "packed")
    export_folder(tmp_path / "packed", tmp_path / "dense")
    before, after = _stored(folder), _stored(tmp_path / "dense")
    assert before.keys() == after.keys()
    layers = [f"{name}.weight" for name in names]
    assert any(((before[n] == 0) & before[n].signbit()).any() for n in layers)  # as torch's pruning leaves them
    before |= {n: before[n] + 0.0 for n in layers}  # which makes -0.0 +0.0 and leaves the rest
    assert all(torch.equal(before[n].view(torch.int32), after[n].view(torch.int32)) for n in before)
    ids = torch.arange(12).view(2, 6)
    models = [AutoModelForCausalLM.from_pretrained(f).eval() for f in (folder, tmp_path / "dense")]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))


def test_names_without_the_prefix_become_the_model_s(gpt2, tmp_path):
    """GPT-2's own files say h.0.attn, and its language model transformer.h.0.attn."""
    folder, names = gpt2
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    tensors = {n.removeprefix("transformer."): t for n, t in _stored(folder).items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    export_folder(bare, tmp_path / "out", packing="bitmask")
    export_folder(folder, tmp_path / "expected", packing="bitmask")
    found, expected = _stored(tmp_path / "out"), _stored(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert len(names) == 8


def test_a_base_model_and_pytorch_files_and_old_names_are_read(tmp_path):
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=67, n_embd=20, n_layer=1, n_head=2, n_positions=32))
    names = _prune(model)
    model.save_pretrained(tmp_path / "base")
    assert export_folder(tmp_path / "base", tmp_path / "packed", packing="bitmask")["packed_tensors"] == len(names) == 4
    config = BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36)
    bert = BertForMaskedLM(config)
    names = _prune(bert)
    bert.save_pretrained(tmp_path / "bert")
    tensors = _stored(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    torch.save(old, tmp_path / "bert" / "pytorch_model.bin")
    assert export_folder(tmp_path / "bert", tmp_path / "dense")["tensors"] == len(tensors)
    assert all(torch.equal(t, tensors[n]) for n, t in _stored(tmp_path / "dense").items())
    assert export_folder(tmp_path / "bert", tmp_path / "csr", packing="csr")["packed_tensors"] == len(names)


def test_files_beside_the_weights_go_along(gpt2, tmp_path):
    folder = Path(shutil.copytree(gpt2[0], tmp_path / "source"))
    (folder / "vocab.txt").write_text("a\nb")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "training_args.bin").write_bytes(b"x")
    export_folder(folder, tmp_path / "out", packing="bitmask")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "vocab.txt", "chat_template.jinja", "pst_bitmask.safetensors",
        "pst_manifest.json", "README.md",
    }  # fmt: skip


def test_a_cast_casts_every_tensor_and_counts_what_becomes_zero(gpt2, tmp_path):
    folder = Path(shutil.copytree(gpt2[0], tmp_path / "source"))
    tensors = _stored(folder)
    tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = 1e-44  # less than bf16 has
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    export_folder(folder, tmp_path / "out", packing="bitmask", dtype="bf16")
    export_folder(tmp_path / "out", tmp_path / "dense")
    dense = _stored(tmp_path / "dense")
    assert all(torch.equal(dense[n], t.bfloat16()) for n, t in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def _with_config(folder, out, **changes):
    shutil.copytree(folder, out)
    table = {**json.loads((out / "config.json").read_text()), **changes}
    (out / "config.json").write_text(json.dumps(table))
    return out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"is quantised \(bitsandbytes\)"),
        ({"quantization_config": {"quant_method": "pst_ds", "format": "zip"}}, "packed as 'zip'"),
        ({"quantization_config": {"quant_method": "pst_ds", "format": "csr", "format_version": 1,
                                  "weights_file": "../pst_csr.safetensors"}}, "weights_file = '../pst_csr"),
        ({"quantization_config": {"quant_method": "pst_ds", "format": "csr", "format_version": 1,
                                  "weights_file": "pst_csr.safetensors"}}, "has no pst_csr.safetensors"),
        ({"architectures": ["NoSuchModel"]}, r"architectures = \['NoSuchModel'\]"),
        ({"architectures": None}, r"architectures = \[\]"),
        ({"model_type": "no-such"}, "has no config.json that transformers can read"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_plain_model_is_refused(gpt2, tmp_path, changes, reason):
    source = _with_config(gpt2[0], tmp_path / "source", **changes)
    with pytest.raises(InputError, match=reason):
        export_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_packed_folders_are_not_converted(gpt2, tmp_path):
    export_folder(gpt2[0], tmp_path / "packed", packing="bitmask")
    path = tmp_path / "packed" / "pst_bitmask.safetensors"
    tensors = load_file(path)
    name = "transformer.h.0.mlp.c_fc"
    tensors[f"{name}.bitmask"][9] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"{name}.weight: bitmask is damaged"):
        export_folder(tmp_path / "packed", tmp_path / "out", packing="csr")
    tensors[f"{name}.bitmask"][9] ^= 1
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"transformer\.ln_f\.bias is not what was exported.* delete pst_manifest"):
        export_folder(tmp_path / "packed", tmp_path / "out", packing="dense")
    (tmp_path / "packed" / "pst_manifest.json").unlink()
    assert export_folder(tmp_path / "packed", tmp_path / "out", packing="dense")["tensors"] > 0
    del tensors[f"{name}.bitmask"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"lacks {name}.bitmask, a part of a weight packed as bitmask"):
        export_folder(tmp_path / "packed", tmp_path / "again")


def test_the_source_is_not_written_over(gpt2, tmp_path):
    export_folder(gpt2[0], tmp_path / "packed", packing="bitmask")
    with pytest.raises(ExportError, match="is the folder to read"):
        export_folder(tmp_path / "packed", tmp_path / "packed")
    with pytest.raises(ExportError, match="exists and is not an export"):
        export_folder(gpt2[0], gpt2[0])
