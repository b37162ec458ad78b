"""Figures and the page of tools.quality, from lines that were measured nowhere."""

from __future__ import annotations

import math

import pytest

from tools.quality.cells import Lines
from tools.quality.grid import grid_from_table
from tools.quality.report import Figure, figure, figure_of, shown, write_report
from tools.quality.report import table as markdown

from .small_grid import filled, table


def test_figures_are_means_with_standard_errors():
    assert figure_of([]) is None
    assert figure_of([0.8]) == Figure(0.8, None, 1)
    three = figure_of([0.80, 0.81, 0.85])
    assert three.mean == pytest.approx(0.82)
    assert three.error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3) / 100)
    assert shown(three, "accuracy") == "82.00 ± 1.53 (3)"
    assert shown(Figure(1234.5, None, 1), "perplexity") == "1,234 (1)"
    assert shown(None, "accuracy") == ""


def test_a_method_has_no_figure_at_a_sparsity_that_it_leaves_out():
    """With a pattern of its own it would have the settings of its cell at 50 % at 2:4 too."""
    row = {"run": {"pst": {"pattern": "row"}}, "tries_of": "pst", "sparsities": ["0.5"]}
    grid = grid_from_table(table(methods={"pst-row": row}))
    lines, _ = filled(grid, lambda cell: 0.8)
    assert figure(grid, lines, "films", "pst-row", "0.5").seeds == 2
    assert figure(grid, lines, "films", "pst-row", "2:4") is None


PAGE = """### Films

| accuracy in %, at sparsity | trained share | 0 % | 50 % | 2:4 | CPU s |
|---|---|---|---|---|---|
| dense | 5.00% | 80.00 ± 0.40 (2) |  |  | 30 |
| PST | 5.00% |  | 79.60 ± 0.40 (2) | 79.60 ± 0.40 (2) | 30 |
| pst-plain | 5.00% |  | 79.00 ± 0.40 (2) |  | 30 |
"""


def test_a_title_with_vertical_lines_stays_in_its_column():
    assert markdown(("a", "|W0|"), [("without |W|", "1")]).splitlines()[::2] == [
        r"| a | \|W0\| |",
        r"| without \|W\| | 1 |",
    ]


def test_the_page_is_written_from_the_lines_alone(tmp_path):
    grid = grid_from_table(table())
    means = {"dense": 0.80, "pst": 0.796, "pst-plain": 0.79}

    def accuracy(cell):
        return means[cell.method] + (0.004 if cell.seed == 1 else -0.004) - (cell.attempt == 1) / 100

    lines = Lines(tmp_path / "results" / "small.jsonl")
    for line in filled(grid, accuracy)[0].values():
        lines.put(line)
    page = write_report([grid], tmp_path / "results")
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "results.md"
    assert PAGE in text
    assert "* Cells of the tables: 16 of 16 done; none missing. Tries: 8 of 8 run." in text
    assert "| PST | `train.head_learning_rate = 0.0001` | **79.20** | **79.20** |" in text
    files = {"int4": {"bytes": 9_000_000, "tests": {"test": {"accuracy": 0.79}}}}
    for line in list(lines.by_id.values()):
        if line["name"].startswith("films/pst/"):
            lines.put({**line, "files": files})
    text = write_report([grid], tmp_path / "results").read_text()
    assert "### Films: accuracy in % and bytes" in text
    assert "| PST | 50 % | int4 | 9.0 |  | 79.00 ± 0.00 (2) |" in text
    some = {key: line for key, line in lines.by_id.items() if line["name"] != "films/pst/2:4/0"}
    failed = {**lines.by_id[next(iter(lines.by_id.keys() - some.keys()))], "outcome": "failed", "error": "no memory"}
    lines.put(failed)
    text = write_report([grid], tmp_path / "results").read_text()
    assert "films/pst/2:4/0: failed (no memory)" in text
    assert "15 of 16 done; missing: 1 failed. Tries" in text
