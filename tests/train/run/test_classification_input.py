"""What a run makes of a base model's config: the kind of problem, the padding token and the positions."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.data.model_limits import positions_of
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train.run import build, prepare

BERT, LLAMA = "tests/data/tiny-bert", "tests/data/tiny-llama"
CLASSIFY, CAUSAL = "tests/data/world_size.toml", "tests/data/causal_lm.toml"


def _prepared(run_file, folder, **settings):
    settings = {"output_dir": str(folder / "run"), "deepspeed_config": "", **settings}
    return prepare(
        load_run(run_file, [f"{key}={json.dumps(value)}" for key, value in settings.items()]),
        LaunchEnvironment(0, 1, 0),
    )


@pytest.mark.parametrize("inherited", ["multi_label_classification", "regression"])
def test_the_loss_is_the_cross_entropy_whatever_the_base_was_trained_for(tmp_path, inherited):
    config = AutoConfig.from_pretrained(BERT, num_labels=2, problem_type=inherited)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BERT).save_pretrained(tmp_path / "base")
    prepared = _prepared(CLASSIFY, tmp_path, **{"model.path": str(tmp_path / "base")})
    engine = build(prepared).eval()
    batch = prepared.task.collate(prepared.load("train"), range(6), prepared.tokenizer)
    with torch.no_grad():
        found = engine(**batch)
    assert float(found.loss) == pytest.approx(float(cross_entropy(found.logits, batch["labels"])), rel=1e-6)
    assert engine.module.config.problem_type == "single_label_classification"


def test_a_padding_token_that_the_model_lacks_is_refused_where_texts_are_padded(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = {"model.path": LLAMA, "model.tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(ConfigError, match=r"padding token '\[NEW\]' has the id 35, but the model only 35 tokens"):
        _prepared(CLASSIFY, tmp_path, **settings)
    assert _prepared(CAUSAL, tmp_path, **settings).tokenizer.pad_token_id == 35  # no sequence is padded


_SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet", "roberta-prelayernorm")
OTHERS = ("bert", "electra", "opt", "gpt2", "albert")


@pytest.mark.parametrize("kind", [*COUNTED_FROM_PADDING, *OTHERS])
def test_a_model_has_positions_for_so_many_tokens_and_no_more(kind):
    config = AutoConfig.for_model(kind, **_SMALL, max_position_embeddings=20, pad_token_id=1)
    model = transformers.AutoModel.from_config(config).eval()
    most = positions_of(config)
    assert most == (18 if kind in COUNTED_FROM_PADDING else 20)
    ids = torch.full((1, most + 1), 7)
    with torch.no_grad():
        assert model(input_ids=ids[:, :most]).last_hidden_state.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)


def test_texts_longer_than_a_roberta_s_positions_are_refused(tmp_path):
    config = AutoConfig.for_model("roberta", **_SMALL, max_position_embeddings=34)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(BERT)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"model.path": str(tmp_path / "base")}
    with pytest.raises(ConfigError, match=r"data\.max_length = 33 .* Set it to at most 32"):
        _prepared(CLASSIFY, tmp_path, **settings, **{"data.max_length": 33})
    _prepared(CLASSIFY, tmp_path, **settings, **{"data.max_length": 32})


def test_a_run_that_would_train_nothing_is_refused(tmp_path):
    rank = {"method": "lora", "pst.update_rank": 0}
    with pytest.raises(ConfigError, match=r"method = 'lora' with pst\.update_rank = 0 would train nothing"):
        _prepared(CAUSAL, tmp_path, **rank)
    _prepared(CLASSIFY, tmp_path, **rank)  # the head trains
