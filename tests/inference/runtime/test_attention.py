"""Attention of single tokens: softmax as it is defined, the same bits in every batch, and torch's for all else."""

import ctypes

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.inference.runtime import attention
from pst_ds.inference.runtime.attention import first_seen, one_query, quicken_attention, takes
from tests.guard_pages import Region, in_child

pytestmark = pytest.mark.skipif(attention.library() is None, reason="no C++ compiler")
SCALE = 0.3


def _random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _defined(query, key, value, begins):
    """softmax(scale q K') V in fp64, (B, H, D)."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = SCALE * query @ key.transpose(2, 3)
    for sample, begin in enumerate(begins):
        scores[sample, :, :, :begin] = -torch.inf
    return (scores.softmax(-1) @ value).squeeze(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("length", "size"), [(1, 16), (5, 32), (70, 64)])
def test_it_is_softmax_of_what_each_sample_sees(dtype, heads, groups, length, size):
    query, key = _random(3, heads, 1, size, dtype=dtype), _random(3, groups, length, size, dtype=dtype)
    value, begins = _random(3, groups, length, size, dtype=dtype) + 1, [0, length // 2, length - 1]
    found, wanted = one_query(query, key, value, begins, SCALE), _defined(query, key, value, begins)
    assert found.dtype == dtype
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sample_has_the_same_bits_in_every_batch_and_after_any_padding(dtype):
    query, key, value = (_random(4, n, m, 16, dtype=dtype) for n, m in ((6, 1), (2, 21), (2, 21)))
    value = value.flip(0)
    begins = [3, 0, 7, 20]
    together = one_query(query, key, value, begins, SCALE)
    for i, begin in enumerate(begins):
        alone = one_query(query[i : i + 1], key[i : i + 1, :, begin:], value[i : i + 1, :, begin:], [0], SCALE)
        assert torch.equal(alone[0], together[i])
    torch.set_num_threads(2)
    try:
        assert torch.equal(one_query(query, key, value, begins, SCALE), together)
    finally:
        torch.set_num_threads(1)


def test_queries_and_caches_are_read_where_they_lie():
    query, roomy = _random(2, 1, 4, 16).transpose(1, 2), _random(2, 2, 2, 40, 16)
    key, value = roomy[0, :, :, :9], roomy[1, :, :, :9]
    assert takes(query, key, value)
    found = one_query(query, key, value, [0, 0], SCALE)
    assert torch.equal(found, one_query(query.contiguous(), key.contiguous(), value.contiguous(), [0, 0], SCALE))


@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_is_read_beyond_a_cache(at_end):
    regions = []

    def guarded(tensor):
        regions.append(Region(tensor.nbytes))
        address = regions[-1].place(tensor, at_end)
        held = (ctypes.c_char * tensor.nbytes).from_address(address)
        return torch.frombuffer(held, dtype=tensor.dtype).view(tensor.shape)

    def run():
        for length in (1, 2, 7, 33):
            query, key = (_random(2, n, m, 16, dtype=torch.bfloat16) for n, m in ((6, 1), (2, length)))
            found = one_query(guarded(query), guarded(key), guarded(key), [0, length - 1], SCALE)
            assert torch.equal(found, one_query(query, key, key, [0, length - 1], SCALE))

    assert in_child(run) == 0


def test_what_else_there_is_is_left_to_torch():
    query, key = _random(2, 4, 1, 16), _random(2, 2, 9, 16)
    assert takes(query, key, key)
    assert not takes(_random(2, 4, 3, 16), key, key)
    assert not takes(query.double(), key.double(), key.double())
    assert not takes(query[..., :8], key[..., :8], key[..., :8])
    assert not takes(query, key, key[..., :8])
    assert not takes(query, key.bfloat16(), key.bfloat16())
    assert not takes(query, key.transpose(2, 3).contiguous().transpose(2, 3), key)
    assert not takes(query.requires_grad_(), key, key)
    with torch.no_grad():
        assert takes(query, key, key)


def test_a_mask_says_where_a_sample_begins_or_nothing_that_is_known_here():
    seen = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)[:, None, None]
    assert first_seen(None, 3, 4) == [0, 0, 0]
    assert first_seen(seen, 3, 4) == [2, 0, 3]
    assert first_seen(seen[:1], 3, 4) == [2, 2, 2]
    assert first_seen(seen.float(), 3, 4) is None
    assert first_seen(seen, 3, 5) is None
    assert first_seen(seen.expand(3, 2, 1, 4), 3, 4) is None
    for hole in ([1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]):
        assert first_seen(torch.tensor([[[hole]]], dtype=torch.bool), 1, 4) is None


def _llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _greedy(model):
    ids = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    options = {"max_new_tokens": 7, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    written = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, eos_token_id=None, **options)
    return torch.stack(written.logits)


def test_a_model_writes_what_it_wrote_with_torchs_attention(monkeypatch):
    model = _llama()
    wanted = _greedy(model)
    assert quicken_attention(model)
    assert not quicken_attention(model)
    calls = []
    monkeypatch.setattr(attention, "one_query", lambda *given: calls.append(given) or one_query(*given))
    found = _greedy(model)
    assert len(calls) == 6 * 2  # every token after the first, which the prompt gives
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_trains_with_torchs_attention():
    model, ids = _llama(), torch.arange(3, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    assert quicken_attention(model)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, wanted)


def test_models_of_other_attentions_and_places_stay_as_they_are(monkeypatch):
    assert not quicken_attention(torch.nn.Linear(2, 2))
    eager = _llama()
    eager.set_attn_implementation("eager")
    assert not quicken_attention(eager)
    assert not quicken_attention(_llama().to("meta"))
    monkeypatch.setattr(attention, "library", lambda: None)
    assert not quicken_attention(_llama())
