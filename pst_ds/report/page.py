"""The HTML page: fill the template with all parts of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pst_ds import __version__
from pst_ds.report import tables
from pst_ds.report.charts import charts
from pst_ds.report.exports import Exports
from pst_ds.report.run_data import RunData


def page(runs: Sequence[RunData], exports: Exports | None = None, notes: Sequence[str] = ()) -> str:
    """Render the HTML of a report about ``runs`` and ``exports``; ``notes`` stand below the table of exports.

    All text from the data is escaped, and the browser may load no other resource and run no script.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    with pd.option_context("future.infer_string", False):  # Arrow refuses bytes of folder names that are not UTF-8
        saved = [*tables.checkpoint_table(runs), *tables.rows_table("Exports", exports or {}, "; ".join(notes))]
        return environment.get_template("report.html").render(
            title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
            version=__version__,
            runs=runs,
            results=[*tables.result_table(runs), *tables.setting_tables(runs)],
            charts=list(charts(runs)),
            details=[*tables.layer_table(runs), *saved],
        )
