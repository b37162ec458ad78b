"""GGUF files of models with experts: stacks filled expert by expert, which llama.cpp computes as transformers does."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pst_ds.core.quantization import Grid, dequantize, quantize, round_to_grid
from pst_ds.formats.base_weights import BaseWeights
from pst_ds.nn.inject import pst_layers
from pst_ds.prune.folder import RECORD_FILE, SCALES_FILE, scales_name
from pst_ds.writing.encoding import Encoding, ExportError
from pst_ds.writing.from_folder import open_folder, plan_folder
from pst_ds.writing.from_run import plan_run
from tests.exporting import export_folder
from tests.pairs import every_pair

from .test_gguf import LINES, byte_level

gguf = pytest.importorskip("gguf")

INT8, INT4 = Grid(8, 32), Grid(4, 32)
SIZES = {
    "vocab_size": 303, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "num_experts_per_tok": 2,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_FINE = {**SIZES, "num_experts": 4, "moe_intermediate_size": 32}
_CONFIGS = {
    "mixtral": lambda **more: transformers.MixtralConfig(**{**SIZES, "num_local_experts": 4, **more}),
    "qwen2_moe": lambda **more: transformers.Qwen2MoeConfig(**{**_FINE, "shared_expert_intermediate_size": 64, **more}),
    "qwen3_moe": lambda **more: transformers.Qwen3MoeConfig(
        **{**_FINE, "head_dim": 32, "norm_topk_prob": True, **more}
    ),
    "glm4_moe": lambda **more: transformers.Glm4MoeConfig(**{
        **_FINE, "n_routed_experts": 4, "head_dim": 32, "use_qk_norm": True, "attention_bias": True,
        "routed_scaling_factor": 1.5, **more,
    }),
    "olmoe": lambda **more: transformers.OlmoeConfig(**{**SIZES, "num_key_value_heads": 4, "num_experts": 4, **more}),
}  # fmt: skip
FAMILIES = tuple(_CONFIGS)


@torch.no_grad()
def random_model(family, **more):
    """Half of the experts' weights are zero, and no scale of a norm is 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_CONFIGS[family](**more)).eval()
    for param in model.parameters():
        if param.dim() == 1:
            param.normal_(1.0, 0.1)
        elif param.dim() == 3:
            param[torch.rand(param.shape) < 0.5] = 0.0
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def stacks_of(path):
    """The stacks of a file as weights (E, O, I), by name."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors if "_exps." in t.name}


def expected_stacks(model, grid):
    """What the file is to hold of the model: gate, up and down, (E, O, I)."""
    found = {}
    for name, param in model.named_parameters():
        if param.dim() == 3:
            weight = param.detach().float()
            weight = weight if grid is None else round_to_grid(weight.flatten(0, 1), None, grid).view(weight.shape)
            parts = weight.chunk(2, 1) if name.endswith("gate_up_proj") else [weight]
            words = ("gate", "up") if len(parts) == 2 else ("down",)
            block = name.split(".")[2]
            found |= {f"blk.{block}.ffn_{w}_exps.weight": p.numpy() for w, p in zip(words, parts, strict=True)}
    return found


@every_pair
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values", [None, INT8, INT4], ids=str)
def test_llama_cpp_computes_the_model(family, values, tmp_path):
    """In fp32 its logits differ by its 16 bits for keys and values; with codes by activations in 8 bits, too, with
    which a token near a border would go to another expert: there every expert is chosen."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = random_model(family, **({} if values is None else {"num_experts_per_tok": 4}))
    saved(model, tmp_path / "model")
    said = export_folder(tmp_path / "model", tmp_path / "m.gguf", packing="gguf", values=values)
    assert said["file_bytes"] == (tmp_path / "m.gguf").stat().st_size
    found, expected = stacks_of(tmp_path / "m.gguf"), expected_stacks(model, values)
    assert found.keys() == expected.keys()
    assert len(found) == (3 if family == "glm4_moe" else 6)  # whose first block is dense
    for name, weight in expected.items():
        assert np.array_equal(found[name], weight), name
    if values is not None:
        export_folder(tmp_path / "model", tmp_path / "ours", values=values)
        import pst_ds.hf  # noqa: F401

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = byte_level()(LINES[0], add_special_tokens=False)["input_ids"]
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    theirs.eval(ids)
    scores = np.array(theirs.scores[: len(ids)])
    theirs.close()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(scores - logits).max() < (0.005 if values is None else 0.05) * np.abs(logits).max()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_run_becomes_a_file_expert_by_expert(family, make_pruned, tmp_path):
    pruned = replace(make_pruned(tmp_path, random_model(family)), tokenizer=byte_level())
    base = BaseWeights(pruned.base, pruned.model.base_model_prefix)
    jobs = plan_run(pruned.model, pruned.checkpoint, base, Encoding("gguf", INT4), None)
    assert {len(output.shape) for job in jobs for output in job.outputs} == {1, 2}
    said = pruned.export(tmp_path / "m.gguf", packing="gguf", values=INT4)
    found, layers = stacks_of(tmp_path / "m.gguf"), pst_layers(pruned.model)
    assert said["tensors"] == len(gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts"
        for name, names in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            weight = layers[f"{experts}.{name}"].masked_weight().float()
            weight = round_to_grid(weight, None, INT4).view(4, -1, weight.shape[1])
            for part, own in zip(names, weight.chunk(len(names), 1), strict=True):
                stored = found[f"blk.{block}.ffn_{part}_exps.weight"]
                assert np.array_equal(stored, own.numpy())
                assert (stored == 0).mean() >= 0.5


def test_a_folder_is_read_expert_by_expert_with_the_scales_that_it_was_pruned_to(tmp_path):
    folder = saved(random_model("mixtral").bfloat16(), tmp_path / "model")
    tensors, scales = load_file(folder / "model.safetensors"), {}
    for block, (stack, matrices) in product(range(2), (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",)))):
        experts = f"model.layers.{block}.block_sparse_moe.experts"
        found = []
        for name in [f"{experts}.{expert}.{matrix}.weight" for expert in range(4) for matrix in matrices]:
            codes, own = quantize(tensors[name], None, INT4)
            found.append(own * 1.125)  # not what a search would find
            tensors[name] = dequantize(codes, found[-1], torch.bfloat16)
        scales[scales_name(f"model.layers.{block}.mlp.experts.{stack}")] = torch.cat(found)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(scales, folder / SCALES_FILE)
    layers = [
        {
            "name": name.removesuffix(".scales"),
            "shape": [len(rows), rows.shape[1] * 32],
            "pattern": "matrix",
            "sparsity_requested": 0.0,
            "zeros": 0,
        }
        for name, rows in scales.items()
    ]
    (folder / RECORD_FILE).write_text(json.dumps({"values": "int4", "group": 32, "layers": layers}))
    jobs, _ = plan_folder(open_folder(folder), Encoding("gguf", INT4), None)
    assert {len(output.shape) for job in jobs for output in job.outputs} == {1, 2}
    assert max(len(job.outputs) for job in jobs) == 1
    assert export_folder(folder, tmp_path / "m.gguf", packing="gguf", values=INT4)["inexact_scales"] == 0
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if "_exps." not in tensor.name:
            continue
        _, block, word, _ = tensor.name.split(".")
        stack = "down_proj" if word == "ffn_down_exps" else "gate_up_proj"
        own = scales[scales_name(f"model.layers.{block}.mlp.experts.{stack}")].float().unflatten(0, (4, -1))
        if stack == "gate_up_proj":
            own = own.chunk(2, 1)[word == "ffn_up_exps"]
        blocks = torch.from_numpy(np.array(tensor.data)).unflatten(2, (-1, 18))
        assert torch.equal(blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float(), own)


def test_a_packed_folder_has_its_own_codes_in_the_file(tmp_path):
    saved(random_model("qwen3_moe"), tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "packed", packing="bitmask", values=INT8)
    export_folder(tmp_path / "model", tmp_path / "a.gguf", packing="gguf", values=INT8)
    export_folder(tmp_path / "packed", tmp_path / "b.gguf", packing="gguf", values=INT8)
    one, other = (stacks_of(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob = true in the config of this qwen2_moe, but llama.cpp"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = false in the config of this qwen3_moe"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 in the config of this olmoe"),
        ("mixtral", {"sliding_window": 16}, "sliding_window = 16 in the config of this mixtral"),
        ("glm4_moe", {"n_group": 2, "topk_group": 1}, "n_group = 2 in the config of this glm4_moe"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "has no name in GGUF files of qwen3moe"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, setting, message, tmp_path):
    saved(random_model(family, **setting), tmp_path / "model")
    with pytest.raises(ExportError, match=message):
        export_folder(tmp_path / "model", tmp_path / "m.gguf", packing="gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_package_that_is_too_old_for_a_family_is_named(tmp_path, monkeypatch):
    folder = saved(random_model("glm4_moe"), tmp_path / "model")
    monkeypatch.delitem(gguf.MODEL_ARCH_NAMES, gguf.MODEL_ARCH.GLM4_MOE)
    with pytest.raises(ExportError, match="package gguf does not know glm4moe"):
        export_folder(folder, tmp_path / "m.gguf", packing="gguf")


def test_an_expert_that_is_missing_is_noticed(tmp_path):
    folder = saved(random_model("olmoe"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="GGUF stacks experts, and these are not 4 of one shape and dtype"):
        export_folder(folder, tmp_path / "m.gguf", packing="gguf")
