"""What of an earlier run is still there while another trains in its folder."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from pst_ds.config.toml import load_run
from pst_ds.data.tasks import classification as tasks
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.report.page import page
from pst_ds.report.run_data import read_runs
from pst_ds.train import loop as training
from pst_ds.train.run import prepare, train_run


def _prepared(folder, *overrides):
    run = load_run(
        "tests/data/world_size.toml", ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", *overrides]
    )
    return prepare(run, LaunchEnvironment(0, 1, 0))


@pytest.mark.parametrize("how", ["restart", "resume"])
def test_a_run_that_trains_has_no_result_of_an_earlier_one(tmp_path, monkeypatch, how):
    """For a restart, and for a run that is resumed from before its end."""
    prepared = _prepared(tmp_path, "train.num_steps=4", "checkpoint.interval=2")
    train_run(prepared, quiet=True)
    if how == "resume":
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Loop, "steps", killed)
        with pytest.raises(KeyboardInterrupt):
            train_run(prepared, quiet=True, **{how: True})
    assert not (tmp_path / "result.json").exists()


def test_a_finished_run_that_is_resumed_never_lacks_its_result(tmp_path, monkeypatch):
    prepared = _prepared(tmp_path, "train.num_steps=4")
    train_run(prepared, quiet=True)
    monkeypatch.setattr(
        training.Loop, "steps", lambda loop, state: pytest.fail(str((tmp_path / "result.json").exists()))
    )
    with pytest.raises(pytest.fail.Exception, match="True"):
        train_run(prepared, quiet=True, resume=True)


def test_a_metric_that_is_no_number_is_null_in_the_files_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.Classification, "metrics", lambda self, outcomes, examples: {"accuracy": math.nan})
    train_run(_prepared(tmp_path, "train.num_steps=2"), quiet=True)
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["metrics"] == {"accuracy": None}
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["eval/accuracy"] for line in lines if line["event"] == "evaluation"] == [None]
    (run,) = read_runs([tmp_path])
    assert run.result["metrics"] == {"accuracy": None}
    assert "eval/accuracy" not in run.curves
    assert "finished, 2 steps" in page([run], [], [])


@pytest.mark.parametrize(
    ("precision", "multiplies", "said"), [("bf16", False, 1), ("bf16", True, 0), ("fp32", False, 0)]
)
def test_bf16_on_a_processor_without_it_is_said_once(tmp_path, monkeypatch, capsys, precision, multiplies, said):
    monkeypatch.setattr("pst_ds.train.reporting.multiplies_bf16", lambda: multiplies)
    train_run(_prepared(tmp_path, "train.num_steps=2", f"train.precision={precision}"))
    shown = "".join(capsys.readouterr())
    assert shown.count('set train.precision = "fp32"') == said
