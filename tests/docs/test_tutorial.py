"""Run the commands of the tutorial and the README; what the tutorial shows is what is printed."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pst_ds.cli.main import main
from tools.cluster.processes import environment, free_ports

from .pages import ROOT, blocks, commands

RUN_SECONDS = 240
TUTORIAL = "docs/learn/tutorial.md"


@pytest.fixture
def at_a_copy_of_the_top_folder(tmp_path, monkeypatch):
    """What the commands read is there, and what they write is not written into the checkout."""
    for name in ("tests", "launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def _run(words: list[str]) -> str:
    """Runs a launch script, and returns what it printed."""
    (port,) = free_ports(1)
    done = subprocess.run(
        words, env=environment(MASTER_PORT=str(port)), capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout


def _shape(line: str) -> str:
    """The line without what differs from machine to machine: values, and the width of columns."""
    line = re.sub(r"-?\d+(,\d{3})*(\.\d+)?(e[+-]?\d+)?", "0", line)
    return " ".join(line.replace("0 .. 0, mean 0", "0").split())


def test_lines_of_other_figures_have_the_same_shape():
    shown = "query  2  32 x 32  0.5000  3 .. 7, mean 5  2,176  0"
    for printed in ("query 2 32 x 32 0.4 5 12,176 1.2e-07", "query     11  8 x 8  1  0 .. 1,024, mean -0.5  9  1e+01"):
        assert _shape(printed) == _shape(shown)
    for other in ("query 2 32 x 32 0.5 3 .. 7 2,176 0", "query 2 32 x 32 0.5 2,176 0", "key 2 32 x 32 0.5 5 2,176 0"):
        assert _shape(other) != _shape(shown)


def _require_lines(shown: str, printed: str, at: str) -> None:
    """Every line that is shown was printed, in this order; between them may be others."""
    rest = iter([_shape(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        assert line == "..." or _shape(line) in rest, f"{at}: not printed: {line}\n{printed}"


@pytest.mark.launcher
def test_the_tutorial_does_what_it_says(at_a_copy_of_the_top_folder, capfd):
    printed = ""
    for block in blocks(TUTORIAL):
        if block.language == "text":
            _require_lines(block.text, printed, str(block))
            continue
        printed = ""
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
        for words in commands(block) if block.language == "bash" else []:
            if words[0] == "pst-ds":
                assert main(words[1:]) == 0, words
                said = capfd.readouterr()
                printed += said.err + said.out
            elif words[0].startswith("launch/"):
                printed += _run(words)
        printed += capfd.readouterr().out


@pytest.fixture
def data_of_the_readme(at_a_copy_of_the_top_folder):
    """reviews.csv, chat.jsonl and tiny models under the names of the hub."""
    rows = [json.loads(line) for line in (ROOT / "tests/data/train.jsonl").read_text(encoding="utf-8").splitlines()]
    with open("reviews.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("text", "label"))
        writer.writeheader()
        writer.writerows(rows)
    with open("chat.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    encoder = Path("sentence-transformers/all-MiniLM-L6-v2")
    encoder.parent.mkdir()
    encoder.symlink_to(ROOT / "tests/data/tiny-bert")
    torch.manual_seed(0)
    decoder = Path("HuggingFaceTB/SmolLM2-135M-Instruct")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=35, max_position_embeddings=256, **sizes)).save_pretrained(decoder)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny-llama")
    tokenizer.chat_template = (ROOT / "tests/data/chat.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(decoder)


@pytest.mark.few(1)
@pytest.mark.parametrize("data", ["reviews.csv", "chat.jsonl"])
def test_the_commands_of_the_readme_run_on_your_data(data_of_the_readme, data):
    (block,) = [block for block in blocks("README.md") if block.text.startswith("pst-ds init") and data in block.text]
    for words in commands(block):
        if words[1] == "serve":  # does not end
            continue
        steps = ["--set", "train.num_epochs=1"] if words[1] == "train" and words[2].endswith(".toml") else []
        assert main([*words[1:], *steps]) == 0, words
    assert (Path("runs") / Path(data).stem / "small" / "config.json").exists()
