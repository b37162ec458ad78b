"""Model families that llama.cpp computes as transformers does, and the settings under which it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pst_ds.export.encoding import ExportError

Config = Any
"""A transformers config; its settings differ between families."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models in transformers, as llama.cpp reads it."""

    architecture: str
    """Name in llama.cpp."""
    rotates_neighbours: bool = False
    """Whether dimension 2 i of a head is rotated with 2 i + 1, and not i with i + d / 2 as in transformers."""
    has_sigmoid_gates: bool = False
    """Whether router gates are sigmoids instead of a softmax."""
    only_with: Mapping[str, object] = field(default_factory=dict)
    """Settings that GGUF cannot express, and the values that llama.cpp assumes."""


_FULL_ATTENTION = {"use_sliding_window": False}
_FAMILIES = {
    "llama": Family("llama", rotates_neighbours=True),
    "mistral": Family("llama", rotates_neighbours=True),
    "mixtral": Family("llama", rotates_neighbours=True, only_with={"sliding_window": None}),
    "qwen2": Family("qwen2", only_with=_FULL_ATTENTION),
    "qwen3": Family("qwen3", only_with=_FULL_ATTENTION),
    "qwen2_moe": Family("qwen2moe", only_with={"norm_topk_prob": False, **_FULL_ATTENTION}),
    "qwen3_moe": Family("qwen3moe", only_with={"norm_topk_prob": True, **_FULL_ATTENTION}),
    "glm4_moe": Family("glm4moe", has_sigmoid_gates=True, only_with={"n_group": 1}),
    "olmoe": Family("olmoe", only_with={"norm_topk_prob": False, "clip_qkv": None}),
}
"""Families by ``model_type``."""


def family_of(config: Config) -> Family:
    """Return the family of a model's text config. Raises ExportError if llama.cpp would compute something else."""
    kind = config.model_type
    family = _FAMILIES.get(kind)
    if family is None:
        raise ExportError(f"model_type = {kind}: GGUF export supports {', '.join(_FAMILIES)}. Use another --format")
    for setting, value in family.only_with.items():
        if (found := getattr(config, setting, value)) != value:
            raise ExportError(
                f"{setting} = {json.dumps(found)} in the config of this {kind}, but llama.cpp computes the family with "
                f"{json.dumps(value)}. Use another --format"
            )
    return family
