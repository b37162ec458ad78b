"""Beam search against every text there is, and what must not be repeated."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from pst_ds.config.data import EvalConfig
from pst_ds.data.generation import _NoRepeatAfter, write_texts

END, VOCABULARY, LONGEST = 0, 5, 3


class _Tokenizer:
    """Tokens are their numbers."""

    eos_token_id, pad_token_id = END, None

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(str(int(i)) for i in row if i != END) for row in ids]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=24, initializer_range=0.6,
        bos_token_id=END, eos_token_id=END, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=9.0, min_new_tokens=2)
    return model


def _best(model, prompt, penalty, repeats=0):
    """The best of all texts up to LONGEST tokens: finished ones with their end, and unfinished ones of full length."""
    best, best_score = None, -float("inf")
    words = range(1, VOCABULARY)
    texts = [(*text, END) for n in range(LONGEST) for text in itertools.product(words, repeat=n)]
    for text in [*texts, *itertools.product(words, repeat=LONGEST)]:
        grams = [text[i : i + repeats] for i in range(len(text) - repeats + 1)]
        if repeats and len(set(grams)) < len(grams):
            continue
        with torch.no_grad():
            chances = model(torch.tensor([[*prompt, *text]])).logits[0].log_softmax(-1)
        total = sum(float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(text))
        score = total / len(text) ** penalty
        if score > best_score:
            best, best_score = text, score
    return " ".join(str(token) for token in best if token != END)


@pytest.mark.parametrize("penalty", [0.0, 0.9, 3.0])
def test_enough_beams_find_the_best_text(model, penalty):
    prompts = [[1, 2, END], [3, END], [2, 4, 1, 3, END], [4, 4, END]]
    settings = EvalConfig(num_beams=64, length_penalty=penalty, max_new_tokens=LONGEST, no_repeat_ngram_size=0)
    found = write_texts(model, prompts, _Tokenizer(), settings, 3, "cpu")
    assert found == [_best(model, prompt, penalty) for prompt in prompts]
    assert len(set(found)) > 1


def test_no_token_of_a_text_stands_in_it_twice_but_those_of_the_data_may(model):
    prompts = [[1, 2, END], [3, 1, 4, 2, END]]
    settings = EvalConfig(num_beams=64, length_penalty=3.0, max_new_tokens=LONGEST, no_repeat_ngram_size=1)
    found = write_texts(model, prompts, _Tokenizer(), settings, 2, "cpu")
    assert found == [_best(model, prompt, 3.0, repeats=1) for prompt in prompts]
    assert set(found[1].split()) <= {"1", "2", "3", "4"}  # there is no other
    assert found[1]


def test_one_beam_takes_the_likeliest_token(model):
    settings = EvalConfig(num_beams=1, max_new_tokens=4, no_repeat_ngram_size=0)
    ids = [1, 3, END]
    (found,) = write_texts(model, [ids], _Tokenizer(), settings, 1, "cpu")
    text = []
    with torch.no_grad():
        while len(text) < 4 and (not text or text[-1] != END):
            text.append(int(model(torch.tensor([[*ids, *text]])).logits[0, -1].argmax()))
    assert found == " ".join(str(token) for token in text if token != END)


def test_the_model_is_left_as_it_was(model):
    before = model.generation_config
    write_texts(model, [[1, END]], _Tokenizer(), EvalConfig(num_beams=2, max_new_tokens=2), 1, "cpu")
    assert model.generation_config is before
    assert (before.do_sample, model.config.use_cache) == (True, False)


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=9), st.integers(1, 3))
def test_only_what_was_written_may_not_be_repeated(prompt, text, size):
    scores = _NoRepeatAfter(len(prompt), size)(torch.tensor([prompt + text], dtype=torch.int64), torch.zeros(1, 4))
    seen = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
    last = tuple(text[len(text) - size + 1 :]) if size > 1 else ()
    for token in range(4):
        banned = len(text) >= size - 1 and (*last, token) in seen
        assert (scores[0, token] == -float("inf")) == banned
