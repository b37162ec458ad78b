"""Judge a planned run: fit to the machine, speed and duration."""

from dataclasses import dataclass

from pst_ds.planning.machines import Machine
from pst_ds.planning.time import TimePlan

PROCESS_BYTES = 300 << 20
"""Anonymous memory of a CPU rank after its imports, measured."""
SCATTERED = 0.11
"""Share of a run's memory that the allocator loses to fragmentation: with it, no measured run needed more than
:attr:`Need.enough` (tools/quality/logs/scaling.md)."""
SCATTERED_AMONG_KEPT = 0.3
"""The same for activations that are kept until the backward pass, between which others come and go."""
LEAST_SHARE = 0.8
"""Share of the sufficient memory that is certainly needed."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a rank: with ``enough`` it trains, with less than ``least`` it is killed."""

    enough: int
    least: int


def need_of_rank(device: str, peak: int, kept: int, saves: float) -> Need:
    """Return the bytes that a rank needs: on a GPU its ``peak``, on a CPU the process with copies to save.

    ``peak``: bytes of its tensors; ``kept``: of these, activations that are not recomputed; ``saves``: bytes of a
    checkpoint that is written during training.
    """
    if device != "cpu":
        return Need(peak, peak)
    enough = PROCESS_BYTES + round((1 + SCATTERED) * (peak + saves) + SCATTERED_AMONG_KEPT * kept)
    return Need(enough, round(LEAST_SHARE * enough))


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a run, independent of the machine."""

    ranks: int
    steps: int
    mask_updates: int
    tokens: int
    """Tokens of a global batch, including padding."""
    flops: float
    """FLOPs of a rank in a step, without recomputation."""
    start_seconds: float
    """Seconds of fine-tuning and one-shot pruning before the first step."""
    need: Need
    """Memory of a rank, on the device that it computes on."""
    model_bytes: int
    """Bytes read at the start, in the precision of the run."""
    checkpoint_bytes: int
    least_batch: int
    """Examples of the smallest global batch that these ranks can share."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Bytes, seconds and hours; None where the machine does not tell."""

    needed_bytes: int
    """Memory with which a rank trains."""
    least_bytes: int
    """Memory below which it is killed. Between the two, the outcome is uncertain."""
    capacity_bytes: int | None
    """Memory that a rank has."""
    fits: bool | None
    margin_bytes: int | None
    """Memory beyond what is needed; negative where it is too little."""
    tokens_per_second: float
    """Tokens of all ranks, including mask updates in the time."""
    tokens_per_second_per_rank: float
    mfu: float | None
    """Share of the data sheet's FLOP/s that the model's products reach, without mask updates."""
    load_seconds: float
    checkpoint_seconds: float
    """Seconds to write a checkpoint from a copy in memory, while training continues."""
    hours: float
    """Hours of the whole run, including loading, fine-tuning and one-shot pruning."""
    rank_hours: float
    least_batch: int

    @property
    def is_too_large(self) -> bool:
        """True if a rank certainly has too little memory; False where the outcome is uncertain or unknown."""
        return self.capacity_bytes is not None and self.capacity_bytes < self.least_bytes


def verdict(work: Work, times: TimePlan, machine: Machine, *, memory: int = 0) -> Verdict:
    """Judge a run. ``memory``: bytes per rank instead of the machine's."""
    # a machine file without a capacity leaves open whether the run fits
    capacity = memory or int(machine.capacity) or None
    margin = None
    fits = None
    if capacity is not None:
        margin = capacity - work.need.enough
        fits = margin >= 0
    training = work.steps * times.step + work.mask_updates * times.update
    # all ranks read from one file system, so the ranks do not make it faster
    load = work.model_bytes / machine.storage_bytes
    hours = (load + work.start_seconds + training) / 3600
    per_second = 0.0
    if training:
        per_second = work.steps * work.tokens / training
    mfu = None
    if machine.peak_flops and times.step:
        # without mask updates and recomputation, as others count it
        mfu = work.flops / (times.step * machine.peak_flops)
    return Verdict(
        needed_bytes=work.need.enough,
        least_bytes=work.need.least,
        capacity_bytes=capacity,
        fits=fits,
        margin_bytes=margin,
        tokens_per_second=per_second,
        tokens_per_second_per_rank=per_second / work.ranks,
        mfu=mfu,
        load_seconds=load,
        checkpoint_seconds=work.checkpoint_bytes / machine.storage_bytes,
        hours=hours,
        rank_hours=hours * work.ranks,
        least_batch=work.least_batch,
    )
