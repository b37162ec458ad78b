"""A snapshot of a GPU's memory when it ends: torch's own, with or without the stacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pst_ds.train.monitor.memory_snapshot import HISTORY_VARIABLE, snapshot_when_memory_ends


@pytest.fixture
def histories(monkeypatch):
    """What torch was told of its history; its snapshots are files with a word."""
    told = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **options: told.append(options))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: Path(path).write_text("snapshot"))
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "summary")
    monkeypatch.delenv(HISTORY_VARIABLE, raising=False)
    return told


def _end_memory(folder, device, error=torch.OutOfMemoryError):
    with pytest.raises(error), snapshot_when_memory_ends(folder, device):
        raise error("CUDA out of memory")


def test_what_a_gpu_held_is_left_in_the_run_and_the_error_goes_on(histories, tmp_path, capsys):
    _end_memory(tmp_path, "cuda:0")
    found = {path.name: path.read_text() for path in (tmp_path / "memory").iterdir()}
    assert found == {"rank-0.pickle": "snapshot", "rank-0.txt": "summary"}
    said = capsys.readouterr().err
    assert "rank 0 on " in said
    assert f"has no memory left; what it holds is in {tmp_path}/memory/rank-0.pickle" in said
    assert HISTORY_VARIABLE in said
    assert histories == []


def test_stacks_are_remembered_when_asked_for(histories, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(HISTORY_VARIABLE, "5000")
    _end_memory(tmp_path, "cuda:0")
    assert histories == [{"max_entries": 5000, "stacks": "python"}, {"enabled": None}]
    assert HISTORY_VARIABLE not in capsys.readouterr().err


@pytest.mark.parametrize(("device", "error"), [("cpu", torch.OutOfMemoryError), ("cuda:0", ValueError)])
def test_nothing_else_leaves_a_snapshot(histories, tmp_path, capsys, device, error):
    _end_memory(tmp_path, device, error)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_disk_that_is_full_hides_no_error(histories, tmp_path, monkeypatch):
    (tmp_path / "memory").write_text("a file")
    _end_memory(tmp_path, "cuda:0")
