"""What docs/how-to/data.md shows can be run: its run files are read, its commands parse, and nothing is left out."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from pst_ds.cli.main import build_parser
from pst_ds.config.data import DATA_PRESETS
from pst_ds.config.tasks import TASKS
from pst_ds.config.toml import run_from_table

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "data.md").read_text(encoding="utf-8")


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def _commands():
    lines = [line.partition("#")[0].strip() for block in _blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("pst-ds ")]


@pytest.mark.parametrize("block", _blocks("toml"))
def test_every_run_file_is_read(block):
    table = {"output_dir": "runs/a", "model": {"path": "m"}, "train": {"num_steps": 1}, **tomllib.loads(block)}
    data = run_from_table(table).data
    assert data.train or data.sources


@pytest.mark.parametrize("command", _commands())
def test_every_command_parses(command):
    words = shlex.split(command)
    build_parser(words[1]).parse_args(words[1:])


def test_every_task_metric_and_preset_is_told_of():
    assert len(_blocks("toml")) >= 3
    assert _commands()
    for name in [*TASKS, *(metric for facts in TASKS.values() for metric in facts.metrics), *DATA_PRESETS]:
        assert f"`{name}`" in PAGE, name
