"""Tiny models with stacks of experts, one of each family, and what their layers must compute."""

from __future__ import annotations

import torch
import transformers
from torch import nn

_TEXT = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_FINE = {**_TEXT, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "num_experts": 4}
_DEEPSEEK = {
    **_TEXT, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
_CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**_TEXT, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**_FINE, shared_expert_intermediate_size=8),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_FINE, head_dim=8),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_FINE, head_dim=8, shared_expert_intermediate_size=8, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**_TEXT, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**_DEEPSEEK, **_LATENT),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**_DEEPSEEK, head_dim=8),
    "phimoe": lambda: transformers.PhimoeConfig(**_TEXT, num_local_experts=4),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2),
    "jamba": lambda: transformers.JambaConfig(
        **_TEXT, num_experts=4, num_experts_per_tok=2, attn_layer_period=1, attn_layer_offset=0, expert_layer_period=1,
        expert_layer_offset=0, use_mamba_kernels=False,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{k: v for k, v in _DEEPSEEK.items() if k not in ("num_hidden_layers", "first_k_dense_replace")},
        layers_block_type=["attention", "moe"], head_dim=8, moe_shared_expert_intermediate_size=8,
    ),
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        **_FINE, num_dense_layers=1, layer_types=["full_attention", "full_attention"],
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2,
    ),
    "aria": lambda: transformers.AriaTextConfig(**_TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
}  # fmt: skip
FAMILIES = tuple(_CONFIGS)


def tiny_model(family: str) -> nn.Module:
    """A causal language model with random weights, buffers included, that computes in fp32 on the CPU."""
    torch.manual_seed(3)
    config = _CONFIGS[family]()
    if family == "aria":
        from transformers.models.aria.modeling_aria import AriaTextForCausalLM

        model: nn.Module = AriaTextForCausalLM(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(4)
    for param in model.parameters():
        param.data.copy_(torch.randn(param.shape, generator=generator) * 0.2)
    model.set_experts_implementation("eager")
    return model.eval()
