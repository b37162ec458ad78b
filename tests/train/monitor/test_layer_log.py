"""What a run leaves to look at: layers.jsonl and the event files hold every figure, once, and say the same."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing import event_accumulator

from pst_ds.config.run import ConfigError, LayerStatisticsConfig
from pst_ds.config.toml import load_run
from pst_ds.data import labelled as data
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train.run import prepare, train_prepared

LAYER_SCALARS = {"sparsity", "flip_rate", "correlation", "score_norm", "relative_update_norm"}
SCALARS = {
    "loss", "grad_norm", "lr/scores", "lr/updates", "lr/head", "sparsity/target", "sparsity/actual", "flip_rate",
    "correlation", "tokens_per_second", "tokens_per_second_per_rank", "data_wait", "peak_memory_bytes", "skipped_steps",
    "time/forward", "time/backward", "time/optimizer", "time/masks", "eval/accuracy", "checkpoint/bytes",
}  # fmt: skip


def _train(folder, *more, resume=False):
    settings = ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", "checkpoint.interval=4", *more]
    prepared = prepare(load_run("tests/data/world_size.toml", settings), LaunchEnvironment(0, 1, 0))
    return train_prepared(prepared, resume=resume, quiet=True)


def _lines(folder, name="layers.jsonl"):
    head, *lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return head, lines


def _of(lines, event):
    return [line for line in lines if line["event"] == event]


def _board(folder):
    return event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()


def test_a_run_holds_every_figure_of_its_layers_in_both_places(tmp_path):
    result = _train(tmp_path)
    head, lines = _lines(tmp_path)
    names, weights = head["layers"], head["weights"]
    assert len(names) == len(weights) == 12
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    updates = _of(metrics, "mask_update")
    masks = _of(lines, "masks")
    assert [line["step"] for line in masks] == [line["step"] for line in updates]
    for line, update in zip(masks, updates, strict=True):
        assert sum(line["flipped"]) / sum(weights) == pytest.approx(update["flip_rate"])
        assert 1 - sum(line["kept"]) / sum(weights) == pytest.approx(update["sparsity/actual"])
    assert 1 - sum(masks[-1]["kept"]) / sum(weights) == pytest.approx(result["sparsity_in_masks"])

    scores = _of(lines, "scores")
    assert [line["step"] for line in scores] == list(range(21))  # 20 times in 20 steps, and before the first
    assert scores[0]["correlation"] == pytest.approx([1.0] * 12)
    assert scores[0]["update_norm"] == [0.0] * 12
    assert all(None not in line["correlation"] for line in scores[:17])
    assert all(set(line["correlation"]) == set(line["score_norm"]) == {None} for line in scores[17:])  # masks are fixed
    assert all(None not in line["update_norm"] for line in scores)
    means = {line["step"]: line["correlation"] for line in _of(metrics, "scores")}
    assert means == pytest.approx({line["step"]: sum(line["correlation"]) / 12 for line in scores[:17]}, rel=1e-5)

    board = _board(tmp_path)
    scalars = set(board.Tags()["scalars"])
    assert scalars >= SCALARS
    assert {tag for tag in scalars if tag.startswith("layers/")} == {
        f"layers/{name}/{figure}" for name in names for figure in LAYER_SCALARS
    }
    i = 5
    for figure in ("correlation", "score_norm"):
        expected = {line["step"]: line[figure][i] for line in scores if line[figure][i] is not None}
        assert _scalar(board, f"layers/{names[i]}/{figure}") == pytest.approx(expected, rel=1e-5, abs=1e-9)
    ratios = {line["step"]: line["update_norm"][i] / line["weight_norm"][i] for line in scores}
    assert _scalar(board, f"layers/{names[i]}/relative_update_norm") == pytest.approx(ratios, rel=1e-5)
    sparsity = _scalar(board, f"layers/{names[i]}/sparsity")
    assert {line["step"]: 1 - line["kept"][i] / weights[i] for line in masks} == pytest.approx(
        {line["step"]: sparsity[line["step"]] for line in masks}
    )


def _scalar(board, tag):
    events = board.Scalars(tag)
    found = {event.step: event.value for event in events}
    assert len(found) == len(events), f"{tag} has a step twice"
    return found


def test_a_run_that_goes_on_has_every_point_once(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _train(whole)
    order, calls = data.GlobalBatches.micro_batches, iter(range(1, 1000))

    def killed_at_11(self, *arguments):
        if next(calls) == 11:
            raise KeyboardInterrupt
        return order(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data.GlobalBatches, "micro_batches", killed_at_11)
        with pytest.raises(KeyboardInterrupt):
            _train(stopped)
    _, lines = _lines(stopped)
    assert lines[-1]["step"] == 10  # the newest checkpoint is of step 8
    with (stopped / "layers.jsonl").open("a") as file:
        file.write('{"step": 11, "event": "ma')  # a crash in the middle of a line
    _train(stopped, resume=True)
    assert _lines(stopped) == _lines(whole)
    boards = [_board(folder) for folder in (whole, stopped)]
    assert set(boards[0].Tags()["scalars"]) == set(boards[1].Tags()["scalars"])
    for tag in boards[0].Tags()["scalars"]:
        one, other = (_scalar(board, tag) for board in boards)
        if tag in (
            "tokens_per_second",
            "tokens_per_second_per_rank",
            "data_wait",
            "peak_memory_bytes",
        ) or tag.startswith(("checkpoint/", "time/")):
            one, other = list(one), list(other)  # the steps
        assert one == other, tag


@pytest.mark.thorough
def test_a_run_that_begins_anew_leaves_nothing_of_the_one_before(tmp_path):
    _train(tmp_path, "train.num_steps=8", "checkpoint.interval=0")
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    _train(tmp_path, "train.num_steps=4")
    assert max(_scalar(_board(tmp_path), "loss")) == 4
    assert max(line["step"] for line in _lines(tmp_path)[1]) == 4


@pytest.mark.few(2)
@pytest.mark.parametrize("method", ["dense", "lora", "magnitude", "gmp", "masked-lora"])
def test_other_methods_leave_out_what_they_lack(tmp_path, method):
    _train(tmp_path, f"method={method}", "train.num_steps=10", "schedule.final_sparsity=0.5")
    tags = _board(tmp_path).Tags()
    scalars = {tag.rpartition("/")[2] for tag in tags["scalars"] if tag.startswith("layers/")}
    expected = {
        "dense": set(),
        "lora": {"relative_update_norm"},
        "magnitude": {"sparsity", "flip_rate"},
        "gmp": {"sparsity", "flip_rate"},
        "masked-lora": {"sparsity", "flip_rate", "relative_update_norm"},
    }
    assert scalars == expected[method]
    assert (tmp_path / "layers.jsonl").is_file() == (method != "dense")


def test_statistics_can_be_switched_off_and_masks_are_still_counted(tmp_path):
    _train(tmp_path, "layer_statistics.interval=-1")
    _, lines = _lines(tmp_path)
    assert {line["event"] for line in lines} == {"masks"}


def test_statistics_come_about_twenty_times_and_at_the_last_step():
    def steps(statistics, num_steps):
        return [step for step in range(num_steps + 1) if statistics.is_due(step, num_steps)]

    assert steps(LayerStatisticsConfig(), 1000) == list(range(0, 1001, 50))
    assert steps(LayerStatisticsConfig(), 7) == list(range(8))
    assert steps(LayerStatisticsConfig(interval=300), 1000) == [0, 300, 600, 900, 1000]
    assert steps(LayerStatisticsConfig(interval=-1), 1000) == []
    every = LayerStatisticsConfig(interval=300)
    assert [every.last_before(step, 1000) for step in (0, 1, 300, 301, 1000)] == [-1, 0, 0, 300, 900]
    with pytest.raises(ConfigError, match=r"interval = -2"):
        LayerStatisticsConfig(interval=-2)
