"""The examples of docs/background/architecture.md add a task and a method to a copy of the package."""

from __future__ import annotations

import difflib
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/background/architecture.md").read_text(encoding="utf-8")
IN_TURN = """
import json, sys
from pst_ds.cli.main import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
"""
LAST_ENTRY = {
    "pst_ds/config/tasks.py": '    "data-to-text": TaskFacts(',
    "pst_ds/config/methods.py": '    "sk-tuning": Method(',
}
"""Line of each table that a new entry is inserted before."""


def _blocks(language):
    """(path, code) of the blocks of the page."""
    return re.findall(rf"```{language}\n# ([\w/]+\.py)[^\n]*\n(.*?)```", PAGE, flags=re.S)


def _extended(folder, name):
    """Copy the package, add the file of ``name`` where it has one, and its table entry. Return the entry."""
    shutil.copytree(ROOT / "pst_ds", folder / "pst_ds", ignore=shutil.ignore_patterns("__pycache__"))
    for path, code in [block for block in _blocks("python") if name in block[0]]:
        (folder / path).write_text(code, encoding="utf-8")
    ((table, entry),) = [block for block in _blocks("text") if f'"{name.replace("_", "-")}"' in block[1]]
    lines = (folder / table).read_text(encoding="utf-8").splitlines(keepends=True)
    place = next(i for i, known in enumerate(lines) if known.rstrip("\n").startswith(LAST_ENTRY[table]))
    (folder / table).write_text("".join([*lines[:place], entry, *lines[place:]]), encoding="utf-8")
    return entry


def _differences(compared, where=""):
    """(new files, changed files) of the right folder, those below it too."""
    new, changed = [where + n for n in compared.right_only], [where + n for n in compared.diff_files]
    assert not compared.left_only
    for name, inner in compared.subdirs.items():
        more_new, more_changed = _differences(inner, f"{where}{name}/")
        new, changed = new + more_new, changed + more_changed
    return new, changed


def _run(package, *verbs):
    """The JSON that each verb prints; all in one process, for to start one takes longer than they do."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-P", "-c", IN_TURN, json.dumps(verbs)]  # -P: not the package in cwd
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("name", "setting", "files"),
    [("word_count", "task=word-count", ["word_count.py"]), ("masked_probe", "method=masked-probe", [])],
)
def test_a_task_is_one_file_and_one_line_and_a_method_is_one_entry(tmp_path, name, setting, files):
    entry, run = _extended(tmp_path, name), str(tmp_path / "run")
    new, changed = _differences(filecmp.dircmp(ROOT / "pst_ds", tmp_path / "pst_ds"))
    assert [Path(path).name for path in new] == files
    (table,) = changed
    before, after = ((top / "pst_ds" / table).read_text(encoding="utf-8").splitlines() for top in (ROOT, tmp_path))
    difference = [shown for shown in difflib.ndiff(before, after) if shown[0] in "+-"]
    assert difference == [f"+ {line}" for line in entry.splitlines()]

    settings = [setting, "deepspeed_config=", f"output_dir={run}", "train.num_steps=2", "schedule.update_interval=1"]
    exported = str(tmp_path / "exported")
    metrics, found = _run(
        tmp_path,
        ["train", "tests/data/world_size.toml", "--quiet", *(w for s in settings for w in ("--set", s))],
        ["eval", run, "--json"],
        ["export", run, "--out", exported],
        ["inspect", exported, "--json"],
    )
    assert ("mse" if name == "word_count" else "accuracy") in metrics
    assert found["sparsity_measured"] == pytest.approx(0.8, abs=1e-3)


def test_the_names_are_in_no_other_file():
    """Else the copies would not be what a contributor has before them."""
    for path in (ROOT / "pst_ds").rglob("*.py"):
        assert "word-count" not in path.read_text(encoding="utf-8"), path
