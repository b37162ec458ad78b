"""Tiny models of many families, and batches for them with padding where the family has any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from pst_ds.prune.model_files import ModelFiles

_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 48, "initializer_range": 0.2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2 + [
        "full_attention"]}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48,
                                 "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2}),
    "opt": ("OPTForCausalLM", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                               "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 48,
                               "init_std": 0.2, "bos_token_id": 2, "eos_token_id": 3}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**_SIZES, "bos_token_id": 2, "eos_token_id": 3}),
    "bamba": ("BambaForCausalLM", {**_SIZES, "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 4,
                                   "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "pad_token_id": 0}),
    "bert": ("BertModel", _SIZES),
    "roberta": ("RobertaForMaskedLM", {**_SIZES, "type_vocab_size": 1, "pad_token_id": 0}),
    "distilbert": ("DistilBertModel", {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48,
                                       "max_position_embeddings": 48, "initializer_range": 0.2}),
    "deberta_v2": ("DebertaV2Model", {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                                      "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
                                      "position_biased_input": False, "type_vocab_size": 0}),
}  # fmt: skip
"""Class and config of each family."""
ENCODERS = ("bert", "roberta", "distilbert", "deberta_v2")


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """``tiny(family, **more)``: a model with random weights, the same in every call."""

    def make(family: str, **more: Any) -> Any:
        class_name, config = FAMILIES[family]
        model_class = getattr(transformers, class_name)
        torch.manual_seed(1)
        return model_class(model_class.config_class(**{**config, **more})).eval()

    return make


@pytest.fixture
def batches() -> Callable[..., list[dict[str, torch.Tensor]]]:
    """``batches(family)``: three of four texts of 12 tokens; of an encoder the texts end in padding, 0 to 6 tokens."""

    def make(family: str) -> list[dict[str, torch.Tensor]]:
        rng, found = torch.Generator().manual_seed(2), []
        for _ in range(3):
            ids = torch.randint(4, 60, (4, 12), generator=rng)
            if family not in ENCODERS:
                found.append({"input_ids": ids})
                continue
            lengths = torch.randint(6, 13, (4, 1), generator=rng)
            mask = (torch.arange(12) < lengths).long()
            found.append({"input_ids": ids * mask, "attention_mask": mask})
        return found

    return make


def stopped_after(blocks, action):
    """Run ``action``, and fail after so many finished blocks as if a disk were full; return the message, or ""."""
    finish = ModelFiles.finish

    def counted(files, part, layers):
        finish(files, part, layers)
        if int(part[-1]) + 1 == blocks:
            raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelFiles, "finish", counted)
        try:
            action()
        except OSError as error:
            return str(error)
    return ""
