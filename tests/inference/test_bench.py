"""The greedy loop against whole forward passes."""

from itertools import islice

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pst_ds.inference.bench import greedy


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
    for tokens in islice(greedy(model, ids), 9):
        assert torch.equal(tokens, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1))
        ids = torch.cat([ids, tokens], 1)
