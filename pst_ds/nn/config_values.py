"""Check the values of a model's config.json that would otherwise fail late, or build an endless model."""

import json
from pathlib import Path

from pst_ds.errors import InputError

_LARGEST = {
    "vocab_size": 1 << 31,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 20,
    "num_key_value_heads": 1 << 20,
}
"""Largest plausible value of each size; all are at least 1, except layers, which are at least 0."""
_LEAST = {"num_hidden_layers": 0}
_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")
"""Keys of configs inside a config."""


def require_plausible_config(path: Path) -> None:
    """Raise InputError, naming file, key and value, for a size or an activation that no model can have.

    Other problems of the file, and a missing file, are left to transformers. Sizes that are not whole numbers, such as
    lists with one per layer, are not checked.
    """
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(table, dict):
        _require_plausible(path, table, "")
        for part in _PARTS:
            if isinstance(table.get(part), dict):
                _require_plausible(path, table[part], f"{part}.")


def _require_plausible(path: Path, table: dict[str, object], place: str) -> None:
    for key, largest in _LARGEST.items():
        value, least = table.get(key), _LEAST.get(key, 1)
        if isinstance(value, bool | str | float):
            raise InputError(f"{path}: {place}{key} = {str(value)[:80]!r} is not a whole number. {_FIX}")
        if isinstance(value, int) and not least <= value <= largest:
            raise InputError(f"{path}: {place}{key} = {str(value)[:80]} is not from {least} to {largest:,}. {_FIX}")
    activation = table.get("hidden_act")
    if isinstance(activation, str) and not _is_known(activation):
        raise InputError(
            f"{path}: {place}hidden_act = {activation[:80]!r} is not an activation of transformers. {_FIX}"
        )


def _is_known(activation: str) -> bool:
    from transformers.activations import ACT2FN

    return activation in ACT2FN


_FIX = "Correct it, or copy config.json from the original model"
