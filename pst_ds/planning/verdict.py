"""Whether a planned run fits its machine, its speed, duration and cost."""

from __future__ import annotations

from dataclasses import dataclass

from pst_ds.planning.machines import Machine
from pst_ds.planning.process_memory import Need
from pst_ds.planning.time import TimePlan


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a run, independent of the machine."""

    ranks: int
    steps: int
    mask_updates: int
    tokens: int
    """Of a global batch, padding included."""
    flops: float
    """Of a rank in a step, without what is recomputed."""
    need: Need
    """Memory of a rank, on the device that it computes on."""
    model_bytes: int
    """Read at the start, in the precision of the run."""
    checkpoint_bytes: int
    least_batch: int
    """Examples of the smallest global batch that these ranks can share."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Bytes, seconds and hours; None for what the machine does not tell."""

    needed_bytes: int
    """Memory with which a rank trains."""
    least_bytes: int
    """Memory below which it is killed. Between the two, the outcome is uncertain."""
    capacity_bytes: int | None
    """Memory that a rank has."""
    fits: bool | None
    """True where it has what is needed."""
    margin_bytes: int | None
    """Memory beyond what is needed; negative where it is too little."""
    tokens_per_second: float
    """Of all ranks, mask updates included."""
    tokens_per_second_per_rank: float
    mfu: float | None
    """Share of the data sheet's products that the model's own are, in steps alone."""
    load_seconds: float
    checkpoint_seconds: float
    """From a copy in memory to the disk; training goes on meanwhile."""
    hours: float
    """Of the whole run, loading included."""
    rank_hours: float
    cost: float | None
    least_batch: int


def verdict(work: Work, times: TimePlan, machine: Machine, *, memory: int = 0, price: float | None = None) -> Verdict:
    """Judge a run. ``memory``: bytes that a rank has, in place of the machine's; ``price``: of a rank for an hour."""
    capacity = memory or int(machine.capacity) or None
    training = work.steps * times.step + work.mask_updates * times.update
    load = work.model_bytes / machine.storage_bytes
    hours = (load + training) / 3600
    per_second = work.steps * work.tokens / training if training else 0.0
    mfu = work.flops / (times.step * machine.peak_flops) if machine.peak_flops and times.step else None
    return Verdict(
        needed_bytes=work.need.enough,
        least_bytes=work.need.least,
        capacity_bytes=capacity,
        fits=None if capacity is None else work.need.enough <= capacity,
        margin_bytes=None if capacity is None else capacity - work.need.enough,
        tokens_per_second=per_second,
        tokens_per_second_per_rank=per_second / work.ranks,
        mfu=mfu,
        load_seconds=load,
        checkpoint_seconds=work.checkpoint_bytes / machine.storage_bytes,
        hours=hours,
        rank_hours=hours * work.ranks,
        cost=None if price is None else hours * work.ranks * price,
        least_batch=work.least_batch,
    )
