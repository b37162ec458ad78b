"""The trials of ``pst-ds tune``, for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from pst_ds.errors import InputError
from pst_ds.file_names import TUNE_FILE
from pst_ds.report.run_data import RunData
from pst_ds.report.tables import Cell, Table, number
from pst_ds.train.tune.table import trial_table, why


def tuning_tables(runs: Sequence[RunData]) -> Iterator[Table]:
    """Yield a table of each search. Raises InputError for a damaged file."""
    for run in runs:
        path = run.folder / TUNE_FILE
        if not path.is_file():
            continue
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            head, *rows = trial_table(lines)
            note = why(lines) if lines[-1]["event"] == "choice" else "not finished; the same command goes on"
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path} is damaged: {error!r}; remove it, or tune again with --restart") from None
        cells = [[Cell(row[0]), *(number(None) if c in "-" else Cell(c, _key(c)) for c in row[1:])] for row in rows]
        yield Table(f"Learning rates tried{f' for {run.name}' if len(runs) > 1 else ''}", head, cells, note=note)


def _key(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
