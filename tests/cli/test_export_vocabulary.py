"""``pst-ds export --vocabulary``: fewer tokens, the same model on texts that have no others."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pst_ds.hf  # noqa: F401
from pst_ds.cli.main import main


def said_by(capsys, *words):
    """The JSON of a command that succeeds, and what it printed."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]), printed


def _texts(path, count):
    with open(path) as file:
        return [json.loads(line)["text"] for _, line in zip(range(count), file, strict=False)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A BERT's run of 4 steps, with an updated embedding."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "output_dir": str(folder), "deepspeed_config": "", "train.num_steps": 4, "schedule.update_interval": 1,
        "pst.update_embeddings": ["word_embeddings"],
    }  # fmt: skip
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", "tests/data/world_size.toml", "--quiet", *overrides]) == 0
    return folder


@pytest.fixture
def some(tmp_path):
    """A file of few texts."""
    (tmp_path / "some.txt").write_text("\n".join(_texts("tests/data/train.jsonl", 3)) + "\n")
    return tmp_path / "some.txt"


STORED = {
    "dense": [],
    "packed": ["--format", "bitmask"],
    "rounded": ["--format", "bitmask", "--embeddings", "int4", "--group", "32"],
}


@pytest.mark.few(1)
@pytest.mark.parametrize("stored", STORED)
def test_a_run_is_exported_for_fewer_tokens_and_verified(run, some, tmp_path, capsys, stored):
    out = tmp_path / "out"
    whole, _ = said_by(capsys, "export", run, "--out", tmp_path / "whole", *STORED[stored])
    said, printed = said_by(capsys, "export", run, "--out", out, "--vocabulary", some, *STORED[stored])
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.vocab_size == said["tokens"] == len(AutoTokenizer.from_pretrained(out))
    assert f"embeds {said['tokens']} tokens" in printed
    assert said["weight_bytes"] < whole["weight_bytes"]
    checked, printed = said_by(capsys, "verify", out, "--against", run, "--checkpoint", "best", "--split", "validation")
    assert checked["reloaded_equal"] is True
    assert checked["vocabulary"]["tokens"] == said["tokens"]
    assert 0 < checked["vocabulary"]["same_tokens"] < checked["examples"]
    assert "texts unchanged" in printed


def test_seen_texts_have_the_same_logits(run, some, tmp_path, capsys):
    for name, words in (("whole", []), ("fewer", ["--vocabulary", some])):
        said_by(capsys, "export", run, "--out", tmp_path / name, *words)
    logits = {}
    for name in ("whole", "fewer"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            logits[name] = torch.cat(
                [model(**tokenizer(text, return_tensors="pt")).logits for text in some.read_text().splitlines()]
            )
    torch.testing.assert_close(logits["fewer"], logits["whole"], rtol=1e-5, atol=1e-6)


def test_seen_keeps_all_that_the_run_reads(run, tmp_path, capsys):
    said_by(capsys, "export", run, "--out", tmp_path / "out", "--vocabulary", "seen")
    for split in ("train", "validation"):
        words = ("--against", run, "--checkpoint", "best", "--split", split)
        checked, _ = said_by(capsys, "verify", tmp_path / "out", *words)
        assert checked["vocabulary"]["same_tokens"] == checked["examples"]


def test_a_folder_is_trimmed_once_more(run, some, tmp_path, capsys):
    said_by(capsys, "export", run, "--out", tmp_path / "seen", "--vocabulary", "seen")
    said, _ = said_by(capsys, "export", tmp_path / "seen", "--out", tmp_path / "out", "--vocabulary", some)
    said_by(capsys, "export", tmp_path / "out", "--out", tmp_path / "copy", "--format", "bitmask")
    direct, _ = said_by(capsys, "export", run, "--out", tmp_path / "direct", "--vocabulary", some)
    assert said["tokens"] == direct["tokens"]
    for name in ("out", "copy"):
        checked, _ = said_by(capsys, "verify", tmp_path / name, "--against", run, "--checkpoint", "best")
        assert checked["reloaded_equal"] is True
        assert checked["vocabulary"]["tokens"] == said["tokens"]


def test_what_is_no_text_is_2_and_writes_nothing(run, some, tmp_path, capsys):
    said_by(capsys, "export", run, "--out", tmp_path / "whole")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for source, vocabulary, words in (
        (run, "missing.txt", "cannot be read"),
        (run, tmp_path / "binary", "cannot be read"),
        (tmp_path / "whole", "seen", "has no training data"),
    ):
        arguments = ["export", str(source), "--out", str(tmp_path / "out"), "--vocabulary", str(vocabulary)]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_language_model_predicts_fewer_tokens(folders, some, tmp_path, capsys):
    run, out = folders / "run", tmp_path / "out"
    said, _ = said_by(capsys, "export", run, "--out", out, "--format", "bitmask", "--vocabulary", some)
    checked, _ = said_by(capsys, "verify", out, "--against", run, "--checkpoint", "best", "--split", "validation")
    assert checked["reloaded_equal"] is True
    assert checked["vocabulary"]["tokens"] == said["tokens"]
    config = json.loads((out / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(config["eos_token_id"]) == tokenizer.eos_token


def test_seen_tokens_of_sequences_of_several_lengths(folders, tmp_path, capsys):
    said, _ = said_by(capsys, "export", folders / "run", "--out", tmp_path / "out", "--vocabulary", "seen")
    assert 0 < said["tokens"] <= 35
