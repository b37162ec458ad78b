"""The quick output layer computes what nn.Linear does, and leaves alone what it must."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pst_ds.inference.bench import resident_bytes
from pst_ds.inference.runtime import native_loop as decoder
from pst_ds.inference.runtime.dense import VectorLinear, quicken_output_layer
from tools.packed_layers import packed_linear

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Share of the largest output: sums in another order in fp32, one rounding in bf16."""


def _llama(tied):
    config = AutoConfig.from_pretrained("tests/data/tiny-llama")
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _close(found, exact, dtype):
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert (found.double() - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(1,), (), (1, 1), (2, 3), (0,)])
@torch.no_grad()
def test_vector_linear_is_the_layer(dtype, bias, lead):
    torch.manual_seed(1)
    layer = nn.Linear(200, 75, bias=bias).to(dtype)
    x = torch.randn(*lead, 200, dtype=dtype)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    if exact.numel():
        _close(VectorLinear.of(layer)(x), exact, dtype)
    else:
        assert VectorLinear.of(layer)(x).shape == exact.shape


@torch.no_grad()
def test_vector_linear_without_a_compiler_is_torchs(monkeypatch):
    layer, x = nn.Linear(200, 75).bfloat16(), torch.randn(1, 1, 200).bfloat16()
    found = VectorLinear.of(layer)(x)
    monkeypatch.setattr(decoder, "library", lambda: None)
    _close(found, VectorLinear.of(layer)(x).double(), torch.bfloat16)


def test_vector_linear_is_the_very_weight_and_has_its_gradient():
    layer = nn.Linear(6, 4)
    made = VectorLinear.of(layer)
    assert made.weight is layer.weight
    assert made.bias is layer.bias
    x = torch.randn(6)
    made(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.expand(4, 6))


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_output_layer_is_quickened_and_stays_tied(tied):
    model = _llama(tied)
    ids = torch.arange(3, 9)[None]
    before, bytes_before = model(input_ids=ids[:, :1]).logits, resident_bytes(model)
    assert quicken_output_layer(model)
    assert type(model.lm_head) is VectorLinear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert resident_bytes(model) == bytes_before
    assert torch.allclose(model(input_ids=ids[:, :1]).logits, before, atol=1e-5)
    assert not quicken_output_layer(model)
    assert not quicken_output_layer(nn.Linear(2, 2))


def test_resident_bytes_count_shared_storage_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert resident_bytes(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    model.register_buffer("window", model[0].weight.detach()[2:4])
    assert resident_bytes(model) == 8 * 8 * 4
    layer = packed_linear(torch.eye(16))
    assert resident_bytes(layer) == 16 * 4 + 16 * 2 + 16 * 8 + 2 * 8
