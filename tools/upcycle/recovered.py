"""What removed experts cost, and how much of it training recovers, by the lines of tools/quality/experts.toml."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pst_ds.errors import InputError
from tools.quality.cells import Line
from tools.quality.grid import Grid
from tools.quality.report import lines_of, table, test_names

UNCUT, ONE_SHOT = "dense", "reap"
"""Methods of the grid that recover all and nothing."""


def recovered(grid: Grid, lines: Mapping[str, Line]) -> str:
    """Return a table of nats per token above the uncut mixture, by method and corpus: means over seeds.

    A method recovers 1 - its nats / those of one-shot removal, given with the standard error over its seeds. Raises
    InputError while one of the two methods that are compared with has not run.
    """
    (data_set,) = grid.data_sets
    tests = test_names(grid, data_set)
    losses = {
        method: torch.tensor([[line["tests"][test]["loss"] for test in tests] for line in found])
        for method, found in _lines_by_method(grid, lines, data_set).items()
    }
    for method in (UNCUT, ONE_SHOT):
        if method not in losses:
            raise InputError(f"{grid.path}: {method!r} has not run. Run python -m tools.quality {grid.path}")
    rows = []
    for method, of_seeds in losses.items():
        added = of_seeds - losses[UNCUT]
        shares = 1 - added.mean(1) / (losses[ONE_SHOT] - losses[UNCUT]).mean()
        error = f" ± {float(shares.std()) / len(shares) ** 0.5:.1%}" if len(shares) > 1 else ""
        by_corpus = [f"{nats:.3f}" for nats in (*added.mean(0).tolist(), float(added.mean()))]
        rows.append([grid.methods[method].title, *by_corpus, f"{float(shares.mean()):.1%}{error} ({len(shares)})"])
    return table(["nats added", *tests, "mean", "recovered (seeds)"], rows)


def _lines_by_method(grid: Grid, lines: Mapping[str, Line], data_set: str) -> dict[str, list[Line]]:
    """Return the finished cells of every method that has some, by seed."""
    found = {
        method.name: [
            line
            for sparsity in grid.sparsities_of(method)
            for line in lines_of(grid, lines, data_set, method.name, sparsity)
        ]
        for method in grid.methods.values()
    }
    return {method: of_method for method, of_method in found.items() if of_method}
