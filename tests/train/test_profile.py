"""``train.profile``: a trace per rank of the named steps, and the same run as without."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from pst_ds.config.toml import load_run
from pst_ds.file_names import PROFILE
from pst_ds.parallel import stop_signals
from pst_ds.parallel.engine import LocalEngine
from pst_ds.parallel.launch import launch_environment
from pst_ds.train import loop as loop_module
from pst_ds.train import profile as profile_module
from pst_ds.train.run import StoppedError, prepare, train_prepared

PARTS = ("forward", "backward", "optimizer", "masks")


def _train(folder, *settings, resume=False):
    run = load_run(
        "tests/data/world_size.toml", [f"output_dir={json.dumps(str(folder))}", "train.num_steps=6", *settings]
    )
    return train_prepared(prepare(run, launch_environment()), quiet=True, resume=resume)


def _alone(folder, *settings, **how):
    return _train(folder, "deepspeed_config=", *settings, **how)


def _lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        [line[key] for key in ("loss", "grad_norm") if key in line] or line.get("mask_checksum")
        for line in lines
        if line["event"] in ("step", "mask_update")
    ]


def _traces(folder):
    traces = {}
    for path in sorted((folder / PROFILE).iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            traces[path.name] = json.load(file)["traceEvents"]
    return traces


def _regions(events, names):
    """Start and end of each region with such a name."""
    found = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in names]
    assert all(e["ph"] == "X" for e in found)  # complete: a start and a duration
    return sorted((e["name"], e["ts"], e["ts"] + e["dur"]) for e in found)


def _require_steps(events, *steps):
    """Just these have regions, one after another, with their parts; return the operations outside."""
    regions = _regions(events, {f"step {number}" for number in range(100)})
    assert [name for name, _, _ in regions] == [f"step {step}" for step in steps]
    ends = [end for _, _, end in regions]
    starts = [start for _, start, _ in regions]
    assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))
    for part in PARTS:
        within = _regions(events, {part})
        assert len(within) == len(steps)
        for (_, start, end), (_, first, last) in zip(within, regions, strict=True):
            assert first <= start <= end <= last
    operations = [e for e in events if e.get("cat") == "cpu_op" and e["ph"] == "X"]
    assert any(e["name"] == "aten::mm" for e in operations)
    return [e for e in operations if not starts[0] <= e["ts"] <= ends[-1]]


def test_the_named_steps_are_in_the_trace_and_nothing_else_changes(tmp_path):
    _alone(tmp_path / "plain")
    _alone(tmp_path / "profiled", "train.profile=[2, 4]")
    assert _lines(tmp_path / "profiled") == _lines(tmp_path / "plain")
    assert not (tmp_path / "plain" / PROFILE).exists()
    ((name, events),) = _traces(tmp_path / "profiled").items()
    assert name == "steps-2-4-rank-00000.json.gz"
    assert _require_steps(events, 2, 3, 4) == []


@pytest.mark.zero3
def test_every_rank_writes_its_own(run_ranks, tmp_path):
    run_ranks(_train, 2, tmp_path / "plain")
    run_ranks(_train, 2, tmp_path / "profiled", "train.profile=[3, 3]")
    assert _lines(tmp_path / "profiled") == _lines(tmp_path / "plain")
    traces = _traces(tmp_path / "profiled")
    assert list(traces) == [f"steps-3-3-rank-0000{rank}.json.gz" for rank in range(2)]
    for events in traces.values():
        assert _require_steps(events, 3) == []
        assert any("all_gather" in e["name"] or "allgather" in e["name"] for e in events)


def test_a_run_that_stops_within_them_writes_what_it_has_and_its_resume_the_rest(tmp_path, monkeypatch):
    settings = ("train.profile=[1, 4]", "checkpoint.interval=0")
    _stop_at(2, monkeypatch)
    with pytest.raises(StoppedError):
        _alone(tmp_path, *settings)
    monkeypatch.setattr(stop_signals, "_asked_by", 0)
    _alone(tmp_path, *settings, resume=True)
    traces = _traces(tmp_path)
    assert list(traces) == ["steps-1-2-rank-00000.json.gz", "steps-3-4-rank-00000.json.gz"]
    assert _require_steps(traces["steps-1-2-rank-00000.json.gz"], 1, 2)  # of the checkpoint
    assert _require_steps(traces["steps-3-4-rank-00000.json.gz"], 3, 4) == []


def test_a_resumed_run_may_profile_other_steps(tmp_path, monkeypatch):
    _stop_at(2, monkeypatch)
    with pytest.raises(StoppedError):
        _alone(tmp_path)
    monkeypatch.setattr(stop_signals, "_asked_by", 0)
    _alone(tmp_path, "train.profile=[5, 6]", resume=True)
    assert list(_traces(tmp_path)) == ["steps-5-6-rank-00000.json.gz"]


def _stop_at(step, monkeypatch):
    """Let a signal arrive in the step after ``step - 1``."""
    set_rates = loop_module.set_rates

    def noted(loop, number):
        if number == step - 1:
            monkeypatch.setattr(stop_signals, "_asked_by", 15)
        set_rates(loop, number)

    monkeypatch.setattr(loop_module, "set_rates", noted)


def test_a_skipped_batch_belongs_to_the_step_that_follows(tmp_path, monkeypatch):
    batches = iter(range(100))
    backward = LocalEngine.backward

    def poisoned(self, loss):
        backward(self, loss)
        if next(batches) == 1:
            next(p for p in self.module.parameters() if p.grad is not None).grad.fill_(math.inf)

    monkeypatch.setattr(LocalEngine, "backward", poisoned)
    result = _alone(tmp_path, "train.profile=[2, 2]")
    assert (result["steps"], result["skipped_steps"]) == (6, 1)
    (events,) = _traces(tmp_path).values()
    assert [name for name, _, _ in _regions(events, {"step 1", "step 2", "step 3"})] == ["step 2"]
    assert len(_regions(events, {"optimizer"})) == 2
    assert len(_regions(events, {"masks"})) == 1


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile_module, "atomic_file", full)
    assert _alone(tmp_path, "train.profile=[2, 3]")["steps"] == 6
    assert "steps-2-3-rank-00000.json.gz was not written: [Errno 28] No space left on device" in capsys.readouterr().err
