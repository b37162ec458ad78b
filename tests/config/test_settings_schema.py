"""The JSON schema of a run file takes what the package takes, and refuses what it refuses."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from pst_ds.config.settings import ConfigError
from pst_ds.config.toml import run_from_table
from tools.docs.run_file import SCHEMA

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted(
    [*ROOT.glob("tests/data/*.toml"), *ROOT.glob("tests/golden/*.toml"), *ROOT.glob("tools/examples/*.toml")]
)
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _table(changes=()):
    table = tomllib.loads((ROOT / "tests/data/causal_lm.toml").read_text(encoding="utf-8"))
    for key, value in changes:
        *parents, last = key.split(".")
        inner = table
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return table


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_the_run_files_here_are_valid(path):
    VALIDATOR.validate(tomllib.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seeed", 1), ("train.batch_sise", 8), ("train.batch_size", 0), ("train.batch_size", "8"), ("task", "poetry"),
        ("method", "psd"), ("pst.preset", "papers"), ("pst.score_rank", -1), ("train.precision", "fp16"),
        ("model.dropout", 1.0), ("distillation.weight", 1.5), ("data.sample_by", "word"), ("pst.overrides", ["q"]),
        ("distillation.temperature", 0.0), ("train.stall_timeout_seconds", 1e7),
    ],
)  # fmt: skip
def test_what_is_wrong_is_wrong_to_both(key, value):
    table = _table([(key, value)])
    assert not VALIDATOR.is_valid(table)
    with pytest.raises(ConfigError):
        run_from_table(table)


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.score_learning_rate", 1), ("pst.preset", "paper"), ("pst.modules_to_save", ["lm_head"]), ("pst.seed", 3)],
)
def test_what_is_right_is_right_to_both(key, value):
    table = _table([(key, value)])
    VALIDATOR.validate(table)
    run_from_table(table)
