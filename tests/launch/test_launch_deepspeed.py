"""The real deepspeed launcher, on two CPU ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pst_ds.cli.main import main
from tests.forks import train_as_rank

RUN_FILE = "tests/data/world_size.toml"


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _launch(*command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python_path = f"{os.getcwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ |= {"PATH": path, "PYTHONPATH": python_path, "MASTER_PORT": _free_port(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)


def _only_json(text: str) -> dict:
    (line,) = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(line)


def _evaluated(folder) -> tuple[int, str]:
    """(exit code, stdout) of ``pst-ds eval`` on a rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["eval", str(folder), "--split", "validation", "--json"])
    return code, out.getvalue()


@pytest.mark.launcher
@pytest.mark.thorough
def test_local_sh_is_the_run_of_two_ranks_as_planned_and_eval_reads_it(run_ranks, tmp_path, capsys):
    done = _launch("launch/local.sh", "--ranks", "2", RUN_FILE, "--set", f"output_dir={tmp_path}/a", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    a, (b, _) = _only_json(done.stdout), run_ranks(train_as_rank, 2, RUN_FILE, tmp_path / "b")
    assert a["world_size"] == 2
    assert a["mask_checksum"] == b["mask_checksum"] != ""
    assert a["metrics"] == b["metrics"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in "ab"]
    losses = [[json.loads(line).get("loss") for line in of_run] for of_run in lines]
    assert losses[0] == losses[1]
    (code, said), other = run_ranks(_evaluated, 2, tmp_path / "a")
    assert (code, other) == (0, (0, ""))
    assert _only_json(said)["accuracy"] == a["metrics"]["accuracy"]
    assert main(["plan", RUN_FILE, "--ranks", "2", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert planned["optimizer_bytes_per_rank"] == a["optimizer_bytes_per_rank"]
    assert planned["trained_parameters"] == a["trained_parameters"]


def test_local_sh_explains_itself():
    helped = _launch("launch/local.sh", "--help")
    assert helped.returncode == 0
    assert "launch/local.sh --ranks 2 run.toml" in helped.stdout
    assert _launch("launch/local.sh", "run.toml").returncode == 2
