"""The table of layers: a row each, and with several runs a column per run for every figure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile

from pst_ds.report.axes import whole
from pst_ds.report.layer_data import LayerData
from pst_ds.report.run_data import RunData
from pst_ds.report.tables import Cell, Table, number

LayerFigure = Callable[[LayerData, int], Cell]
Shapes = Mapping[tuple[str, int], list[int]]
"""By layer and number of weights."""


def layer_table(runs: Sequence[RunData], shapes: Shapes) -> Table | None:
    """List every layer of any run, with its shape where it is known; None without layers.

    A figure that no run has is left out.
    """
    known = {run.name: run.layers for run in runs if run.layers is not None}
    if not known:
        return None
    names = list(dict.fromkeys(name for layers in known.values() for name in layers.names))
    sizes = [_column(layers, _size(shapes), names) for layers in known.values()]
    has_shapes = any("×" in cell.text for of_run in sizes for cell in of_run)
    same = _in_one(sizes)
    columns = {} if same else {"shape" if has_shapes else "weights": sizes}
    for title, of in FIGURES.items():
        of_runs = [_column(layers, of, names) for layers in known.values()]
        if _has_values(of_runs):
            columns[title] = of_runs
    prefix = common_prefix(names)
    first = ["layer", *(["shape" if has_shapes else "weights"] if same else [])]
    rows = [
        [
            Cell(name.removeprefix(prefix)),
            *([same[i]] if same else []),
            *(of_run[i] for of_runs in columns.values() for of_run in of_runs),
        ]
        for i, name in enumerate(names)
    ]
    caption = f"Layers of {prefix.rstrip('.')}" if prefix else "Layers"
    if len(known) == 1:
        return Table(caption, [*first, *columns], rows)
    groups = [("", len(first)), *((title, len(known)) for title in columns)]
    return Table(caption, [*first, *(name for _ in columns for name in known)], rows, groups)


def _size(shapes: Shapes) -> LayerFigure:
    def size(layers: LayerData, i: int) -> Cell:
        shape = shapes.get((layers.names[i], layers.weights[i]))
        return number(layers.weights[i], whole if shape is None else lambda _: " × ".join(map(str, shape)))

    return size


def _in_one(columns: Sequence[Sequence[Cell]]) -> list[Cell]:
    """Merge columns into one where the cells of every row agree; return none where some differ."""
    rows = [[cell for cell in row if not cell.is_missing] for row in zip(*columns, strict=True)]
    return [cells[0] for cells in rows] if all(len(set(cells)) == 1 for cells in rows) else []


def common_prefix(names: Collection[str]) -> str:
    """Return the dotted parts, with the dot after them, that several names have in common, or ""."""
    first, *others = [name.split(".")[:-1] for name in names] if len(names) > 1 else [[]]
    same = takewhile(lambda column: len(set(column)) == 1, zip(first, *others, strict=False))
    return "".join(f"{parts[0]}." for parts in same)


def _column(layers: LayerData, figure: LayerFigure, names: Collection[str]) -> list[Cell]:
    """Return a cell for each of ``names``; a missing one for a layer that the run does not have."""
    places = {name: i for i, name in enumerate(layers.names)}
    return [figure(layers, places[name]) if name in places else number(None) for name in names]


def _has_values(columns: Sequence[Sequence[Cell]]) -> bool:
    return any(not cell.is_missing for column in columns for cell in column)


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
