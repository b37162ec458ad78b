"""What task "causal-lm" refuses: settings, models and tokenizers that do not fit it."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoTokenizer, DistilBertConfig, GPT2Config, LlamaModel

from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.nn.targets import InjectionError
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train.run import build, prepare, train_prepared

LLAMA = "tests/data/tiny-llama"


def _prepared(tmp_path, **more):
    settings = {"output_dir": str(tmp_path / "run"), "deepspeed_config": "", **more}
    run = load_run("tests/data/causal_lm.toml", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    return prepare(run, LaunchEnvironment(0, 1, 0))


def _gpt2(folder):
    """Its config alone, which is all that these refusals read; the head is the embedding."""
    GPT2Config(
        vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=48, bos_token_id=1, eos_token_id=2
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)
    return str(folder)


def _refusal(tmp_path, **more):
    with pytest.raises(InputError) as caught:
        build(_prepared(tmp_path, **more))
    return str(caught.value)


def test_settings_that_do_not_fit_the_task_are_refused(tmp_path):
    message = _refusal(tmp_path, **{"eval.metric": "accuracy"})
    assert message == (
        "eval.metric = 'accuracy' is not a metric of task 'causal-lm'; choose from 'perplexity', or remove it"
    )
    message = _refusal(tmp_path, **{"eval.metric": "perplexity", "task": "classification"})
    assert "is not a metric of task 'classification'; choose from 'accuracy', 'macro_f1', 'matthews_cor" in message
    assert "must name one column for task 'causal-lm'" in _refusal(tmp_path, **{"data.text_columns": ["a", "b"]})
    assert "data.max_length = 1 must be at least 2" in _refusal(tmp_path, **{"data.max_length": 1})
    assert "task = 'lm' must be one of 'classification', 'regression', 'causal-lm'" in _refusal(tmp_path, task="lm")


def test_sequences_longer_than_the_model_s_positions_are_refused(tmp_path):
    message = _refusal(tmp_path, **{"data.max_length": 49})
    assert message.startswith("data.max_length = 49 is more than the 48 positions of the model")
    path = _gpt2(tmp_path / "base")  # which calls them n_positions
    assert "more than the 48 positions" in _refusal(tmp_path, **{"data.max_length": 49, "model.path": path})
    _prepared(tmp_path, **{"data.max_length": 48})


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    message = _refusal(tmp_path, **{"model.tokenizer": "tests/data/tiny-bert"})
    assert "the tokenizer has no end-of-text token (eos_token)" in message
    assert "model.tokenizer" in message


def test_another_model_s_tokenizer_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-bert", eos_token="[SEP]")
    tokenizer.save_pretrained(tmp_path / "other")
    message = _refusal(tmp_path, **{"model.tokenizer": str(tmp_path / "other")})
    assert "the tokenizer has 37 tokens and the end-of-text token 3, the model only 35 (vocab_size)" in message


def test_fewer_sequences_than_a_batch_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has 93 examples, .*batch_size = 96; lower it or data\.max_length, the tok"):
        train_prepared(_prepared(tmp_path, **{"train.batch_size": 96}), quiet=True)


def test_a_model_that_looks_both_ways_is_refused(tmp_path):
    more = {"model.path": "tests/data/tiny-bert", "model.tokenizer": LLAMA}
    assert "the model is an encoder (bert, whose config says is_decoder = false)" in _refusal(tmp_path, **more)


def test_a_model_of_no_causal_class_is_refused(tmp_path):
    DistilBertConfig(n_layers=1, dim=8, n_heads=1, hidden_dim=8, vocab_size=40).save_pretrained(tmp_path / "base")
    more = {"model.path": str(tmp_path / "base"), "model.tokenizer": LLAMA}
    assert "and task 'causal-lm' cannot be built" in _refusal(tmp_path, **more)


def test_a_head_that_would_be_random_is_refused(tmp_path):
    LlamaModel(AutoConfig.from_pretrained(LLAMA)).save_pretrained(tmp_path / "base")
    message = _refusal(tmp_path, **{"model.path": str(tmp_path / "base"), "model.tokenizer": LLAMA})
    assert f"model.path = '{tmp_path}/base' lacks lm_head.weight, which a LlamaForCausalLM" in message


def test_an_update_of_a_tied_embedding_is_refused(tmp_path):
    more = {"model.path": _gpt2(tmp_path / "base"), "pst.update_embeddings": ["wte"]}
    with pytest.raises(InjectionError, match=r"transformer\.wte\.weight is tied to lm_head\.weight"):
        _prepared(tmp_path, **more)
