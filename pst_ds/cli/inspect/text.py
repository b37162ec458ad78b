"""What ``pst-ds inspect`` found, as lines of text: facts, then a table of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pst_ds.cli.plan_text import name_across_blocks
from pst_ds.text_table import aligned, bytes_text

Layer = dict[str, Any]
"""Of a layer or tensor: "name", "shape" or None, "dtype", "pattern", "weights", "zeros" or None, "bytes" on disk; of a
run also "trained" parameters, "flipped" weights of the last mask update and "correlation" of its scores with |W|."""

_VECTORS = ("(vectors)",)


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a path is, what is known of the whole, and of each layer."""

    kind: str
    facts: dict[str, Any]
    """JSON values; None for what is not known."""
    layers: list[Layer]
    note: str = ""
    """What the reader should know of how this was found."""


def measured_sparsity(layers: Sequence[Layer]) -> float | None:
    """Share of zeros of all ``layers`` together; None without any."""
    weights = sum(layer["weights"] for layer in layers)
    return sum(layer["zeros"] for layer in layers) / weights if weights else None


def print_inspected(found: Inspected, *, every_layer: bool) -> None:
    print(found.kind)
    facts = [(key.replace("_", " "), _shown(key, value)) for key, value in found.facts.items() if value is not None]
    width = max((len(key) for key, _ in facts), default=0)
    for key, text in facts:
        print(f"  {key.ljust(width)}  {text}")
    if found.layers:
        print("\n".join(["", *layer_table(found.layers, every_layer=every_layer)]))
    if found.note:
        print(f"\n{found.note}")


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return bytes_text(value) if key.endswith("bytes") else f"{value:,}"
    if isinstance(value, dict):
        known = {name: _shown(name, of) for name, of in value.items() if of is not None}
        return ", ".join(f"{name.removesuffix('_bytes')} {text}" for name, text in known.items()) or "none"
    if isinstance(value, list):
        separator = "; " if value and isinstance(value[0], dict) else ", "
        return separator.join(_shown(key, item) for item in value) or "none"
    return str(value)


def layer_table(layers: Sequence[Layer], *, every_layer: bool) -> list[str]:
    """A line for each layer, or for all that have a name across blocks, a shape, a dtype and a pattern in common.

    Of the vectors, biases and norms, that is one line in all.
    """
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        key: tuple[str, ...] = (layer["name"],)
        if not every_layer:
            is_vector = layer["shape"] is not None and len(layer["shape"]) < 2
            alike = (name_across_blocks(layer["name"]), *(str(layer[k]) for k in ("shape", "dtype", "pattern")))
            key = _VECTORS if is_vector else alike
        groups.setdefault(key, []).append(layer)
    rows = [_row(key[0], groups[key]) for key in sorted(groups, key=lambda key: key == _VECTORS)]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    return aligned([columns, *([row[name] or "-" for name in columns] for row in rows)])


def _row(name: str, group: Sequence[Layer]) -> dict[str, str]:
    """Cells by their heading; of several layers the least, mean and greatest of a figure, or sums."""
    first = group[0]
    is_one_shape = all(layer["shape"] == first["shape"] for layer in group)
    zeros = [layer["zeros"] / layer["weights"] for layer in group if layer["zeros"] is not None and layer["weights"]]
    correlations = [layer["correlation"] for layer in group if layer.get("correlation") is not None]
    flips = [layer["flipped"] for layer in group if layer.get("flipped") is not None]
    trained = sum(layer.get("trained", 0) for layer in group)
    return {
        "layer": name if len(group) > 1 else first["name"],
        "count": str(len(group)) if len(group) > 1 else "",
        "shape": " x ".join(map(str, first["shape"])) if first["shape"] and is_one_shape else "",
        "dtype": first["dtype"] or "",
        "pattern": first["pattern"] or "",
        "zeros": _range(zeros, "{:.4f}"),
        "flipped": _range(flips, "{:.0f}"),
        "correlation": _range(correlations, "{:.3f}"),
        "trained": f"{trained:,}" if trained else "",
        "bytes": f"{sum(layer['bytes'] for layer in group):,}",
    }


def _range(values: Sequence[float], form: str) -> str:
    """ "0.8998 .. 0.9001, mean 0.9000", or one number where all are written alike."""
    if not values:
        return ""
    least, mean, most = (form.format(value) for value in (min(values), sum(values) / len(values), max(values)))
    return least if least == most else f"{least} .. {most}, mean {mean}"
