"""What the replay of a disturbed run trains: stretches of steps with as many ranks each."""

from __future__ import annotations

import json
import sys

import pytest

from pst_ds.cli.main import main
from pst_ds.parallel import stop_signals
from tools.chaos import replay
from tools.chaos.elastic import ranks_of_steps
from tools.cluster.processes import steps


def test_steps_with_as_many_ranks_are_one_stretch(tmp_path):
    events = [{"event": "start", "ranks": 9}]
    events += [{"event": "step", "step": step, "ranks": 2 if step in (3, 4) else 1} for step in range(1, 7)]
    lines = [json.dumps(event) for event in events]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert ranks_of_steps(tmp_path) == [(1, 2), (2, 2), (1, 2)]


@pytest.mark.parametrize("stretch", [1, 3])
def test_a_stretch_has_its_steps_and_the_next_one_follows(tmp_path, monkeypatch, stretch):
    out = tmp_path / "out"
    settings = ["deepspeed_config=", "train.num_steps=4", "train.log_interval=1", f"output_dir={out}"]
    words = ["tests/data/world_size.toml", *(word for setting in settings for word in ("--set", setting)), "--resume"]

    def train(most):
        monkeypatch.setattr(stop_signals, "asked_by", stop_signals.asked_by)  # undone after the test
        monkeypatch.setattr(sys, "argv", ["replay", str(most), *words])
        monkeypatch.setattr(replay, "program", lambda: sys.exit(main()))  # that of a rank ends the process
        with pytest.raises(SystemExit) as ended:
            replay.main()
        return ended.value.code

    assert train(stretch) == 75
    assert steps(out) == list(range(1, stretch + 1))
    assert train(0) == 0
    assert steps(out) == [1, 2, 3, 4]
