"""The table of layers: one row per layer, and with several runs one column per run for every figure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile

from pst_ds.report.axes import whole
from pst_ds.report.layer_data import LayerData
from pst_ds.report.run_data import RunData
from pst_ds.report.tables import Cell, Table, number

LayerFigure = Callable[[LayerData, int], Cell]
Shapes = Mapping[tuple[str, int], list[int]]
"""Shapes by layer and number of weights."""


def layer_table(runs: Sequence[RunData], shapes: Shapes) -> Table | None:
    """Tabulate the layers of all runs, with shapes where known; None without layers. Figures that no run has are
    omitted.
    """
    known = {run.name: run.layers for run in runs if run.layers is not None}
    if not known:
        return None
    names = list(dict.fromkeys(name for layers in known.values() for name in layers.names))
    sizes = [_column(layers, _size(shapes), names) for layers in known.values()]
    size = "shape" if any("×" in cell.text for of_run in sizes for cell in of_run) else "weights"
    same = _in_one(sizes)
    columns = {} if same else {size: sizes}
    for title, of in FIGURES.items():
        of_runs = [_column(layers, of, names) for layers in known.values()]
        if any(not cell.is_missing for of_run in of_runs for cell in of_run):
            columns[title] = of_runs
    prefix = common_prefix(names)
    first = ["layer", *([size] if same else [])]
    cells = [*([same] if same else []), *(of_run for of_runs in columns.values() for of_run in of_runs)]
    rows = [[Cell(name.removeprefix(prefix)), *(column[i] for column in cells)] for i, name in enumerate(names)]
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
    """Merge columns into one if the cells of every row agree; return an empty list otherwise."""
    rows = [[cell for cell in row if not cell.is_missing] for row in zip(*columns, strict=True)]
    return [cells[0] for cells in rows] if all(len(set(cells)) == 1 for cells in rows) else []


def common_prefix(names: Collection[str]) -> str:
    """Return the dotted parts, including the last dot, that several names have in common, or ""."""
    first, *others = [name.split(".")[:-1] for name in names] if len(names) > 1 else [[]]
    same = takewhile(lambda column: len(set(column)) == 1, zip(first, *others, strict=False))
    return "".join(f"{parts[0]}." for parts in same)


def _column(layers: LayerData, figure: LayerFigure, names: Collection[str]) -> list[Cell]:
    """Return one cell per name; a missing one for layers that the run does not have."""
    places = {name: i for i, name in enumerate(layers.names)}
    return [figure(layers, places[name]) if name in places else number(None) for name in names]


def _figure(name: str) -> LayerFigure:
    return lambda layers, i: number(_value(layers, name, i), "{:.4g}".format)


def _relative_update(layers: LayerData, i: int) -> Cell:
    update, weight = (_value(layers, name, i) for name in ("update_norm", "weight_norm"))
    return number(update / weight if update is not None and weight else None, "{:.4g}".format)


def _value(layers: LayerData, name: str, i: int) -> float | None:
    return layers.figures[name][i] if name in layers.figures else None


FIGURES: dict[str, LayerFigure] = {
    "sparsity": lambda layers, i: number(layers.sparsity(i), "{:.4f}".format),
    "update rank": lambda layers, i: number(layers.ranks[i] if layers.ranks else None, whole),
    "flips in total": lambda layers, i: number(layers.flipped[i] if layers.flipped else None, whole),
    "correlation of S, |W|": _figure("correlation"),
    "score norm": _figure("score_norm"),
    "update norm": _figure("update_norm"),
    "update / W0 norm": _relative_update,
}
"""Figures of the table, by heading."""
