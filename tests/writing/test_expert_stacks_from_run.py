"""Exports of models with pruned stacks of experts: the base's own tensors, and the values of the masked model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.hf import PackedWeightsConfig
from pst_ds.nn.inject import persistent_buffers
from pst_ds.parallel.launch import launch_environment
from pst_ds.runtime.experts import SparseExperts
from pst_ds.train.run import prepare, train_prepared
from tests.nn.expert_families import tiny_model

LLAMA = "tests/data/tiny-llama"


@pytest.fixture(autouse=True)
def _alone(alone):
    pass


@torch.no_grad()
def _trained(folder, family, **more):
    """A run of four steps from a base whose buffers have values as no model starts with."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    for buffer in persistent_buffers(model).values():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder / "base")
    settings = {
        "output_dir": str(folder / "run"), "model.path": str(folder / "base"), "deepspeed_config": "",
        "schedule.final_sparsity": 0.7, "schedule.update_interval": 1, "train.num_steps": 4,
        "data.document_mask": False, **more,
    }  # fmt: skip
    with torch.enable_grad():
        run = load_run("tests/data/causal_lm.toml", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        train_prepared(prepare(run, launch_environment()), quiet=True)
    return folder


def _loaded(folder, load_as):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PackedWeightsConfig(load_as=load_as))
    return model.eval()


def _tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_a_dense_export_has_the_tensors_of_the_base_and_the_values_of_the_run(family, tmp_path, verb):
    _trained(tmp_path, family)
    verb("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    base, found = _tensors(tmp_path / "base"), _tensors(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in base.items()}
    entries = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["tensors"]
    of_experts = [e for e in entries if e["origin"] == "pruned" and ("experts." in e["name"] or len(e["shape"]) == 3)]
    matrices = [len(e["pruned_per_matrix"]) for e in of_experts]
    assert set(matrices) == {"gpt_oss": {4}, "granitemoe": {8, 4}}.get(
        family, {1}
    )  # stacks of four experts, or a matrix
    for entry, count in zip(of_experts, matrices, strict=True):
        assert set(entry["pruned_per_matrix"]) == {int(0.7 * (found[entry["name"]].numel() // count))}
    verified = verb("verify", str(tmp_path / "out"), "--against", str(tmp_path / "run"))
    assert (verified["differing_weights"], verified["differing_predictions"]) == (0, 0)
    assert verified["max_logit_difference"] == 0.0


@pytest.mark.thorough
def test_a_narrow_export_is_verified_and_missing_zeros_are_found(tmp_path, verb, capsys):
    _trained(tmp_path, "mixtral", **{"train.num_steps": 2})
    verb("export", str(tmp_path / "run"), "--out", str(tmp_path / "1"))
    verb("export", str(tmp_path / "run"), "--out", str(tmp_path / "narrow"), "--dtype", "bf16")
    verified = verb("verify", str(tmp_path / "narrow"), "--against", str(tmp_path / "run"))
    assert verified["differing_weights"] == 0
    assert "rounding" in verified
    (file,) = (tmp_path / "1").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(tmp_path / "1")]) == 2
    assert "differs" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "kind"), [("mixtral", "bitmask"), ("gpt_oss", "2:4")])
def test_a_packed_export_has_one_entry_a_stack_and_computes_with_it(family, kind, tmp_path, verb):
    pattern = {"pst.pattern": "2:4", "schedule.final_sparsity": 0.5} if kind == "2:4" else {}
    _trained(tmp_path, family, **{"train.num_steps": 2, **pattern})
    verb("export", str(tmp_path / "run"), "--format", kind, "--out", str(tmp_path / "out"))
    entries = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["tensors"]
    stacks = {e["name"]: e for e in entries if len(e["shape"]) == 3}
    layers = [f"model.layers.{i}.mlp.experts.{stack}" for i in (0, 1) for stack in ("gate_up_proj", "down_proj")]
    assert sorted(stacks) == sorted(layers)
    assert all(entry["packing"] == kind for entry in stacks.values())
    assert not any("experts.0" in entry["name"] for entry in entries)
    layers = {layer["name"]: layer for layer in verb("inspect", str(tmp_path / "out"))["layers"]}
    assert all(layers[name]["expert_zeros"] == [layers[name]["zeros"] // 4] * 4 for name in stacks)
    verified = verb("verify", str(tmp_path / "out"), "--against", str(tmp_path / "run"))
    assert (verified["differing_weights"], verified["differing_predictions"]) == (0, 0)
    assert verified["max_logit_difference"] == 0.0
    assert verified["kept_sparse"]["differing_weights"] == 0
    sparse = _loaded(tmp_path / "out", "sparse")
    experts = sparse.model.layers[0].mlp.experts
    assert isinstance(experts.down_proj, SparseExperts)
    dense = _loaded(tmp_path / "out", "dense")
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        expected = dense(ids).logits
        torch.testing.assert_close(sparse(ids).logits, expected)
        sparse.dequantize()
        assert torch.equal(sparse(ids).logits, expected)
    assert isinstance(experts.down_proj, torch.nn.Parameter)


ROUNDED_IN_TRAINING = {"quantization.values": "int8", "model.base_bits": 8, "schedule.cooldown_fraction": 0.5}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("family", "kind", "more", "options"),
    [
        ("mixtral", "bitmask", {}, "--values int8"),
        ("mixtral", "dense", {"model.base_bits": 8, "pst.exclude_modules": ["experts"]}, "--dtype bf16"),
        ("qwen3_moe", "dense", {}, "--values int4 --group row"),
        ("qwen3_next", "bitmask", {}, "--values int8"),
        ("glm4_moe", "dense", {}, "--values int8 --dtype bf16"),
        ("deepseek_v3", "bitmask", {}, "--values int4 --group row"),
        ("gpt_oss", "bitmask", {}, "--values int4 --group row"),
        ("gpt_oss", "dense", ROUNDED_IN_TRAINING, "--values int8"),
        ("granitemoe", "dense", {"pst.exclude_modules": ["attn"]}, "--values int8 --embeddings int8"),
    ],
)
def test_an_export_in_fewer_bits_is_found_equal_to_its_run(family, kind, more, options, tmp_path, verb):
    _trained(tmp_path, family, **more)
    verb("export", str(tmp_path / "run"), "--format", kind, *options.split(), "--out", str(tmp_path / "out"))
    verified = verb("verify", str(tmp_path / "out"), "--against", str(tmp_path / "run"))
    assert "rounding" in verified
    assert (verified["differing_weights"], verified["differing_predictions"]) == (0, 0)
    assert verified["max_logit_difference"] == 0.0
