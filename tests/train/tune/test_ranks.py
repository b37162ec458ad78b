"""``pst-ds tune`` on two ranks: trials and choice as on one process."""

from __future__ import annotations

import contextlib
import io
import json
from unittest import mock

import pytest

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.train.tune import trials
from pst_ds.train.tune.halving import Rung

RUN_FILE = "tests/data/world_size.toml"
SHORT_TRIALS = mock.patch.object(trials, "rungs", return_value=[Rung(3, 6)])


def _arguments(folder, *more):
    settings = [f"output_dir={folder}/run", "train.num_steps=600", *more]
    return [RUN_FILE, "--out", f"{folder}/tuned.toml", *(word for s in settings for word in ("--set", s))]


def _tuned(folder):
    """(exit code, lines that are JSON) of the verb on a rank."""
    with SHORT_TRIALS, contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["tune", *_arguments(folder), "--json"])
    return code, [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")]


def _trials(folder):
    lines = [json.loads(line) for line in (folder / "run" / "tune.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "trial"], lines[-1]


@pytest.mark.thorough
@pytest.mark.zero3
@pytest.mark.usefixtures("alone")
def test_two_ranks_choose_as_one_process_does(run_ranks, tmp_path):
    (code, (said,)), other = run_ranks(_tuned, 2, tmp_path / "two")
    assert (code, other) == (0, (0, []))
    with SHORT_TRIALS:
        assert main(["tune", *_arguments(tmp_path / "one", "deepspeed_config=")]) == 0
    (two, choice), (one, expected) = _trials(tmp_path / "two"), _trials(tmp_path / "one")
    assert [(t["trial"], t["steps"]) for t in two] == [(t["trial"], t["steps"]) for t in one]
    assert [t["steps"] for t in two] == [6] * 3
    # masks of two ranks may differ in bits whose scores are equal but for a rounding
    assert [t["value"] for t in two] == pytest.approx([t["value"] for t in one], abs=one[0]["standard_error"])
    assert choice == expected
    assert said["chosen"]["update_learning_rate"] == choice["update_learning_rate"]
    tuned = load_run(tmp_path / "two" / "tuned.toml")
    assert tuned.train.update_learning_rate == choice["update_learning_rate"]
