"""Settings by the dotted names that ``--set`` knows them by."""

from __future__ import annotations

from typing import Any


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one: {"schedule.final_sparsity": 0.9, ...}, in their order."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        found |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
