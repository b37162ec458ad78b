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


NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?"
MEASURED = (
    rf"(?<=eta ){NUMBER}h?\d*m?\d+s|(?<=tok/s ){NUMBER}|(?<=GiB ){NUMBER}|(?<=loss ){NUMBER}|(?<=difference ){NUMBER}"
    rf"|(?<=allowed ){NUMBER}|(?<=accuracy ){NUMBER}|(?<=macro_f1 ){NUMBER}|(?<=matthews_correlation ){NUMBER}"
    rf"|(?<=\bf1 ){NUMBER}|{NUMBER} MB(?: at the peak| all the time)"
)
"""Numbers that differ between machines: times, memory of the process, and what rounding changes."""


def _comparable(line: str) -> str:
    """Return the line without measured numbers and without the width of columns."""
    return " ".join(re.sub(MEASURED, "0", line).split())


def test_only_measured_numbers_may_differ():
    shown = "step 200/200 | eta 0m00s | loss 0.002568 | sparsity 0.5 | tok/s 5549 | GiB 0.63"
    printed = "step 200/200 | eta 1h02m00s | loss 1.2e-03 | sparsity 0.5 | tok/s 9 | GiB 10.1"
    assert _comparable(printed) == _comparable(shown)
    for number, other in (("200/200", "201/200"), ("sparsity 0.5", "sparsity 0.51")):
        assert _comparable(printed.replace(number, other)) != _comparable(shown)


def _require_lines(shown: str, printed: str, at: str) -> None:
    """Every line that is shown was printed, in this order; between them may be others."""
    lines = iter([_comparable(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        assert line == "..." or _comparable(line) in lines, f"{at}: not printed: {line}\n{printed}"


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
@pytest.mark.parametrize(
    ("data", "product"),
    [
        ("reviews.csv", "runs/reviews/small/config.json"),
        ("chat.jsonl", "runs/chat/small/config.json"),
        ("tests/data/train.jsonl", "runs/first/export/model.safetensors"),
    ],
)
def test_the_commands_of_the_readme_run_on_your_data(data_of_the_readme, data, product):
    (block,) = [block for block in blocks("README.md") if block.text.startswith("pst-ds init") and data in block.text]
    for words in commands(block):
        if words[1] == "serve":  # does not end
            continue
        if words[1:] in (["train", "reviews.toml"], ["train", "chat.toml"]):
            words += ["--set", "train.num_epochs=1"]
        assert main(words[1:]) == 0, words
    assert Path(product).exists()
