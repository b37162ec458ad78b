"""Which rank a stalled run names, also in simulated stalls of NCCL with several groups and late reports."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from pst_ds.parallel.stall_verdict import VERDICT_FILE, GroupState, StallReport, verdict_of
from tools.chaos.stalls import simulated


def _report(rank, *, reached=9, waits_at=9, idle=12.0, seconds=12.0, world=4, **more):
    groups = {"0": GroupState(list(range(world)), reached, waits_at, seconds)}
    return StallReport(rank, f"host{rank}", 100 + rank, "batch 3", idle, more.get("groups", groups), "stack")


def _stuck(rank, **more):
    return _report(rank, reached=8, waits_at=0, **more)


@pytest.mark.parametrize(
    ("reports", "named", "said"),
    [
        ([_report(0), _stuck(1), _report(2), _report(3)], [1],
         "rank 1 (host1, pid 101) hangs in batch 3, and the others wait for it"),
        # its device has not started the collective
        ([_report(0), _report(1, reached=8), _report(2), _report(3)], [1], "rank 1 (host1, pid 101) hangs"),
        ([_report(0), _stuck(1), _stuck(2), _report(3)], [], "do not show one that all others wait for"),
        ([_report(i) for i in range(4)], [], "all ranks have entered the same collectives; the network or a device"),
        ([_report(0), _stuck(1, idle=3.0), _report(2), _report(3)], [], "wait for work that goes on: rank 1 (host1"),
        ([_report(0), _stuck(1), _report(2, seconds=3.0), _report(3)], [], "do not show one"),
        ([_stuck(i) for i in range(4)], [], "no rank waits in a collective, so none can be named"),
        ([_report(i, groups={}) for i in range(4)], [], "the numbers of collectives are not known"),
        ([_report(0), _stuck(2)], [], "no report of rank 1 (host1), 3 (host3): stopped, cut off or late"),
    ],
)  # fmt: skip
def test_the_rank_to_look_at_is_named(reports, named, said):
    found = verdict_of(reports, [f"host{i}" for i in range(4)], 12.0)
    assert found.ranks == named
    text = found.message(12.0)
    assert text.startswith("pst-ds train: no progress for 12 seconds (train.stall_timeout_seconds): ")
    assert said in text
    assert text.endswith("Continue from the newest checkpoint with --resume")


def test_a_rank_alone_is_named_without_collectives():
    assert "rank 0 (host0, pid 100) hangs in batch 3. C" in verdict_of([_report(0, groups={})], [""], 12.0).message(
        12.0
    )


def test_ranks_that_wait_for_each_other_in_two_groups_name_nobody():
    def state(reached, waits_at):
        return GroupState([0, 1], reached, waits_at, 12.0)

    first = _report(0, groups={"a": state(5, 5), "b": state(2, 0)})
    second = _report(1, groups={"a": state(4, 0), "b": state(3, 3)})
    assert verdict_of([first, second], ["", ""], 12.0).ranks == []


def test_the_verdict_is_written_with_its_reports(tmp_path):
    reports = [_report(0), _report(1), _stuck(2), _report(3)]
    verdict_of(reports, ["node0", "node0", "node1", "node1"], 12.0).write(tmp_path, reports)
    written = json.loads((tmp_path / VERDICT_FILE).read_text())
    assert (written["ranks"], written["hosts"]) == ([2], ["node1"])
    assert [StallReport.from_json(json.dumps(report)) for report in written["reports"]] == reports


def test_a_report_travels_as_json():
    assert StallReport.from_json(json.dumps(asdict(_stuck(1)))) == _stuck(1)


def test_simulated_stalls_name_the_faulty_rank_and_no_other():
    found = simulated(ranks=16, stalls=100, seed=0)
    assert found.falsely_named == 0
    assert found.named >= 0.95 * found.faulty > 30
