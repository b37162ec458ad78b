"""What all verbs have in common: one JSON object at the end, help that is quick, ``--quiet``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from pst_ds import progress
from pst_ds.cli.doctor import processes as doctor_processes
from pst_ds.cli.main import VERBS, build_parser, main

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = "tests/data/causal_lm.toml"
RUN_VERBS = ("plan", "train", "launch", "prune", "eval", "export", "verify")
QUIET = ("prepare", "train", "prune", "eval", "export", "verify", "predict", "bench")


def _arguments(verb, folders, out):
    """A short piece of work of each verb."""
    run, dense = str(folders / "run"), str(folders / "dense")
    tiny = ["--set", f"output_dir={json.dumps(str(out))}", "--set", "deepspeed_config=", "--set", "train.num_steps=2"]
    return {
        "init": ["tests/data/tiny-bert", "--train", "tests/data/train.jsonl", "--out", str(out / "run.toml")],
        "prepare": ["tests/data/train.jsonl", "--tokenizer", "tests/data/tiny-llama", "--out", str(out / "store")],
        "plan": [RUN_FILE, "--ranks", "2"],
        "train": [RUN_FILE, *tiny],
        "launch": [RUN_FILE, *tiny, "--by", "true"],
        "users": ["train", run, "--store", str(out / "users"), "--by", "label", "--epochs", "1", "--layers", "q_proj"],
        "prune": [RUN_FILE, "--method", "wanda", "--samples", "4", "--out", str(out)],
        "eval": [run],
        "export": [run, "--out", str(out)],
        "verify": [dense, "--against", run, "--limit", "2"],
        "predict": [
            str(folders / "regressor"),
            "--data",
            "tests/data/train.jsonl",
            "--out",
            str(out.with_suffix(".jsonl")),
        ],
        "generate": [dense, "--prompt", "the film", "--max-new-tokens", "2"],
        "bench": [dense, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1", "--dtype", "fp32"],
        "inspect": [run],
        "doctor": ["--folder", str(out.parent)],
    }[verb]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "serve"])  # which ends when it is stopped
def test_every_verb_ends_with_one_json_object(folders, tmp_path, capsys, monkeypatch, verb):
    # what doctor tries in other processes has tests of its own
    for name in ("native_code", "two_ranks"):
        monkeypatch.setattr(doctor_processes, name, lambda limit: iter(()))
    quiet = ["--quiet"] if verb in QUIET else []
    transformers.utils.logging.disable_progress_bar()  # which in a process of its own is done before the import
    capsys.readouterr()
    assert main([verb, *_arguments(verb, folders, tmp_path / "out"), *quiet, "--json"]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("}\n")
    result = json.loads(said.out.splitlines()[-1])
    assert isinstance(result, dict)
    assert len(result) > 1
    if quiet:
        assert said.err == ""
        assert progress.quiet


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pst-ds {verb}")
    assert "--json" in text
    assert ("--quiet" in text) == (verb in QUIET)
    assert ("--set KEY=VALUE" in text) == (verb in RUN_VERBS)


def test_quiet_is_for_one_call(folders, capsys):
    assert main(["verify", str(folders / "dense"), "--quiet"]) == 0
    assert main(["verify", str(folders / "dense")]) == 0
    assert not progress.quiet


def test_the_help_of_no_verb_imports_anything_heavy():
    script = """
import sys
from pst_ds.cli.main import VERBS, build_parser
build_parser(*VERBS)
print(sorted({"torch", "transformers", "deepspeed", "datasets", "numpy", "tqdm"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("rank", ["1", "x"])
def test_an_error_is_said_by_rank_0_or_by_a_process_whose_rank_is_no_number(capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    assert main(["inspect", "no/such/path"]) == 2
    assert bool(capsys.readouterr().err) == (rank == "x")


def test_training_on_a_terminal_has_a_bar_and_lines_above_it(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.0)
    assert main(["train", *_arguments("train", folders, tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert re.search(r"step █+ +[12]/2 \| eta 0m00s \| loss [0-9.]+ \| sparsity 0\.[0-9]+", told)
    assert re.search(r"\rstep 2: loss [0-9.]+, perplexity [^\r]*\n", told)
    assert re.search(r"\r +\r$", told)  # wiped


def test_the_parser_knows_every_verb():
    (verbs,) = (action.choices for action in build_parser()._actions if action.choices)
    assert list(verbs) == list(VERBS)
