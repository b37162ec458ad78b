"""Check the values of a model's configs that would otherwise fail late, or build an endless model."""

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
    "max_position_embeddings": 1 << 40,
}
"""Largest plausible value of each size; all are at least 1 if :data:`_LEAST` does not say less."""
_LEAST = {"num_hidden_layers": 0, "max_position_embeddings": 0}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of token ids; a model can have several that end a text."""
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


def require_plausible_generation(path: Path) -> None:
    """Raise InputError for a generation_config.json that is not an object, or whose special tokens are not ids.

    Other problems of the file, and a missing file, are left to transformers.
    """
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(table, dict):
        raise InputError(f"{path} has {str(table)[:80]!r} where an object is expected. {_fix_of(path)}")
    _require_tokens(path, table, "")


def _require_plausible(path: Path, table: dict[str, object], place: str) -> None:
    """Raise InputError for a value of a config, or of the part of one that is at ``place``, such as "text_config."."""
    for key, largest in _LARGEST.items():
        value = table.get(key)
        least = _LEAST.get(key, 1)
        if isinstance(value, bool | str | float):
            raise InputError(f"{path}: {place}{key} = {str(value)[:80]!r} is not a whole number. {_fix_of(path)}")
        if isinstance(value, int) and not least <= value <= largest:
            raise InputError(
                f"{path}: {place}{key} = {str(value)[:80]} is not from {least} to {largest:,}. {_fix_of(path)}"
            )
    _require_tokens(path, table, place)
    names = table.get("architectures")
    is_list_of_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not is_list_of_names:
        raise InputError(f"{path}: {place}architectures = {str(names)[:80]!r} is not a list of names. {_fix_of(path)}")
    activation = table.get("hidden_act")
    if isinstance(activation, str) and not _is_known(activation):
        raise InputError(
            f"{path}: {place}hidden_act = {activation[:80]!r} is not an activation of transformers. {_fix_of(path)}"
        )


def _require_tokens(path: Path, table: dict[str, object], place: str) -> None:
    for key in _TOKENS:
        value = table.get(key)
        if value is None:
            continue
        tokens: list[object] = [value]
        if isinstance(value, list) and key == "eos_token_id":
            tokens = value
        # type, since True is an instance of int; -1 is how some configs say that there is no such token.
        if not all(type(token) is int and -1 <= token < 1 << 31 for token in tokens):
            raise InputError(f"{path}: {place}{key} = {str(value)[:80]!r} is not the id of a token. {_fix_of(path)}")


def _is_known(activation: str) -> bool:
    from transformers.activations import ACT2FN

    return activation in ACT2FN


def _fix_of(path: Path) -> str:
    return f"Correct it, or copy {path.name} from the original model"
