"""Cells of the results table for real, on a tiny model: trained, exported, verified, tested, and kept as lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from tests.forks import ForkedModule
from tools.quality import workers
from tools.quality.__main__ import main
from tools.quality.run_cell import count_parameters, sparsity_of_targets, write_run

ROOT = Path(__file__).resolve().parents[2]

GRID = """
name = "tiny"
title = "Tiny"
metric = "accuracy"
cpu_seconds = {cpu_seconds}
sparsities = ["0.5"]
seeds = [0]
[search]
sparsity = "0.5"
[run]
model.path = "tests/data/tiny-bert"
data = {{train = "tests/data/train.jsonl", validation = "tests/data/validation.jsonl", max_length = 32}}
train = {{num_steps = {num_steps}, batch_size = 8, precision = "fp32"}}
checkpoint.interval = 0
[data_sets.lines]
tests.test = "tests/data/validation.jsonl"
[files.export]
bf16 = ["--dtype", "bf16"]
int8 = ["--dtype", "bf16", "--values", "int8", "--embeddings", "int8"]
{methods}
"""
METHODS = """
[methods.dense]
run.method = "dense"
sparsities = ["0"]
tries = [{train.head_learning_rate = 1e-3}]
[methods.pst]
tries = [{train.update_learning_rate = 1e-3}]
[methods.words]
shallow = "bag of words"
sparsities = ["0"]
[methods.wrong]
run.pst.score_rank = -1
tries = [{train.update_learning_rate = 1e-3}]
"""


@pytest.fixture
def forked(imported_by_ranks, alone, monkeypatch):
    """Cells are forks of this process, in place of interpreters."""
    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(Popen=ForkedModule, DEVNULL=subprocess.DEVNULL))


def write_grid(folder, methods=METHODS, cpu_seconds=300, num_steps=4):
    path = folder / "tiny.toml"
    path.write_text(GRID.format(methods=methods, cpu_seconds=cpu_seconds, num_steps=num_steps))
    return [str(path), "--results", str(folder / "results"), "--folder", str(folder / "work")]


def lines_in(folder):
    written = (folder / "results" / "tiny.jsonl").read_text().splitlines()
    lines = {line["name"]: line for line in map(json.loads, written)}
    assert len(lines) == len(written)
    assert all(text == json.dumps(json.loads(text), sort_keys=True) for text in written)
    return lines


def test_cells_become_lines_and_a_page_and_are_not_run_again(forked, tmp_path, capsys):
    arguments = write_grid(tmp_path)
    assert main([*arguments, "--workers", "2"]) == 1  # one method cannot be run
    said = capsys.readouterr().out
    assert "lines/dense/search/0: accuracy test" in said
    lines = lines_in(tmp_path)
    dense, pst, wrong = (lines[f"lines/{name}/search/0"] for name in ("dense", "pst", "wrong"))
    assert (wrong["outcome"], dense["outcome"], pst["outcome"]) == ("failed", "done", "done")
    assert "score_rank = -1" in wrong["error"]
    for line in (dense, pst):
        assert line["verified"] is True
        assert line["steps"] == 4
        assert set(line["tests"]) == {"test"}
        assert 0.0 <= line["tests"]["test"]["accuracy"] == line["validation"]["accuracy"] <= 1.0
        assert 0.0 < line["cpu_seconds"] < 300 == line["budget_cpu_seconds"]
        assert line["kind"] == "search"
        assert line["machine"]
        assert line["optimizer_bytes"] >= 8 * line["trained_parameters"]
        assert line["parameters"] == count_parameters(Path("tests/data/tiny-bert")) + _head(line)
        assert line["trained_share"] == line["trained_parameters"] / line["parameters"]
    assert (dense["trained_share"], dense["sparsity_measured"]) == (1.0, 0.0)
    assert (pst["trained_share"] < 1.0, pst["sparsity_measured"]) == (True, 0.5)
    assert pst["settings"]["schedule"] == {"final_sparsity": 0.5}
    words = lines["lines/words/0/0"]
    assert words["tests"]["test"] == {"accuracy": words["validation"]["accuracy"]}
    assert words["training_cpu_seconds"] <= words["cpu_seconds"]
    assert_files_of(dense, pst)
    folders = list((tmp_path / "work" / "cells").iterdir())
    assert len(folders) == 4
    assert not [p for folder in folders for p in folder.rglob("*.safetensors")]  # what is large is removed
    assert (tmp_path / "work" / "cells" / pst["id"] / "run" / "metrics.jsonl").is_file()
    page = (tmp_path / "results.md").read_text()
    assert "lines/wrong/search/0: failed" in page
    before = (tmp_path / "results" / "tiny.jsonl").read_bytes()
    assert main([*arguments, "--workers", "2"]) == 1
    assert "0 cells run" in capsys.readouterr().out
    assert (tmp_path / "results" / "tiny.jsonl").read_bytes() == before


def test_a_cell_may_begin_with_a_model_that_it_prunes(forked, tmp_path):
    methods = """
[methods.started]
untuned = true
run.start = {method = "wanda", samples = 8}
run.schedule.initial_sparsity = 0.5
"""
    assert main(write_grid(tmp_path, methods)) == 0
    (line,) = lines_in(tmp_path).values()
    assert (line["outcome"], line["verified"], line["sparsity_measured"]) == ("done", True, 0.5)
    assert line["validation"]["accuracy"] == line["tests"]["test"]["accuracy"]
    assert not list((tmp_path / "work" / "cells").rglob("*.safetensors"))


def assert_files_of(dense, pst):
    """Each is smaller than with more bits and without zeros, and the tests are those of its own weights."""
    for line in (dense, pst):
        assert list(line["files"]) == ["bf16", "int8"]
        assert set(line["files"]["int8"]["tests"]["test"]) == set(line["tests"]["test"])
        assert line["files"]["int8"]["bytes"] < line["files"]["bf16"]["bytes"]
        changed = {name: file["tests"]["test"]["loss"] for name, file in line["files"].items()}
        assert changed["int8"] != changed["bf16"]
        assert changed["int8"] == pytest.approx(line["tests"]["test"]["loss"], abs=0.05)
    assert pst["files"]["int8"]["bytes"] < dense["files"]["int8"]["bytes"]


def _head(line):
    """Weights and biases that the base model lacks: of the pooler, if it does, and of the new head."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained("tests/data/tiny-bert"))
    whole = sum(param.numel() for param in model.parameters())
    return whole - count_parameters(Path("tests/data/tiny-bert"))


def test_a_cell_over_its_budget_is_ended_and_said_to_be(tmp_path, capsys):
    methods = "[methods.pst]\ntries = [{train.update_learning_rate = 1e-3}]\n"
    arguments = write_grid(tmp_path, methods, cpu_seconds=1)
    assert main(arguments) == 1
    line = lines_in(tmp_path)["lines/pst/search/0"]
    assert (line["outcome"], line["error"]) == ("over budget", "more than 1 CPU seconds")
    assert "over budget" in capsys.readouterr().out


def test_a_model_is_tested_as_it_is_or_as_a_step_before_made_it(forked, tmp_path):
    methods = """
[methods.dense]
train = false
sparsities = ["0"]
[methods.wanda]
train = false
base = {prune = "wanda", samples = 8}
"""
    text = GRID.format(methods=methods, cpu_seconds=300, num_steps=4)
    text = text.replace('metric = "accuracy"', 'metric = "perplexity"\nreference = "tests/data/tiny-llama"')
    text = text.replace("tiny-bert", "tiny-llama").replace("[run]\n", '[run]\ntask = "causal-lm"\n')
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    arguments = [str(path), "--results", str(tmp_path / "results"), "--folder", str(tmp_path / "work")]
    assert main(arguments) == 0
    lines = lines_in(tmp_path)
    dense, wanda = lines["lines/dense/0/0"], lines["lines/wanda/0.5/0"]
    assert (dense["sparsity_measured"], wanda["sparsity_measured"]) == (0.0, pytest.approx(0.5, abs=0.01))
    assert dense["tests"]["test"]["perplexity"] == dense["validation"]["perplexity"] > 1.0
    assert wanda["tests"]["test"]["perplexity"] != dense["tests"]["test"]["perplexity"]
    assert dense["tests"]["test"]["kl_mean"] == 0.0 < wanda["tests"]["test"]["kl_mean"]
    assert "| KL divergence at 50 % |" in (tmp_path / "results.md").read_text()
    assert wanda["steps_before"]["base"]["prune"] == "wanda"
    assert wanda["base"] == {"prune": "wanda", "samples": 8, "seed": 0, "sparsity": "0.5"}
    assert "trained_share" not in wanda


def test_zeros_of_stacks_of_experts_are_counted(tmp_path):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 35,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))
    stack, zeros = model.model.layers[0].mlp.experts.down_proj, 2 * 32 * 20
    stack.data[:, :, :20] = 0.0
    model.save_pretrained(tmp_path / "model")
    settings = {"task": "causal-lm", "model": {"path": str(tmp_path / "model")}, "train": {"num_steps": 1}}
    settings["data"] = {"train": "tests/data/train.jsonl"}
    attention = 2 * 32 * 32 + 2 * 16 * 32
    found = sparsity_of_targets(write_run(settings, tmp_path, "run"), tmp_path / "model")
    assert found == zeros / (2 * 3 * 32 * 48 + attention)


def test_a_signal_ends_the_children_and_leaves_nothing_half_written(tmp_path):
    methods = "[methods.pst]\ntries = [{train.update_learning_rate = 1e-3}]\n"
    arguments = write_grid(tmp_path, methods, num_steps=1_000_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.quality", *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        child = _child(tmp_path / "work")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert not Path(f"/proc/{child}").exists()
    assert not (tmp_path / "results").exists()


def _child(folder):
    """The process of the cell that runs in ``folder``, once it trains."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(folder.glob("cells/*/run/metrics.jsonl")):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    words = path.read_bytes().decode().split("\0")
                    if words[1:3] == ["-m", "tools.quality.run_cell"] and str(folder) in words[3]:
                        return int(path.parent.name)
        time.sleep(0.05)
    raise AssertionError("the cell did not begin to train")


def test_one_process_at_a_time_runs_a_grid(tmp_path, capsys):
    import fcntl

    arguments = write_grid(tmp_path)
    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / "tiny.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(arguments) == 2
    assert "another process" in capsys.readouterr().err
    assert os.listdir(tmp_path / "work") == ["tiny.lock"]
