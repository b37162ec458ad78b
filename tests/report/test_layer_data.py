"""layers.jsonl: totals, last known figures, lines that are not as they should be, long runs in little memory."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pst_ds.report.heat_maps import layer_pictures
from pst_ds.report.run_data import read_layers, read_runs
from pst_ds.train.monitor.images import MOST_COLUMNS

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
    assert found.flipped == [5, 12]
    assert [found.sparsity(i) for i in (0, 1)] == [0.5, 0.5]
    assert found.column_steps() == [(2, 2), (4, 4)]
    assert found.history.sparsity() == pytest.approx(np.array([[0.2, 0.5], [0.0, 0.5]]))


def test_a_figure_that_is_no_longer_taken_keeps_its_last_value(read):
    found = read(HEAD, _scores(1, correlation=[0.9, None]), _scores(2, correlation=[0.8, 0.7]), _scores(3))
    assert found.figures["correlation"] == [0.8, 0.7]
    assert found.figures["score_norm"] == [None, None]


def test_lines_that_are_not_as_they_should_be_are_skipped(read):
    wrong = [
        {"step": 1, "event": "masks", "kept": [1], "flipped": [1]},
        {"step": 1, "event": "masks", "kept": 3, "flipped": [1, 2]},
        {"step": 1, "event": "scores", "correlation": [1.0, 1.0]},
        {"step": 1, "event": "histogram", "layer": 2, "low": 0, "high": 1, "kept": [], "pruned": [], "threshold": None},
        {"step": 1, "event": "histogram", "layer": 0},
        {"step": 1},
        [1, 2],
    ]
    found = read(HEAD, *wrong)
    assert (found.kept, found.flipped, found.update_steps) == ([], [], [])
    assert found.pictures == {"histogram": {}, "thumbnail": {}}
    assert found.sparsity(0) is None


@pytest.mark.parametrize(
    "head", [{"layers": ["a"]}, {"layers": [], "weights": []}, {"layers": ["a"], "weights": [1, 2]}, 3]
)
def test_without_a_whole_first_line_there_are_no_layers(read, head):
    assert read(head) is None


def test_without_a_file_there_are_no_layers(tmp_path):
    assert read_layers(tmp_path / "layers.jsonl") is None


def test_many_updates_and_pictures_are_merged_and_thinned(read):
    updates = 3 * MOST_COLUMNS + 1
    lines = [{"step": s, "event": "masks", "kept": [5, 5], "flipped": [1, 0]} for s in range(updates)]
    lines += [{"step": s, "event": "thumbnail", "layer": 1, "share": [[0.5]]} for s in range(1000)]
    found = read(HEAD, *lines)
    assert found.flipped == [updates, 0]
    steps = found.column_steps()
    assert len(steps) == found.history.flips().shape[1] <= MOST_COLUMNS
    assert steps[0] == (0, 3)
    assert steps[-1] == (updates - 1, updates - 1)
    shown = [line["step"] for line in found.pictures["thumbnail"][1].items]
    assert len(shown) <= 65
    assert shown == sorted(shown)
    assert (shown[0], shown[-1]) == (0, 999)


@pytest.mark.parametrize("count", [3, 64, 65, 200, 1000])
def test_the_pictures_of_a_layer_are_evenly_apart(write_run, count):
    scores = {"low": 0.0, "high": 1.0, "kept": [1, 2], "pruned": [2, 1], "threshold": 0.5}
    lines = [{"step": s, "event": "thumbnail", "layer": 1, "share": [[0.5]]} for s in range(1, count + 1)]
    lines += [{"step": s, "event": "histogram", "layer": 1, **scores} for s in range(1, count + 1)]
    (run,) = read_runs([write_run(layers=[HEAD, *lines])])
    ((_, snapshots),) = layer_pictures(run)
    for kind in ("scores", "mask"):
        steps = [snapshot.step for snapshot in snapshots if snapshot.kind == kind]
        assert (len(steps), steps[0], steps[-1]) == (min(count, 4), 1, count)
        gaps = np.diff(steps)
        assert gaps.max() - gaps.min() <= max(1, 0.1 * count)
