"""Tables of a report about runs: results, settings, checkpoints, slow ranks, layers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from pst_ds.core.experts.tokens import hardly_used
from pst_ds.progress import duration_text
from pst_ds.report.charts import Chart, short, whole
from pst_ds.report.run_data import LayerData, RunData
from pst_ds.text_table import bytes_text
from pst_ds.train.monitor.curves import EVALUATION, is_number

MISSING = "–"
MAIN_SETTINGS = (
    "task", "method", "model.path", "data.train", "data.dataset", "schedule.final_sparsity", "pst.pattern",
    "pst.score_rank", "pst.update_rank", "train.num_steps", "train.num_epochs", "train.batch_size", "train.precision",
    "deepspeed_config", "seed",
)  # fmt: skip
"""Settings shown for every run, unless they are empty or zero."""


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    value: float | None = None
    """The sort key; None for text and missing values."""
    is_missing: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table. ``groups``: headings above several columns, with the number of columns."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]
    groups: list[tuple[str, int]] = field(default_factory=list)
    note: str = ""

    @property
    def is_numeric(self) -> list[bool]:
        """For each column, whether it has numbers, or only missing values."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.head))]
        return [any(c.value is not None for c in cells) or all(c.is_missing for c in cells) for cells in columns]


def number(value: object, text: Callable[[float], str] = short) -> Cell:
    """Return a cell for a number, or a missing one for any other value."""
    if not is_number(value):
        return Cell(MISSING, is_missing=True)
    return Cell(text(value) if math.isfinite(value) else str(value), float(value))


def result_table(runs: Sequence[RunData]) -> Table:
    """Tabulate the results of the runs, starting with the final metrics."""
    rows = [[Cell(label), *cells] for label, cells in _results(runs) if not all(cell.is_missing for cell in cells)]
    return Table("Results", ["", *(run.name for run in runs)], rows)


def _results(runs: Sequence[RunData]) -> Iterator[tuple[str, list[Cell]]]:
    yield "state", [_state(run) for run in runs]
    metrics = [_final_metrics(run) for run in runs]
    for name in dict.fromkeys(name for of_run in metrics for name in of_run):
        yield name, [number(of_run.get(name)) for of_run in metrics]
    requested = [run.result.get("sparsity_requested", run.last("sparsity/target")) for run in runs]
    yield "sparsity requested", [number(value) for value in requested]
    in_masks = [run.result.get("sparsity_in_masks", run.last("sparsity/actual")) for run in runs]
    yield "sparsity in the masks", [number(value, "{:.6f}".format) for value in in_masks]
    for key, label, text in (
        ("best_step", "best step", whole),
        ("skipped_steps", "skipped steps", whole),
        ("trained_parameters", "trained parameters", whole),
        ("optimizer_bytes_per_rank", "optimizer state per rank", bytes_text),
    ):
        yield label, [number(run.result.get(key), text) for run in runs]
    peaks = [max((int(value) for _, value in run.curves.get("peak_memory_bytes", [])), default=None) for run in runs]
    yield "peak memory per rank", [number(peak, bytes_text) for peak in peaks]
    yield "checkpoint", [number(run.checkpoints[-1].nbytes if run.checkpoints else None, bytes_text) for run in runs]
    speeds = [[value for _, value in run.curves.get("tokens_per_second", [])] for run in runs]
    yield (
        "tokens per second, median",
        [number(statistics.median(of_run) if of_run else None, whole) for of_run in speeds],
    )
    yield "experts hardly used", [number(_hardly_used(run), whole) for run in runs]
    yield "ranks", [number(run.result.get("world_size"), whole) for run in runs]
    yield "time", [number(run.result.get("seconds"), duration_text) for run in runs]


def _state(run: RunData) -> Cell:
    step = number(run.result.get("steps", run.last_step), whole).text
    return Cell(f"finished, {step} steps" if run.result else f"not finished, at step {step}")


def _hardly_used(run: RunData) -> int | None:
    """Count the rarely used experts of a run that has counted its experts' tokens."""
    tokens = run.result.get("expert_tokens")
    return sum(len(hardly_used(counts)) for counts in tokens.values()) if isinstance(tokens, dict) else None


def _final_metrics(run: RunData) -> dict[str, float | None]:
    """Return the metrics of the result, or of the last evaluation of an unfinished run."""
    names = [name.removeprefix(EVALUATION) for name in run.curves if name.startswith(EVALUATION)]
    final = run.result.get("metrics")
    return final if isinstance(final, dict) and final else {name: run.last(EVALUATION + name) for name in names}


def measured_once_table(charts: Sequence[Chart]) -> Table | None:
    """Tabulate charts that have single points only; None without any."""
    rows = [
        [Cell(chart.title), Cell(one.label), number(step, whole), number(value)]
        for chart in charts
        for one in chart.series
        for step, value in one.points
    ]
    return Table("Measured once", ["", "of", "step", "value"], rows) if rows else None


def setting_tables(runs: Sequence[RunData]) -> Iterator[Table]:
    """Yield the settings that differ between the runs, and the main ones that they have in common."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings if name != "output_dir"))
    differ = [name for name in names if any(_setting(run, name) != _setting(runs[0], name) for run in runs)]
    if differ:
        rows = [[Cell(name), *(_setting(run, name) for run in runs)] for name in differ]
        yield Table("Settings that differ", ["", *(run.name for run in runs)], rows)
    main = [name for name in MAIN_SETTINGS if name not in differ and runs[0].settings.get(name)]
    if main:
        caption = "Main settings" if len(runs) == 1 else "Main settings in common"
        yield Table(caption, ["", "value"], [[Cell(name), _setting(runs[0], name)] for name in main])


def _setting(run: RunData, name: str) -> Cell:
    """Return the cell of a setting; an empty one counts as missing."""
    value = run.settings.get(name)
    if value is None or value in ("", []):
        return Cell(MISSING, is_missing=True)
    return Cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def checkpoint_table(runs: Sequence[RunData]) -> Table | None:
    """Tabulate the finished checkpoints of all runs; None without any."""
    checkpoints = [(run, checkpoint) for run in runs for checkpoint in run.checkpoints]
    if not checkpoints:
        return None
    metrics = list(dict.fromkeys(name for _, checkpoint in checkpoints for name in checkpoint.metrics))
    rows = [
        [
            Cell(checkpoint.name if len(runs) == 1 else f"{run.name}/{checkpoint.name}"),
            Cell(", ".join(checkpoint.links)),
            number(checkpoint.step, whole),
            number(checkpoint.sparsity),
            *(number(checkpoint.metrics.get(name)) for name in metrics),
            number(checkpoint.nbytes, bytes_text),
        ]
        for run, checkpoint in checkpoints
    ]
    return Table("Checkpoints", ["checkpoint", "links", "step", "sparsity", *metrics, "size"], rows)


def straggler_table(runs: Sequence[RunData]) -> Table | None:
    """Tabulate the ranks that slowed down others; None without any."""
    found = [(run, event) for run in runs for event in run.stragglers]
    if not found:
        return None
    rows = [
        [
            Cell(str(event.get("host", MISSING)) if len(runs) == 1 else f"{run.name}: {event.get('host', MISSING)}"),
            *(number(event.get(name), whole) for name in ("rank", "step")),
            *(number(event.get(name)) for name in ("step_seconds", "median_step_seconds")),
            number(event.get("memory_bytes"), bytes_text),
            number(event.get("others"), whole),
        ]
        for run, event in found
    ]
    head = ["host", "rank", "from step", "its seconds per step", "the median rank's", "its memory", "more slow ranks"]
    return Table("Ranks that the others waited for", head, rows)


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
    weights: dict[str, list[int]] = {}
    for layers in known.values():
        for name, count in zip(layers.names, layers.weights, strict=True):
            weights.setdefault(name, []).append(count)
    names, sizes = list(weights), [_size(name, counts, shapes) for name, counts in weights.items()]
    columns: dict[str, list[list[Cell]]] = {}
    for title, of in FIGURES.items():
        of_runs = [_column(layers, of, names) for layers in known.values()]
        if any(not cell.is_missing for of_run in of_runs for cell in of_run):
            columns[title] = of_runs
    prefix = common_prefix(names)
    cells = [sizes, *(of_run for of_runs in columns.values() for of_run in of_runs)]
    rows = [[Cell(name.removeprefix(prefix)), *(column[i] for column in cells)] for i, name in enumerate(names)]
    caption = f"Layers of {prefix.rstrip('.')}" if prefix else "Layers"
    first = ["layer", "shape" if any("×" in cell.text for cell in sizes) else "weights"]
    if len(known) == 1:
        return Table(caption, [*first, *columns], rows)
    groups = [("", len(first)), *((title, len(known)) for title in columns)]
    return Table(caption, [*first, *(name for _ in columns for name in known)], rows, groups)


def _size(name: str, weights: Sequence[int], shapes: Shapes) -> Cell:
    """Return the shape of a layer, or its number of weights; all of them if they differ between runs."""
    texts = [" × ".join(map(str, shapes[name, n])) if (name, n) in shapes else whole(n) for n in dict.fromkeys(weights)]
    return Cell(" or ".join(texts), float(weights[0]))


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
    "flips in total": lambda layers, i: number(layers.flipped[i] if layers.flipped else None, whole),
    "correlation of S, |W|": _figure("correlation"),
    "score norm": _figure("score_norm"),
    "update norm": _figure("update_norm"),
    "update / W0 norm": _relative_update,
}
"""Figures of the table, by heading."""
