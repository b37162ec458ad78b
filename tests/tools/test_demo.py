"""The demo's runs are what its page says: those of PST as ``pst-ds init`` writes them."""

from __future__ import annotations

import json

import pytest

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from tools.demo.__main__ import RUN_FILE, RUNS

EXAMPLES = 240
"""Of the training text below."""
RATES = ("score_learning_rate", "update_learning_rate", "embedding_learning_rate", "head_learning_rate", "adam_beta2")


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("pst")])
def test_a_run_of_pst_is_what_init_writes(name, tmp_path, capsys):
    demo_run = load_run(RUN_FILE, [f"{key}={json.dumps(value)}" for key, value in RUNS[name].items()])
    pattern = ["--pattern", "1x4"] if name.endswith("1x4") else []
    sparsity, out = str(demo_run.schedule.final_sparsity), str(tmp_path / "mine.toml")
    words = ["init", "tests/data/tiny-bert", "--train", "tests/data/train.jsonl", "--validation", "none", "--out", out]
    assert main([*words, "--sparsity", sparsity, *pattern]) == 0
    capsys.readouterr()
    written = load_run(out)
    for setting in ("final_sparsity", "initial_sparsity", "warmup_fraction", "cooldown_fraction", "update_interval"):
        assert getattr(demo_run.schedule, setting) == getattr(written.schedule, setting), setting
    assert demo_run.pst == written.pst
    for setting in ("method", "reconstruct", "budgets"):
        assert getattr(demo_run.start, setting) == getattr(written.start, setting)
    assert min(demo_run.start.samples, EXAMPLES) == min(written.start.samples, EXAMPLES)
    assert [getattr(demo_run.train, rate) for rate in RATES] == [getattr(written.train, rate) for rate in RATES]
