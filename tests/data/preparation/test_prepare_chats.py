"""Conversations into a store: tokens and mask are those of the conversation, whatever the file and the processes."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from pst_ds.cli.main import main
from pst_ds.config.data import DataConfig, DataSource
from pst_ds.data.conversations import Conversation, render
from pst_ds.data.preparation.pieces import Reading
from pst_ds.data.preparation.prepare import plan_store, prepare_store
from pst_ds.data.tasks.causal_lm import collate_sequences
from pst_ds.data.tokens.loading import load_sequences
from pst_ds.data.tokens.store import open_store
from pst_ds.errors import InputError

TINY = "tests/data/tiny-llama"
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m.content }}{% if m.role == 'assistant' %}{{ ' dull </s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
)
WORDS = ["film", "plot", "warm", "the", "a"]


@pytest.fixture(autouse=True)
def _own_cache(alone):
    """A cache of datasets of its own."""


@pytest.fixture
def tokenizer():
    made = AutoTokenizer.from_pretrained(TINY)
    made.chat_template = TEMPLATE
    return made


def _talk(number):
    return [
        {"role": "user", "content": " ".join(WORDS[number % 3 :])},
        {"role": "assistant", "content": " ".join(WORDS[: 1 + number % 4])},
        {"role": "user", "content": "the plot"},
        {"role": "assistant", "content": WORDS[number % 5]},
    ]


ROWS = [{"messages": _talk(i), "n": i} for i in range(60)]


def _jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _store(folder, source, tokenizer, **more):
    plan = plan_store([str(source)], tokenizer, Reading(column="messages", kind="chat"), piece_bytes=2000)
    prepare_store(plan, tokenizer, folder, **more)
    return open_store(folder)


def test_a_store_has_the_tokens_and_the_mask_of_every_conversation(tmp_path, tokenizer):
    stream = _store(tmp_path / "store", _jsonl(tmp_path / "chats.jsonl"), tokenizer)
    ids, learned = [], []
    for row in ROWS:
        rendered = render(Conversation(row["messages"]), tokenizer, "")
        assert rendered.ids[-1] == tokenizer.eos_token_id  # the template ends answers with it, so none is added
        ids += rendered.ids
        learned += rendered.is_answer
    assert np.asarray(stream.tokens[: len(stream)]).tolist() == ids
    assert stream.learned[0 : len(ids)].tolist() == learned
    assert 0.2 < np.mean(learned) < 0.8


def test_formats_and_processes_give_the_same_bytes(tmp_path, tokenizer):
    path = _jsonl(tmp_path / "chats.jsonl")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "chats.parquet")
    pairs = [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in ROWS]
    alike = [
        _store(tmp_path / "one", path, tokenizer),
        _store(tmp_path / "two", path, tokenizer, num_workers=2),
        _store(tmp_path / "parquet", tmp_path / "chats.parquet", tokenizer),
        _store(tmp_path / "pairs", _jsonl(tmp_path / "pairs.jsonl", pairs), tokenizer),
    ]
    assert len({stream.learned[0 : len(stream)].tobytes() for stream in alike}) == 1
    assert len({np.asarray(stream.tokens[: len(stream)]).tobytes() for stream in alike}) == 1
    assert alike[0].digest == alike[1].digest


def test_another_template_is_another_store(tmp_path, tokenizer):
    path = _jsonl(tmp_path / "chats.jsonl")
    keys = []
    for template in (TEMPLATE, TEMPLATE.replace("dull", "warm")):
        tokenizer.chat_template = template
        keys.append(plan_store([str(path)], tokenizer, Reading(column="messages", kind="chat")).key)
    assert keys[0] != keys[1]


def test_sequences_of_a_store_learn_what_the_assistant_says(tmp_path, tokenizer):
    _store(tmp_path / "store", _jsonl(tmp_path / "chats.jsonl"), tokenizer)
    sequences = load_sequences(DataConfig(train=str(tmp_path / "store"), max_length=40), "train", tokenizer)
    batch = collate_sequences(sequences, [0])
    rendered = [render(Conversation(row["messages"]), tokenizer, "") for row in ROWS[:4]]
    ids = [token for of in rendered for token in of.ids][:40]
    places = [place for of in rendered for place in range(len(of.ids))][:40]
    wrote = [is_answer for of in rendered for is_answer in of.is_answer][:40]
    assert batch["input_ids"].tolist() == [ids]
    assert batch["position_ids"].tolist() == [places]
    assert batch["labels"].tolist() == [[t if is_answer else -100 for t, is_answer in zip(ids, wrote, strict=True)]]


def test_a_mixture_takes_conversations_and_prose(tmp_path, tokenizer):
    prose = [{"text": " ".join(WORDS * 3)} for _ in range(60)]
    sources = (
        DataSource(path=str(_jsonl(tmp_path / "chats.jsonl")), weight=0.5, kind="chat"),
        DataSource(path=str(_jsonl(tmp_path / "prose.jsonl", prose)), weight=0.5),
    )
    sequences = load_sequences(DataConfig(sources=sources, max_length=16), "train", tokenizer)
    assert sequences.masks_tokens
    shares = [float(sequences[i].predicted.mean()) for i in range(len(sequences))]
    assert min(shares) < 0.6 < max(shares)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "film"}, "line 2 has neither a column 'messages' with messages nor prompt and completion"),
        ({"messages": "film"}, "line 2, column 'messages' holds 'film', but a conversation is a list of messages"),
        (
            {"messages": [{"role": "user", "content": "film"}]},
            "line 2, column 'messages' has no message of the role 'assistant'",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_line(tmp_path, tokenizer, row, problem):
    path = _jsonl(tmp_path / "chats.jsonl", [ROWS[0], row])
    with pytest.raises(InputError, match=problem):
        _store(tmp_path / "store", path, tokenizer)
    assert not (tmp_path / "store").exists()


def test_the_verb_takes_a_template_from_a_file(tmp_path, capsys):
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    words = ["prepare", str(_jsonl(tmp_path / "chats.jsonl")), "--tokenizer", TINY, "--kind", "chat", "--json"]
    assert main([*words, "--out", str(tmp_path / "store")]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err
    words += ["--chat-template", str(tmp_path / "chat.jinja"), "--out", str(tmp_path / "store")]
    assert main([*words, "--count-bytes"]) == 2
    assert "--count-bytes is for text" in capsys.readouterr().err
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["documents"] == len(ROWS)
