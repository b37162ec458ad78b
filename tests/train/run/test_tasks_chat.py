"""Conversations from a file to a verified export that answers, with a tiny Llama."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pst_ds.cli.main import main

pytestmark = pytest.mark.usefixtures("alone")

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama whose tokenizer has no template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<end>"]})
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base, tmp_path):
    words = ["film", "plot", "warm", "dull"]
    rows = [
        {"messages": [
            {"role": "user", "content": f"the {words[i % 4]}"},
            {"role": "assistant", "content": f"the {words[(i + 1) % 4]} {words[i % 4]}"},
            {"role": "user", "content": "the the"},
            {"role": "assistant", "content": "warm " * (1 + i % 3)},
        ]}
        for i in range(16)
    ]  # fmt: skip
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    return {
        "output_dir": str(tmp_path / "run"), "task": "chat", "model.path": str(base), "deepspeed_config": "",
        "data.train": str(path), "data.validation": str(path), "data.test": str(path), "data.max_length": 40,
        "data.text_columns": ["messages"], "data.chat_template": str(tmp_path / "chat.jinja"),
        "train.num_steps": 12, "train.batch_size": 4, "train.update_learning_rate": 0.05,
        "schedule.final_sparsity": 0.5, "schedule.update_interval": 2, "eval.num_beams": 1, "eval.max_new_tokens": 8,
    }  # fmt: skip


def _sets(settings):
    return [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]


def test_from_conversations_to_an_export_that_answers(settings, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", "tests/data/causal_lm.toml", "--quiet", *_sets(settings)]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert losses[-1] < 0.8 * losses[0]
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(run), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verified["differing_predictions"] == verified["max_logit_difference"] == 0
    assert verified["unit"] == "conversations"

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    chat = [{"role": "user", "content": "the film"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(**ids, max_new_tokens=2).shape[1] == ids["input_ids"].shape[1] + 2

    texts = tmp_path / "texts.jsonl"
    assert main(["eval", str(run), "--texts", str(texts), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"perplexity", "bleu", "rouge_l", "chrf"} <= metrics.keys()
    written = [json.loads(line) for line in texts.read_text().splitlines()]
    assert len(written) == 16
    assert written[0]["references"] == ["warm "]


def test_without_a_template_one_message_says_what_to_do(settings, capsys):
    del settings["data.chat_template"]
    assert main(["train", "tests/data/causal_lm.toml", "--quiet", *_sets(settings)]) == 2
    assert "Name a Jinja file with data.chat_template" in capsys.readouterr().err
    settings["data.chat_template"] = "no.jinja"
    assert main(["train", "tests/data/causal_lm.toml", "--quiet", *_sets(settings)]) == 2
    assert "data.chat_template = 'no.jinja' cannot be read" in capsys.readouterr().err


def test_init_sees_conversations_in_the_columns(base, settings, tmp_path):
    out = tmp_path / "run.toml"
    (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    try:
        words = [str(base), "--train", settings["data.train"], "--out", str(out)]
        assert main(["init", *words]) == 0
    finally:
        (base / "chat_template.jinja").unlink()
    written = out.read_text()
    assert 'task = "chat"' in written
    assert 'text_columns = ["messages"]' in written
    assert "label_column" not in written
