"""Families of models in one process: begun by one-shot pruning, trained, exported, checked and reloaded; or refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from pst_ds.cli.main import main
from pst_ds.config.pst import PSTConfig
from pst_ds.nn.targets import InjectionError, listed, resolve_targets
from tests.nn.expert_families import FAMILIES as OF_EXPERTS
from tests.nn.expert_families import tiny_model

_TEXT = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PLAIN = {name: value for name, value in _TEXT.items() if name != "num_key_value_heads"}
_ENCODER = {name: value for name, value in _PLAIN.items() if name not in ("bos_token_id", "eos_token_id")}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_CONFIGS = {
    "bamba": lambda: transformers.BambaConfig(**_TEXT, **_MAMBA2, attn_layer_indices=[1]),
    "bloom": lambda: transformers.BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=2),
    "fnet": lambda: transformers.FNetConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, intermediate_size=24, max_position_embeddings=32,
        pad_token_id=0,
    ),
    "falcon": lambda: transformers.FalconConfig(**_PLAIN, num_kv_heads=1, new_decoder_architecture=True, bias=True),
    "gemma": lambda: transformers.GemmaConfig(**_TEXT, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_TEXT, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=6),
    "gemma3n_text": lambda: transformers.Gemma3nTextConfig(
        **_TEXT, head_dim=8, vocab_size_per_layer_input=48, hidden_size_per_layer_input=8, altup_num_inputs=2,
        laurel_rank=4, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], sliding_window=6,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_PLAIN),
    "jamba": lambda: transformers.JambaConfig(
        **_TEXT, num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8,
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=8),
    "granite": lambda: transformers.GraniteConfig(**_TEXT, embedding_multiplier=3.0, residual_multiplier=0.3),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **_TEXT, **_MAMBA2, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=8,
        layer_types=["mamba", "attention"],
    ),
    "deberta": lambda: transformers.DebertaConfig(**_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "deberta_v2": lambda: transformers.DebertaV2Config(**_ENCODER, relative_attention=True, pos_att_type=["p2c"]),
    "llama": lambda: transformers.LlamaConfig(**_TEXT),
    "ministral3": lambda: transformers.Ministral3Config(**_TEXT, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_TEXT, sliding_window=6),
    "mpt": lambda: transformers.MptConfig(vocab_size=48, d_model=16, n_layers=2, n_heads=2, expansion_ratio=2),
    "olmo2": lambda: transformers.Olmo2Config(**_TEXT),
    "opt": lambda: transformers.OPTConfig(**_PLAIN, ffn_dim=24, word_embed_proj_dim=8),
    "phi": lambda: transformers.PhiConfig(**_TEXT),
    "phi3_longrope": lambda: transformers.Phi3Config(
        **_TEXT, original_max_position_embeddings=16, rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        },
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_TEXT),
    "qwen3": lambda: transformers.Qwen3Config(**_TEXT, head_dim=8),
    "smollm3": lambda: transformers.SmolLM3Config(**_TEXT, no_rope_layers=[1, 0]),
}  # fmt: skip
_ENCODERS = ("deberta", "deberta_v2", "fnet")
FAMILIES = list(dict.fromkeys([*_CONFIGS, *OF_EXPERTS]))
IN_FP32 = ("deberta", "fnet", *OF_EXPERTS)
"""transformers adds fp32 biases to DeBERTa's bf16 queries, torch has no Fourier transform in bf16, and transformers
 multiplies no experts of odd sizes in bf16."""
LEAVES_DENSE = {"gemma3n_text": ["correction_coefs"], "jamba": ["A_log", "dt_proj"], "mamba": ["A_log", "dt_proj"]}


def _write_base(family, folder):
    torch.manual_seed(1)
    if family in _ENCODERS:
        model = AutoModel.from_config(_CONFIGS[family](), dtype=torch.float32)
    elif family in _CONFIGS:
        model = AutoModelForCausalLM.from_config(_CONFIGS[family](), dtype=torch.float32)
    else:
        model = tiny_model(family)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-llama", pad_token="</s>")
    tokenizer.save_pretrained(folder)


def _budgets(family):
    """Return the budgets of the one-shot start: by saliency for language models without stacks of experts."""
    if family in _ENCODERS:
        return "equal"
    has_stacks = family in OF_EXPERTS or family in ("granitemoehybrid", "jamba")
    return "equal" if has_stacks else "saliency"


def _arguments(family, folder):
    settings = {
        "output_dir": str(folder / "run"), "model.path": str(folder / "base"), "deepspeed_config": "",
        "train.precision": "fp32" if family in IN_FP32 else "bf16",
        "task": "classification" if family in _ENCODERS else "causal-lm",
        "pst.exclude_modules": LEAVES_DENSE.get(family, []), "pst.pattern": "global", "start.method": "alps",
        "start.samples": 2, "start.budgets": _budgets(family), "data.max_length": 16, "eval.interval": 0,
        "train.num_steps": 2, "train.batch_size": 2, "schedule.initial_sparsity": 0.5, "schedule.update_interval": 1,
        "schedule.warmup_fraction": 0.0, "schedule.cooldown_fraction": 0.5,
    }  # fmt: skip
    words = (word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}"))
    return ["tests/data/causal_lm.toml", *words]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(3)
def test_a_family_is_begun_trained_exported_and_reloaded(tmp_path, capsys, family):
    _write_base(family, tmp_path / "base")
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["train", *_arguments(family, tmp_path), "--quiet"]) == 0
    assert main(["export", run, "--out", out, "--format", "bitmask", "--values", "int8", "--quiet"]) == 0
    assert main(["verify", out, "--against", run, "--limit", "2", "--quiet", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verified["differing_weights"] == 0
    assert verified["kept_sparse"]["layers"] > 0


REFUSED = {
    "jamba": (_CONFIGS["jamba"], ["A_log", "dt_proj"]),
    "mamba": (_CONFIGS["mamba"], ["A_log", "dt_proj"]),
    "llama4": (lambda: transformers.Llama4TextConfig(**_TEXT, head_dim=8, num_local_experts=4), ["experts"]),
    "dbrx": (
        lambda: transformers.DbrxConfig(
            vocab_size=48, d_model=16, n_layers=1, n_heads=2,
            attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
        ),
        ["mlp"],
    ),
    "jetmoe": (
        lambda: transformers.JetMoeConfig(
            vocab_size=48, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_key_value_heads=1,
            kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
        ),
        ["input_linear", "output_linear"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_stay_dense_in_part_is_refused_with_what_to_exclude(family):
    config, names = REFUSED[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(InjectionError) as refusal:
        resolve_targets(model, PSTConfig())
    assert str(refusal.value).endswith(f"If that is intended, set exclude_modules = {listed(names)}")
    assert resolve_targets(model, PSTConfig(exclude_modules=tuple(names)))


ONLY_FP32 = {
    "deberta": "DebertaForSequenceClassification keeps deberta",
    "fnet": "FNetForSequenceClassification works in fp32 only",
}
"""transformers adds fp32 biases to DeBERTa's queries, and torch has no Fourier transform in bf16."""


@pytest.mark.parametrize("family", ONLY_FP32)
def test_a_family_that_only_works_in_fp32_is_refused_in_bf16(tmp_path, capsys, family):
    """Nothing of this is declared; init proposes fp32."""
    _write_base(family, tmp_path / "base")
    words = [*_arguments(family, tmp_path), "--set", "train.precision=bf16"]
    for verb in ("train", "plan"):
        assert main([verb, *words]) == 2
        message = capsys.readouterr().err
        assert ONLY_FP32[family] in message
        assert 'Set train.precision = "fp32"' in message
    assert not (tmp_path / "run").exists()
    file = tmp_path / "run.toml"
    model, data = str(tmp_path / "base"), "tests/data/train.jsonl"
    assert main(["init", model, "--train", data, "--steps", "2", "--out", str(file)]) == 0
    assert 'precision = "fp32"' in file.read_text(encoding="utf-8")


_HRM = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_LARA = {
    **_TEXT, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
FUSED_IN_FILES = {
    "hrm_text": (_HRM, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]),
    "lara_mini": (_LARA, ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]),
}


@pytest.mark.parametrize("family", FUSED_IN_FILES)
def test_layers_that_the_files_fuse_are_refused_before_training_all_at_once(tmp_path, capsys, family):
    """They could be trained, and then not be exported."""
    values, names = FUSED_IN_FILES[family]
    config = transformers.AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("tests/data/tiny-llama", pad_token="</s>").save_pretrained(tmp_path / "base")
    ending = f"exclude_modules = {listed(names)}"
    with pytest.raises(InjectionError) as refusal:
        resolve_targets(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PSTConfig())
    assert str(refusal.value).endswith(ending)
    init = ["init", str(tmp_path / "base"), "--train", "tests/data/train.jsonl", "--task", "causal-lm", "--steps", "2"]
    words = _arguments(family, tmp_path)
    for command in (["plan", *words], ["train", *words], [*init, "--out", str(tmp_path / "run.toml")]):
        assert main(command) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "transformers saves each fused with others, in parts or transposed" in message
        assert all(name in message for name in names)
    settings = [word for word in words if word != "--set" and not word.startswith(("start.", "schedule.initial"))]
    settings.append(f"pst.exclude_modules={json.dumps(names)}")
    words = [settings[0], *(word for setting in settings[1:] for word in ("--set", setting))]
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["train", *words, "--quiet"]) == 0
    assert main(["export", run, "--out", out, "--quiet"]) == 0
    assert main(["verify", out, "--against", run, "--limit", "2", "--quiet"]) == 0


def test_all_that_a_family_must_leave_dense_is_named_at_once():
    """DeepSeek-V4 has layers with another forward, and matrices outside any layer."""
    config = transformers.DeepseekV4Config(
        **{**_TEXT, "num_key_value_heads": 1}, head_dim=8, moe_intermediate_size=8, n_routed_experts=4,
        num_experts_per_tok=2, q_lora_rank=8, qk_rope_head_dim=4, o_lora_rank=8, o_groups=2, index_head_dim=8,
        index_n_heads=2, index_topk=4, mlp_layer_types=["moe", "moe"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InjectionError) as refusal:
        resolve_targets(model, PSTConfig())
    names = json.loads(str(refusal.value).rpartition("exclude_modules = ")[2])
    assert "o_a_proj" in names
    assert resolve_targets(model, PSTConfig(exclude_modules=tuple(names)))
