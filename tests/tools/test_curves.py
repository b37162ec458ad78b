"""Fits of error against training steps."""

from __future__ import annotations

import pytest

from tests.tools import small_grid
from tools.quality.curves import Point, fit, points_of, report
from tools.quality.grid import grid_from_table


@pytest.mark.parametrize(("floor", "scale", "power"), [(12.0, 300.0, 0.8), (0.0, 5.0, 0.3), (3.2, 0.9, 1.5)])
def test_a_curve_is_found_again_from_its_points(floor, scale, power):
    points = [Point(n, floor + scale * n**-power, 0.1, 1) for n in (50, 100, 200, 400, 800)]
    assert fit(points).at(3200) == pytest.approx(floor + scale * 3200**-power, rel=1e-3)


def test_a_constant_error_stays_constant():
    points = [Point(n, 7.0, 0.1, 1) for n in (50, 100, 200, 400, 800)]
    assert fit(points).at(6400) == pytest.approx(7.0, rel=1e-3)


def test_points_are_means_over_seeds_and_a_single_seed_has_the_error_of_its_examples(tmp_path):
    test_file = tmp_path / "test.jsonl"
    test_file.write_text("{}\n" * 100)
    table = small_grid.table(data_sets={"films": {"tests": {"test": str(test_file)}}})
    runs = [("pst", 10, 0.5), ("pst", 10, 0.7), ("pst", 20, 0.9), ("dense", 10, 1.0)]
    lines = {
        str(number): {
            "outcome": "done", "kind": "cell", "data_set": "films", "method": method, "steps": steps,
            "tests": {"test": {"accuracy": accuracy}},
        }
        for number, (method, steps, accuracy) in enumerate(runs)
    }  # fmt: skip
    del lines["3"]["steps"]  # a model that is only pruned
    grid = grid_from_table(table)
    assert [p.steps for p in points_of(grid, lines)["dense"]] == [0]
    pst = points_of(grid, lines)["pst"]
    assert [(p.steps, p.seeds) for p in pst] == [(10, 2), (20, 1)]
    assert [p.mean for p in pst] == pytest.approx([40.0, 10.0])
    assert [p.error_bar for p in pst] == pytest.approx([10.0, 3.0])
    assert "40 ± 10 (2)" in report(grid, lines)
