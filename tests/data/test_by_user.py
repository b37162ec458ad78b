"""Rows by user: what each task loads of one user is what it loads of a file with that user's rows alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from pst_ds.config.data import DataConfig, EvalConfig
from pst_ds.config.run import ConfigError
from pst_ds.data.by_user import read_by_user
from pst_ds.data.tasks.causal_lm import CausalLM
from pst_ds.data.tasks.chat import Chat
from pst_ds.data.tasks.classification import Classification
from tests.pairs import every_pair

USERS = ("ann", "7", "ann", "ben")


def _row(i):
    words = " ".join(["the film was fine and very sharp"] * (1 + i % 3))
    return {"text": words, "label": "good" if i % 2 else "bad", "messages": [
        {"role": "user", "content": f"film {i}"}, {"role": "assistant", "content": words},
    ]}  # fmt: skip


def _write(path, users):
    rows = [_row(i) | {"who": int(user) if user.isdigit() else user} for i, user in users]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    everyone = [(i, USERS[i % 4]) for i in range(12)]
    everyone = [(i, user) for i, user in everyone if user != "7"]  # one type of a column
    alone = [pair for pair in everyone if pair[1] == "ann"]
    return _write(tmp_path / "all.jsonl", everyone), _write(tmp_path / "ann.jsonl", alone)


def _tokenizer(template=False):
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template:
        tokenizer.chat_template = Path("tests/data/chat.jinja").read_text()
    return tokenizer


@every_pair
@pytest.mark.parametrize(
    ("task", "more"),
    [(Classification, {}), (CausalLM, {"max_length": 16}), (Chat, {"text_columns": ("messages",), "max_length": 64})],
    ids=["labels", "text", "messages"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_users_examples_are_those_of_a_file_of_its_own(files, task, more, split):
    everyone, alone = (DataConfig(train=path, test=path, **more) for path in files)
    made, tokenizer, labels = task(EvalConfig()), _tokenizer(task is Chat), ["bad", "good"]
    rows = read_by_user(everyone, split, "who")
    assert {user: rows.count(user) for user in rows.places} == {"ann": 6, "ben": 3}
    own, wanted = rows.load(made, "ann", tokenizer, labels), made.load(alone, split, tokenizer, labels)
    assert len(own) == len(wanted)
    for i in range(len(own)):
        ours, theirs = made.collate(own, [i], tokenizer), made.collate(wanted, [i], tokenizer)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_short_text_is_one_short_sequence_and_nothing_of_it_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("PST_DS_CACHE", str(tmp_path / "cache"))
    path = _write(tmp_path / "rows.jsonl", [(0, "ann")])
    rows = read_by_user(DataConfig(train=path, max_length=128), "train", "who")
    own = rows.load(CausalLM(EvalConfig()), "ann", _tokenizer(), [])
    assert len(own) == 1
    assert 2 < own.length < 128
    assert not os.path.exists(tmp_path / "cache")


def test_numbers_name_users_too(tmp_path):
    path = _write(tmp_path / "rows.jsonl", [(0, "7"), (1, "8"), (2, "7")])
    assert read_by_user(DataConfig(train=path), "train", "who").places == {"7": [0, 2], "8": [1]}


@pytest.mark.parametrize("value", [None, "", " "])
def test_a_row_of_nobody_is_refused(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "who": who}) + "\n" for who in ("ann", value)))
    with pytest.raises(ConfigError, match="in line 2, which is not a user"):
        read_by_user(DataConfig(train=str(path)), "train", "who")


def test_users_that_look_the_same_are_refused(tmp_path):
    """Each would get an adapter of its own, and half of the examples."""
    path = tmp_path / "rows.csv"
    path.write_text("text,user\nfilm,ann\nplot,bob\ncast,ann \n")
    with pytest.raises(ConfigError, match="has the users 'ann' and 'ann ', which look the same, in line 4"):
        read_by_user(DataConfig(train=str(path)), "train", "user")


def test_a_missing_number_is_not_a_user(tmp_path):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["film", "plot"], "user": [1.0, float("nan")]}).to_parquet(path)
    with pytest.raises(ConfigError, match="column 'user' has nan in row 1, which is not a user"):
        read_by_user(DataConfig(train=str(path)), "train", "user")
