"""``pst-ds tune`` through the deepspeed launcher, on two ranks: trials and choice as on one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run

RUN_FILE = "tests/data/world_size.toml"


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _on_two_ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    port = _free_port()
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ |= {"PYTHONPATH": f"{os.getcwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", port]
    command = [*launcher, "--module", "pst_ds", "tune", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, check=False)


def _arguments(folder, *more):
    settings = [f"output_dir={folder}/run", "train.num_steps=600", *more]
    return [RUN_FILE, "--out", f"{folder}/tuned.toml", *(word for s in settings for word in ("--set", s))]


def _trials(folder):
    lines = [json.loads(line) for line in (folder / "run" / "tune.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "trial"], lines[-1]


@pytest.mark.launcher
@pytest.mark.usefixtures("alone")
def test_two_ranks_choose_as_one_process_does(tmp_path):
    done = _on_two_ranks(*_arguments(tmp_path / "two"), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1
    assert main(["tune", *_arguments(tmp_path / "one", "deepspeed_config=")]) == 0
    (two, choice), (one, expected) = _trials(tmp_path / "two"), _trials(tmp_path / "one")
    assert [(t["trial"], t["steps"]) for t in two] == [(t["trial"], t["steps"]) for t in one]
    # masks of two ranks may differ in bits whose scores are equal but for a rounding
    assert [t["value"] for t in two] == pytest.approx([t["value"] for t in one], abs=one[0]["standard_error"])
    assert choice == expected
    tuned = load_run(tmp_path / "two" / "tuned.toml")
    assert tuned.train.update_learning_rate == choice["update_learning_rate"]
