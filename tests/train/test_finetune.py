"""Runs that fine-tune their base first, against the same steps as separate commands, interrupted anywhere."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run, load_run_folder
from pst_ds.errors import InputError
from pst_ds.file_names import FINETUNED, STEP_FOLDER
from pst_ds.parallel import sharding, stop_signals
from pst_ds.parallel.engine import release
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.progress import heard_by
from pst_ds.train import run as train_module
from pst_ds.train.run import StoppedError, prepare, train_prepared

CLASSIFIER, DECODER = "tests/data/world_size.toml", "tests/data/causal_lm.toml"
SETTINGS = ("train.num_steps=4", "deepspeed_config=", "checkpoint.interval=2", "checkpoint.keep_last=9")
FINETUNE = ("finetune.method=lora", "finetune.num_steps=4")
TAUGHT = ("distillation.weight=0.5", "distillation.teacher=finetuned")
START = ("start.method=wanda", "start.samples=12", "schedule.initial_sparsity=0.5")


def _newest_step(folder):
    """Of the checkpoints in a run's folder."""
    return int((folder / "checkpoints" / "latest").readlink().name.removeprefix("step-"))


def _run(run_file, folder, *more):
    return load_run(run_file, [*SETTINGS, f"output_dir={json.dumps(str(folder))}", *more])


def _train(run_file, folder, *more, **how):
    prepared = prepare(_run(run_file, folder, *more), LaunchEnvironment(rank(), world_size(), rank()))
    return train_prepared(prepared, **{"quiet": True, **how})


def _trained(folder):
    """Masters, moments and masks of the last checkpoint."""
    checkpoint = read_checkpoint((Path(folder) / "checkpoints" / "final").resolve())
    shapes = {name: torch.Size(shape).numel() for name, shape in checkpoint.contents.trained.items()}
    kinds = ("master", "exp_avg", "exp_avg_sq")
    values = {f"{kind} {n}": checkpoint.values(n, kind, 0, numel) for n, numel in shapes.items() for kind in kinds}
    return values | {f"mask {name}": bits for name, bits in checkpoint.masks.items()}


def _differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("run_file", "method", "more"),
    [
        (CLASSIFIER, "lora", (*TAUGHT, *START)),
        (DECODER, "lora", ("distillation.weight=0.5", "pst.update_rank=2", *START)),
        (CLASSIFIER, "dense", TAUGHT),
        (DECODER, "dense", ("method=gmp", *TAUGHT)),
    ],
)
def test_the_stages_equal_separate_commands(tmp_path, alone, run_file, method, more, capsys):
    whole, first, model, rest = (tmp_path / name for name in ("whole", "first", "model", "rest"))
    _train(run_file, whole, f"finetune.method={method}", "finetune.num_steps=3", *more)
    ranks = [setting for setting in more if setting.startswith("pst.")]
    _train(run_file, first, f"method={method}", "train.num_steps=3", *ranks)
    assert _differing(_trained(whole / "finetuned"), _trained(first)) == []
    assert main(["export", str(first), "--out", str(model)]) == 0
    assert _differing(*(load_file(f / "model.safetensors") for f in (whole / "finetuned" / "model", model))) == []
    named = [setting.replace("=finetuned", f"={model}") for setting in more]
    _train(run_file, rest, f"model.path={model}", *named)
    assert _differing(_trained(whole), _trained(rest)) == []

    moved = Path(shutil.move(whole, tmp_path / "moved"))
    run = load_run_folder(moved)
    assert run.model.path.startswith(str(moved))
    assert (run.finetune.method, run.distillation.teacher) == ("none", "finetuned" if "distil" in str(more) else "")
    assert main(["train", str(moved), "--resume"]) == 0
    assert _differing(_trained(moved), _trained(rest)) == []
    for words in (["eval", str(moved)], ["inspect", str(moved)]):
        assert main(words) == 0, words
    assert main(["export", str(moved), "--out", str(tmp_path / "export")]) == 0
    assert main(["verify", str(tmp_path / "export"), "--against", str(moved)]) == 0
    base = "tests/data/tiny-bert" if run_file == CLASSIFIER else "tests/data/tiny-llama"
    assert f"A sparse version of {base}." in (tmp_path / "export" / "README.md").read_text()


def _zero3(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    return path


def _forget_after(step, folder):
    """Leave a run folder as a kill before its next checkpoint would."""
    for path in (folder / "checkpoints").iterdir():
        match = STEP_FOLDER.fullmatch(path.name)
        if match is None:
            path.unlink()
        elif int(match[1]) > step:
            shutil.rmtree(path)
    (folder / "result.json").unlink()


def _killed(whole, folder, where):
    """Copy a run, and leave what a kill ``where`` leaves."""
    shutil.copytree(whole, folder, symlinks=True)
    if where == "while pruned":
        _forget_after(2, folder)
        return folder
    for path in folder.iterdir():
        if path.name != "finetuned":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if where != "before the start":
        shutil.rmtree(folder / "finetuned" / "model")
    if where == "while fine-tuned":
        _forget_after(2, folder / "finetuned")
    return folder


@pytest.mark.zero3
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_run_killed_in_or_between_stages_ends_with_the_same_bits(run_ranks, tmp_path, ranks):
    settings = (*FINETUNE, *TAUGHT, *START, f"deepspeed_config={_zero3(tmp_path)}")
    run_ranks(_train, ranks, CLASSIFIER, str(tmp_path / "whole"), *settings)
    wanted, model = _trained(tmp_path / "whole"), load_file(tmp_path / "whole/finetuned/model/model.safetensors")
    for where in ("while fine-tuned", "before the export", "before the start", "while pruned"):
        folder = _killed(tmp_path / "whole", tmp_path / where, where)
        run_ranks(_resumed, ranks, CLASSIFIER, str(folder), *settings)
        assert _differing(model, load_file(folder / "finetuned/model/model.safetensors")) == [], where
        assert _differing(wanted, _trained(folder)) == [], where


def _resumed(*arguments):
    return _train(*arguments, resume=True)


def _held(engine_parts):
    """Numbers in the weights and shards of an engine, and parameters with optimizer state."""
    params, inner = engine_parts
    return sum(p.numel() + sharding.shard_of(p).values.numel() for p in params), len(inner.state)


def _held_before_and_after_release(*arguments):
    found = []

    def released(engine):
        parts = (list(engine.module.parameters()), engine.optimizer.optimizer)
        before = _held(parts)
        release(engine)
        found.append((before, _held(parts)))

    with mock.patch.object(train_module, "release", released):
        _train(*arguments)
    return found


@pytest.mark.zero3
@pytest.mark.thorough
def test_weights_and_moments_of_a_finished_stage_are_freed(run_ranks, tmp_path):
    settings = (*FINETUNE, f"deepspeed_config={_zero3(tmp_path)}")
    for stages in run_ranks(_held_before_and_after_release, 2, CLASSIFIER, str(tmp_path / "run"), *settings):
        assert len(stages) == 2
        assert all(numbers > 10_000 and moments > 0 for (numbers, moments), _ in stages)
        assert [after for _, after in stages] == [(0, 0)] * 2


def test_a_signal_while_it_fine_tunes_ends_the_run_which_resumes(tmp_path, alone):
    run = (CLASSIFIER, tmp_path / "run", *FINETUNE)
    stop_signals.install()
    seen = 0

    def stop():
        nonlocal seen
        seen += 1
        if seen == 2:
            signal.raise_signal(signal.SIGTERM)

    with heard_by(stop), pytest.raises(StoppedError, match=r"of 4, saved in .*finetuned.checkpoints"):
        _train(*run, quiet=False)
    stop_signals._asked_by = 0
    assert _newest_step(tmp_path / "run" / FINETUNED) in (1, 2, 3)
    with pytest.raises(InputError, match=r"finetune.method = \"lora\": output_dir = .* has checkpoints up to"):
        _train(*run)
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "moved"))
    assert main(["train", str(moved), "--resume"]) == 0
    assert (_newest_step(moved / FINETUNED), _newest_step(moved)) == (4, 4)
    _train(CLASSIFIER, tmp_path / "undisturbed", *FINETUNE)
    assert _differing(_trained(moved), _trained(tmp_path / "undisturbed")) == []


def test_other_settings_are_refused_once_the_run_has_checkpoints_and_else_need_a_restart(tmp_path, alone):
    run = (CLASSIFIER, tmp_path, *FINETUNE)
    _train(*run)
    with pytest.raises(ConfigError, match="has checkpoints up to"):
        _train(*run)
    for changed, said in (
        ("finetune.num_steps=3", "train.num_steps = 3"),
        ("finetune.method=dense", "method = 'dense'"),
        ("finetune.update_learning_rate=0.5", "train.update_learning_rate = 0.5"),
    ):
        for how in ("resume", "restart"):
            with pytest.raises(InputError, match=rf"which differs from \[finetune\]: {said}.*Restore"):
                _train(*run, changed, **{how: True})
    _train(*run, "train.gradient_clipping=0.5", resume=True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(InputError, match=r"train.num_steps = 3: the run in .*finetuned"):
        _train(*run, "finetune.num_steps=3", resume=True)
    _train(*run, "finetune.num_steps=3", restart=True)
    assert json.loads((tmp_path / "finetuned" / "model" / "pst_manifest.json").read_text())["step"] == 3


def test_a_plan_adds_its_time_and_memory(tmp_path, verb):
    words = [w for s in (*SETTINGS, f"output_dir={tmp_path}") for w in ("--set", s)]
    alone, tuned = (
        verb("plan", CLASSIFIER, *words, *more)
        for more in ([], ["--set", "finetune.method=dense", "--set", "finetune.num_steps=8"])
    )
    stage = tuned["finetuning"]
    assert alone["finetuning"] is None
    assert (stage["num_steps"], stage["trained_parameters"]) == (8, stage["parameters"])
    assert tuned["verdict"]["hours"] == pytest.approx(alone["verdict"]["hours"] + stage["verdict"]["hours"])
    assert tuned["verdict"]["needed_bytes"] == max(plan["verdict"]["needed_bytes"] for plan in (alone, stage))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["finetune.num_steps=3"], 'does nothing with finetune.method = "none"'),
        (["finetune.method=pst"], "must be one of 'none', 'dense', 'lora'"),
        (["finetune.method=lora"], "set one of them above 0"),
        ([*FINETUNE, "finetune.num_epochs=1.0"], "set one of them above 0"),
        (["finetune.method=dense", "finetune.num_steps=3", "model.base_bits=8"], "model.base_bits = 8"),
    ],
)
def test_a_stage_that_cannot_train_is_refused(tmp_path, settings, said):
    with pytest.raises(ConfigError) as caught:
        _run(CLASSIFIER, tmp_path, *settings)
    assert said in str(caught.value)
