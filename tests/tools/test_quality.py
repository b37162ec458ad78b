"""The results table: its grid, the order of its cells and the choice of tries, without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tools.quality.__main__ import main
from tools.quality.cells import Lines, LinesError, cell_of, chosen, plan
from tools.quality.grid import GridError, grid_from_table, load_grid, sparsity_settings
from tools.quality.report import figure
from tools.quality.workers import Options, next_cell, selected

from .small_grid import filled, line_of, table

ROOT = Path(__file__).resolve().parents[2]
GRIDS = sorted((ROOT / "tools" / "quality").glob("*.toml"))


def test_tries_come_first_and_then_one_seed_of_everything():
    grid = grid_from_table(table())
    assert [p.state for p in plan(grid, {})].count("to do") == 8
    _, order = filled(grid, lambda cell: 0.8 + (cell.attempt or 0) / 100)
    assert order[:8] == [
        f"{text}/{method}/search/{attempt}"
        for attempt in (0, 1)
        for text in ("films", "tweets")
        for method in ("dense", "pst")
    ]
    # what the search has run is not run again: seed 0 of dense, and of pst at the sparsity searched at
    assert order[8:12] == ["films/pst-plain/0.5/0", "tweets/pst-plain/0.5/0", "films/pst/2:4/0", "tweets/pst/2:4/0"]
    assert all(name.endswith("/1") for name in order[12:])
    assert len(order) == 8 + 4 + 8 == len(set(order))


def test_some_sparsities_may_have_fewer_seeds():
    grid = grid_from_table(table(seeds_at={"2:4": [1]}))
    lines, order = filled(grid, lambda cell: 0.8)
    assert [name for name in order if "2:4" in name] == ["films/pst/2:4/1", "tweets/pst/2:4/1"]
    assert [figure(grid, lines, "films", "pst", s).seeds for s in ("0.5", "2:4")] == [2, 1]
    small = grid_from_table(table(data_sets={"tweets": {"sparsities": ["0", "0.5"]}}))
    _, order = filled(small, lambda cell: 0.8)
    assert [name for name in order if "2:4" in name] == ["films/pst/2:4/0", "films/pst/2:4/1"]
    with pytest.raises(GridError, match=r"seeds_at\.2:4: 7 is not one of 0, 1"):
        grid_from_table(table(seeds_at={"2:4": [7]}))


def test_a_try_is_chosen_on_validation_alone_once_all_have_ended():
    grid = grid_from_table(table())
    first, second = (cell_of(grid, {}, "search", "films", "pst", "0.5", 0, i) for i in (0, 1))
    lines = {first.id: line_of(first, 0.7)}
    assert chosen(grid, lines, "films", "pst") is None
    better_on_test = line_of(second, 0.9, validation={"accuracy": 0.6})
    lines[second.id] = better_on_test
    assert chosen(grid, lines, "films", "pst") == 0
    lines[second.id] = {**better_on_test, "validation": {"accuracy": 0.7}}
    assert chosen(grid, lines, "films", "pst") == 0  # of equals the first
    lines[first.id] = {**lines[first.id], "outcome": "failed"}
    assert chosen(grid, lines, "films", "pst") == 1
    lines[second.id] = {**lines[second.id], "validation": {"accuracy": math.nan}}
    assert chosen(grid, lines, "films", "pst") is None
    cell = cell_of(grid, {**lines, second.id: better_on_test}, "cell", "films", "pst-plain", "0.5", 1)
    assert cell.settings["train"] == {"num_steps": 4, "head_learning_rate": 1e-3}
    assert (cell.settings["seed"], cell.settings["pst"]["seed"], cell.attempt) == (1, 1, 1)


def test_lower_perplexity_is_better():
    grid = grid_from_table(table(metric="perplexity"))
    cells = [cell_of(grid, {}, "search", "films", "pst", "0.5", 0, i) for i in (0, 1)]
    values = (40.0, 30.0)
    lines = {c.id: line_of(c, 0.5, validation={"perplexity": v}) for c, v in zip(cells, values, strict=True)}
    assert chosen(grid, lines, "films", "pst") == 1


def test_one_text_may_be_searched_for_all():
    grid = grid_from_table(table(search={"sparsity": "0.5", "data_sets": ["tweets"]}))
    names = [p.name for p in plan(grid, {}) if p.cell]
    assert names == [f"tweets/{method}/search/{i}" for i in (0, 1) for method in ("dense", "pst")]
    lines, _ = filled(grid, lambda cell: 0.8 + (cell.attempt or 0) / 100)
    assert chosen(grid, lines, "films", "pst") == 1


def test_tries_may_be_shorter_than_cells():
    grid = grid_from_table(table(search={"sparsity": "0.5", "run": {"train": {"num_steps": 2}}}))
    lines, _ = filled(grid, lambda cell: 0.8 + (cell.attempt or 0) / 100)
    cells = [planned.cell for planned in plan(grid, lines)]
    found = {(cell.kind, cell.settings["train"]["num_steps"], bool(cell.tests)) for cell in cells}
    assert found == {("search", 2, False), ("cell", 4, True)}
    assert chosen(grid, lines, "films", "pst") == 1
    assert len(lines) == len(cells)  # none is both


def test_an_untuned_method_waits_for_no_search():
    grid = grid_from_table(table(methods={"as-it-is": {"untuned": True, "run": {"method": "pst"}}}))
    states = {planned.name: planned.state for planned in plan(grid, {}) if planned.method == "as-it-is"}
    assert states == dict.fromkeys(
        [f"{t}/as-it-is/{s}/{n}" for n in (0, 1) for s in ("0.5", "2:4") for t in ("films", "tweets")], "to do"
    )
    with pytest.raises(GridError, match=r"methods\.pst is untuned, so it can have no tries"):
        grid_from_table(table(methods={"pst": {"untuned": True}}))


def test_a_cell_is_its_settings():
    def of(**changes):
        return cell_of(grid_from_table(table(**changes)), {}, "search", "films", "pst", "0.5", 0, 0)

    cell = of()
    assert cell.id == of(title="Another", cpu_seconds=90, seeds=[0, 1, 2]).id
    assert cell.id != of(run={"train": {"num_steps": 5}}).id
    assert cell.id != of(data_sets={"films": {"tests": {"test": "other.jsonl"}}}).id
    assert len({cell.id, of(reference="dense").id, of(data_sets={"films": {"reference": "films"}}).id}) == 3
    overridden = grid_from_table(table(), ["train.num_steps=5", "model.path=other"])
    assert cell_of(overridden, {}, "search", "films", "pst", "0.5", 0, 0).settings["model"]["path"] == "other"
    assert cell.settings == {
        "method": "pst",
        "model": {"path": "base"},
        "data": {"train": "f.jsonl", "test": "ft.jsonl"},
        "train": {"num_steps": 4, "head_learning_rate": 1e-4},
        "schedule": {"final_sparsity": 0.5},
        "seed": 0,
        "pst": {"seed": 0},
    }
    assert sparsity_settings("1:4") == {"pst": {"pattern": "1:4"}, "schedule": {"final_sparsity": 0.75}}


def test_what_comes_before_a_cell_belongs_to_it():
    more = {
        "wanda": {"train": False, "base": {"prune": "wanda", "samples": 8}, "seeds": [0]},
        "masked": {"run": {"method": "masked-lora"}, "base": {"prune": "wanda", "samples": 8}, "tries_of": "pst"},
        "taught": {"run": {"method": "pst"}, "teacher": "dense", "tries_of": "pst"},
    }
    more["half"] = {**more["wanda"], "base": {"prune": "alps", "reconstruct": 2, "sparsity": "0.5"}}
    more["tied"] = {**more["wanda"], "base": {**more["wanda"]["base"], "run": {"pst": {"min_kept_share": 0.1}}}}
    grid = grid_from_table(table(methods=more))
    wanda = cell_of(grid, {}, "cell", "films", "wanda", "2:4", 0)
    assert wanda.base.prune == {"prune": "wanda", "samples": 8, "seed": 0, "sparsity": "2:4"}
    assert cell_of(grid, {}, "cell", "films", "half", "2:4", 0).base.prune == {**more["half"]["base"], "seed": 0}
    tied = cell_of(grid, {}, "cell", "films", "tied", "2:4", 0)
    assert (tied.base.prune, tied.settings) == (wanda.base.prune, wanda.settings)
    assert tied.base.settings["pst"] == {**wanda.base.settings.get("pst", {}), "min_kept_share": 0.1}
    longer = grid_from_table(table(methods=more), ["train.num_steps=9"])
    assert cell_of(longer, {}, "cell", "films", "wanda", "2:4", 0).id == wanda.id  # no training is in it
    assert cell_of(grid, {}, "cell", "films", "taught", "0.5", 0) is None  # waits for two searches
    lines, _ = filled(grid, lambda cell: 0.8)
    masked = cell_of(grid, lines, "cell", "films", "masked", "2:4", 1)
    assert masked.settings["pst"] == {"seed": 1, "pattern": "2:4", "initial_mask": "zeros"}
    assert masked.base.id == wanda.base.id
    taught = cell_of(grid, lines, "cell", "films", "taught", "0.5", 1)
    assert taught.teacher.settings == cell_of(grid, lines, "cell", "films", "dense", "0", 1).settings
    wanted = selected(grid, plan(grid, {}), "films/taught/0.5/1")
    searched = {p.name.rpartition("/")[0] for p in wanted if "/search/" in p.name}
    assert searched == {"films/pst/search", "films/dense/search"}


def test_sessions_go_on_where_the_lines_end(tmp_path):
    grid, lines = grid_from_table(table()), Lines(tmp_path / "small.jsonl")
    first = next_cell(grid, lines, Options(), set())
    assert next_cell(grid, lines, Options(), {first.id}).name == "films/pst/search/0"
    lines.put(line_of(first, 0.8))
    assert next_cell(grid, Lines(lines.path), Options(), set()).name == "films/pst/search/0"
    another = next_cell(grid, lines, Options(), {first.id})
    Lines(lines.path).put(line_of(another, 0.8))  # another process
    lines.put(line_of(first, 0.8, outcome="failed"))
    assert Lines(lines.path).by_id.keys() == {first.id, another.id}
    lines.path.unlink()
    lines.put(line_of(first, 0.8, outcome="failed"))
    assert next_cell(grid, lines, Options(), set()).id != first.id
    assert next_cell(grid, lines, Options(retry_failed=True), set()).id == first.id
    assert next_cell(grid, lines, Options(retry_failed=True), {first.id}).id != first.id  # once a session
    lines.put(line_of(first, 0.8, outcome="over budget", budget_cpu_seconds=60))
    assert next_cell(grid, lines, Options(), set()).id != first.id
    lines.put(line_of(first, 0.8, outcome="over budget", budget_cpu_seconds=59))  # the grid allows more now
    assert next_cell(grid, lines, Options(), set()).id == first.id
    assert next_cell(grid, lines, Options(only="tweets/pst"), set()).name == "tweets/pst/search/0"
    assert len(lines.path.read_text().splitlines()) == 1
    lines.path.write_text('{"id": "a"}\nhalf a li')
    with pytest.raises(LinesError, match="line 2"):
        Lines(lines.path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrik": "accuracy"}, "unknown key 'metrik'"),
        ({"methods": {"pst": {"trys": []}}}, "unknown key 'methods.pst.trys'"),
        ({"methods": {"pst": {"tries": [{}]}}}, "same number of tries: dense 2, pst 1"),
        ({"methods": {"pst": {"tries": []}}}, "methods.pst has no tries"),
        ({"methods": {"gmp": {"tries_of": "mgp"}}}, "'mgp' is not one of"),
        ({"methods": {"one-shot": {"train": False, "tries_of": "pst"}}}, "train = false"),
        ({"methods": {"pst": {"sparsities": ["0.9", "0.7"]}}}, "lacks search.sparsity"),
        ({"methods": {"pst": {"sparsities": ["50 %"]}}}, "methods.pst.sparsities: '50 %'"),
        ({"methods": {"pst": {"base": {"samples": 3}}}}, "must say how to prune"),
        ({"methods": {"pst": {"teacher": "pst-plain"}}}, "must be a method with sparsities"),
        ({"methods": {"pst": {"at": {"0.9": {}}}}}, "methods.pst.at: '0.9'"),
        ({"search": {"data_sets": ["film"]}}, "search.data_sets: 'film'"),
        ({"methods": {"pst": {"data_sets": ["films"]}}}, "methods.pst-plain needs the tries of 'pst' on 'tweets'"),
        ({"cpu_seconds": 0}, "must be above 0"),
        ({"cpu_seconds": "60"}, "cpu_seconds = '60': Input should be a valid number"),
    ],
)
def test_a_grid_that_cannot_be_used_is_refused(changes, said):
    with pytest.raises(GridError, match=said.replace("(", r"\(")):
        grid_from_table(table(**changes))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_the_grids_of_the_project_can_be_used(path):
    """Every cell's settings make a run; those of what is made before it are there when they are needed."""
    from pst_ds.config.toml import run_from_table

    grid = load_grid(path)
    value = {"accuracy": 0.8, "pearson": 0.8, "perplexity": 50.0, "loss": 4.0}
    lines = {}
    for _ in range(3):  # searches, what waits for them, what waits for that
        for planned in plan(grid, lines):
            if planned.cell is not None and planned.cell.id not in lines:
                cell = planned.cell
                run = run_from_table({**cell.settings, "output_dir": "out"})
                assert run.data.test == next(iter(cell.tests.values()), run.data.test)
                assert run.metric == grid.metric
                for step in filter(None, (cell.base, cell.teacher)):
                    run_from_table({**step.settings, "output_dir": "out"})
                lines[cell.id] = line_of(cell, 0.8, validation=value, tests=dict.fromkeys(cell.tests, value))
    assert {planned.state for planned in plan(grid, lines)} == {"done"}


def test_bad_arguments_end_with_2_and_one_message(tmp_path, capsys):
    assert main([str(tmp_path / "no.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    grid = tmp_path / "grid.toml"
    grid.write_text("name = 1")
    assert main([str(grid), "--list"]) == 2
    assert str(grid) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(grid), "--workers", "0"])


def test_the_list_says_what_is_known_of_each_cell(tmp_path, capsys):
    toml = "\n".join(f"{key} = {json.dumps(value)}" for key, value in table().items() if not isinstance(value, dict))
    grid = tmp_path / "small.toml"
    grid.write_text(
        toml + '\n[search]\nsparsity = "0.5"\n[run]\ntrain.num_steps = 4\n[data_sets.films]\n'
        '[methods.dense]\nsparsities = ["0"]\ntries = [{train.head_learning_rate = 1e-4}]\n'
    )
    assert main([str(grid), "--list", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "to do       films/dense/search/0", "waits       films/dense/0/0", "waits       films/dense/0/1",
    ]  # fmt: skip
