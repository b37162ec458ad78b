"""Activations without values, against what autograd saves and against a formula."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, LlamaForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.core.head_loss import ChunkSizes
from pst_ds.errors import InputError
from pst_ds.nn.inject import inject_pst
from pst_ds.planning.activations import UntraceableError, trace_micro_batch


def _llama(vocabulary, attention="sdpa", **grids):
    config = LlamaConfig(
        hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4, vocab_size=vocabulary,
        use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
        return inject_pst(model, PSTConfig(modules_to_save=(), relative_magnitude=False), **grids)


def _bytes(model, **shape):
    return trace_micro_batch(model, **shape).activations


@pytest.mark.parametrize("vocabulary", [100, 4000])
def test_checkpointed_layers_keep_their_inputs_alone(vocabulary):
    found = _bytes(_llama(vocabulary), batch=2, sequence=64, checkpointing=True)
    inputs, layer = 6 * 2 * 256, 2 * (10 * 256 + 6 * 640)  # of a token
    loss = 2 * vocabulary * 128 + 2 * 4 * (1 << 20)  # one chunk; softmax and what it is made from in fp32
    assert found == pytest.approx(128 * inputs + max(128 * layer, min(loss, 128 * 12 * vocabulary)), rel=0.15)


def test_each_block_that_is_not_recomputed_adds_what_it_keeps():
    shape = {"batch": 2, "sequence": 64, "checkpointing": True}
    some = [_bytes(_llama(100), recomputed_blocks=blocks, **shape) for blocks in (1, 3, 5)]
    every = _bytes(_llama(100), recomputed_blocks=6, **shape)
    none = _bytes(_llama(100), batch=2, sequence=64, checkpointing=False)
    assert every == _bytes(_llama(100), **shape)
    assert none > some[0] > some[1] > some[2]
    # the first block that keeps its activations takes the room of the one that was being recomputed
    two_blocks = some[1] - some[2]
    assert 0 <= some[2] - every < two_blocks / 4
    assert some[0] - some[1] == pytest.approx(two_blocks, rel=0.01)


def test_more_blocks_than_a_model_has_are_refused():
    with pytest.raises(InputError, match=r"model.recomputed_blocks = 7, and LlamaForCausalLM has 6 blocks"):
        _bytes(_llama(100), batch=1, sequence=8, checkpointing=True, recomputed_blocks=7)


@pytest.mark.thorough
def test_the_loss_of_a_large_vocabulary_is_one_chunk_for_any_number_of_tokens():
    """Whether it is the teacher's too: beside its logits it has hidden states."""
    shape = {"batch": 8, "sequence": 512, "checkpointing": True}
    small, large, taught = (
        _bytes(_llama(size), distilled=distilled, **shape)
        for size, distilled in [(100, False), (32_000, False), (32_000, True)]
    )
    logits, hidden = 2 * (1 << 22), 2 * 8 * 512 * 256
    assert large - small < logits + 8 * (1 << 20)
    assert 0 <= taught - large < logits + hidden + 8 * (1 << 20)
    on_gpu = _bytes(_llama(32_000), device="cuda", **shape)
    assert on_gpu - small < 8 * 512 * 32_000 * 2


@pytest.mark.few(1)
@pytest.mark.parametrize("distilled", [False, True])
def test_chunks_beyond_two_are_counted_as_if_they_were_run(distilled, monkeypatch):
    """Whatever their size: half as many of them, of twice the rows, read the head's weight half as often."""
    shape = {"batch": 2, "sequence": 512, "checkpointing": True, "distilled": distilled}
    traces = []
    for rows in (128, 256, 512):  # eight, four and two: the last are all run
        sizes = ChunkSizes(least_rows=rows, numbers=1, numbers_in_fp32=128 * 4000)
        monkeypatch.setattr("pst_ds.planning.activations.chunk_sizes", lambda device, sizes=sizes: sizes)
        traces.append(trace_micro_batch(_llama(4000), **shape))
    eight, four, two = ((trace.launches, trace.moved) for trace in traces)
    for k in range(2):
        assert eight[k] - four[k] == 2 * (four[k] - two[k])
    assert eight[0] > four[0]


def test_without_checkpointing_every_layer_keeps_what_its_matrices_multiply():
    found = _bytes(_llama(100), batch=2, sequence=64, checkpointing=False)
    inputs = 6 * 128 * 2 * (3 * 256 + 640)  # of q k v, of o, of gate and up, of down
    assert inputs * 2 < found < inputs * 8
    twice = _bytes(_llama(100), batch=4, sequence=64, checkpointing=False)
    assert twice == pytest.approx(2 * found, rel=0.05)


def test_eager_attention_keeps_a_square_for_every_head():
    sizes = [
        _bytes(_llama(100, attention), batch=1, sequence=512, checkpointing=False) for attention in ("eager", "sdpa")
    ]
    assert sizes[0] - sizes[1] > 6 * 4 * 512 * 512 * 2


def test_at_least_what_autograd_saves_of_a_real_classifier():
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, num_labels=3
    )
    real = AutoModelForSequenceClassification.from_config(config)
    inject_pst(real, PSTConfig())
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    known = {p.untyped_storage().data_ptr() for p in (*real.parameters(), *real.buffers())}
    ids = torch.zeros(3, 40, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = real(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.zeros(3, dtype=torch.long)).loss
    total = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in known)
    assert loss.requires_grad
    with torch.device("meta"):
        traced = AutoModelForSequenceClassification.from_config(config)
        inject_pst(traced, PSTConfig(relative_magnitude=False))
    found = _bytes(traced, batch=3, sequence=40, checkpointing=False)
    assert total <= found <= 1.5 * total


def test_a_model_that_needs_values_says_so():
    model = _llama(100)
    model.model.register_forward_pre_hook(lambda module, args: float(module.norm.weight.sum()))
    with pytest.raises(UntraceableError, match="LlamaForCausalLM"):
        _bytes(model, batch=1, sequence=8, checkpointing=False)


def test_an_exception_without_text_is_named():
    def refuse(module, args):
        raise NotImplementedError

    model = _llama(100)
    model.model.register_forward_pre_hook(refuse)
    with pytest.raises(UntraceableError, match=r"^LlamaForCausalLM: NotImplementedError$"):
        _bytes(model, batch=1, sequence=8, checkpointing=False)
