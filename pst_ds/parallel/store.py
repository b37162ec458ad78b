"""Exchanges over the store at which ranks meet, next to the process group. Importing this needs no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_group_numbers = itertools.count()


class StoreGroup:
    """Exchange small JSON values between all ranks, from threads that run while training uses the process group.

    Every rank has one connection to the store and none to other ranks, and needs no collective to open it. All ranks
    create their groups in the same order, and call the methods of one in the same order, in any thread.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        from pst_ds.parallel.ranks import rank, world_size

        self._rank, self._world = rank(), world_size()
        self._store: dist.Store | None = None
        if dist.is_initialized() and self._world > 1:
            # a separate connection: a waiting one blocks every other thread that uses it
            self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._name, self._round = f"pst_ds/{next(_group_numbers)}", 0

    def decide(self, value: T, decision: Callable[[Sequence[T]], R]) -> R:
        """Return on every rank the ``decision`` of rank 0 on the values of all ranks, in order. Collective.

        Only rank 0 calls ``decision``, which must not raise. Values and decision travel as JSON, so a tuple becomes a
        list: unpickling would let anyone who reaches the store run code on every rank. Rank 0, which may hold the
        store, returns once all others have the answer.

        Raises:
            torch.distributed.DistError: a rank is missing after the process group's timeout.
            ValueError: data in the store that no rank has sent.
        """
        own = json.dumps(value)
        if self._store is None:
            return json.loads(json.dumps(decision([json.loads(own)])))
        name = f"{self._name}/{self._round}"
        self._round += 1
        if self._rank:
            self._store.set(f"{name}/of-{self._rank}", own)
            decided = json.loads(self._store.get(f"{name}/answer"))
            with suppress(RuntimeError):  # rank 0 has ended; the answer is here
                self._store.set(f"{name}/read-{self._rank}", "")
            return decided
        others = range(1, self._world)
        sent = [own, *(self._store.get(f"{name}/of-{other}").decode() for other in others)]
        answer = json.dumps(decision([json.loads(text) for text in sent]))
        self._store.set(f"{name}/answer", answer)
        self._store.wait([f"{name}/read-{other}" for other in others])
        for key in ("answer", *(f"{kind}-{other}" for kind in ("of", "read") for other in others)):
            self._store.delete_key(f"{name}/{key}")
        return json.loads(answer)
