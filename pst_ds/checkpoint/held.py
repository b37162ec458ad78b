"""The state of a run after its last steps, held in memory, to be saved while a step is under way that does not end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pst_ds.atomic_files import PARTIAL
from pst_ds.checkpoint.format import CheckpointState
from pst_ds.checkpoint.host_file import plan_host_file
from pst_ds.checkpoint.own_part import OwnPart
from pst_ds.checkpoint.retention import step_name
from pst_ds.checkpoint.writer import CheckpointFile
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.store_group import StoreGroup

NEVER = -1
_ENDING = f".held{PARTIAL}"


@dataclass(frozen=True, slots=True)
class HeldSave:
    """How a save of a held state ended; the same on every rank."""

    step: int
    """The step that the run can go on after: saved, or already there; NEVER if no step was held by all ranks."""
    error: str = ""
    """Why that state could not be written."""


class HeldStates:
    """Holds this rank's part of the checkpoints of the last two steps: :meth:`hold` copies it, 12 bytes for each of its
    trainable values and its mask bits, into memory that is kept.

    No rank ends a step before all have begun it, so the last step of the slowest rank is one of the two that each
    holds. ``file_of_host`` as for a CheckpointWriter. Making it is collective.
    """

    def __init__(self, folder: Path, engine: Engine, *, file_of_host: bool = False):
        self._folder = folder
        self.group = StoreGroup()
        """Of the thread that calls :meth:`save`."""
        self._parts = (OwnPart(engine), OwnPart(engine))
        together = plan_host_file(self._parts[0].lengths()) if file_of_host else None
        self._file = CheckpointFile(folder, engine, _ENDING, self.group, together)
        self._states: list[CheckpointState | None] = [None, None]
        self._newest = 0
        self._masks: object = self
        self._lock = threading.Lock()
        self._is_writing = False

    def hold(self, state: CheckpointState, masks: object) -> None:
        """Hold the engine's state as it is now in place of the older one; nothing more once :meth:`save` was called.

        ``masks`` is an object that stays the same for as long as the masks do, which are then not copied again.
        Without a collective.
        """
        with self._lock:
            if self._is_writing:
                return
            older, same = 1 - self._newest, masks is self._masks and self._states[self._newest] is not None
            self._states[older] = None
            self._parts[older].copy(masks_of=self._parts[self._newest] if same else None)
            self._states[older], self._masks, self._newest = state, masks, older

    def save(self, when_written: Callable[[CheckpointState], None]) -> HeldSave:
        """Write the last state that all ranks hold, unless that checkpoint is there. Collective over the threads that
        call it, while training goes on. ``when_written`` is called on rank 0 with the state, if it was written."""
        with self._lock:
            self._is_writing = True
        newest = self._states[self._newest]
        step, is_there = self.group.decide(NEVER if newest is None else newest.step, self._common)
        if step == NEVER or is_there:
            return HeldSave(step)
        (held,) = [i for i, state in enumerate(self._states) if state is not None and state.step == step]
        state = self._states[held]
        assert state is not None
        error, _ = self._file.write(step_name(step), state, self._parts[held], lambda: when_written(state))
        return HeldSave(step, error)

    def _common(self, steps: Sequence[int]) -> tuple[int, bool]:
        """Return the last step of all ranks, and whether its checkpoint is there."""
        step = min(steps)
        return step, step != NEVER and (self._folder / step_name(step)).is_dir()
