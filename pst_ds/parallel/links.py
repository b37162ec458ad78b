"""Count the bytes that collectives bring to a rank over the links of its node and from other nodes.

Ranks of a group are neighbours in their rings, and every node has as many network cards as ranks, which share the
places where rings enter it (as NCCL's channels do). Bytes are therefore the mean over the ranks of a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes that a rank receives."""

    within: float = 0.0
    """From ranks of the same node."""
    between: float = 0.0
    """From other nodes."""

    def __add__(self, other: Received) -> Received:
        return Received(self.within + other.within, self.between + other.between)

    def __mul__(self, times: float) -> Received:
        return Received(self.within * times, self.between * times)

    @property
    def total(self) -> float:
        return self.within + self.between


NOTHING = Received()


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of a process group, equally many on each of its nodes."""

    ranks: int
    nodes: int = 1

    @property
    def hops(self) -> int:
        """Hops of a ring that take time: between its nodes, or else between its ranks."""
        if self.nodes > 1:
            # hops inside a node are so much faster that they do not count next to these
            return self.nodes
        return self.ranks - 1

    @classmethod
    def of_neighbours(cls, ranks: int, node_size: int) -> Group:
        return cls(ranks, math.ceil(ranks / node_size))

    def owners(self, degree: int) -> Group:
        """Return the ranks, one of each ``degree`` neighbours, that own the same experts."""
        ranks = self.ranks // degree
        # they are apart by the degree, so they may be on fewer nodes than the whole group
        return Group(ranks, min(ranks, self.nodes))

    def gathered(self, nbytes: float) -> Received:
        """Return what a ring all-gather of ``nbytes`` in total, or a reduce-scatter, brings to each rank.

        All bytes but a rank's own pass every hop of the ring, of which one per node enters it. An all-reduce brings
        twice that.
        """
        received = nbytes * (self.ranks - 1) / self.ranks
        between = 0.0
        if self.nodes > 1:
            # of the ring's hops, as many as there are ranks, those into the first rank of a node come from another one
            between = received * self.nodes / self.ranks
        return Received(received - between, between)

    def exchanged(self, nbytes: float) -> Received:
        """Return what an all-to-all brings to a rank that holds ``nbytes`` afterwards: directly from every other."""
        # every rank sends the same number of bytes, and every node has the same number of ranks
        between = nbytes * (self.nodes - 1) / self.nodes
        return Received(nbytes * (self.ranks - 1) / self.ranks - between, between)
