"""Pool token vectors into embeddings, as the sentence-transformers files of a model folder say."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pst_ds.errors import InputError

_MODES = {"cls", "mean", "max", "lasttoken"}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How embeddings are made: vectors of each mode side by side, divided by their norm if ``normalize``."""

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False

    def __call__(self, hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Pool ``hidden`` (texts, tokens, width), fp32, where ``mask`` (texts, tokens) is 1. Padding is at the end."""
        lengths = mask.sum(1, dtype=np.int64)
        pooled = []
        for mode in self.modes:
            if mode == "mean":
                sums = (mask[:, None].astype(np.float32) @ hidden)[:, 0]  # (texts, width)
                pooled.append(sums / lengths[:, None])
            elif mode == "max":
                pooled.append(np.where(mask[:, :, None] > 0, hidden, -np.inf).max(1))
            elif mode == "lasttoken":
                pooled.append(hidden[np.arange(len(hidden)), lengths - 1])
            else:  # "cls"
                pooled.append(hidden[:, 0])
        vectors = np.concatenate(pooled, -1, dtype=np.float32)
        if self.normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors


def pooling_of(folder: Path) -> Pooling:
    """Return the pooling of a model folder; the mean if it has no files of sentence-transformers. Raises InputError."""
    file = folder / "modules.json"
    if not file.is_file():
        return Pooling()
    try:
        modules = {str(one["type"]).rpartition(".")[2]: str(one["path"]) for one in json.loads(file.read_bytes())}
        file = folder / modules["Pooling"] / "config.json"
        table = dict(json.loads(file.read_bytes()))
        flags = [name.removeprefix("pooling_mode_") for name, value in table.items() if value is True]
        # newer files name the mode, older ones have a flag per mode
        named = table.get("pooling_mode") or [name for name in flags if f"pooling_mode_{name}" in table]
        if isinstance(named, str):
            named = [named]
        modes = [re.sub("_tokens?$", "", mode) for mode in named]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read: {error!r}. Copy it from the original model") from None
    unknown = [*(modules.keys() - {"Transformer", "Pooling", "Normalize"}), *(set(modes) - _MODES)]
    if unknown or not modes:
        raise InputError(f"{file}: {unknown or 'no pooling'} is not supported. Use sentence-transformers for it")
    return Pooling(tuple(modes), "Normalize" in modules)
