"""Layers for ``pst-ds inspect``: descriptions from tensors, masks and experts, and the printed facts and table."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pst_ds.cli.plan import name_across_blocks
from pst_ds.text_table import aligned, bytes_text

Facts = dict[str, object]
"""JSON values; None if unknown."""
_GroupKey = tuple[str, ...]
"""What the layers of one line have in common."""
_VECTORS: _GroupKey = ("(vectors)",)
"""Key of the line of all biases and norms; its first entry is what the line is called."""


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
    return {
        "name": name,
        "shape": list(shape),
        "dtype": dtype,
        "pattern": pattern,
        "weights": math.prod(shape),
        "zeros": zeros,
        "bytes": nbytes,
    }


def add_experts(layer: Layer, zeros: Sequence[int], tokens: Sequence[int] = ()) -> None:
    """Add the pruned weights of each expert to a stack's description, and its ``tokens`` if known."""
    layer["expert_zeros"] = list(zeros)
    if tokens:
        layer["expert_tokens"] = list(tokens)


def sparsity_of(layers: Sequence[Layer]) -> float | None:
    """Return the sparsity of all ``layers`` together; None if they have no weights."""
    weights = 0
    zeros = 0
    for layer in layers:
        weights += layer["weights"]
        zeros += layer["zeros"] or 0
    return zeros / weights if weights else None


def print_inspection(inspection: Inspection, *, every_layer: bool) -> None:
    """Print the known facts, one per line, then the table of :func:`layer_table`, then the note."""
    print(inspection.kind)
    texts: dict[str, str] = {}
    for key, value in inspection.facts.items():
        if value is not None:
            texts[key.replace("_", " ")] = _text(key, value)
    width = max(map(len, texts), default=0)
    for title, text in texts.items():
        print(f"  {title.ljust(width)}  {text}")
    if inspection.layers:
        print()
        print("\n".join(layer_table(inspection.layers, every_layer=every_layer)))
    if inspection.note:
        print(f"\n{inspection.note}")


def _text(key: str, value: object) -> str:
    """Format the fact ``key``, whose name tells the unit of a number: "weight_file_bytes"."""
    # bool is a kind of int, so it comes first
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return bytes_text(value) if key.endswith("bytes") else f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(_texts_of_entries(value)) or "none"
    if isinstance(value, list):
        # the text of an object already has commas
        separator = "; " if value and isinstance(value[0], dict) else ", "
        return separator.join(_text(key, item) for item in value) or "none"
    return str(value)


def _texts_of_entries(table: Facts) -> Iterator[str]:
    """Yield the known entries of a fact that is an object; the text of a size says that it is in bytes."""
    for name, value in table.items():
        if value is not None:
            yield f"{name.removesuffix('_bytes')} {_text(name, value)}"


def layer_table(layers: Sequence[Layer], *, every_layer: bool) -> list[str]:
    """Return one line per layer, or one for all layers with the same name across blocks, shape, dtype and pattern.

    Vectors (biases and norms) then share one line. A column in which no layer has a value is omitted.
    """
    groups: dict[_GroupKey, list[Layer]] = {}
    for layer in layers:
        key = (layer["name"],) if every_layer else _group_key(layer)
        groups.setdefault(key, []).append(layer)
    # last, because their line says least; sorting is stable and leaves the others in their order
    keys = sorted(groups, key=lambda key: key == _VECTORS)
    rows = [_row(key[0], groups[key]) for key in keys]
    columns = _columns(rows)
    table = [columns]
    for row in rows:
        table.append([row.get(heading) or "-" for heading in columns])
    return aligned(table)


def _group_key(layer: Layer) -> _GroupKey:
    """Return what a layer has in common with those that share its line; the first entry is the name of the line."""
    shape = layer["shape"]
    if shape is not None and len(shape) < 2:
        return _VECTORS
    return (name_across_blocks(layer["name"]), str(shape), layer["dtype"], layer["pattern"])


def _columns(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the headings for which any row has a text, in the order of the rows."""
    # a dict, not a set, because it keeps the order
    headings: dict[str, None] = {}
    for row in rows:
        headings |= dict.fromkeys(row)
    return [heading for heading in headings if any(row.get(heading) for row in rows)]


def _row(name: str, group: Sequence[Layer]) -> dict[str, str]:
    """Return cells by heading; for several layers minimum, mean and maximum, or the sum. "" if unknown."""
    first = group[0]
    cells = {"layer": first["name"], "count": ""}
    if len(group) > 1:
        cells = {"layer": name, "count": str(len(group))}
    cells |= {
        "shape": _common_shape(group),
        # only vectors may have several, such as norms in BF16 and a router's bias in F32
        "dtype": ", ".join(sorted({layer["dtype"] for layer in group})),
        "values": first.get("values", ""),
        "pattern": first["pattern"],
    }
    cells |= _sparsity_cells(group)
    cells |= _size_cells(group)
    cells |= _update_cells(group)
    return cells


def _common_shape(group: Sequence[Layer]) -> str:
    """Return the shape of all layers of a line, such as "32 x 60"; "" if they differ, as vectors may."""
    shape = group[0]["shape"]
    is_one_shape = all(layer["shape"] == shape for layer in group)
    if not shape or not is_one_shape:
        return ""
    return " x ".join(map(str, shape))


def _sparsity_cells(group: Sequence[Layer]) -> dict[str, str]:
    """Return the sparsity of layers and of their experts, and the tokens of these, by heading."""
    sparsities: list[float] = []
    sparsities_of_experts: list[float] = []
    tokens: list[int] = []
    for layer in group:
        weights = layer["weights"]
        zeros = layer["zeros"]
        # an empty tensor has no sparsity
        if zeros is not None and weights:
            sparsities.append(zeros / weights)
        expert_zeros = layer.get("expert_zeros", [])
        for zeros_of_expert in expert_zeros:
            # every expert has the same number of weights
            sparsities_of_experts.append(zeros_of_expert * len(expert_zeros) / weights)
        tokens += layer.get("expert_tokens", [])
    return {
        "sparsity": _range(sparsities, "{:.4f}"),
        "sparsity of experts": _range(sparsities_of_experts, "{:.4f}"),
        "tokens of experts": _range(tokens, "{:.0f}"),
    }


def _size_cells(group: Sequence[Layer]) -> dict[str, str]:
    """Return trained parameters, quantisation error and bits of a weight, and the bytes of all, by heading."""
    trained = 0
    nbytes = 0
    rounding_errors: list[float] = []
    bits: list[float] = []
    for layer in group:
        trained += layer.get("trained", 0)
        nbytes += layer["bytes"]
        # only quantised tensors have them
        if "rounding_error" in layer:
            rounding_errors.append(layer["rounding_error"])
        if "bits_per_weight" in layer:
            bits.append(layer["bits_per_weight"])
    return {
        "trained": f"{trained:,}" if trained else "",
        "rounding": _range(rounding_errors, "{:.4f}"),
        "bits": _range(bits, "{:.2f}"),
        "bytes": f"{nbytes:,}",
    }


def _update_cells(group: Sequence[Layer]) -> dict[str, str]:
    """Return the numbers about the updates of layers, by heading."""
    values: dict[str, list[float]] = {}
    for layer in group:
        for heading, value in layer.get("update", {}).items():
            values.setdefault(heading, []).append(value)
    return {heading: _range(numbers, "{:.4g}") for heading, numbers in values.items()}


def _range(values: Sequence[float], form: str) -> str:
    """Format values as "0.8998 .. 0.9001, mean 0.9000", or as one number if all look the same; "" without any."""
    if not values:
        return ""
    least = form.format(min(values))
    most = form.format(max(values))
    # as text, because values that differ only in later digits would give a range of equal numbers
    if least == most:
        return least
    mean = form.format(sum(values) / len(values))
    return f"{least} .. {most}, mean {mean}"
