"""Model folders whose experts have zeros, from anywhere: packed a stack at a time, and back to the tensors they had."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pst_ds.core.quantization import Grid
from pst_ds.hf import PackedWeightsConfig
from pst_ds.runtime.experts import SparseExperts
from pst_ds.writing.check import check_export
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import read_manifest
from tests.exporting import export_folder
from tests.nn.expert_families import tiny_model

FAMILIES = ["mixtral", "gpt_oss", "granitemoe"]
"""Files of a matrix each; of the stacks as they are; of the stacks under other names."""


@torch.no_grad()
def _pruned(folder, family, keep=lambda w: w.abs() > w.abs().flatten().quantile(0.7)):
    model = tiny_model(family)
    for param in (p for name, p in model.named_parameters() if p.dim() == 3):
        param.mul_(keep(param))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _two_of_four(weight):
    """Along the inputs, which (E, I, O) has in the middle."""
    order = weight.abs().transpose(1, 2).unflatten(2, (-1, 4)).argsort(-1).argsort(-1)
    return (order >= 2).flatten(2).transpose(1, 2)


def _stacks(folder):
    entries, _ = read_manifest(folder)
    return {entry.name: entry for entry in entries if len(entry.shape) == 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_zeros_in_its_experts_is_packed_and_comes_back(family, tmp_path):
    before = _pruned(tmp_path / "zeros", family)
    export_folder(tmp_path / "zeros", tmp_path / "packed", packing="bitmask")
    stacks, parameters = _stacks(tmp_path / "packed"), dict(tiny_model(family).named_parameters())
    expected = {name: tuple(param.shape) for name, param in parameters.items() if param.dim() == 3}
    assert {name: entry.shape for name, entry in stacks.items()} == expected
    assert {entry.packing for entry in stacks.values()} == {"bitmask"}
    check_export(tmp_path / "packed")
    sparse, dense = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", quantization_config=PackedWeightsConfig(load_as=how))
        for how in ("sparse", "dense")
    )
    assert sum(isinstance(module, SparseExperts) for module in sparse.modules()) == len(stacks)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "zeros").state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in dense.state_dict().items())
    export_folder(tmp_path / "packed", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor + 0.0) for name, tensor in before.items())
    check_export(tmp_path / "back")


def test_what_was_packed_is_packed_otherwise(tmp_path):
    before = _pruned(tmp_path / "zeros", "gpt_oss", _two_of_four)
    export_folder(tmp_path / "zeros", tmp_path / "bitmask", packing="bitmask")
    export_folder(tmp_path / "bitmask", tmp_path / "2of4", packing="2:4")
    assert {entry.packing for entry in _stacks(tmp_path / "2of4").values()} == {"2:4"}
    check_export(tmp_path / "2of4")
    export_folder(tmp_path / "2of4", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(after[name], tensor + 0.0) for name, tensor in before.items())
    damaged = next((tmp_path / "2of4").glob("*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ExportError, match="its SHA-256 differs"):
        export_folder(tmp_path / "2of4", tmp_path / "other")


def test_values_of_stacks_are_rounded_once(tmp_path):
    _pruned(tmp_path / "zeros", "mixtral")
    export_folder(tmp_path / "zeros", tmp_path / "int8", packing="bitmask", values=Grid(8))
    assert {entry.values for entry in _stacks(tmp_path / "int8").values()} == {"int8"}
    export_folder(tmp_path / "int8", tmp_path / "dense")
    export_folder(tmp_path / "int8", tmp_path / "again", packing="bitmask", values=Grid(8))
    for entry, other in zip(_stacks(tmp_path / "int8").values(), _stacks(tmp_path / "again").values(), strict=True):
        assert [part.sha256 for part in entry.parts] == [part.sha256 for part in other.parts]
        assert entry.rounding_error == other.rounding_error > 0.0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("zeros", "dense"))
    for name, tensor in before.items():
        assert torch.equal(after[name] == 0, tensor == 0) or "experts" not in name
        torch.testing.assert_close(after[name], tensor, rtol=0.0, atol=float(tensor.abs().max()) / 100)


def test_experts_without_zeros_stay_in_the_tensors_they_were_in(tmp_path):
    before = _pruned(tmp_path / "zeros", "mixtral", torch.ones_like)
    with pytest.raises(ExportError, match="nothing can be packed"):
        export_folder(tmp_path / "zeros", tmp_path / "packed", packing="bitmask")
    export_folder(tmp_path / "zeros", tmp_path / "dense")
    entries, _ = read_manifest(tmp_path / "dense")
    assert {entry.name for entry in entries} == set(before)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
