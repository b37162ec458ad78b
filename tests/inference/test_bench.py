"""The greedy loop against whole forward passes, and the time in linear layers."""

import time

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pst_ds.inference.bench import GreedyDecoder, LinearTime
from pst_ds.inference.runtime import SparseLinear


def _llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("tests/data/tiny-llama")).eval()


def _gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=35, n_positions=48)).eval()


@pytest.mark.parametrize("make", [_llama, _gpt2])
@torch.no_grad()
def test_tokens_are_those_of_whole_forward_passes(make):
    model = make()
    ids = torch.randint(35, (3, 6), generator=torch.Generator().manual_seed(4))
    decoder = GreedyDecoder(model)
    decoder.prefill(ids[:, :2])
    decoder.step()
    found = [decoder.prefill(ids), *(decoder.step() for _ in range(8))]  # what was before is forgotten
    for tokens in found:
        assert torch.equal(tokens, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1))
        ids = torch.cat([ids, tokens], 1)


class _Model(nn.Module):
    """Two layers and a slow thing beside them; a clock that each moves."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.register_forward_pre_hook(lambda *_: None)
        self.sparse = SparseLinear.from_dense(torch.eye(4))

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        self.clock.now += 100.0
        return self.head(self.sparse(self.first(x)))


class _Clock:
    now = 0.0


def test_time_in_linear_layers_and_nothing_else(monkeypatch):
    clock = _Clock()
    model = _Model(clock)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    for layer, seconds in ((model.first, 1.0), (model.sparse, 2.0), (model.head, 4.0)):
        forward = layer.forward

        def slow(x, forward=forward, seconds=seconds):
            clock.now += seconds
            return forward(x)

        monkeypatch.setattr(layer, "forward", slow)
    counted = LinearTime(model)
    with torch.no_grad():
        counted.start()
        model(torch.ones(4))
        model(torch.ones(4))
        counted.stop()
        model(torch.ones(4))
    assert (counted.blocks, counted.output_layer) == (6.0, 8.0)
