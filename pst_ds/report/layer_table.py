"""The table of layers: a row each, and of several runs a column a run for every figure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any

from pst_ds.report.axes import whole
from pst_ds.report.layer_data import LayerData
from pst_ds.report.run_data import RunData
from pst_ds.report.tables import Cell, Table, number

LayerFigure = Callable[[LayerData, int], Cell]


def layer_table(runs: Sequence[RunData], shapes: dict[str, list[int]]) -> Table | None:
    """Every layer of any run; a figure that none of them has is left out. None without layers.

    ``shapes``: of the weights by layer, where they are known.
    """
    known = {run.name: run.layers for run in runs if run.layers is not None}
    if not known:
        return None
    weights: dict[str, int] = {}
    for layers in known.values():
        weights |= dict(zip(layers.names, layers.weights, strict=True))
    columns = {title: [_column(layers, of, weights) for layers in known.values()] for title, of in FIGURES.items()}
    columns = {title: of_runs for title, of_runs in columns.items() if _has_values(of_runs)}
    prefix = common_prefix(weights)
    rows = [
        [
            Cell(name.removeprefix(prefix)),
            number(weights[name], _shape_text(shapes.get(name))),
            *(of_run[i] for of_runs in columns.values() for of_run in of_runs),
        ]
        for i, name in enumerate(weights)
    ]
    first = ["layer", "shape" if shapes.keys() & weights.keys() else "weights"]
    caption = f"Layers of {prefix.rstrip('.')}" if prefix else "Layers"
    if len(known) == 1:
        return Table(caption, [*first, *columns], rows)
    groups = [("", len(first)), *((title, len(known)) for title in columns)]
    return Table(caption, [*first, *(name for _ in columns for name in known)], rows, groups)


def common_prefix(names: Collection[str]) -> str:
    """The dotted parts, with the dot behind them, that all of several names begin with; "" if there are none."""
    first, *others = [name.split(".")[:-1] for name in names] if len(names) > 1 else [[]]
    same = takewhile(lambda column: len(set(column)) == 1, zip(first, *others, strict=False))
    return "".join(f"{parts[0]}." for parts in same)


def _column(layers: LayerData, figure: LayerFigure, names: Collection[str]) -> list[Cell]:
    """A cell for each of ``names``; a missing one for a layer that the run has not."""
    places = {name: i for i, name in enumerate(layers.names)}
    return [figure(layers, places[name]) if name in places else number(None) for name in names]


def _has_values(columns: Sequence[Sequence[Cell]]) -> bool:
    return any(not cell.is_missing for column in columns for cell in column)


def _shape_text(shape: list[int] | None) -> Callable[[Any], str]:
    return whole if shape is None else lambda _: " × ".join(map(str, shape))


def _sparsity(layers: LayerData, i: int) -> Cell:
    return number(layers.sparsity(i), "{:.4f}".format)


def _flips(layers: LayerData, i: int) -> Cell:
    return number(layers.flipped[i] if layers.flipped else None, whole)


def _figure(name: str) -> LayerFigure:
    return lambda layers, i: number(_value(layers, name, i), "{:.4g}".format)


def _relative_update(layers: LayerData, i: int) -> Cell:
    update, weight = (_value(layers, name, i) for name in ("update_norm", "weight_norm"))
    return number(update / weight if update is not None and weight else None, "{:.4g}".format)


def _value(layers: LayerData, name: str, i: int) -> float | None:
    return layers.figures[name][i] if name in layers.figures else None


FIGURES: dict[str, LayerFigure] = {
    "sparsity": _sparsity,
    "flips in total": _flips,
    "correlation of S, |W|": _figure("correlation"),
    "score norm": _figure("score_norm"),
    "update norm": _figure("update_norm"),
    "update / W0 norm": _relative_update,
}
"""By their headings."""
