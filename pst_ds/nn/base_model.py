"""Whether a place can be that of a pretrained model, before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_ds.errors import InputError

PRUNING_RECORD = "pruning.json"
"""What ``pst-ds prune`` writes beside the weights of a folder."""


def require_model_place(setting: str, place: str) -> None:
    """Raise InputError for what is neither there nor spelled like a name on the hub, before the hub is asked for it.

    ``setting`` is the one that names it: "model.path".
    """
    if not place:
        raise InputError(f"{setting} = '' is empty; name a model folder, or a model on the hub")
    if not Path(place).exists() and (place.count("/") > 1 or place.startswith((".", "/", "~"))):
        raise InputError(
            f"{setting} = {place!r} does not exist (looked in {Path(place).absolute()}); name a model folder, or a "
            "model on the hub"
        )


def refuse_packed(setting: str, place: str, config: Any) -> None:
    """Raise InputError for a model whose transformers ``config`` says that it is packed or quantised."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if method == "pst_ds":
        raise InputError(
            f"{setting} = {place!r} is packed, and its weights cannot be ranked as they are. Make it dense: pst-ds "
            f"export {place} --format dense --out DIR"
        )
    raise InputError(
        f"{setting} = {place!r} is quantised ({getattr(method, 'value', method)}), and its weights cannot be ranked; "
        "name the model as it was before that"
    )
