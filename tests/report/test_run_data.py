"""Reading run folders: curves, names, damaged lines, what is no run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pst_ds.errors import InputError
from pst_ds.report.run_data import read_layers, read_runs, short_names
from pst_ds.train.monitor.curves import read_curves


def test_curves_are_finite_numbers_by_name_with_the_last_of_each_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "seconds": 0.1, "event": "step", "loss": 2.0, "flip_rate": 0.3, "sparsity/actual": 0.0},
        {"step": 2, "seconds": 0.2, "event": "mask_update", "flip_rate": 0.2, "mask_checksum": "ab"},
        {"step": 2, "seconds": 0.2, "event": "step", "loss": float("nan"), "sparsity/actual": 0.4},
        {"step": 2, "seconds": 0.3, "event": "step", "sparsity/actual": 0.5, "is_odd": True},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '[1]\n\n{"step": 3, "los')
    assert read_curves(path) == {"loss": [(1, 2.0)], "sparsity/actual": [(1, 0.0), (2, 0.5)], "flip_rate": [(2, 0.2)]}


def test_a_run_that_has_just_begun_is_one(write_run):
    (run,) = read_runs([write_run()])
    assert run.name == "mine"
    assert run.settings == {"method": "pst", "schedule.final_sparsity": 0.9}
    assert (run.result, run.curves, run.layers, run.checkpoints, run.last_step) == ({}, {}, {}, {}, 0)


def test_a_run_file_may_begin_with_a_byte_order_mark(write_run):
    (run,) = read_runs([write_run(run_file='\ufeffmethod = "pst"\n')])
    assert (run.run_file, run.settings) == ('method = "pst"\n', {"method": "pst"})


def test_names_are_as_short_as_tells_them_apart():
    assert short_names([Path("/a/one/run"), Path("/a/two/run")]) == ["one/run", "two/run"]
    assert short_names([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert short_names([Path("/a/b/run"), Path("/b/run"), Path("/c/run")]) == ["a/b/run", "b/run", "c/run"]


def test_checkpoints_are_listed_with_their_links_and_those_without_a_manifest_are_not(write_run):
    run = write_run()
    for step in (10, 20, 30):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        state = {"step": step, "sparsity": 0.5, "metrics": {"accuracy": 0.7}}
        (folder / "manifest.json").write_text(json.dumps({"state": state}) if step < 30 else '{"sta')
        (folder / "shard").write_bytes(bytes(100))
    (run / "checkpoints" / "step-00000040.partial").mkdir()
    (run / "checkpoints" / "best").symlink_to("step-00000010")
    (read,) = read_runs([run])
    first = run / "checkpoints" / "step-00000010" / "manifest.json"
    size = 100 + first.stat().st_size
    facts = {"sparsity": 0.5, "accuracy": 0.7, "size in bytes": size}
    assert read.checkpoints == {
        "step-00000010": {"links": "best", "step": 10, **facts},
        "step-00000020": {"links": "", "step": 20, **facts},
    }


def test_what_is_no_run_is_said_with_the_fix(tmp_path, write_run):
    with pytest.raises(InputError, match=r"'no/such' is not a run folder: run.toml is missing \(looked in /"):
        read_runs([Path("no/such")])
    with pytest.raises(InputError, match=r"run\.toml is not TOML: "):
        read_runs([write_run("broken", run_file="a = ")])
    run = write_run("twice")
    with pytest.raises(InputError, match=r"twice' is named twice. Name every run once"):
        read_runs([run, tmp_path / "." / "twice"])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b'{"steps": '])
def test_a_damaged_result_is_named(write_run, content):
    folder = write_run()
    (folder / "result.json").write_bytes(content)
    with pytest.raises(InputError, match=r"result\.json' (cannot be read|does not contain a JSON object)"):
        read_runs([folder])


HEAD = {"layers": ["a", "b"], "weights": [10, 20]}


@pytest.fixture
def read(tmp_path):
    """What comes of these lines, and of a last one that is cut off."""

    def read_lines(*lines):
        path = tmp_path / "layers.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "event": "mas')
        return read_layers(path)

    return read_lines


def _scores(step, **figures):
    nothing = {name: [None, None] for name in ("correlation", "score_norm", "update_norm", "weight_norm")}
    return {"step": step, "event": "scores", **nothing, **figures}


def test_flips_add_up_and_kept_is_the_last(read):
    found = read(
        HEAD,
        {"step": 2, "event": "masks", "kept": [8, 20], "flipped": [2, 0]},
        {"step": 4, "event": "masks", "kept": [5, 10], "flipped": [3, 12]},
    )
    assert found == {
        "a": {"weights": 10, "sparsity": 0.5, "flips in total": 5},
        "b": {"weights": 20, "sparsity": 0.5, "flips in total": 12},
    }


def test_a_figure_that_is_no_longer_taken_keeps_its_last_value(read):
    found = read(HEAD, _scores(1, correlation=[0.9, None]), _scores(2, correlation=[0.8, 0.7]), _scores(3))
    assert [layer["correlation"] for layer in found.values()] == [0.8, 0.7]
    assert all(math.isnan(layer["score_norm"]) for layer in found.values())


def test_lines_that_are_not_as_they_should_be_are_skipped(read):
    wrong = [
        {"step": 1, "event": "masks", "kept": [1], "flipped": [1]},
        {"step": 1, "event": "masks", "kept": 3, "flipped": [1, 2]},
        {"step": 1, "event": "scores", "correlation": [1.0, 1.0]},
        {"step": 1},
        [1, 2],
    ]
    assert read(HEAD, *wrong) == {"a": {"weights": 10}, "b": {"weights": 20}}


@pytest.mark.parametrize(
    "head", [{"layers": ["a"]}, {"layers": [], "weights": []}, {"layers": ["a"], "weights": [1, 2]}, 3]
)
def test_without_a_whole_first_line_there_are_no_layers(read, head):
    assert read(head) == {}


def test_without_a_file_there_are_no_layers(tmp_path):
    assert read_layers(tmp_path / "layers.jsonl") == {}
