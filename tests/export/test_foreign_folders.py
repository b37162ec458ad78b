"""Model folders that other libraries have quantised: named and refused, or read into plain numbers if that is asked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from pst_ds.cli.main import main
from pst_ds.export.check import check_export
from tests.exporting import export_folder

from ..core.test_foreign_formats import awq, bitsandbytes4, bitsandbytes8, gptq, mxfp4

LLAMA = LlamaConfig(
    vocab_size=67, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    tie_word_embeddings=False,
)  # fmt: skip
GPT_OSS = GptOssConfig(
    vocab_size=67, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
    num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2,
)  # fmt: skip
LAYERS = {
    "gptq": (gptq, "{}."),
    "awq": (awq, "{}."),
    "bitsandbytes": (bitsandbytes4, "{}.weight."),
    "bitsandbytes, 8 bits": (bitsandbytes8, "{}."),
}


def foreign_folder(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write a model of two layers whose projections are quantised; return its state dict as plain numbers."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GPT_OSS) if kind == "mxfp4" else LlamaForCausalLM(LLAMA)
    model.to(torch.bfloat16).save_pretrained(path)
    plain = load_file(path / "model.safetensors")
    stored, settings = dict(plain), {}
    for seed, (name, tensor) in enumerate(sorted(plain.items())):
        if kind == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            parts, settings, weight = mxfp4(experts, outputs, inputs, seed)
            parts = {f"{name}_{part}": values for part, values in parts.items()}
        elif kind != "mxfp4" and name.endswith("_proj.weight"):
            make, beside = LAYERS[kind]
            module = name.removesuffix(".weight")
            parts, settings, weight = make(outputs=tensor.shape[0], inputs=tensor.shape[1], seed=seed)
            parts = {name if p == "codes" else beside.format(module) + p: values for p, values in parts.items()}
        else:
            continue
        del stored[name]
        stored |= parts
        plain[name] = weight.to(torch.bfloat16)
    save_file({name: tensor.clone().contiguous() for name, tensor in stored.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    settings = {"quant_method": kind.partition(",")[0], **settings}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return plain


@pytest.mark.parametrize("kind", [*LAYERS, "mxfp4"])
def test_it_becomes_plain_numbers_if_that_is_asked(tmp_path, kind):
    plain = foreign_folder(tmp_path / "theirs", kind)
    export_folder(tmp_path / "theirs", tmp_path / "plain", dequantize=True)
    check_export(tmp_path / "plain")
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in plain.items())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())


def test_it_can_go_straight_to_our_own_grid(tmp_path):
    from pst_ds.core.quantization import Grid

    foreign_folder(tmp_path / "theirs", "gptq")
    for name, source, how in (("two", "plain", {}), ("one", "theirs", {"dequantize": True})):
        if name == "two":
            export_folder(tmp_path / "theirs", tmp_path / "plain", dequantize=True)
        export_folder(tmp_path / source, tmp_path / name, values=Grid(8), embeddings=Grid(4), **how)
    one, two = (load_file(tmp_path / name / "pst_dense.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


def _said_by(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("kind", ["gptq", "awq", "bitsandbytes", "mxfp4"])
def test_it_is_named_unless_that_is_asked(capsys, tmp_path, kind):
    foreign_folder(tmp_path / "theirs", kind)
    line = _said_by(capsys, "export", tmp_path / "theirs", "--out", tmp_path / "out")
    assert f"is quantised ({kind}). Add --dequantize, or export the model before it was quantised" in line
    words = ["--method", "magnitude", "--out", tmp_path / "out", "--set", f'model.path="{tmp_path / "theirs"}"']
    line = _said_by(capsys, "prune", "tests/data/causal_lm.toml", *words)
    assert f"is quantised ({kind}), and its weights cannot be ranked" in line
    assert f"pst-ds export {tmp_path / 'theirs'} --dequantize --out DIR" in line
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def _with_config(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def _with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj"
DAMAGE = {
    "no such library": (lambda f: _with_config(f, {"quant_method": "aqlm"}), "aqlm is not supported; gptq, awq"),
    "not quantised": (lambda f: _with_config(f, None), "is not quantised by another library. Remove --dequantize"),
    "ours": (lambda f: _with_config(f, {"quant_method": "pst_ds"}), "is not quantised by another library"),
    "other bits": (lambda f: _with_config(f, {"quant_method": "gptq", "bits": 3}), "2, 4 or 8 bits, not 3"),
    "another version": (
        lambda f: _with_config(f, {"quant_method": "awq", "bits": 4, "version": "gemv"}), "4 bits, version gemm, not 4"
    ),
    "no scales": (lambda f: _with_tensors(f, lambda t: t.pop(f"{UP}.scales")), f"{UP}.weight: its gptq parts "),
    "half the codes": (
        lambda f: _with_tensors(f, lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][::2].contiguous()})),
        f"{UP}.weight: its gptq parts ",
    ),
    "scales of infinity": (
        lambda f: _with_tensors(f, lambda t: t[f"{UP}.scales"].fill_(float("inf"))), "its gptq scales are not finite"
    ),
    "another layer": (
        lambda f: _with_tensors(f, lambda t: t.update({"lm.qweight": t.pop(f"{UP}.qweight")})),
        "the model has no such weight",
    ),
    "another shape": (
        lambda f: _with_tensors(f, lambda t: t.update({
            f"{UP}.{part}": t[f"{UP.replace('up', 'down')}.{part}"].clone() for part in
            ("qweight", "qzeros", "scales", "g_idx")
        })), r"up_proj\.weight is \(32, 64\) in its gptq parts, and \(64, 32\) in the model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_read_is_one_message_and_nothing_is_written(capsys, tmp_path, name):
    foreign_folder(tmp_path / "theirs", "gptq")
    damage, message = DAMAGE[name]
    damage(tmp_path / "theirs")
    line = _said_by(capsys, "export", tmp_path / "theirs", "--dequantize", "--out", tmp_path / "out")
    assert re.search(message, line), line
    assert str(tmp_path / "theirs") in line
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
