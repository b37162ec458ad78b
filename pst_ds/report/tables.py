"""Tables of a report about runs: results, settings, layers, checkpoints."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import pandas as pd

from pst_ds.core.experts.tokens import hardly_used
from pst_ds.progress import duration_text
from pst_ds.report.run_data import RunData
from pst_ds.text_table import bytes_text
from pst_ds.train.monitor.curves import EVALUATION, is_number

MAIN_SETTINGS = (
    "task", "method", "model.path", "data.train", "data.dataset", "schedule.final_sparsity", "pst.pattern",
    "pst.score_rank", "pst.update_rank", "train.num_steps", "train.num_epochs", "train.batch_size", "train.precision",
    "deepspeed_config", "seed",
)  # fmt: skip
"""Settings shown for every run, unless they are empty or zero."""
Cells = Mapping[str, object]


class Table(NamedTuple):
    caption: str
    html: str
    note: str = ""


def table(caption: str, columns: Mapping[str, Cells] | pd.DataFrame, note: str = "") -> Iterator[Table]:
    """Yield the table of ``columns``, which are cells by row; none without a value. Texts are escaped."""
    frame = columns
    if not isinstance(frame, pd.DataFrame):
        rows = dict.fromkeys(row for cells in columns.values() for row in cells)
        frame = pd.DataFrame({name: [cells.get(row) for row in rows] for name, cells in columns.items()}, list(rows))
    frame = frame.astype(object).map(_text)
    frame = frame.loc[(frame != "–").any(axis=1), (frame != "–").any(axis=0)]
    if frame.size:
        with pd.option_context("display.max_colwidth", None):
            yield Table(caption, frame.to_html(border=0), note)


def rows_table(caption: str, rows: Mapping[str, Cells], note: str = "") -> Iterator[Table]:
    """Yield the table of ``rows``, which are cells by column; none without a value."""
    columns = dict.fromkeys(column for cells in rows.values() for column in cells)
    return table(caption, {name: {row: cells.get(name) for row, cells in rows.items()} for name in columns}, note)


def _text(value: object) -> str:
    """Format a cell: numbers with six digits, or all digits of a whole one; a dash for a missing value."""
    if value is None or value != value or value in ("", []):
        return "–"
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        return f"{number:,.0f}" if number.is_integer() and abs(number) < 1e15 else f"{number:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def result_table(runs: Sequence[RunData]) -> Iterator[Table]:
    """Yield the results of the runs, starting with the final metrics."""
    return table("Results", {run.name: dict(_results(run)) for run in runs})


def _results(run: RunData) -> Iterator[tuple[str, object]]:
    result, curves = run.result, run.curves
    yield "state", f"finished, {result.get('steps')} steps" if result else f"not finished, at step {run.last_step}"
    last = {name.removeprefix(EVALUATION): run.last(name) for name in curves if name.startswith(EVALUATION)}
    metrics = result.get("metrics")
    yield from (metrics if isinstance(metrics, dict) and metrics else last).items()
    yield "sparsity requested", result.get("sparsity_requested", run.last("sparsity/target"))
    yield "sparsity in the masks", result.get("sparsity_in_masks", run.last("sparsity/actual"))
    for key in ("best_step", "skipped_steps", "trained_parameters"):
        yield key.replace("_", " "), result.get(key)
    yield "optimizer state per rank", _size(result.get("optimizer_bytes_per_rank"))
    yield "peak memory per rank", _size(max((v for _, v in curves.get("peak_memory_bytes", [])), default=None))
    yield "checkpoint", _size(next((one["size in bytes"] for one in reversed(run.checkpoints.values())), None))
    speeds = [value for _, value in curves.get("tokens_per_second", [])]
    yield "tokens per second, median", round(statistics.median(speeds)) if speeds else None
    tokens, seconds = result.get("expert_tokens"), result.get("seconds")
    yield "experts hardly used", sum(map(len, map(hardly_used, tokens.values()))) if isinstance(tokens, dict) else None
    yield "ranks", result.get("world_size")
    yield "time", duration_text(seconds) if is_number(seconds) else None


def _size(count: object) -> str | None:
    return bytes_text(count) if is_number(count) else None


def setting_tables(runs: Sequence[RunData]) -> Iterator[Table]:
    """Yield the settings that differ between the runs, and the main ones that they have in common."""
    columns = {run.name: {name: _text(value) for name, value in run.settings.items()} for run in runs}
    first = columns[runs[0].name]
    names = dict.fromkeys(name for cells in columns.values() for name in cells if name != "output_dir")
    differ = [n for n in names if len({cells.get(n, "–") for cells in columns.values()}) > 1]
    kept = {run: {name: cells.get(name) for name in differ} for run, cells in columns.items()}
    yield from table("Settings that differ", kept)
    main = {name: first[name] for name in MAIN_SETTINGS if name not in differ and runs[0].settings.get(name)}
    yield from table("Main settings" if len(runs) == 1 else "Main settings in common", {"value": main})


def layer_table(runs: Sequence[RunData]) -> Iterator[Table]:
    """Yield the figures of all layers, next to each other for several runs."""
    frames = {run.name: pd.DataFrame(run.layers.values(), run.layers) for run in runs if run.layers}
    if len(frames) < 2:
        frame = next(iter(frames.values()), pd.DataFrame())
    else:
        frame = pd.concat(frames, axis=1).swaplevel(axis=1)
        frame = frame[list(dict.fromkeys(frame.columns.get_level_values(0)))]  # figure by figure
    return table("Layers", frame)


def checkpoint_table(runs: Sequence[RunData]) -> Iterator[Table]:
    return rows_table(
        "Checkpoints", {f"{run.name}/{name}": facts for run in runs for name, facts in run.checkpoints.items()}
    )
