"""Families of models that llama.cpp computes as transformers does, and the settings with which it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pst_ds.export.manifest import ExportError

Config = Any
"""A configuration of transformers, whose settings differ by family."""


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp reads a family of transformers."""

    architecture: str
    """Its name there."""
    rotates_neighbours: bool = False
    """Whether dimension 2 i of a head is rotated with 2 i + 1, and not i with i + d / 2 as in transformers."""
    has_sigmoid_gates: bool = False
    """Whether a router's numbers become gates one by one, and not all by one softmax."""
    only_with: Mapping[str, object] = field(default_factory=dict)
    """Settings that llama.cpp has no word for, and their values in what it computes."""


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
"""By ``model_type``."""


def family_of(config: Config) -> Family:
    """Return the family of a model's text config. Raises ExportError where llama.cpp would compute something else."""
    kind = config.model_type
    family = _FAMILIES.get(kind)
    if family is None:
        raise ExportError(f"GGUF is written of {', '.join(_FAMILIES)} models, and this is {kind}")
    for setting, value in family.only_with.items():
        if (found := getattr(config, setting, value)) != value:
            raise ExportError(
                f"{setting} is {json.dumps(found)} in the config of this {kind}, and llama.cpp computes the family "
                f"with {json.dumps(value)}"
            )
    return family
