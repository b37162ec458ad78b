"""Check that per-user adapters belong to a model folder, dense or packed."""

import hashlib
from pathlib import Path

from torch import Tensor, nn

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
    for name in common.shapes:
        # names are LAYER.personal_U and LAYER.personal_V; everything else is a head that was trained per user
        if name.rpartition(".")[2] not in (LEFT, RIGHT):
            raise UserStoreError(f"{store.folder} has a head for each user ({name}), which cannot generate text")
    base_fingerprint = read_facts(folder).base_fingerprint
    if not base_fingerprint:
        why = "does not name its base model. Use an export of the run that the users were trained on"
        raise InputError(f"{folder / MANIFEST_FILE} {why}")
    if base_fingerprint != common.base_fingerprint:
        raise UserStoreError(f"{store.folder} has adapters of another base model than {folder}")
    _require_masks(model, folder, store)


def _require_masks(model: nn.Module, folder: Path, store: UserStore) -> None:
    """Compare pruned weights with the masks, except in quantised layers, whose kept weights may be zero."""
    modules = dict(model.named_modules())
    if any(isinstance(module, SparseLinear) and module.is_quantized for module in modules.values()):
        return
    for name, mask_sha256 in store.common.masks_sha256.items():
        if name not in modules:
            raise UserStoreError(f"{store.folder} has adapters of {name}, which the model in {folder} does not have")
        module = modules[name]
        weight = module.dense_weight() if isinstance(module, SparseLinear) else module.get_parameter("weight")
        # an export has zeros exactly where the mask has, as long as no kept weight was quantised to 0
        keep = weight.detach().cpu() != 0
        # masks have the order of the layer in training: (outputs, inputs) of nn.Linear, or (inputs, outputs) of Conv1D.
        # a packed layer does not record which of them it was
        as_linear = _sha256(keep)
        as_conv1d = _sha256(keep.t().contiguous())
        if mask_sha256 not in (as_linear, as_conv1d):
            raise UserStoreError(
                f"{store.folder} has adapters whose masks differ from {folder} ({name}). Use the "
                "export of the run and checkpoint that they were trained on"
            )


def _sha256(keep: Tensor) -> str:
    """Return the checksum of a mask as a store has it: over its bits, packed into bytes."""
    return hashlib.sha256(pack_mask(keep).numpy().data).hexdigest()
