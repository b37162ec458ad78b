"""The rank that the others wait for: named by what each was busy with, on the one exchange of a step."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections import Counter

import pytest
import torch.distributed as dist

from pst_ds.config.toml import load_run
from pst_ds.parallel import ranks, sharding
from pst_ds.parallel.launch import launch_environment
from pst_ds.parallel.ranks import rank
from pst_ds.train import loop as loop_module
from pst_ds.train import run as run_module
from pst_ds.train.run import prepare, train_prepared
from pst_ds.train.timing import LEAST_SLOW, WINDOW, Pace

HOSTS = [f"host{i}" for i in range(5)]


def _pace(*slow_steps, steps=WINDOW, typical=1.0, slow=1.5):
    """Of five ranks, the fourth of which is slow in the given steps."""
    pace = Pace(HOSTS)
    for step in range(steps):
        seconds = [typical, typical * 0.9, typical, slow if step in slow_steps else typical, typical * 1.1]
        pace.add(seconds, [100, 200, 300, 400, 500])
    return pace


def test_a_rank_that_is_slow_in_most_of_the_steps_is_named_once_with_its_host():
    pace = _pace(*range(2, WINDOW))
    found = pace.newly_slow()
    assert (found.rank, found.host, found.others) == (3, "host3", 0)
    assert (found.step_seconds, found.median_step_seconds, found.memory_bytes) == (1.5, 1.0, 400)
    assert "rank 3 on host3: it is busy with a step for 1.5 s, the median rank for 1 s" in str(found)
    pace.add([1.0, 1.0, 1.0, 1.5, 1.0], [1] * 5)
    assert pace.newly_slow() is None
    assert pace.slow().rank == 3
    for _ in range(WINDOW):
        pace.add([1.0] * 5, [1] * 5)
    assert pace.newly_slow() is pace.slow() is None
    for _ in range(WINDOW):
        pace.add([1.0, 1.0, 1.0, 1.5, 1.0], [1] * 5)
    assert pace.newly_slow().rank == 3


@pytest.mark.parametrize(
    "pace",
    [
        _pace(*range(LEAST_SLOW - 1)),  # too few of the steps
        _pace(*range(WINDOW), steps=WINDOW - 1),  # too soon
        _pace(*range(WINDOW), slow=1.19),
        _pace(*range(WINDOW), typical=0.001, slow=0.01),  # too little to matter
    ],
)
def test_a_rank_that_is_slow_now_and_then_or_a_little_is_not(pace):
    assert pace.slow() is None


def test_the_slowest_of_several_is_named_and_the_others_are_counted():
    pace = Pace(HOSTS)
    for _ in range(WINDOW):
        pace.add([1.0, 2.0, 1.0, 3.0, 1.0], [1] * 5)
    assert (pace.slow().rank, pace.slow().others) == (3, 1)
    assert "rank 3 on host3 and 1 more: " in str(pace.slow())


def test_two_ranks_are_compared_with_the_faster_and_one_with_none():
    pair, alone = Pace(HOSTS[:2]), Pace(HOSTS[:1])
    pair.add([0.0, 1.0], [1, 1])  # a rank that has not measured yet
    for _ in range(WINDOW):
        pair.add([1.0, 2.0], [5, 6])
        alone.add([1.0], [5])
    assert (pair.slow().rank, pair.slow().median_step_seconds) == (1, 1.0)
    assert pair.figures() == {
        "ranks/least_seconds": 1.0, "ranks/median_seconds": 1.0, "ranks/most_seconds": 2.0, "ranks/slowest": 1,
        "ranks/least_memory_bytes": 5, "ranks/median_memory_bytes": 5,
    }  # fmt: skip
    assert alone.slow() is None
    assert alone.figures() == {}


class _Counted:
    """torch.distributed, which counts what is asked of other ranks."""

    def __init__(self, calls):
        self._calls = calls

    def __getattr__(self, name):
        found = getattr(dist, name)
        if name.startswith(("all_", "broadcast", "barrier", "reduce", "gather", "scatter", "new_group")):
            self._calls[name] += 1
        return found


def _with_slow_rank(folder):
    """The collectives of ours in each step of a run whose rank 1 takes 0.2 s longer in the middle of a forward pass, or
    as long as all else where the machine is busy."""
    settings = [f"output_dir={json.dumps(str(folder))}", "train.num_steps=12", "train.log_interval=12"]
    settings += ["schedule.update_interval=100", "schedule.cooldown_fraction=0", "layer_statistics.interval=-1"]
    settings += ["checkpoint.interval=0", "eval.interval=-1"]
    calls, in_steps, build, began = Counter(), [], run_module.build, [time.monotonic()]

    def build_slow(*arguments, **named):
        engine = build(*arguments, **named)
        if rank() == 1:
            engine.module.bert.encoder.layer[1].register_forward_pre_hook(slow_down)
        return engine

    def slow_down(*_):
        began[0], before = time.monotonic(), began[0]
        time.sleep(max(0.2, 0.5 * (began[0] - before)))

    def before_step(*arguments):
        in_steps.append(Counter(calls))
        set_rates(*arguments)

    set_rates = loop_module.set_rates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build", build_slow)
        patch.setattr(loop_module, "set_rates", before_step)
        for module in (ranks, sharding):
            patch.setattr(module, "dist", _Counted(calls))
        train_prepared(prepare(load_run("tests/data/world_size.toml", settings), launch_environment()), quiet=True)
    return [after - before for before, after in itertools.pairwise(in_steps[2:])]


@pytest.mark.zero3
def test_a_slow_rank_is_named_and_a_step_has_one_collective_beside_those_of_zero(run_ranks, tmp_path):
    of_ranks = run_ranks(_with_slow_rank, 2, tmp_path)
    assert of_ranks == [[Counter(all_gather_into_tensor=1)] * 9] * 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (named,) = [line for line in lines if line["event"] == "straggler"]
    assert (named["rank"], named["host"]) == (1, socket.gethostname())
    last = [line for line in lines if line["event"] == "step"][-1]
    assert last["ranks/slowest"] == 1
    assert last["ranks/most_seconds"] > last["ranks/least_seconds"] > 0
    assert last["peak_memory_bytes"] >= last["ranks/median_memory_bytes"] > 10 * 2**20
