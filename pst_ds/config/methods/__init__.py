"""The methods of a run file: a file here for each, with its METHOD, and a line in the table (docs/extending.md)."""

from __future__ import annotations

from importlib import import_module
from typing import Literal

from pst_ds.config.methods.method import Method

OneShotMethod = Literal["magnitude", "wanda", "sparsegpt", "alps"]
_NAMES = (
    "pst",
    "dense",
    "lora",
    "magnitude",
    "gmp",
    "movement",
    "soft-movement",
    "spp",
    "masked-lora",
    "sk-tuning",
)
METHODS: dict[str, Method] = {
    name: import_module(f"pst_ds.config.methods.{name.replace('-', '_')}").METHOD for name in _NAMES
}
