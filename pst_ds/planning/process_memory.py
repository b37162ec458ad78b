"""Memory that a process on a CPU needs in addition to the tensors that its plan counts."""

from __future__ import annotations

from dataclasses import dataclass

PROCESS_BYTES = 300 << 20
"""A rank after its imports, as far as no file backs it: measured."""
SCATTERED = 0.11
"""Of all that a run takes, what the allocator holds in pieces too small for the next tensor: with it, no
measured run took more than is enough (tools/quality/logs/scaling.md)."""
SCATTERED_AMONG_KEPT = 0.3
"""The same of activations that are kept to the backward pass, between which others come and go."""
LEAST_SHARE = 0.8
"""Of what is enough, what is certainly needed."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a rank: with ``enough`` it trains, with less than ``least`` it is killed."""

    enough: int
    least: int


def need_of_process(peak: int, kept: int, saves: float) -> Need:
    """Return what a rank needs whose tensors take ``peak`` bytes, ``kept`` of them activations that are not made anew,
    and which holds ``saves`` bytes of a checkpoint that is being written while it trains."""
    taken = (1 + SCATTERED) * (peak + saves) + SCATTERED_AMONG_KEPT * kept
    enough = PROCESS_BYTES + round(taken)
    return Need(enough, round(LEAST_SHARE * enough))
