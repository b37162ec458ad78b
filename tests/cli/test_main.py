"""The program around the verbs: who reads its output and in which encoding, and JSON that every reader takes."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pst_ds.cli import inspect
from pst_ds.cli.main import main
from pst_ds.config import toml as run_file

ROOT = Path(__file__).resolve().parents[2]


def _program(*arguments, **options):
    command = [sys.executable, "-m", "pst_ds", *arguments]
    return subprocess.run(command, timeout=60, check=False, cwd=ROOT, stderr=subprocess.PIPE, **options)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("arguments", "code", "unbuffered"),
    [
        (["inspect", "tests/data/world_size.toml"], 141, ""),  # short: noticed at the end
        (["inspect", "tests/data/world_size.toml"], 141, "1"),
        (["inspect", "tests/data/world_size.toml", "--json"], 141, "1"),
        (["train", "--help"], 141, ""),
        (["inspect", "no/such"], 2, ""),
    ],
    ids=str,
)
def test_a_reader_that_has_gone_ends_it_without_a_word(tmp_path, arguments, code, unbuffered):
    (tmp_path / "run.toml").write_text('method = "pst"\n')
    reader, writer = os.pipe()
    os.close(reader)
    words = [word.format(run=tmp_path) for word in arguments]
    done = _program(*words, stdout=writer, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert done.returncode == code, done.stderr
    assert bool(done.stderr) == (code == 2)


@pytest.mark.thorough
def test_an_error_that_nobody_reads_ends_it_too():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pst_ds", "inspect", "no/such"]
    done = subprocess.run(command, timeout=60, check=False, cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 141


def test_without_a_stdout_nothing_is_said():
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m pst_ds inspect tests/data/world_size.toml >&-"],
        timeout=60, check=False, cwd=ROOT,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


def test_another_broken_pipe_is_a_bug_with_its_traceback(monkeypatch, capsys):
    def broken(*arguments):
        raise BrokenPipeError("a process of ours has died")

    monkeypatch.setattr(run_file, "load_run", broken)
    assert main(["plan", "run.toml"]) == 1
    assert "BrokenPipeError: a process of ours has died" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_message_whoever_finds_it(monkeypatch, capsys, number):
    def full(*arguments):
        raise OSError(number, os.strerror(number), "runs/x/metrics.jsonl")

    monkeypatch.setattr(run_file, "load_run", full)
    monkeypatch.setenv("RANK", "3")  # whose disk it is
    assert main(["train", "run.toml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pst-ds train: [Errno ")
    assert "'runs/x/metrics.jsonl'. Free space" in line


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_text_that_the_terminal_cannot_hold_is_escaped(tmp_path, encoding):
    run = tmp_path / "\u00fc\udcff.toml"
    run.write_text(Path("tests/data/world_size.toml").read_text())
    done = _program("inspect", str(run), stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    assert (b"\\xfc\\udcff" if encoding == "ascii" else "\u00fc\\udcff".encode()) in done.stdout


def test_the_json_of_a_verb_has_null_for_what_is_not_finite(monkeypatch, capsys):
    monkeypatch.setattr(inspect, "run", lambda args: {"loss": math.nan, "rows": [math.inf, 1.5]})
    assert main(["inspect", "folder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": None, "rows": [None, 1.5]}


def test_a_run_folder_of_any_name_is_continued_where_it_is(folders, tmp_path, capsys):
    run = tmp_path / "\U0001f600"
    shutil.copytree(folders / "run", run, symlinks=True)
    capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    assert main(["train", str(run), "--resume", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["output_dir"] == str(run)
    assert f"resuming from {run}/checkpoints/step-00000006" in said.err
    assert sorted(tmp_path.iterdir()) == before


def test_help_is_quick_because_it_imports_nothing_heavy():
    script = """
import sys
from pst_ds.cli.main import main
try:
    main(["--help"])
except SystemExit as exit:
    assert exit.code == 0
heavy = {"torch", "transformers", "deepspeed", "datasets", "numpy"} & set(sys.modules)
print("heavy:", sorted(heavy))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    for verb in ("plan", "train", "eval", "export", "verify"):
        assert f"    {verb} " in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"
