"""The dense run whose losses stand next to a run's: what is read of it, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pst_ds.config.run import ConfigError
from pst_ds.config.toml import dump_run, load_run
from pst_ds.train.monitor.curves import batch_losses
from pst_ds.train.monitor.dense_run import read_dense_run
from pst_ds.train.monitor.metrics import MetricsWriter

STEPS = [
    {"step": 1, "event": "step", "loss": 0.9, "losses": [0.9]},
    {"step": 4, "event": "step", "loss": 0.7, "losses": [0.8, 0.7, 0.6]},
    {"step": 4, "event": "evaluation", "eval/accuracy": 0.5, "eval/loss": 0.8},
    {"step": 6, "event": "step", "loss": 0.45, "losses": [0.5, 0.4]},
    {"step": 8, "event": "evaluation", "eval/accuracy": 0.5, "eval/loss": 0.6},
]


@pytest.fixture
def dense(tmp_path):
    """``dense("train.batch_size=8")``: the folder of a dense run like that of the tests, but for these settings."""

    def make(*settings, lines=STEPS):
        folder = tmp_path / "dense"
        folder.mkdir(exist_ok=True)
        run = load_run("tests/data/world_size.toml", [f"output_dir={folder}", "method=dense", *settings])
        (folder / "run.toml").write_text(dump_run(run))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def _run(folder, *settings):
    return load_run("tests/data/world_size.toml", [f"dense_run={folder}", *settings])


def test_its_losses_are_those_of_the_same_steps(dense):
    found = read_dense_run(_run(dense()))
    assert found.training == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6), (5, 0.5), (6, 0.4)]
    assert found.training_loss(3) == 0.7
    assert found.training_loss(4, batches=3) == pytest.approx(0.7)
    assert found.training_loss(7) is None
    assert [found.validation_loss(step) for step in (3, 4, 6, 8, 9)] == [None, 0.8, pytest.approx(0.7), 0.6, None]
    assert found.at(4, {"event": "step", "losses": [1, 1], "loss": 1}) == {"loss/dense": pytest.approx(0.65)}
    assert found.at(6, {"event": "evaluation", "eval/loss": 1}) == {"eval/loss/dense": pytest.approx(0.7)}
    assert found.at(9, {"event": "evaluation", "eval/loss": 1, "loss": 1}) == {}


def test_the_lines_of_an_older_run_have_means_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{k: v for k, v in line.items() if k != "losses"} for line in STEPS] + [{"step": 9, "event": "step"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert batch_losses(path) == [(1, 0.9), (4, 0.7), (6, 0.45)]
    assert batch_losses(path, 4) == [(1, 0.9), (4, 0.7)]
    skipped = {"step": 3, "event": "step", "losses": [1.0, None, 3.0, 4.0]}  # four batches took two steps
    path.write_text(json.dumps(STEPS[0]) + "\n" + json.dumps(skipped) + "\n")
    assert batch_losses(path) == [(1, 0.9), (1, 1.0), (3, 3.0), (3, 4.0)]


def test_the_loss_with_another_teacher_is_left_out(dense, tmp_path):
    """Only what both validated can be compared."""
    found = read_dense_run(_run(dense(), "distillation.weight=0.5", f"distillation.teacher={tmp_path}"))
    assert found.training == []
    assert found.training_loss(3) is None
    assert found.validation_loss(4) == 0.8


def test_a_run_without_one_has_none():
    assert read_dense_run(load_run("tests/data/world_size.toml")) is None


def test_metrics_and_progress_show_both(dense, tmp_path, capsys):
    """In metrics.jsonl and in TensorBoard under one heading."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    folder.mkdir()
    metrics = MetricsWriter(folder, num_steps=8, is_main=True, dense=read_dense_run(_run(dense())))
    metrics.write(4, {"event": "step", "loss": 0.75, "losses": [0.8, 0.7]})
    metrics.progress(4, {"loss": 0.75, "sparsity": 0.5}, batches=2)
    metrics.evaluation(6, {"accuracy": 0.5, "loss": 0.9})
    metrics.verdict(6, "The run underfits: so it does.")
    metrics.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["loss"], lines[0]["loss/dense"]) == (0.75, pytest.approx(0.65))
    assert (lines[1]["eval/loss"], lines[1]["eval/loss/dense"]) == (0.9, pytest.approx(0.7))
    shown = capsys.readouterr().err
    assert "loss 0.75 | dense 0.65 | sparsity 0.5" in shown
    assert "step 6: accuracy 0.5, loss 0.9, dense loss 0.7\n" in shown
    assert shown.count("The run underfits: so it does.") == 1
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) >= {"loss", "loss/dense", "eval/loss", "eval/loss/dense"}
    assert [e.tensor_proto.string_val for e in board.Tensors("fit/text_summary")] == [
        [b"The run underfits: so it does."]
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.batch_size=8"], "has train.batch_size = 8, and this run 24"),
        (["data.max_length=16"], "has data.max_length = 16, and this run 32"),
        (
            ["data.train=tests/data/validation.jsonl"],
            "has data.train = 'tests/data/validation.jsonl', and this run 'te",
        ),
        (["task=regression"], "has task = 'regression', and this run 'classification'"),
        (["model.path=tests/data/tiny-llama"], "has model.path = 'tests/data/tiny-llama', and this run 'tests/data/ti"),
        (["method=gmp"], 'has method = \'gmp\', which prunes. Name a run of method "dense" or "lora"'),
    ],
)
def test_what_cannot_be_compared_is_refused(dense, settings, message):
    folder = dense(*settings)
    with pytest.raises(ConfigError) as caught:
        read_dense_run(_run(folder))
    assert str(caught.value).startswith(f"dense_run = {str(folder)!r} {message}")


def test_the_same_files_by_another_path_are_the_same(dense):
    folder = dense(f"data.train={Path('tests/data/train.jsonl').resolve()}", "data.validation=")
    assert read_dense_run(_run(folder)).training


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run folder: run.toml is missing \(looked in .*\)\. Name the outp"):
        read_dense_run(_run(tmp_path / "nowhere"))


def test_another_text_under_the_same_name_is_refused(dense):
    folder = dense()
    saved = folder / "checkpoints" / "step-00000004"
    saved.mkdir(parents=True)
    run = _run(folder)
    assert read_dense_run(run, "abd")
    (saved / "manifest.json").write_text(json.dumps({"state": {"progress": {"data_digest": "abc"}}}))
    assert read_dense_run(run, "abc")
    with pytest.raises(ConfigError, match=r"dense_run = .* trained on another text: .* Train the dense run again"):
        read_dense_run(run, "abd")
