"""A quickened model has both of its quick parts."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.inference.runtime import attention
from pst_ds.inference.runtime.attention import quicken_decoding
from pst_ds.inference.runtime.dense import VectorLinear

CONFIG = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "attn_implementation": "sdpa",
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


@pytest.mark.skipif(attention.library() is None, reason="no C++ compiler")
def test_output_layer_and_attention_are_quickened(model):
    quicken_decoding(model)
    assert type(model.lm_head) is VectorLinear
    assert model.config._attn_implementation == attention.NAME


def test_models_without_either_stay_as_they_are():
    layer = nn.Linear(2, 2)
    quicken_decoding(layer)
    assert type(layer) is nn.Linear
