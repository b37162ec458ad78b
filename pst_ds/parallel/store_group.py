"""All ranks, over the store at which they met: for what threads exchange while training uses the process group."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

from pst_ds.parallel.ranks import rank, world_size

T = TypeVar("T")
R = TypeVar("R")
_numbers = itertools.count()


class StoreGroup:
    """Exchanges small JSON values of all ranks. Every rank has one connection to the store and none to another rank, so
    that their number does not grow with the ranks, nor does it take a collective to connect them.

    All ranks make their groups in the same order, and call the methods of one in the same order, in any thread.
    """

    def __init__(self) -> None:
        self._store: dist.Store | None = None
        if dist.is_initialized() and world_size() > 1:
            # a connection of its own: one that waits would keep every other thread from using it
            self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._name, self._round = f"pst_ds/{next(_numbers)}", 0

    def decide(self, value: T, decision: Callable[[Sequence[T]], R]) -> R:
        """Return on every rank what ``decision`` makes of the values of all ranks, in order, on rank 0, which alone
        calls it; it must not raise. Values and decision travel as JSON, so a tuple becomes a list: unpickling
        would let anyone who reaches the store run code on every rank. Rank 0, where the store may be, returns once all
        others have the answer, and can end then. Collective. Raises torch.distributed.DistError after the
        process group's timeout without a rank, and ValueError for what no rank has sent."""
        own = json.dumps(value)
        if self._store is None:
            return json.loads(json.dumps(decision([json.loads(own)])))
        name = f"{self._name}/{self._round}"
        self._round += 1
        if rank():
            self._store.set(f"{name}/of-{rank()}", own)
            decided = json.loads(self._store.get(f"{name}/answer"))
            with suppress(RuntimeError):  # rank 0 is gone, and the answer is here
                self._store.set(f"{name}/read-{rank()}", "")
            return decided
        others = range(1, world_size())
        sent = [own, *(self._store.get(f"{name}/of-{other}").decode() for other in others)]
        answer = json.dumps(decision([json.loads(text) for text in sent]))
        self._store.set(f"{name}/answer", answer)
        self._store.wait([f"{name}/read-{other}" for other in others])
        for key in ("answer", *(f"{kind}-{other}" for kind in ("of", "read") for other in others)):
            self._store.delete_key(f"{name}/{key}")
        return json.loads(answer)
