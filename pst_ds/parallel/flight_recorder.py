"""Numbers of this rank's collectives, from torch's flight recorder. They show which rank a stalled run waits for.

Every member of a group counts the group's collectives. The recorder notes the last one that the host has entered, and
which ones are complete. That also holds for NCCL, whose calls return at once, so that a stack does not show a wait.
"""

import pickle
import time
from typing import TypedDict

import torch
import torch.distributed as dist

from pst_ds.parallel.stall_verdict import GroupState


class _Status(TypedDict):
    """Numbers that the recorder has of a group."""

    last_enqueued_collective: int
    last_started_collective: int
    """-1 if start times are not recorded, as for gloo, and for NCCL without TORCH_NCCL_ENABLE_TIMING=1."""
    last_completed_collective: int


class FlightRecorder:
    """Reads torch's recorder. Call :meth:`sample` often: what lies between two samples has the time of the later."""

    def __init__(self) -> None:
        # NCCL has a separate recorder, in builds with CUDA only
        name = "_dump_nccl_trace" if dist.is_initialized() and dist.get_backend() == "nccl" else "_dump_fr_trace"
        self._dump = getattr(torch._C._distributed_c10d, name, None)
        self._names: dict[str, str] = {}
        """Names of groups, which are the same on all ranks, by the recorder's numbers, which are not."""
        self._statuses: dict[str, _Status] = {}
        self._changed: dict[str, float] = {}

    def sample(self) -> bool:
        """Return whether a collective was entered, started or completed since the last call."""
        if self._dump is None:
            return False
        statuses: dict[str, _Status] = pickle.loads(self._dump(False, False, False))["pg_status"]
        changed = [number for number, status in statuses.items() if status != self._statuses.get(number)]
        for number in changed:
            self._changed[number] = time.monotonic()
        self._statuses = statuses
        # the recorder forgets old entries, and only entries have names
        if not statuses.keys() <= self._names.keys():
            self._entries()
        return bool(changed)

    def groups(self) -> dict[str, GroupState]:
        """Return the state of every group by name; nothing if the numbers of some group cannot be told."""
        if self._dump is None:
            return {}
        entries = self._entries()
        self.sample()
        if not self._statuses.keys() <= self._names.keys():
            return {}
        groups: dict[str, GroupState] = {}
        # a later group of the same name replaces one that was destroyed
        for number in sorted(self._statuses, key=int):
            name = self._names[number]
            status = self._statuses[number]
            try:
                group = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
            except RuntimeError:  # destroyed
                continue
            entered = status["last_enqueued_collective"]
            started = status["last_started_collective"]
            groups[name] = GroupState(
                members=dist.get_process_group_ranks(group),
                reached=started if started >= 0 else entered,
                waits_at=_first_incomplete(entries, number),
                seconds=time.monotonic() - self._changed[number],
            )
        return groups

    def _entries(self) -> list[dict]:
        """Return the recorder's last collectives, oldest first, and learn the names of their groups."""
        assert self._dump is not None
        entries: list[dict] = pickle.loads(self._dump(True, False, False)).get("entries", [])
        for entry in entries:
            self._names[str(entry["pg_id"])] = entry["process_group"][0]
        return entries


def _first_incomplete(entries: list[dict], group: str) -> int:
    """Return the number of a group's first collective that is not complete; 0 for none."""
    for entry in entries:
        # gloo never notes when a collective is complete, but retires it then
        is_over = entry["retired"] or entry["time_discovered_completed_ns"] is not None
        if str(entry["pg_id"]) == group and not is_over and not entry["is_p2p"]:
            return int(entry["collective_seq_id"])
    return 0
