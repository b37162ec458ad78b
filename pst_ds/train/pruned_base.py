"""A base model that ``pst-ds prune`` wrote, under masks that go on moving."""

from __future__ import annotations

import json
from pathlib import Path

from pst_ds.config.run import RunConfig
from pst_ds.nn.base_model import PRUNING_RECORD

_COARSE = ("matrix", "stack")
"""Patterns that, as "global" always does, keep the zeros of a folder whose matrices all have the same share of them."""


def remark_on_shares(run: RunConfig) -> str:
    """Return what a user should know, as a sentence without a full stop, when the run's pattern shares zeros out
    otherwise than ``pst-ds prune`` did in the run's base model; "" when it keeps them, or there is no such model.

    Zeros score lowest, so a pattern keeps them as long as none of its groups has more of them than it prunes.
    """
    record = Path(run.model.path) / PRUNING_RECORD
    if run.mask_method.masks != "ramp" or run.pst.pattern == "global" or not record.is_file():
        return ""
    try:
        about = json.loads(record.read_text(encoding="utf-8"))
        pattern, budgets = str(about["pattern"]), str(about.get("budgets", "equal"))
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # not one that is known
    if budgets == "equal" and (run.pst.pattern == pattern or run.pst.pattern in _COARSE):
        return ""
    return (
        f'pst-ds prune shared the zeros of model.path out with pattern "{pattern}" and {budgets} budgets, which '
        f'pst.pattern = "{run.pst.pattern}" does not keep: its first masks prune other weights. pst.pattern = "global" '
        "begins with the zeros that are there"
    )
