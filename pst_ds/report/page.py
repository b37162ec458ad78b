"""The HTML page: fill the template with all parts of a report."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from pst_ds import __version__
from pst_ds.report import charts as drawing
from pst_ds.report.outcomes import ExportData
from pst_ds.report.run_data import RunData
from pst_ds.report.tables import Table, layer_table, measured_once_table, result_table, setting_tables
from pst_ds.train.fit_verdict import sentence

TEMPLATES = Path(__file__).parent / "templates"


def page(runs: Sequence[RunData], exports: Sequence[ExportData], outcomes: Sequence[tuple[str, list[Table]]]) -> str:
    """Render the HTML of a report about ``runs``.

    ``outcomes``: further headings, each with its tables. All text from the data is escaped, and the browser may load no
    other resource and run no other script.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    all_charts = list(drawing.charts(runs))
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return environment.get_template("report.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        axes=drawing,
        runs=runs,
        results=result_table(runs),
        verdicts=[(run, text) for run in runs if (text := sentence(run.result.get("fit")))],
        settings=list(setting_tables(runs)),
        charts=[chart for chart in all_charts if chart.has_curve],
        measured_once=measured_once_table([chart for chart in all_charts if not chart.has_curve]),
        layers=layer_table(runs, {key: shape for export in exports for key, shape in export.shapes.items()}),
        outcomes=[(heading, tables) for heading, tables in outcomes if tables],
    )
