"""``pst-ds launch``: what it hands to the launcher, and a run of two ranks that is killed once and goes on alone."""

from __future__ import annotations

import json
import os
import signal

import pytest

from pst_ds.cli.main import main
from tools.cluster.processes import (
    RUN_FILE,
    Background,
    ended_after,
    environment,
    free_ports,
    kill_all,
    rank_processes,
    result,
    steps,
    wait_until,
)

RUN_SECONDS = 300


def test_the_launcher_is_given_the_run_and_its_settings(tmp_path, capfd):
    folder = tmp_path / "run"
    assert main(["launch", RUN_FILE, "--by", "echo 'two words'", "--set", f"output_dir={folder}", "--json"]) == 0
    said = capfd.readouterr()
    first, last = said.out.splitlines()
    assert first == f"two words {RUN_FILE} --resume --set output_dir={folder}"
    found = json.loads(last)
    assert (found["exit_code"], found["output_dir"], found["left_out"]) == (0, str(folder), [])
    assert [attempt["exit_code"] for attempt in found["attempts"]] == [0]
    assert "pst-ds launch: attempt 1 ended with 0" in said.err


@pytest.mark.parametrize(
    ("by", "said"), [("'", "is not a command"), (" ", "--by is empty"), ("no-such-launcher", "cannot be started")]
)
def test_a_launcher_that_is_none_is_refused(tmp_path, capsys, by, said):
    assert main(["launch", RUN_FILE, "--by", by, "--set", f"output_dir={tmp_path}"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--retries", "--spares", "--wait"])
def test_a_number_that_is_none_is_refused(option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["launch", RUN_FILE, option, "-1"])
    assert caught.value.code == 2


@pytest.mark.launcher
def test_a_run_whose_rank_is_killed_goes_on_by_itself_to_its_end(tmp_path):
    folder, (port,) = tmp_path / "run", free_ports(1)
    command = ["pst-ds", "launch", RUN_FILE, "--by", "launch/local.sh --ranks 2", "--wait", "0"]
    settings = [f"output_dir={folder}", "train.num_steps=30", "checkpoint.interval=2", "eval.interval=-1"]
    command += [word for setting in settings for word in ("--set", setting)]
    with ended_after(Background(tmp_path / "log", *command, env=environment(MASTER_PORT=str(port)))) as run:
        try:
            wait_until((folder / "checkpoints/latest").is_symlink, RUN_SECONDS, run.text)
            os.kill(rank_processes(folder)[-1], signal.SIGKILL)
            assert run.exit_code(RUN_SECONDS) == 0, run.text()
        finally:
            kill_all(rank_processes(folder))
    assert "attempt 1 ended with 1 at step" in run.text()
    assert "attempt 2 ended with 0 at step 30" in run.text()
    assert (result(folder)["steps"], result(folder)["world_size"]) == (30, 2)
    assert steps(folder) == list(range(1, 31))
