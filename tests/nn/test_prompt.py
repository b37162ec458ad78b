"""A prompt: the losses and gradients of PEFT's, those of embeddings that are put together by hand, and generation."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from pst_ds.core.prompts import with_prompt, without_prompt
from pst_ds.errors import InputError
from pst_ds.nn.inject import bypassed
from pst_ds.nn.prompt import PSTPrompt, attach_prompt, embedded, prompt_of, read

LLAMA = "tests/data/tiny-llama"
TEXT = "a good plot"


def _llama(kind=AutoModelForCausalLM, **options):
    torch.manual_seed(0)
    return kind.from_pretrained(LLAMA, dtype=torch.float64, **options).eval()


def _prompted(model, *, adapter="none", rank=0, after=0):
    ids = torch.tensor(AutoTokenizer.from_pretrained(LLAMA)(TEXT)["input_ids"])
    attach_prompt(model, PSTPrompt(embedded(model, ids), adapter, after=after, rank=rank))
    return model.requires_grad_(False).get_submodule("model.pst_prompt").requires_grad_(True)


def _batch(*, left=False):
    """Two texts, one with padding; the first token of each is predicted by none."""
    ids = torch.randint(4, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    ids[0, slice(0, 2) if left else slice(4, 6)] = 0
    real = torch.tensor([[0, 0, 1, 1, 1, 1] if left else [1, 1, 1, 1, 0, 0], [1] * 6])
    labels = ids.masked_fill(real == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def test_loss_and_gradients_are_those_of_pefts_prompt_tuning_from_text():
    peft = pytest.importorskip("peft")
    ours = _llama()
    prompt = _prompted(ours)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", prompt_tuning_init="TEXT", prompt_tuning_init_text=TEXT, num_virtual_tokens=prompt.size,
        tokenizer_name_or_path=LLAMA,
    )  # fmt: skip
    theirs = peft.get_peft_model(_llama(), config)
    (table,) = (param for param in theirs.parameters() if param.requires_grad)
    torch.testing.assert_close(prompt.pst_P, table.to(torch.float64), rtol=1e-6, atol=1e-8)
    table.data = table.data.double()
    loss, reference = ours(**_batch()).loss, theirs(**_batch()).loss
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0.0)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(prompt.pst_P.grad, table.grad, rtol=1e-6, atol=1e-10)
    assert prompt.pst_P.grad.norm() > 1e-4


@pytest.mark.parametrize("adapter", ["linear", "low-rank"])
def test_an_adapter_begins_as_the_text_and_trains(adapter):
    plain, model = _llama(), _llama()
    _prompted(plain)
    prompt = _prompted(model, adapter=adapter, rank=2 if adapter == "low-rank" else 0)
    states = prompt.states.clone()
    assert torch.equal(model(**_batch()).logits, plain(**_batch()).logits)
    model(**_batch()).loss.backward()
    assert prompt.pst_U.grad.any()
    prompt.pst_U.data.normal_()
    change = prompt.pst_U if prompt.pst_V is None else prompt.pst_U @ prompt.pst_V
    torch.testing.assert_close(prompt(), states + states @ change.t())
    assert "states" not in "".join(model.state_dict())


def test_an_encoder_reads_it_after_its_first_token():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    plain = BertForSequenceClassification(config).double().eval()
    model = copy.deepcopy(plain)
    attach_prompt(model, PSTPrompt(embedded(model, torch.tensor([7, 9, 11])), after=1))
    batch = _batch()
    kinds = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    words = plain.bert.get_input_embeddings()(batch["input_ids"])
    own = plain.bert.get_input_embeddings()(torch.tensor([[7, 9, 11]] * 2))
    put_in = torch.cat([words[:, :1], own, words[:, 1:]], 1)
    real, zeros = batch["attention_mask"], torch.zeros(2, 3, dtype=torch.int64)
    expected = plain(
        inputs_embeds=put_in, attention_mask=torch.cat([real[:, :1], zeros + 1, real[:, 1:]], 1),
        token_type_ids=torch.cat([kinds[:, :1], zeros, kinds[:, 1:]], 1),
    ).logits  # fmt: skip
    found = model(input_ids=batch["input_ids"], attention_mask=real, token_type_ids=kinds)
    torch.testing.assert_close(found.logits, expected)
    assert not torch.allclose(plain(batch["input_ids"], real, kinds).logits, expected)
    copied = copy.deepcopy(model)
    prompt_of(copied).pst_P.data.normal_()  # a copy has a prompt of its own
    torch.testing.assert_close(model(batch["input_ids"], real, kinds).logits, expected)
    assert not torch.allclose(copied(batch["input_ids"], real, kinds).logits, expected)
    hidden = model.bert(batch["input_ids"], real, output_hidden_states=True)
    assert {state.shape[1] for state in (hidden.last_hidden_state, *hidden.hidden_states)} == {6}


def test_what_is_on_top_of_a_decoder_sees_the_text_alone():
    model = _llama(AutoModelForSequenceClassification)
    model.config.pad_token_id = 0
    batch = _batch()
    dense = model(batch["input_ids"], batch["attention_mask"]).logits
    prompt = _prompted(model)
    found = model(batch["input_ids"], batch["attention_mask"]).logits
    one = model(batch["input_ids"][:1, :4]).logits  # the same text without its padding
    torch.testing.assert_close(found[:1], one)
    assert not torch.allclose(found, dense)
    with bypassed(model):
        torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"]).logits, dense)
    assert prompt.size == 4


def test_it_writes_as_the_embeddings_put_together_by_hand():
    model, plain = _llama(), _llama()
    prompt = _prompted(model)
    batch = _batch(left=True)
    how = {"attention_mask": batch["attention_mask"], "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=batch["input_ids"], **how)[:, 6:]
    for row, width in ((0, 4), (1, 6)):  # without padding
        ids = batch["input_ids"][row : row + 1, -width:]
        put_in = torch.cat([prompt().unsqueeze(0), plain.get_input_embeddings()(ids)], 1)
        expected = plain.generate(inputs_embeds=put_in, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert found[row].tolist() == expected[0].tolist()
    slow = model.generate(input_ids=batch["input_ids"], use_cache=False, **how)[:, 6:]
    assert torch.equal(found, slow)


def test_states_are_what_the_model_makes_of_the_text():
    model = _llama()
    ids = torch.tensor([5, 6, 7])
    expected = model.model(input_ids=ids.unsqueeze(0)).last_hidden_state[0]
    assert torch.equal(read(model, ids), expected)
    assert torch.equal(embedded(model, ids), model.get_input_embeddings().weight[ids])


def test_what_is_put_in_comes_out():
    values, prompt = torch.randn(2, 4, 3), torch.randn(2, 3)
    for after in (0, 1, 4):
        joined = with_prompt(values, prompt, after)
        assert torch.equal(joined[:, after : after + 2], prompt.expand(2, 2, 3))
        assert torch.equal(without_prompt(joined, 2, after), values)


def test_a_model_without_embeddings_is_refused():
    with pytest.raises(InputError, match="reads no embeddings"):
        attach_prompt(torch.nn.Linear(2, 2), PSTPrompt(torch.zeros(1, 2)))
