"""A small grid with lines for its cells."""

from __future__ import annotations

from tools.quality.cells import plan
from tools.quality.grid import laid_over


def table(**changes):
    """A grid of two texts; every method has two tries."""
    tries = [{"train": {"head_learning_rate": rate}} for rate in (1e-4, 1e-3)]
    return laid_over(
        {
            "name": "small",
            "title": "Small",
            "metric": "accuracy",
            "cpu_seconds": 60,
            "sparsities": ["0.5", "2:4"],
            "seeds": [0, 1],
            "search": {"sparsity": "0.5"},
            "run": {"model": {"path": "base"}, "train": {"num_steps": 4}},
            "data_sets": {
                "films": {"title": "Films", "run": {"data": {"train": "f.jsonl"}}, "tests": {"test": "ft.jsonl"}},
                "tweets": {"run": {"data": {"train": "t.jsonl", "test": "tt.jsonl"}}},
            },
            "methods": {
                "dense": {"sparsities": ["0"], "run": {"method": "dense"}, "tries": tries},
                "pst": {"title": "PST", "run": {"method": "pst"}, "tries": tries},
                "pst-plain": {
                    "run": {"method": "pst", "pst": {"score_rank": 0}},
                    "tries_of": "pst",
                    "sparsities": ["0.5"],
                },
            },
        },
        changes,
    )


def line_of(cell, accuracy, **more):
    tests = {name: {"accuracy": accuracy, "loss": 1 - accuracy} for name in cell.tests}
    facts = {
        "id": cell.id, "name": cell.name, "outcome": "done", "tests": tests, "cpu_seconds": 30.0, "machine": "a CPU",
        "validation": {"accuracy": accuracy, "loss": 1 - accuracy}, "trained_share": 0.05, "verified": True,
        "budget_cpu_seconds": 60, "seed": cell.seed, "sparsity_measured": 0.5, "settings": cell.settings,
    }  # fmt: skip
    return {**facts, **more}


def filled(grid, accuracy_of):
    """Lines of all cells, run in order; ``accuracy_of(cell)``."""
    lines, order = {}, []
    while True:
        todo = [planned.cell for planned in plan(grid, lines) if planned.state == "to do"]
        if not todo:
            return lines, order
        lines[todo[0].id] = line_of(todo[0], accuracy_of(todo[0]))
        order.append(todo[0].name)
