"""Per-user adapters for a model folder, dense or packed: each sample of a batch has its user's, or none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pst_ds.core.bits import pack_mask
from pst_ds.errors import InputError
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.inference.runtime import SparseLinear
from pst_ds.nn.batched_updates import LEFT, RIGHT, BatchUpdates
from pst_ds.train.users.store import State, UserStore, UserStoreError


class ServedUsers:
    """A store of adapters for a model in memory. Switching users looks up their states; no weight changes."""

    def __init__(self, model: nn.Module, folder: Path, store: UserStore):
        """``model``: the model of ``folder``, an export of the run that the users were trained on.

        Raises UserStoreError for a store with another form, base or mask, and for adapters with a head.
        """
        self.store, self._model = store, model
        _require_served(store)
        _require_base(folder, store)
        _require_masks(model, folder, store)
        try:
            self._updates = BatchUpdates(model, store.common.shapes, store.common.beta)
        except (KeyError, ValueError, AttributeError) as error:
            raise UserStoreError(f"{store.folder} does not fit the model in {folder}: {error}") from None

    def assign(self, users: Sequence[str | None]) -> None:
        """Let sample i of later batches use the adapter of ``users[i]``, or none. Raises UserStoreError."""
        self.assign_states([None if user is None else self.store.state(user) for user in users])

    def assign_states(self, states: Sequence[State | None]) -> None:
        """Let sample i of later batches use ``states[i]``, or none; without states all samples use the base model."""
        self._updates.assign(states, like=next(p for p in self._model.parameters() if p.is_floating_point()))

    def close(self) -> None:
        """Remove the updates from the model."""
        self._updates.remove()


def _require_served(store: UserStore) -> None:
    common = store.common
    if common.form != "beside":
        raise UserStoreError(
            f"{store.folder} has adapters of the form {common.form!r}, whose weight is for one user only. "
            "Export a user (pst-ds users export), or train the users with --form beside"
        )
    others = [name for name in common.shapes if name.rpartition(".")[2] not in (LEFT, RIGHT)]
    if others:
        raise UserStoreError(
            f"{store.folder} has a head for each user ({others[0]}), and such models cannot generate text"
        )


def _require_base(folder: Path, store: UserStore) -> None:
    try:
        known = json.loads((folder / MANIFEST_FILE).read_bytes()).get("base_fingerprint")
    except (OSError, ValueError, AttributeError):
        known = None
    if not known:
        path = folder / MANIFEST_FILE
        raise InputError(
            f"{path} does not name its base model. Use an export of the run that the users were trained on"
        )
    if known != store.common.base_fingerprint:
        raise UserStoreError(f"{store.folder} has adapters of another base model than {folder}")


def _require_masks(model: nn.Module, folder: Path, store: UserStore) -> None:
    """Compare pruned weights with the masks, except in quantised layers, whose kept weights may be zero."""
    modules = dict(model.named_modules())
    if any(isinstance(module, SparseLinear) and module.is_quantized for module in modules.values()):
        return
    for name, known in store.common.masks_sha256.items():
        if name not in modules:
            raise UserStoreError(
                f"{store.folder} has adapters of a layer {name}, which the model in {folder} does not have"
            )
        module = modules[name]
        weight = module.dense_weight() if isinstance(module, SparseLinear) else module.get_parameter("weight")
        keep = weight.detach().cpu() != 0
        found = {hashlib.sha256(pack_mask(bits).numpy().data).hexdigest() for bits in (keep, keep.t().contiguous())}
        if known not in found:  # try the order of nn.Linear and of Conv1D, which a packed layer does not record
            raise UserStoreError(
                f"{store.folder} has adapters whose masks differ from {folder} ({name}). Use the "
                "export of the run and checkpoint that they were trained on"
            )
