"""A quickened model has both of its quick parts, and what is put on its layers afterwards stays on them."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.inference.runtime import attention
from pst_ds.inference.runtime.attention import quicken_decoding
from pst_ds.inference.runtime.dense import VectorLinear
from pst_ds.nn.batched_updates import LEFT, RIGHT, BatchUpdates

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


@torch.no_grad()
def test_updates_of_users_come_on_a_quickened_output_layer(model):
    quicken_decoding(model)
    ids = torch.arange(3, 9)[None]
    plain = model(input_ids=ids).logits
    state = {f"lm_head.{LEFT}": torch.randn(50, 2), f"lm_head.{RIGHT}": torch.randn(2, 32)}
    updates = BatchUpdates(model, {name: values.shape for name, values in state.items()}, beta=1.0)
    updates.assign([state], plain)
    assert not torch.allclose(model(input_ids=ids).logits, plain)


def test_models_without_either_stay_as_they_are():
    layer = nn.Linear(2, 2)
    quicken_decoding(layer)
    assert type(layer) is nn.Linear
