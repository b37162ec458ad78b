"""Figures, bars and the page of tools.quality, from lines that were measured nowhere."""

from __future__ import annotations

import math

import pytest

from tools.quality.bars import check_bars, verdicts
from tools.quality.grid import GridError, grid_from_table
from tools.quality.lines import Lines
from tools.quality.report import table as markdown
from tools.quality.report import write_report
from tools.quality.stats import Figure, figure, figure_of, shown

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


BARS = [
    {"title": "near", "kind": "within", "method": "pst", "sparsity": "0.5", "against": ["dense"], "points": 1.0},
    {
        "title": "level", "kind": "not-below", "method": "pst", "sparsity": "0.5", "against": ["pst-plain"],
        "standard_errors": 1.0, "data_sets": ["films"],
    },
    {
        "title": "back", "kind": "won-back", "method": "pst", "sparsity": "0.5", "against": ["pst-plain"],
        "dense": "dense", "share": 0.7, "data_sets": ["films"],
    },
    {"title": "all pass", "kind": "verified"},
]  # fmt: skip


def test_the_try_that_is_best_elsewhere_is_judged_on_the_data_set_left_out():
    bar = {"title": "carries", "kind": "left-out", "method": "pst", "points": 0.5}
    grid = grid_from_table(table(bars=[bar]))
    check_bars(grid)
    assert {v.met for v in verdicts(grid, {})} == {None}
    values = {("films", 0): 0.80, ("films", 1): 0.70, ("tweets", 0): 0.690, ("tweets", 1): 0.694}
    lines, _ = filled(grid, lambda cell: values.get((cell.data_set, cell.attempt), 0.6))
    found = {v.data_set: v for v in verdicts(grid, lines)}
    assert (found["films"].met, found["tweets"].met) == (False, True)
    assert found["films"].measured == "10.00 points below, by `train.head_learning_rate = 0.001`"
    assert found["tweets"].measured == "0.40 points below, by `train.head_learning_rate = 0.0001`"
    with pytest.raises(GridError, match="needs tries that are whole runs"):
        check_bars(grid_from_table(table(bars=[bar | {"method": "pst-plain"}])))


def test_bars_are_computed_from_the_lines():
    grid = grid_from_table(table(bars=BARS))
    check_bars(grid)
    assert {v.met for v in verdicts(grid, {})} == {None}
    means = {"dense": 0.80, "pst": 0.796, "pst-plain": 0.79}

    def accuracy(cell):
        return means[cell.method] + (0.004 if cell.seed == 1 else -0.004) - (cell.attempt == 1) / 100

    lines, _ = filled(grid, accuracy)
    assert figure(grid, lines, "films", "pst", "0.5").mean == pytest.approx(0.796)
    near, near_tweets, level, back, verified = verdicts(grid, lines)
    assert (near.measured, near.met) == ("0.40 points below", True)
    assert (near_tweets.data_set, near_tweets.met) == ("tweets", True)
    assert level.met
    assert "0.6 points ahead of pst-plain (standard error 0.57)" in level.measured
    assert (back.measured, back.met) == ("60% of the 0.010 nats that pst-plain adds", False)
    assert (verified.measured, verified.met) == ("20 of 20 exports", True)
    means["pst"] = 0.78
    near, _, level, *_ = verdicts(grid, filled(grid, accuracy)[0])
    assert (near.met, level.met) == (False, False)


def test_a_loss_is_within_by_how_much_it_is_above():
    bar = {**BARS[0], "against": ["dense", "pst-plain"], "points": 0.005, "data_sets": ["films"]}
    grid = grid_from_table(table(metric="loss", bars=[bar], seeds=[0]))
    losses = {"dense": 0.200, "pst-plain": 0.300}
    for loss, said in ((0.204, "0.004 nats below"), (0.210, "0.01 nats below"), (0.190, "0.01 nats above")):
        losses["pst"] = loss
        (found,) = verdicts(grid, filled(grid, lambda cell: 1.0 - losses[cell.method])[0])
        assert (found.measured, found.met) == (said, loss < 0.205)


def test_a_method_that_is_to_be_ahead_has_to_be_ahead_by_that_much():
    bar = {**BARS[0], "kind": "ahead-by", "against": ["pst-plain"], "points": 1.5, "data_sets": ["films"]}
    grid = grid_from_table(table(bars=[bar], seeds=[0]))
    check_bars(grid)
    for ahead in (0.016, 0.014, -0.016):
        lines, _ = filled(grid, lambda cell, ahead=ahead: 0.8 + (ahead if cell.method == "pst" else 0.0))
        (found,) = verdicts(grid, lines)
        assert found.met == (ahead > 0.015)
        side = "ahead of" if ahead > 0 else "behind"
        assert found.measured.startswith(f"{100 * abs(ahead):.1f} points {side} pst-plain")


def test_a_loss_is_ahead_by_nats():
    bar = {**BARS[0], "kind": "ahead-by", "against": ["pst-plain"], "points": 0.02, "data_sets": ["films"]}
    grid = grid_from_table(table(metric="loss", bars=[bar], seeds=[0]))
    for ahead, said in ((0.03, "0.03 nats ahead of"), (0.01, "0.01 nats ahead of")):
        lines, _ = filled(grid, lambda cell, ahead=ahead: 0.7 + (ahead if cell.method == "pst" else 0.0))
        (found,) = verdicts(grid, lines)
        assert found.measured.startswith(said)
        assert found.met == (ahead > 0.02)


def test_methods_are_compared_seed_by_seed():
    bar = {**BARS[1], "kind": "ahead", "standard_errors": 2.0}
    grid = grid_from_table(table(bars=[bar], seeds=[0, 1, 2]))
    check_bars(grid)
    ahead = [0.010, 0.012, 0.011]

    def accuracy(cell):  # seeds are farther apart than the methods
        return 0.7 + 0.05 * cell.seed + (ahead[cell.seed] if cell.method == "pst" else 0.0)

    (found,) = verdicts(grid, filled(grid, accuracy)[0])
    assert (found.measured, found.met) == ("1.1 points ahead of pst-plain (standard error 0.058), 3 seeds", True)
    ahead[:] = [0.010, -0.012, 0.011]
    assert verdicts(grid, filled(grid, accuracy)[0])[0].met is False
    alone = grid_from_table(table(bars=[bar], seeds=[0]))
    (found,) = verdicts(alone, filled(alone, accuracy)[0])
    assert (found.measured, found.met) == ("not measured: two seeds of pst and pst-plain", None)


def test_a_gap_is_won_back_where_the_seeds_show_one():
    bar = {
        "title": "gap", "kind": "gap", "method": "pst", "sparsity": "0.5", "lower": "pst-plain", "upper": "dense",
        "standard_errors": 2.0, "share": 0.3, "data_sets": ["films"],
    }  # fmt: skip
    grid = grid_from_table(table(bars=[bar], seeds=[0, 1, 2], methods={"dense": {"sparsities": ["0.5"]}}))
    check_bars(grid)
    above = {"pst-plain": [0.0] * 3, "pst": [0.004, 0.006, 0.005], "dense": [0.010, 0.012, 0.011]}

    def accuracy(cell):
        return 0.7 + 0.05 * cell.seed + above[cell.method][cell.seed]

    (found,) = verdicts(grid, filled(grid, accuracy)[0])
    said = "dense is 1.1 points ahead of pst-plain (standard error 0.058), 3 seeds; pst is 45% of the way"
    assert (found.measured, found.met) == (said, True)
    above["pst"] = [0.001] * 3
    assert verdicts(grid, filled(grid, accuracy)[0])[0].met is False
    above["dense"] = [0.010, -0.012, 0.011]
    (found,) = verdicts(grid, filled(grid, accuracy)[0])
    assert found.measured.endswith("3 seeds: no gap")
    assert found.met is True
    assert verdicts(grid, {})[0].met is None


def test_a_bar_that_cannot_be_computed_is_refused():
    for change, said in (
        ({"kind": "near"}, "must be one of"),
        ({"points": None}, "points missing"),
        ({"against": ["pts"]}, "'pts' is not one of the methods"),
        ({"limit": 1}, "limit missing or not of kind"),
    ):
        bar = {key: value for key, value in {**BARS[0], **change}.items() if value is not None}
        with pytest.raises(GridError, match=said):
            check_bars(grid_from_table(table(bars=[bar])))


PAGE = """| bar | text | measured |  |
|---|---|---|---|
| near | Films | 0.40 points below | met |
| near | tweets | 0.40 points below | met |
| level | Films | 0.6 points ahead of pst-plain (standard error 0.57) | met |
| back | Films | 60% of the 0.010 nats that pst-plain adds | not met |
| all pass | all | 20 of 20 exports | met |

### Films

| accuracy in %, at zeros | trained share | 0 % | 50 % | 2:4 | CPU s |
|---|---|---|---|---|---|
| dense | 5.00% | 80.00 ± 0.40 (2) |  |  | 30 |
| PST | 5.00% |  | 79.60 ± 0.40 (2) | 79.60 ± 0.40 (2) | 30 |
| pst-plain | 5.00% |  | 79.00 ± 0.40 (2) |  | 30 |

![Films](results/small-films-test.svg)
"""


def test_of_one_seed_there_is_no_standard_error_to_be_within():
    bar = {**BARS[1], "against": ["dense"], "data_sets": ["tweets"]}
    for ahead in (0.001, -0.001):
        grid = grid_from_table(table(bars=[bar], seeds=[0]))
        lines, _ = filled(grid, lambda cell, ahead=ahead: 0.8 + (ahead if cell.method == "pst" else 0.0))
        (level,) = verdicts(grid, lines)
        assert level.met == (ahead > 0)
        assert "0.1 points" in level.measured
        assert "(one seed: no standard error)" in level.measured


def test_a_title_with_bars_stays_in_its_column():
    assert markdown(("a", "|W0|"), [("without |W|", "1")]).splitlines()[::2] == [
        r"| a | \|W0\| |",
        r"| without \|W\| | 1 |",
    ]


def test_the_page_is_written_from_the_lines_alone(tmp_path):
    grid = grid_from_table(table(bars=BARS))
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
    plots = sorted((tmp_path / "results").glob("*.svg"))
    assert [plot.name for plot in plots] == ["small-films-test.svg", "small-tweets-test.svg"]
    drawn = [plot.read_text() for plot in plots]
    assert all("fill: #ffffff" in drawing for drawing in drawn)  # a ground of its own
    write_report([grid], tmp_path / "results")
    assert [plot.read_text() for plot in plots] == drawn  # the same bytes for the same lines
    files = {"int4": {"bytes": 9_000_000, "tests": {"test": {"accuracy": 0.79}}}}
    for line in list(lines.by_id.values()):
        if line["name"].startswith("films/pst/"):
            lines.put({**line, "files": files})
    text = write_report([grid], tmp_path / "results").read_text()
    assert "### Films: accuracy in % and bytes" in text
    assert "| PST | 50 % | int4 | 9.0 | 79.00 ± 0.00 (2) |" in text
    some = {key: line for key, line in lines.by_id.items() if line["name"] != "films/pst/2:4/0"}
    failed = {**lines.by_id[next(iter(lines.by_id.keys() - some.keys()))], "outcome": "failed", "error": "no memory"}
    lines.put(failed)
    text = write_report([grid], tmp_path / "results").read_text()
    assert "films/pst/2:4/0: failed (no memory)" in text
    assert "15 of 16 done; missing: 1 failed. Tries" in text
