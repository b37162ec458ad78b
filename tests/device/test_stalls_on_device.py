"""A stalled run on the emulated device, whose collectives return before they complete, names the rank that hangs."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pst_ds.parallel import watchdog
from pst_ds.parallel.stall_verdict import VERDICT_FILE

from .pretended import late_collectives, to_device

pytestmark = [pytest.mark.device, pytest.mark.zero3]


def _stalled(folder, hanging):
    """Train on a thread until the watchdog ends the process; return the stack of this rank in the verdict."""
    ended = threading.Event()

    def end(code):
        ended.set()
        threading.Event().wait()

    os_exit, watchdog.os._exit = os._exit, end
    made = [dist.new_group(ranks) for ranks in ([0, 1], [1, 2])]
    pairs = [group for group in made if isinstance(group, dist.ProcessGroup)]

    def train():
        with watchdog.watching(Path(folder), 2.0, ["node0", "node1", "node2"]):
            values = {group: to_device(torch.ones(4)) for group in (None, *pairs)}
            for step in range(10):
                watchdog.heartbeat(f"step {step}")
                if step == 5 and dist.get_rank() == hanging:
                    threading.Event().wait()
                for group, numbers in values.items():
                    dist.all_reduce(numbers, group=group)
                if step == 5:
                    watchdog.heartbeat("reading values")  # the calls above have returned
                for numbers in values.values():
                    numbers.add_(1)  # the host waits here

    with late_collectives():
        threading.Thread(target=train, daemon=True).start()
        assert ended.wait(20)
    watchdog.os._exit = os_exit
    deadline = time.monotonic() + 10
    while not (Path(folder) / VERDICT_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return json.loads((Path(folder) / VERDICT_FILE).read_text())


@pytest.mark.parametrize("hanging", [0, 1, 2])
def test_the_rank_that_hangs_is_named_although_calls_return_at_once(run_on_device, tmp_path, hanging):
    (verdict, *_) = run_on_device(_stalled, 3, str(tmp_path), hanging)
    assert (verdict["ranks"], verdict["hosts"]) == ([hanging], [f"node{hanging}"])
    doing = {report["rank"]: report["doing"] for report in verdict["reports"]}
    assert doing == {rank: "step 5" if rank == hanging else "reading values" for rank in range(3)}
