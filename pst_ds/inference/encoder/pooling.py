"""Pool token vectors into embeddings, as the sentence-transformers files of a model folder say."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst_ds.errors import InputError

_MODES = {"cls", "mean", "max", "lasttoken"}
_FLAG = "pooling_mode_"
"""Start of the names of older files' flags."""


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
                # a product with the mask: a sum over masked vectors would need a copy of them
                sums = (mask[:, None].astype(np.float32) @ hidden)[:, 0]  # (texts, width)
                pooled.append(sums / lengths[:, None])
            elif mode == "max":
                # below any number, so that padding never is the largest
                pooled.append(np.where(mask[:, :, None] > 0, hidden, -np.inf).max(1))
            elif mode == "lasttoken":
                pooled.append(hidden[np.arange(len(hidden)), lengths - 1])
            else:  # "cls"
                pooled.append(hidden[:, 0])
        vectors = np.concatenate(pooled, -1, dtype=np.float32)
        if self.normalize:
            # the limit of torch's normalize, for a vector of zeros
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors


def pooling_of(folder: Path) -> Pooling:
    """Return the pooling of a model folder; the mean if it has no files of sentence-transformers. Raises InputError."""
    file = folder / "modules.json"
    if not file.is_file():
        return Pooling()
    try:
        # folders of the modules by their classes; "sentence_transformers.models.Pooling" is a type
        modules: dict[str, str] = {}
        for module in json.loads(file.read_bytes()):
            modules[str(module["type"]).rpartition(".")[2]] = str(module["path"])
        # so that a message about the second file names it
        file = folder / modules["Pooling"] / "config.json"
        modes = _modes_of(dict(json.loads(file.read_bytes())))
    # JSON of another structure raises any of these
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read: {error!r}. Copy it from the original model") from None
    unknown = [*(modules.keys() - {"Transformer", "Pooling", "Normalize"}), *(set(modes) - _MODES)]
    if unknown or not modes:
        raise InputError(f"{file}: {unknown or 'no pooling'} is not supported. Use sentence-transformers for it")
    return Pooling(tuple(modes), "Normalize" in modules)


def _modes_of(config: Mapping[str, Any]) -> list[str]:
    """Return the modes that the config of a pooling module states: "cls", "mean", "max" and others."""
    # newer files name the mode, older ones have a flag per mode
    named = config.get("pooling_mode")
    if isinstance(named, str):
        named = [named]
    if not named:
        named = []
        for key, value in config.items():
            if key.startswith(_FLAG) and value is True:
                named.append(key.removeprefix(_FLAG))
    # flags are called "cls_token" and "mean_tokens"
    return [re.sub("_tokens?$", "", mode) for mode in named]
