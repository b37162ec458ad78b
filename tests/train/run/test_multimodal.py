"""Models of text and pictures, of which the text part alone is trained: the rest stays, tensor by tensor."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from pst_ds.cli.main import main
from pst_ds.formats.safetensors_file import tensor_bytes

LLAMA = "tests/data/tiny-llama"
_TEXT = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 40, "head_dim": 12, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_PLACES = {"image_token_index": 39, "boi_token_index": 38, "eoi_token_index": 37}


@pytest.fixture(autouse=True)
def _alone(alone):
    pass


def _gemma3():
    vision = {**_VISION, "intermediate_size": 24}
    config = Gemma3Config(text_config=_TEXT, vision_config=vision, mm_tokens_per_image=4, **_PLACES)
    return Gemma3ForConditionalGeneration(config)


def _llama4():
    text = {**_TEXT, "intermediate_size": 16, "intermediate_size_mlp": 40, "num_local_experts": 2,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 32}  # fmt: skip
    vision = {**_VISION, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16,
              "projector_output_dim": 16}  # fmt: skip
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, **_PLACES))


def _qwen3_5():
    text = {**_TEXT, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
    vision = {"hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 24,
              "patch_size": 4, "num_position_embeddings": 16}  # fmt: skip
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))


def _base(model, folder):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "any"}')
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)


def _arguments(folder, **more):
    settings = {
        "output_dir": str(folder / "run"), "model.path": str(folder / "base"), "deepspeed_config": "",
        "schedule.final_sparsity": 0.7, "schedule.update_interval": 1, "train.num_steps": 3,
        "train.precision": "bf16", "data.document_mask": False, **more,  # linear attention reads on over documents
    }  # fmt: skip
    options = [("--set", f"{key}={json.dumps(value)}") for key, value in settings.items()]
    return ["tests/data/causal_lm.toml", *(text for option in options for text in option)]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("make", "excluded", "pruned"),
    [(_gemma3, ["vision_tower"], 14), (_llama4, ["experts"], 14), (_qwen3_5, [], 15)],
    ids=["gemma3", "llama4", "qwen3.5"],
)
def test_the_text_part_is_trained_and_the_rest_is_kept_bit_for_bit(tmp_path, make, excluded, pruned, verb):
    torch.manual_seed(1)
    _base(make(), tmp_path / "base")
    verb("train", *_arguments(tmp_path, **{"pst.exclude_modules": excluded}))
    base = load_file(tmp_path / "base/model.safetensors")
    for kind in ("dense", "bitmask"):
        out = tmp_path / kind
        verb("export", str(tmp_path / "run"), "--format", kind, "--out", str(out))
        verb("verify", str(out))
        verified = verb("verify", str(out), "--against", str(tmp_path / "run"))
        assert (verified["differing_weights"], verified["differing_predictions"]) == (0, 0)
        assert verified["pruned_tensors"] == pruned
    exported = load_file(tmp_path / "dense/model.safetensors")
    assert exported.keys() == base.keys()
    differing = [name for name in base if tensor_bytes(exported[name]) != tensor_bytes(base[name])]
    assert len(differing) == pruned
    assert all("language_model." in name and ".layers." in name for name in differing)
    entries = json.loads((tmp_path / "bitmask/pst_manifest.json").read_text())["tensors"]
    assert {entry["name"] for entry in entries} == set(base)
    assert [e["name"] for e in entries if e["packing"] == "bitmask"] == [
        e["name"] for e in entries if e["pruned_per_matrix"]
    ]
    _, info = type(make()).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert (tmp_path / "dense/preprocessor_config.json").is_file()


def test_a_smaller_vocabulary_of_a_text_part_is_refused_before_a_corpus_is_tokenised(
    tmp_path, capsys, monkeypatch, verb
):
    torch.manual_seed(1)
    _base(_qwen3_5(), tmp_path / "base")
    verb("train", *_arguments(tmp_path))

    def never(*args, **kwargs):
        raise AssertionError("work before the checks")

    for name in ("_tokens_of_file", "_tokens_of_splits", "trim", "kept_experts", "_convert"):
        monkeypatch.setattr(f"pst_ds.export.export_run.{name}", never)
    (tmp_path / "some.txt").write_text("a film\n")
    for vocabulary, format_name in (("seen", "dense"), (tmp_path / "some.txt", "bitmask")):
        words = ["--vocabulary", str(vocabulary), "--format", format_name, "--out", str(tmp_path / "out")]
        assert main(["export", str(tmp_path / "run"), *words]) == 2
        assert f"vocabulary: {tmp_path / 'base'} has more than the text part" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tower_that_text_does_not_call_is_refused_by_name(tmp_path, capsys):
    torch.manual_seed(1)
    _base(_gemma3(), tmp_path / "base")
    assert main(["train", *_arguments(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        "the first step has called 14 of 26 pruned layers, and not model.vision_tower.encoder.layers.0.self_attn"
        in said
    )
    assert 'exclude_modules = ["vision_tower"], or prune them all the same with prune_uncalled = true' in said
    assert not (tmp_path / "run/checkpoints").exists()
    assert main(["train", *_arguments(tmp_path, **{"pst.prune_uncalled": True})]) == 0
