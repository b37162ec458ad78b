"""Runs whose masks and kept weights are solved during training: stopped and resumed, on several ranks, exported."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pst_ds import MaskUpdater
from pst_ds.checkpoint.format import CheckpointError
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.config.update_forms import only_low_rank
from pst_ds.core.schedule import CubicSchedule
from pst_ds.errors import InputError
from pst_ds.formats.safetensors_file import TensorFile
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train.run import prepare, train_prepared
from pst_ds.train.run_folder import open_checkpoint
from tests.train.run.test_causal_lm import _base
from tests.train.test_resume import OF_SHORT, _assert_same_run, _go_on, _stopped, _train

SOLVES = ("schedule.solves=2", "schedule.final_sparsity=0.7")
FIRST, LAST = 9, 14
"""Steps of the two solves; the run listens from its first batch to the last solve."""


def _updates(folder):
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["mask_checksum"] for line in lines if line["event"] == "mask_update"}


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"),
    [(1, "local", "bf16"), pytest.param(2, "3", "bf16", marks=pytest.mark.zero3),
     pytest.param(3, "2", "fp32", marks=[pytest.mark.zero3, pytest.mark.thorough])],
)  # fmt: skip
def test_a_stopped_run_is_saved_after_the_next_solve_and_ends_with_the_same_bits(
    run_ranks, tmp_path, ranks, stage, precision
):
    more = (*SOLVES, f"train.precision={precision}", "train.gradient_accumulation_steps=2")
    whole = run_ranks(_train, ranks, tmp_path / "whole", stage, *more)
    said = run_ranks(partial(_stopped, at=FIRST - 4), ranks, tmp_path / "stopped", stage, *more)
    assert [path.name for path in (tmp_path / "stopped" / "solved").iterdir()] == [f"step-{FIRST:08d}"]
    _assert_same_run(tmp_path, whole, said, run_ranks(_go_on, ranks, tmp_path / "stopped", stage, *more), at=FIRST)
    assert list(_updates(tmp_path / "whole")) == [FIRST, LAST]
    files = [tmp_path / name / "solved" / f"step-{LAST:08d}" / "model.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    steps = {int(path.name[5:]) for path in (tmp_path / "whole" / "checkpoints").glob("step-*")}
    assert not steps & (set(range(1, FIRST)) | set(range(FIRST + 1, LAST)))


@pytest.mark.zero3
def test_the_first_solve_has_the_same_masks_on_other_ranks(run_ranks, tmp_path):
    """Later ones differ where the gradients do, in their last bits: micro-batches have other sizes."""
    more = (*SOLVES, OF_SHORT, "train.update_learning_rate=0", "train.head_learning_rate=0", "model.dropout=0.0")
    for ranks in (1, 2, 3):
        run_ranks(_train, ranks, tmp_path / str(ranks), "3", *more)
    first = [next(iter(_updates(tmp_path / str(ranks)).values())) for ranks in (1, 2, 3)]
    assert first[0] == first[1] == first[2]


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solved") / "run"
    _train(folder, "local", *SOLVES)
    return folder


def test_a_run_is_evaluated_exported_and_verified_where_it_was_moved(solved, tmp_path, capsys):
    moved = solved.rename(solved.with_name("moved"))
    assert main(["eval", str(moved), "--checkpoint", "final", "--split", "validation"]) == 0
    metrics = json.loads((moved / "result.json").read_text())["metrics"]
    assert f"accuracy {metrics['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["export", str(moved), "--out", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(moved)]) == 0
    assert "0 of 12 weight tensors differ" in capsys.readouterr().out
    moved.rename(solved)


def test_the_folder_of_a_solve_is_the_base_with_other_values_of_kept_weights(solved):
    checkpoint = open_checkpoint(load_run(solved / "run.toml"), "final")
    base, own = (
        TensorFile(Path(p) / "model.safetensors") for p in ("tests/data/tiny-bert", checkpoint.state.base_path)
    )
    assert checkpoint.state.base_path == str(solved / "solved" / f"step-{LAST:08d}")
    assert base.slots.keys() == own.slots.keys()
    pruned = {name for name in base.slots if f"{name.removesuffix('.weight')}" in _without_prefix(checkpoint.masks)}
    assert len(pruned) == 12
    for name in base.slots:
        before, after = base.read(name), own.read(name)
        assert torch.equal(before, after) == (name not in pruned), name
        if name in pruned:
            assert float((after == 0).float().mean()) == pytest.approx(0.7, abs=0.01)


def _without_prefix(names):
    return {name.removeprefix("bert.") for name in names} | set(names)


def test_a_language_model_with_other_files_than_it_computes_in(tmp_path, capsys):
    """GPT-2: fused matrices stored (I, O), files in fp16, an embedding that is also the head."""
    base = Path(_base("gpt2", tmp_path / "base"))
    save_file({k: v.half() for k, v in load_file(base / "model.safetensors").items()}, base / "model.safetensors")
    more = ("deepspeed_config=", f"model.path={base}", f"output_dir={tmp_path / 'run'}", "train.precision=bf16")
    run = load_run("tests/data/causal_lm.toml", [*more, *SOLVES, "train.num_steps=16", "schedule.warmup_fraction=0.1"])
    train_prepared(prepare(run, LaunchEnvironment(0, 1, 0)), quiet=True)
    (solved,) = (tmp_path / "run" / "solved").iterdir()
    kinds = {slot.dtype for slot in TensorFile(solved / "model.safetensors").slots.values()}
    assert kinds == {torch.float16, torch.float32}  # which holds bf16 too
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "run")]) == 0
    assert "0 of 8 weight tensors differ" in capsys.readouterr().out


def test_a_missing_folder_of_a_solve_is_named(solved):
    folder = solved / "solved"
    folder.rename(solved / "elsewhere")
    with pytest.raises(CheckpointError, match=r"solved/step-00000014 is missing, and .* Copy the whole run folder"):
        open_checkpoint(load_run(solved / "run.toml"), "final")
    (solved / "elsewhere").rename(folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('method="gmp"', 'is for method = "pst", not for method = '),
        ('start.method="alps"', r"prunes\. Remove \[start\]"),
        ('pst.magnitude="activation"', "changes scores. Remove it"),
        ('pst.update_form="spp"', only_low_rank("schedule.solves = 2", "spp")),
        ('pst.pattern="global"', 'pattern "global" pools several'),
        ("model.base_bits=8", "base_bits = 8 quantises"),
        ("distillation.weight=0.5", "Name a dense model in distillation.teacher"),
        ("schedule.solves=20", "the ramp has 12 steps, fewer than 4 for each. Fix: schedule.solves = 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_run("tests/data/world_size.toml", [*SOLVES, setting]).make_schedules(20)


def test_scripts_cannot_solve():
    with pytest.raises(InputError, match=r"MaskUpdater does not\. Give it solves = 0"):
        MaskUpdater(torch.nn.Linear(1, 1), CubicSchedule(num_steps=9, solves=1))
