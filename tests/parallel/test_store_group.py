"""Objects that all ranks exchange through the store at which they met."""

from __future__ import annotations

import os
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pst_ds.parallel.ranks import barrier, rank
from pst_ds.parallel.store import StoreGroup


def test_one_process_decides_by_itself():
    group = StoreGroup()
    assert group.decide(3, lambda values: [*values, 4]) == [3, 4]


def _decided():
    first, second = StoreGroup(), StoreGroup()
    found = []
    for i in range(3):
        found.append(first.decide([rank(), i], lambda values: (list(values), os.getpid())))
        found.append(second.decide(rank(), sum))
    return found, os.getpid()


@pytest.mark.zero3
def test_every_rank_hears_what_rank_0_decides_from_the_values_of_all_in_order(run_ranks):
    (one, pid), (other, _), (third, _) = run_ranks(_decided, 3)
    assert one == other == third
    assert one[::2] == [[[[0, i], [1, i], [2, i]], pid] for i in range(3)]
    assert one[1::2] == [3, 3, 3]


def _exact():
    value = {
        "error": "caf\u00e9 \udcff",
        "bytes": 2**63 + rank(),
        "cuts": [[0, 2**53 + 1, 2**62]],
        "part": -0.1,
        "is": None,
    }
    decided = StoreGroup().decide(value, lambda values: [values, True])
    return value, decided


@pytest.mark.zero3
def test_values_arrive_as_they_were_sent(run_ranks):
    sent, decided = zip(*run_ranks(_exact, 2), strict=True)
    assert decided == ([list(sent), True],) * 2
    assert [type(number) for number in decided[1][0][1].values()] == [str, int, list, float, type(None)]


class _RunsWhenUnpickled:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def _poisoned(folder):
    """Whoever reaches the store leaves a pickle where each rank reads."""
    group, key = StoreGroup(), "of-1" if rank() == 0 else "answer"
    store = group._store
    store.set(f"{group._name}/0/{key}", pickle.dumps(_RunsWhenUnpickled(str(folder / key))))
    barrier()
    group._store = SimpleNamespace(get=store.get, set=lambda *_: None)  # so that both read what the stranger wrote
    with pytest.raises(ValueError, match=r"invalid start byte|Expecting value"):
        group.decide(0, len)
    barrier()


@pytest.mark.zero3
def test_what_a_stranger_writes_into_the_store_is_never_run(run_ranks, tmp_path):
    (tmp_path / "run").mkdir()
    run_ranks(_poisoned, 2, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def _beside_a_collective():
    """A thread's exchange begins before a collective of the main thread on one rank, and after it on the other."""
    group, found = StoreGroup(), []
    thread = threading.Thread(target=lambda: found.append(group.decide(rank(), list)))
    if rank() == 0:
        thread.start()
    total = torch.ones(())
    dist.all_reduce(total)
    if rank():
        thread.start()
    thread.join()
    return found, float(total)


@pytest.mark.zero3
def test_threads_exchange_while_the_process_group_is_used(run_ranks):
    assert run_ranks(_beside_a_collective, 2) == [([[0, 1]], 2.0)] * 2


def _kept(rounds):
    """Whether rank 0 finds anything of so many exchanges in the store."""
    group = StoreGroup()
    for _ in range(rounds):
        group.decide(0, len)
    store = dist.distributed_c10d._get_default_store()
    names = [f"{group._name}/{i}/{key}" for i in range(rounds) for key in ("answer", "of-1", "read-1")]
    found = [name for name in names if rank() == 0 and store.check([name])]
    barrier()
    return found


@pytest.mark.zero3
def test_what_was_read_does_not_stay_in_the_store(run_ranks):
    assert run_ranks(_kept, 2, 9)[0] == []


def _late(folder):
    """What rank 1 has noted when rank 0 goes on."""
    group = StoreGroup()
    if rank():
        group._store = _Noted(group._store, folder / "read")
    group.decide(0, len)
    return [path.name for path in folder.iterdir()]


class _Noted:
    """A store of which it is noted that a rank has read from it."""

    def __init__(self, store, note):
        self._store, self._note, self.set = store, note, store.set

    def get(self, key):
        answer = self._store.get(key)
        self._note.touch()
        return answer


@pytest.mark.zero3
def test_rank_0_goes_on_when_all_have_read_the_answer(run_ranks, tmp_path):
    (tmp_path / "notes").mkdir()
    assert run_ranks(_late, 2, tmp_path / "notes")[0] == ["read"]
