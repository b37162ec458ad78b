"""The examples of docs/background/architecture.md add a task and a method to this process."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pst_ds.cli.main import main
from pst_ds.config import methods, tasks
from pst_ds.data import tasks as files_of_tasks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/background/architecture.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("alone")


def _blocks(language):
    """(path, rest of the first line, code) of the blocks of the page."""
    return re.findall(rf"```{language}\n# ([\w/]+\.py)([^\n]*)\n(.*?)```", PAGE, flags=re.S)


def _add_entry(monkeypatch, module, table, name):
    """Add the page's entry of ``name``, as it is written there, to a table of a module."""
    path = f"{module.__name__.replace('.', '/')}.py"
    ((code,),) = [(code,) for file, where, code in _blocks("text") if (file, where) == (path, f", in {table}")]
    ((found, entry),) = eval(f"{{{code}}}", vars(module)).items()
    assert found == name
    monkeypatch.setitem(getattr(module, table), name, entry)


def _train_evaluate_export(verb, folder, setting):
    """Return (the metrics, what the exported folder is found to hold)."""
    settings = [setting, "deepspeed_config=", f"output_dir={folder}/run", "train.num_steps=2"]
    words = [word for each in [*settings, "schedule.update_interval=1"] for word in ("--set", each)]
    assert main(["train", "tests/data/world_size.toml", "--quiet", *words]) == 0
    metrics = verb("eval", f"{folder}/run")
    verb("export", f"{folder}/run", "--out", f"{folder}/exported")
    return metrics, verb("inspect", f"{folder}/exported")


def test_a_task_is_one_file_and_one_line(tmp_path, monkeypatch, verb):
    ((path, _, code),) = [block for block in _blocks("python") if block[0].startswith("pst_ds/")]
    assert path == "pst_ds/data/tasks/word_count.py"
    assert not (ROOT / path).exists()
    (tmp_path / "word_count.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(files_of_tasks, "__path__", [*files_of_tasks.__path__, str(tmp_path)])
    _add_entry(monkeypatch, tasks, "TASKS", "word-count")
    metrics, found = _train_evaluate_export(verb, tmp_path, "task=word-count")
    sys.modules.pop("pst_ds.data.tasks.word_count")
    assert "mse" in metrics
    assert found["sparsity_measured"] == pytest.approx(0.8, abs=1e-3)


def test_a_method_is_one_entry(tmp_path, monkeypatch, verb):
    _add_entry(monkeypatch, methods, "METHODS", "masked-probe")
    metrics, found = _train_evaluate_export(verb, tmp_path, "method=masked-probe")
    assert "accuracy" in metrics
    assert found["sparsity_measured"] == pytest.approx(0.8, abs=1e-3)


def test_the_names_are_in_no_other_file():
    """Else the examples would not be what a contributor has to write."""
    for path in (ROOT / "pst_ds").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "word-count" not in text, path
        assert "masked-probe" not in text, path
