"""Check that per-user adapters belong to a model folder, dense or packed."""

import hashlib
from pathlib import Path

from torch import nn

from pst_ds.checkpoint.user_store import UserStore, UserStoreError
from pst_ds.core.bits import pack_mask
from pst_ds.errors import InputError
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.nn.folder_facts import read_facts
from pst_ds.nn.personal_updates import LEFT, RIGHT
from pst_ds.runtime import SparseLinear


def require_fitting(model: nn.Module, folder: Path, store: UserStore) -> None:
    """Raise UserStoreError unless the adapters of ``store`` belong to ``model``, the model of ``folder``.

    The folder must be an export of the run that the users were trained on. Rejects stores with another form, base or
    mask, and adapters with a head.
    """
    common = store.common
    if common.form != "beside":
        raise UserStoreError(
            f"{store.folder} has adapters of the form {common.form!r}, whose weight is for one user only. "
            "Export a user (pst-ds users export), or train them anew: pst-ds users train --form beside"
        )
    others = [name for name in common.shapes if name.rpartition(".")[2] not in (LEFT, RIGHT)]
    if others:
        raise UserStoreError(f"{store.folder} has a head for each user ({others[0]}), which cannot generate text")
    known = read_facts(folder).base_fingerprint
    if not known:
        why = "does not name its base model. Use an export of the run that the users were trained on"
        raise InputError(f"{folder / MANIFEST_FILE} {why}")
    if known != common.base_fingerprint:
        raise UserStoreError(f"{store.folder} has adapters of another base model than {folder}")
    _require_masks(model, folder, store)


def _require_masks(model: nn.Module, folder: Path, store: UserStore) -> None:
    """Compare pruned weights with the masks, except in quantised layers, whose kept weights may be zero."""
    modules = dict(model.named_modules())
    if any(isinstance(module, SparseLinear) and module.is_quantized for module in modules.values()):
        return
    for name, known in store.common.masks_sha256.items():
        if name not in modules:
            raise UserStoreError(f"{store.folder} has adapters of {name}, which the model in {folder} does not have")
        module = modules[name]
        weight = module.dense_weight() if isinstance(module, SparseLinear) else module.get_parameter("weight")
        keep = weight.detach().cpu() != 0
        found = {hashlib.sha256(pack_mask(bits).numpy().data).hexdigest() for bits in (keep, keep.t().contiguous())}
        if known not in found:  # try the order of nn.Linear and of Conv1D, which a packed layer does not record
            raise UserStoreError(
                f"{store.folder} has adapters whose masks differ from {folder} ({name}). Use the "
                "export of the run and checkpoint that they were trained on"
            )
