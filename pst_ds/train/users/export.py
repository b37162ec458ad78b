"""A checkpoint with one user's values, from which that user's model is exported with the base's sparsity."""

from __future__ import annotations

from torch import Tensor

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.config.run import RunConfig
from pst_ds.parallel.optimizer_state import MASTER
from pst_ds.train.users.personal import common_of
from pst_ds.train.users.store import State, UserStore, UserStoreError


class UserCheckpoint(Checkpoint):
    """A run's checkpoint whose personal values are those of one user."""

    def __init__(self, checkpoint: Checkpoint, state: State):
        super().__init__(checkpoint.folder, checkpoint.state, checkpoint.contents)
        self._state = state

    def values(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        if kind == MASTER and name in self._state:
            return self._state[name].flatten()[start:stop].float()
        return super().values(name, kind, start, stop)


def user_checkpoint(checkpoint: Checkpoint, run: RunConfig, store: UserStore, user: str) -> UserCheckpoint:
    """Return ``checkpoint`` with the state of ``user``.

    Raises UserStoreError when the store belongs to another model, or its form is "beside": merging such an update
    would fill the pruned weights.
    """
    if store.common.form == "beside":
        raise UserStoreError(
            f"{store.folder}: its updates lie next to the layers, and merging them would fill the pruned weights. "
            "Train the users with --form masked to export them, or serve them over the base's export."
        )
    own, trained = store.common, checkpoint.contents.trained
    shapes = {name: list(trained[name]) for name in own.shapes if name in trained}
    store.require_common(common_of(checkpoint, run, shapes, form=own.form, dtype=own.dtype))
    return UserCheckpoint(checkpoint, store.state(user))
