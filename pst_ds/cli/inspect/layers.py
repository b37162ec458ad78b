"""Layers for ``pst-ds inspect``: descriptions from tensors, masks and experts, and the printed facts and table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from pst_ds.cli.plan import name_across_blocks
from pst_ds.text_table import aligned, bytes_text

Facts = dict[str, object]
"""JSON values; None if unknown."""
_VECTORS = ("(vectors)",)


class Layer(TypedDict, total=False):
    """A layer or tensor, with its bytes on disk. Keys that are unknown for a kind of path are missing."""

    name: str
    shape: list[int] | None
    dtype: str
    pattern: str
    weights: int
    zeros: int | None
    bytes: int
    packing: str
    origin: str
    values: str
    """"int8" or "int4" for quantised weights."""
    group: int | str
    bits_per_weight: float
    rounding_error: float
    """Relative quantisation error."""
    sparsity_requested: float
    trained: int
    """Trained parameters."""
    update: dict[str, float]
    """Numbers by which the update form describes a layer's update."""
    expert_zeros: list[int]
    """Pruned weights of each expert of a stack."""
    expert_tokens: list[int]
    """Tokens routed to each expert, in training or for calibration."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The kind of a path, with facts about it and about each layer; ``note`` names their source."""

    kind: str
    facts: Facts
    layers: list[Layer]
    note: str = ""


def layer_of(name: str, shape: Sequence[int], dtype: str, pattern: str, zeros: int, nbytes: int) -> Layer:
    """Describe a tensor with ``zeros`` pruned weights that takes ``nbytes`` on disk."""
    layer: Layer = {"name": name, "shape": list(shape), "dtype": dtype, "pattern": pattern}
    return layer | {"weights": math.prod(shape), "zeros": zeros, "bytes": nbytes}


def add_experts(layer: Layer, zeros: Sequence[int], tokens: Sequence[int] = ()) -> None:
    """Add the pruned weights of each expert to a stack's description, and its ``tokens`` if known."""
    layer["expert_zeros"] = list(zeros)
    if tokens:
        layer["expert_tokens"] = list(tokens)


def sparsity_of(layers: Sequence[Layer]) -> float | None:
    """Return the sparsity of all ``layers`` together; None without any."""
    weights = sum(layer["weights"] for layer in layers)
    return sum(layer["zeros"] or 0 for layer in layers) / weights if weights else None


def print_inspection(inspection: Inspection, *, every_layer: bool) -> None:
    print(inspection.kind)
    facts = [(key.replace("_", " "), _text(key, value)) for key, value in inspection.facts.items() if value is not None]
    width = max((len(key) for key, _ in facts), default=0)
    for key, text in facts:
        print(f"  {key.ljust(width)}  {text}")
    if inspection.layers:
        print("\n".join(["", *layer_table(inspection.layers, every_layer=every_layer)]))
    if inspection.note:
        print(f"\n{inspection.note}")


def _text(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return bytes_text(value) if key.endswith("bytes") else f"{value:,}"
    if isinstance(value, dict):
        known = {name: _text(name, of) for name, of in value.items() if of is not None}
        return ", ".join(f"{name.removesuffix('_bytes')} {text}" for name, text in known.items()) or "none"
    if isinstance(value, list):
        separator = "; " if value and isinstance(value[0], dict) else ", "
        return separator.join(_text(key, item) for item in value) or "none"
    return str(value)


def layer_table(layers: Sequence[Layer], *, every_layer: bool) -> list[str]:
    """Return one line per layer, or one for all layers with the same name across blocks, shape, dtype and pattern.

    Vectors (biases and norms) then share one line.
    """
    groups: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        key: tuple[str, ...] = (layer["name"],)
        if not every_layer:
            is_vector = layer["shape"] is not None and len(layer["shape"]) < 2
            alike = (name_across_blocks(layer["name"]), str(layer["shape"]), layer["dtype"], layer["pattern"])
            key = _VECTORS if is_vector else alike
        groups.setdefault(key, []).append(layer)
    rows = [_row(key[0], groups[key]) for key in sorted(groups, key=lambda key: key == _VECTORS)]
    headings = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in headings if any(row.get(name) for row in rows)]
    return aligned([columns, *([row.get(name) or "-" for name in columns] for row in rows)])


def _row(name: str, group: Sequence[Layer]) -> dict[str, str]:
    """Return cells by heading; for several layers minimum, mean and maximum, or the sum."""
    first = group[0]
    is_one_shape = all(layer["shape"] == first["shape"] for layer in group)
    zeros = [layer["zeros"] / layer["weights"] for layer in group if layer["zeros"] is not None and layer["weights"]]
    trained = sum(layer.get("trained", 0) for layer in group)
    stacks = [(layer["weights"], layer.get("expert_zeros", [])) for layer in group]
    of_experts = [zeros * len(counts) / weights for weights, counts in stacks for zeros in counts]
    return {
        "layer": name if len(group) > 1 else first["name"],
        "count": str(len(group)) if len(group) > 1 else "",
        "shape": " x ".join(map(str, first["shape"])) if first["shape"] and is_one_shape else "",
        "dtype": first["dtype"],
        "values": first.get("values", ""),
        "pattern": first["pattern"],
        "sparsity": _range(zeros, "{:.4f}"),
        "sparsity of experts": _range(of_experts, "{:.4f}"),
        "tokens of experts": _range([n for layer in group for n in layer.get("expert_tokens", ())], "{:.0f}"),
        "trained": f"{trained:,}" if trained else "",
        "rounding": _range([layer["rounding_error"] for layer in group if "rounding_error" in layer], "{:.4f}"),
        "bits": _range([layer["bits_per_weight"] for layer in group if "bits_per_weight" in layer], "{:.2f}"),
        "bytes": f"{sum(layer['bytes'] for layer in group):,}",
        **_update_cells(group),
    }


def _update_cells(group: Sequence[Layer]) -> dict[str, str]:
    """Return the numbers about the updates of layers, by heading."""
    values: dict[str, list[float]] = {}
    for layer in group:
        for heading, value in layer.get("update", {}).items():
            values.setdefault(heading, []).append(value)
    return {heading: _range(numbers, "{:.4g}") for heading, numbers in values.items()}


def _range(values: Sequence[float], form: str) -> str:
    """Format values as "0.8998 .. 0.9001, mean 0.9000", or as one number if all look the same."""
    if not values:
        return ""
    least, mean, most = (form.format(value) for value in (min(values), sum(values) / len(values), max(values)))
    return least if least == most else f"{least} .. {most}, mean {mean}"
