"""Models are opened for one-shot pruning as ``from_pretrained`` opens them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pst_ds.prune.model_files import ModelFiles

TEXT = {
    "vocab_size": 35, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {
    "vocab_size": 35, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 66, "pad_token_id": 0, "num_labels": 2,
}  # fmt: skip
CONFIGS = {
    "nomic_bert": ENCODER,
    "gte": ENCODER,
    "jina_embeddings_v3": ENCODER,
    "ultrabert": ENCODER,
    "qwen3_5_moe_text": {
        **TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip
"""Families for which transformers also converts files of older or original checkpoints, which have other names."""


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_that_transformers_saved_has_every_tensor(tmp_path, family):
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    kind = AutoModelForCausalLM if CONFIGS[family].get("head_dim") else AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    files = ModelFiles(str(tmp_path), None)
    parts = {files.part_of(name) for name, _ in files.model.named_modules()}
    for part in sorted(parts):
        with files.loaded(part):
            prefix = "" if part == "outside" else f"{part}."
            for name, tensor in files.model.state_dict().items():
                if name.startswith(prefix) and not tensor.is_meta:
                    assert torch.equal(tensor, model.state_dict()[name]), name
