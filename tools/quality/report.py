"""Write tools/quality/logs/results.md from the lines of the grids."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pst_ds.atomic_files import write_text_atomic
from pst_ds.config.toml import flatten
from tools.quality.cells import Line, Lines, cell_of, chosen, plan, tries_run
from tools.quality.grid import Grid, Method, Table

_HEAD = """# Results

What sparsity costs under each method: one model, one text and one budget for all of a table. Written by
`python -m tools.quality` from the lines under `{results}`; every line has all the settings of its run.

* Figures are of the test files, mean ± standard error over seeds, with the number of seeds in brackets. No choice was
  made on them: of each method's tries, the same number for all, the best on the validation file was taken.
* Every export is reloaded by plain transformers and compared with the masked model (`pst-ds verify`); its sparsity is
  counted in the file.
* The trained share is the trained parameters over all of the model's.
"""


def write_report(grids: Sequence[Grid], results: Path) -> Path:
    """Write the page of every grid that has lines in ``results`` next to that folder. Return its path."""
    lines = [(grid, Lines(results / f"{grid.name}.jsonl").by_id) for grid in grids]
    sections = [section(grid, by_id) for grid, by_id in lines if by_id]
    page = results.with_name(f"{results.name}.md")
    head = _HEAD.format(results=results.as_posix() if not results.is_absolute() else results.name)
    write_text_atomic(page, "\n".join([head, *sections]))
    return page


def section(grid: Grid, lines: Mapping[str, Line]) -> str:
    """Return the section of one grid: its description, a table per test, and the tries."""
    parts = [f"## {grid.title}\n", *([f"{grid.about.strip()}\n"] if grid.about else []), costs(grid, lines)]
    for data_set in grid.data_sets.values():
        for test in test_names(grid, data_set.name):
            title = data_set.title if len(test_names(grid, data_set.name)) == 1 else f"{data_set.title}: {test}"
            parts += [f"### {title}\n", results_table(grid, lines, data_set.name, test)]
        if curve := files_table(grid, lines, data_set.name):
            parts += [f"### {data_set.title}: {metric_name(grid)} and bytes\n", curve]
    parts.append(tries_table(grid, lines))
    return "\n".join(parts)


def costs(grid: Grid, lines: Mapping[str, Line]) -> str:
    """Return machine, budget, cost of the cells, the command, and what is missing."""
    planned = plan(grid, lines)
    ids = {p.cell.id for p in planned if p.cell}
    own = [line for key, line in lines.items() if key in ids]
    cells = Counter(p.state for p in planned if not p.is_search)
    tries = Counter(p.state for p in planned if p.is_search)
    machines = ", ".join(sorted({line["machine"] for line in own})) or "no machine yet"
    spent = sum(line["cpu_seconds"] for line in own)
    missing = ", ".join(f"{count} {state}" for state, count in cells.items() if state != "done")
    said = [
        f"* Machine: {machines}; a cell has one thread. Budget of a cell: {grid.cpu_seconds:g} CPU seconds. All cells "
        f"together took {spent / 3600:.1f} CPU hours.",
        f"* Cells of the tables: {cells['done']} of {cells.total()} done; "
        + (f"missing: {missing}. " if missing else "none missing. ")
        + f"Tries: {tries.total() - tries['to do'] - tries['waits']} of {tries.total()} run.",
        f"* Command: `python -m tools.quality {grid.path}`; settings, tries and seeds are in that file.",
    ]
    for p in planned:
        line = lines.get(p.cell.id) if p.cell else None
        if line is not None and line["outcome"] != "done":
            said.append(f"* {p.name}: {line['outcome']} ({line.get('error', '')})")
    return "\n".join(said) + "\n"


def results_table(grid: Grid, lines: Mapping[str, Line], data_set: str, test: str) -> str:
    """Return a table of methods x sparsities: the metric, the trained share and the CPU seconds of a cell."""
    methods = grid.methods_of(data_set)
    sparsities = list(dict.fromkeys(s for m in methods for s in grid.sparsities_of(m, data_set)))
    apart = sparsities if grid.reference or grid.data_sets[data_set].reference else []
    of_kl = [f"KL divergence at {percent(s)}" for s in apart]
    head = [f"{metric_name(grid)}, at sparsity", "trained share", *(percent(s) for s in sparsities), *of_kl, "CPU s"]
    rows = []
    for method in methods:
        cells = [shown(figure(grid, lines, data_set, method.name, s, test), grid.metric) for s in sparsities]
        kl = [shown(figure(grid, lines, data_set, method.name, s, test, "kl_mean"), "kl_mean") for s in apart]
        share, seconds = share_of(grid, lines, data_set, method), seconds_of(grid, lines, data_set, method)
        row = [method.title, share, *cells, *kl, seconds]
        if any(cells):
            rows.append(row)
    return table(head, rows)


def files_table(grid: Grid, lines: Mapping[str, Line], data_set: str) -> str:
    """Return a table of the metric of each file on the first test, its megabytes and the milliseconds for a text of 32
    tokens, if measured; "" without files.
    """
    test, rows = test_names(grid, data_set)[0], []
    for method in grid.methods_of(data_set):
        for sparsity in grid.sparsities_of(method, data_set):
            cells = [line.get("files", {}) for line in lines_of(grid, lines, data_set, method.name, sparsity)]
            for name in dict.fromkeys(name for files in cells for name in files):
                files = [of_cell[name] for of_cell in cells if name in of_cell]
                value = figure_of([file["tests"][test][grid.metric] for file in files])
                nbytes = statistics.fmean(file["bytes"] for file in files)
                ms = f"{statistics.fmean(file['ms'] for file in files):.2f}" if "ms" in files[0] else ""
                place = (method.title, percent(sparsity), name)
                rows.append((*place, f"{nbytes / 1e6:.1f}", ms, shown(value, grid.metric)))
    return table(("method", "sparsity", "file", "MB", "ms for 32 tokens", metric_name(grid)), rows) if rows else ""


def metric_name(grid: Grid) -> str:
    name = grid.metric.replace("_", " ")
    return name if grid.lower_is_better else f"{name} in %"


def percent(sparsity: str) -> str:
    return sparsity if ":" in sparsity else f"{100 * float(sparsity):g} %"


def share_of(grid: Grid, lines: Mapping[str, Line], data_set: str, method: Method) -> str:
    """Return the trained share, which does not depend on the sparsity; a dash for untrained methods."""
    for sparsity in grid.sparsities_of(method):
        for line in lines_of(grid, lines, data_set, method.name, sparsity):
            return f"{line['trained_share']:.2%}" if "trained_share" in line else "-"
    return ""


def seconds_of(grid: Grid, lines: Mapping[str, Line], data_set: str, method: Method) -> str:
    """Return the mean CPU seconds of the method's cells."""
    cells = [line for s in grid.sparsities_of(method) for line in lines_of(grid, lines, data_set, method.name, s)]
    return f"{sum(line['cpu_seconds'] for line in cells) / len(cells):.0f}" if cells else ""


def tries_table(grid: Grid, lines: Mapping[str, Line]) -> str:
    """Return a table of the tries and their validation metrics; the chosen ones are bold."""
    data_sets = [grid.data_sets[name] for name in grid.search.data_sets or grid.data_sets]
    rows = []
    for method in grid.methods.values():
        runs = {d.name: tries_run(grid, lines, d.name, method.name) for d in data_sets}
        taken = {d.name: chosen(grid, lines, d.name, method.name) for d in data_sets}
        if not any(line for of_text in runs.values() for line in of_text):
            continue
        for i, settings in enumerate(method.tries):
            values = [validation(grid, runs[name][i], bold=i == taken[name]) for name in runs]
            rows.append((method.title, settings_text(settings), *values))
    where = f"seed {grid.search.seed} and {percent(grid.search.sparsity)} sparsity (dense methods: none)"
    if grid.search.run:
        where += f", with {settings_text(grid.search.run)}"
    said = f"Tries, one run each at {where}; the one chosen for all cells of its method is bold:\n\n"
    head = ("method", "settings", *(f"{d.title}: validation {metric_name(grid)}" for d in data_sets))
    return said + table(head, rows) if rows else ""


def validation(grid: Grid, line: Line | None, *, bold: bool) -> str:
    if line is None:
        return ""
    done = line["outcome"] == "done"
    value = number(line["validation"][grid.metric], grid.metric) if done else line["outcome"]
    return f"**{value}**" if bold else value


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *others = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others]) + "\n"


@dataclass(frozen=True)
class Figure:
    """Mean over seeds and its standard error, which is None for one seed."""

    mean: float
    error: float | None
    seeds: int


def lines_of(grid: Grid, lines: Mapping[str, Line], data_set: str, method: str, sparsity: str) -> list[Line]:
    """Return the finished cells of one place in the table, by seed; none at a sparsity that the method omits."""
    found: list[Line] = []
    if sparsity not in grid.sparsities_of(grid.methods[method], data_set):
        return found
    for seed in grid.seeds_of(grid.methods[method], sparsity):
        cell = cell_of(grid, lines, "cell", data_set, method, sparsity, seed)
        line = lines.get(cell.id) if cell else None
        if line is not None and line["outcome"] == "done":
            found.append(line)
    return found


def figure_of(values: list[float]) -> Figure | None:
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Figure(statistics.fmean(values), error, len(values))


def figure(
    grid: Grid, lines: Mapping[str, Line], data_set: str, method: str, sparsity: str, test: str = "", metric: str = ""
) -> Figure | None:
    """Return the mean over seeds of a test's metric, by default of the first test; None without a finished cell."""
    test, metric = test or test_names(grid, data_set)[0], metric or grid.metric
    found = lines_of(grid, lines, data_set, method, sparsity)
    return figure_of([line["tests"][test][metric] for line in found])


def test_names(grid: Grid, data_set: str) -> list[str]:
    return list(grid.data_sets[data_set].tests) or ["test"]


def number(value: float, metric: str) -> str:
    """Format a value for the page: perplexities, losses and divergences unchanged, others in percent."""
    if metric == "kl_mean":
        return f"{value:.3g}"
    if metric == "loss":
        return f"{value:.3f}"
    if metric.endswith("perplexity"):
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    return f"{100 * value:.2f}"


def shown(figure: Figure | None, metric: str) -> str:
    """Format mean, standard error and number of seeds: "82.31 ± 0.24 (3)"; without an error for one seed."""
    if figure is None:
        return ""
    error = "" if figure.error is None else f" ± {number(figure.error, metric)}"
    return f"{number(figure.mean, metric)}{error} ({figure.seeds})"


def settings_text(settings: Table) -> str:
    """Format settings: `train.head_learning_rate = 0.0002`, separated by commas."""
    return ", ".join(f"`{name} = {value}`" for name, value in flatten(settings).items())
