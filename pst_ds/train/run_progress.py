"""Where a run is: the state of its training loop, and what checkpoints keep of it so that the run can resume."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pst_ds.checkpoint.format import Checkpoint, CheckpointError
from pst_ds.masks.update import MaskStats
from pst_ds.train.batches import Places


@dataclass(slots=True)
class LoopState:
    """Where the training loop is; the same on every rank."""

    step: int = 0
    """Optimizer steps applied."""
    batch: int = 0
    """Global batches trained on, skipped steps included."""
    masks: MaskStats | None = None
    """Statistics of the last mask update."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each global batch since the last line of metrics.jsonl."""
    tokens: int = 0
    """Tokens of these batches."""
    last_report_seconds: float = 0.0
    """Seconds into the run at the last line of metrics.jsonl."""
    skipped_in_a_row: int = 0
    streams: list[Places] = field(default_factory=list)
    """Position of each reader of streams; empty for a run without streams."""
    stopped_by: int = 0
    """Signal that asked some rank to stop; 0 for none."""

    def as_json(self) -> dict[str, Any]:
        """Return the saved fields as JSON values."""
        return {
            "batch": self.batch,
            "masks": self.masks.totals() if self.masks else None,
            "losses": list(self.losses),
            "tokens": self.tokens,
            "last_report_seconds": self.last_report_seconds,
            "skipped_in_a_row": self.skipped_in_a_row,
            "streams": list(self.streams),
        }

    @classmethod
    def from_json(cls, step: int, values: dict[str, Any]) -> LoopState:
        """Restore the state after ``step`` from what :meth:`as_json` returned. Raises TypeError for other fields."""
        masks = values.get("masks")
        return cls(step=step, **{**values, "masks": None if masks is None else MaskStats(**masks)})


_SAVED = LoopState().as_json().keys()


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Where a run is, for a checkpoint; the same on every rank and for any number of ranks.

    The random numbers of a step and the order of batches follow from the seed and ``loop.batch``, and learning rates
    from the step, so none of them are saved.
    """

    loop: LoopState
    skipped_steps: int
    """Optimizer steps that were skipped."""
    seconds: float
    """Seconds of training, over all processes of the run."""
    groups: dict[str, dict[str, Any]]
    """Learning rate, peak rate and Adam's betas of each parameter group."""
    best_step: int | None
    best_value: float | None
    """Metric after ``best_step``."""
    evaluated_step: int
    """Step of the last evaluation; -1 before the first."""
    data_digest: str
    """SHA-256 of the training examples."""
    run: dict[str, Any]
    """Resolved run file."""
    world_size: int
    zero_stage: int

    def as_json(self) -> dict[str, Any]:
        """Return the progress as JSON values, for ``CheckpointState.progress``."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "loop"}
        return {**self.loop.as_json(), **own}

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> RunProgress:
        """Read the progress in ``checkpoint``. Raises CheckpointError when there is none, or an unknown one."""
        values = checkpoint.state.progress
        try:
            loop = LoopState.from_json(checkpoint.state.step, {k: v for k, v in values.items() if k in _SAVED})
            return cls(loop=loop, **{k: v for k, v in values.items() if k not in _SAVED})
        except TypeError as error:
            raise CheckpointError(f"{checkpoint.folder} was not written to continue a run: {error}") from None
