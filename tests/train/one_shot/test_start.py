"""A run that prunes its own base before the first step, against ``pst-ds prune`` and a run from its folder."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run, load_run_folder
from pst_ds.errors import InputError
from pst_ds.parallel import stop_signals
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.progress import heard_by
from pst_ds.train.run import StoppedError, prepare, train_prepared

RUN_FILE = "tests/data/world_size.toml"
SETTINGS = ("train.num_steps=4", "schedule.initial_sparsity=0.5", "deepspeed_config=", "eval.interval=0")
START = ("start.method=alps", "start.samples=24", "start.reconstruct=1")


def _run(folder, *more):
    return load_run(RUN_FILE, [*SETTINGS, f"output_dir={json.dumps(str(folder))}", *more])


def _train(folder, *more, **how):
    prepared = prepare(_run(folder, *more), LaunchEnvironment(rank(), world_size(), rank()))
    return train_prepared(prepared, quiet=True, **how)


def _trained(folder):
    """The masters and the masks of the last checkpoint."""
    checkpoint = read_checkpoint((Path(folder) / "checkpoints" / "final").resolve())
    shapes = checkpoint.contents.trained
    values = {n: checkpoint.values(n, "master", 0, torch.Size(shape).numel()) for n, shape in shapes.items()}
    return values | {f"mask {name}": bits for name, bits in checkpoint.masks.items()}


def _differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def _started(run_ranks, tmp_path, ranks):
    run_ranks(_train, ranks, str(tmp_path / str(ranks)), *START, f"deepspeed_config={_zero3(tmp_path)}")
    return tmp_path / str(ranks)


@pytest.mark.thorough
def test_it_is_the_run_from_the_folder_that_prune_writes_and_its_folder_says_so(tmp_path, alone):
    _train(tmp_path / "run", *START)
    words = ["--method", "alps", "--samples", "24", "--reconstruct", "1", "--sparsity", "0.5", "--seed", "7", "--quiet"]
    assert main(["prune", RUN_FILE, *words, "--out", str(tmp_path / "pruned")]) == 0
    begun, pruned = (
        load_file(path / "model.safetensors") for path in (tmp_path / "run" / "start", tmp_path / "pruned")
    )
    assert _differing(begun, pruned) == []
    _train(tmp_path / "from-folder", f"model.path={json.dumps(str(tmp_path / 'pruned'))}")
    assert _differing(_trained(tmp_path / "run"), _trained(tmp_path / "from-folder")) == []

    run = load_run_folder(tmp_path / "run")
    assert (run.model.path, run.start.method) == (str(tmp_path / "run" / "start"), "none")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert main(["export", str(tmp_path / "moved"), "--out", str(tmp_path / "export")]) == 0
    assert main(["verify", str(tmp_path / "export"), "--against", str(tmp_path / "moved")]) == 0
    assert "A sparse version of tests/data/tiny-bert." in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.few(1)
@pytest.mark.parametrize(("share", "pattern"), [(0.5, "matrix"), (0.7, "row")])
def test_a_language_model_begins_with_shares_by_saliency(tmp_path, alone, share, pattern):
    begun = ("start.method=wanda", "start.budgets=saliency", "start.samples=12", "pst.pattern=global")
    shares = (f"schedule.initial_sparsity={share}", f"schedule.final_sparsity={share}")
    run = load_run(
        "tests/data/causal_lm.toml", ["deepspeed_config=", f"output_dir={json.dumps(str(tmp_path))}", *begun, *shares]
    )
    prepared = prepare(run, LaunchEnvironment(rank(), world_size(), rank()))
    train_prepared(prepared, quiet=True)
    record = json.loads((tmp_path / "start" / "pruning.json").read_text())
    assert (record["budgets"], record["pattern"]) == ("saliency", pattern)
    in_rows = [
        (weight == 0).sum(1).unique().numel()
        for name, weight in load_file(tmp_path / "start" / "model.safetensors").items() if name.endswith("_proj.weight")
    ]  # fmt: skip
    assert (max(in_rows) == 1) is (pattern == "row")


def test_a_plan_names_it(tmp_path, capsys):
    words = [
        word
        for setting in (*SETTINGS, *START, f"output_dir={json.dumps(str(tmp_path))}")
        for word in ("--set", setting)
    ]
    assert main(["plan", RUN_FILE, *words]) == 0
    assert f"all ranks prune to 0.5 by alps on 24 examples: {tmp_path / 'start'}" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_run_that_goes_on_does_not_prune_again_and_another_start_is_refused(tmp_path, alone, capsys):
    _train(tmp_path, *START)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "start").iterdir()}
    whole = _trained(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    _train(tmp_path, *START)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "start").iterdir()} == files
    assert _differing(whole, _trained(tmp_path)) == []
    _train(tmp_path, *START, resume=True)
    with pytest.raises(ConfigError, match="has checkpoints up to"):
        _train(tmp_path, *START)
    with pytest.raises(ConfigError, match=r"does not match .*, and the checkpoints in .* continue from it"):
        _train(tmp_path, *START, "start.samples=23", resume=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "start").iterdir()} == files


@pytest.mark.thorough
def test_a_start_that_was_not_finished_or_is_of_other_settings_is_made_anew(tmp_path, alone):
    _train(tmp_path / "whole", *START)
    _train(tmp_path / "other", *START, "start.samples=12")
    _train(tmp_path / "layers", *START, "pst.exclude_modules=['query']")
    for name, damage in (("other", None), ("layers", None), ("damaged", b"{")):
        if damage:
            shutil.copytree(tmp_path / "whole" / "start", tmp_path / name / "start")
            (tmp_path / name / "start" / "pruning.json").write_bytes(damage)
        else:
            shutil.rmtree(tmp_path / name / "checkpoints")
        _train(tmp_path / name, *START)
        assert _differing(_trained(tmp_path / "whole"), _trained(tmp_path / name)) == []


@pytest.mark.zero3
def test_ranks_begin_with_the_same_zeros_as_one_process(run_ranks, tmp_path):
    one, two = (_started(run_ranks, tmp_path, ranks) for ranks in (1, 2))
    assert _differing(*(load_file(folder / "start" / "model.safetensors") for folder in (one, two))) == []
    masks = [{n: bits for n, bits in _trained(folder).items() if n.startswith("mask ")} for folder in (one, two)]
    assert _differing(*masks) == []


def _refused(folder, *more):
    with pytest.raises(InputError) as caught:
        _train(folder, *more)
    return str(caught.value)


@pytest.mark.zero3
def test_what_cannot_be_pruned_ends_all_ranks_with_one_message(run_ranks, tmp_path):
    """A folder whose class has weights that it lacks, which no run needs."""
    base = Path(shutil.copytree("tests/data/tiny-bert", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["BertForPreTraining"]}))
    settings = (*START, f"model.path={json.dumps(str(base))}", f"deepspeed_config={_zero3(tmp_path)}")
    said = run_ranks(_refused, 2, str(tmp_path / "new"), *settings)
    assert said[0].startswith(f"start.method = \"alps\": model.path = '{base}' lacks cls.predictions")
    assert said == said[:1] * 2
    assert not (tmp_path / "new").exists()


def test_of_little_text_all_is_looked_at(tmp_path, alone):
    _train(tmp_path, *START, "start.samples=2000")
    assert json.loads((tmp_path / "start" / "pruning.json").read_text())["samples"] == 240


def _zero3(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    return path


def _stopped_after(blocks, folder, *more):
    """What ends a run of which each rank gets SIGTERM after so many blocks of its start, and how many there were."""
    seen = 0

    def count():
        nonlocal seen
        seen += 1
        if seen == blocks:
            signal.raise_signal(signal.SIGTERM)

    stop_signals.install()
    with heard_by(count):
        try:
            _train(folder, *more)
        except StoppedError as error:
            return str(error), seen
    return "", seen


@pytest.mark.thorough
@pytest.mark.zero3
def test_a_signal_ends_a_start_on_all_ranks_and_the_next_continues(run_ranks, tmp_path):
    settings = (*START, f"deepspeed_config={_zero3(tmp_path)}")
    (first, blocks), (other, _) = run_ranks(_stopped_after, 2, 1, str(tmp_path / "run"), *settings)
    assert first == other
    assert first.startswith("stopped by SIGTERM while")
    assert blocks == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"run.lock", ".start.unfinished"}
    _train(tmp_path / "run", *START)
    _train(tmp_path / "undisturbed", *START)
    assert _differing(_trained(tmp_path / "run"), _trained(tmp_path / "undisturbed")) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["start.samples=12"], 'does nothing with start.method = "none"'),
        (["method=lora"], "method = 'lora' does not"),
        (["method=masked-lora"], 'Fix: pst.initial_mask = "zeros"'),
        (["schedule.initial_sparsity=0.0"], "schedule.initial_sparsity, which is 0"),
        (
            ["pst.pattern=2:4", "schedule.final_sparsity=0.5", "schedule.initial_sparsity=0.25"],
            "initial_sparsity = 0.5",
        ),
        (['pst.overrides=[{modules="query", final_sparsity=0.6}]'], "a separate final_sparsity"),
    ],
)
def test_a_start_that_the_run_would_not_begin_with_is_refused(tmp_path, settings, said):
    method = [] if settings[0].startswith("start.") else ["start.method=alps"]
    with pytest.raises(ConfigError) as caught:
        _run(tmp_path, *method, *settings)
    assert said in str(caught.value)


def test_a_model_that_was_its_own_teacher_is_taught_by_what_was_not_pruned(tmp_path):
    run = _run(tmp_path, "start.method=alps", "distillation.weight=0.5").started()
    assert run.distillation.teacher == "tests/data/tiny-bert"
    assert run.model.path == str(tmp_path / "start")
    assert run.started() == run


@pytest.mark.zero3
def test_one_run_file_fine_tunes_cuts_and_recovers(run_ranks, tmp_path, alone, capsys):
    tuned = ("finetune.method=lora", "finetune.num_steps=2", "distillation.weight=0.5")
    tuned += ("distillation.teacher=finetuned",)
    cut = (*tuned, "start.method=channels", "start.ffn=0.5", "start.samples=24", "schedule.initial_sparsity=0.0")
    words = [word for setting in (*SETTINGS, *cut) for word in ("--set", setting)]
    run = tmp_path / "run"
    assert main(["plan", RUN_FILE, *words, "--json", "--set", f"output_dir={run}"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    run_ranks(_train, 2, str(run), *cut, f"deepspeed_config={_zero3(tmp_path)}")
    record = json.loads((run / "start" / "pruning.json").read_text())
    assert planned["parameters"] - planned["trained_parameters"] < record["parameters"] < record["parameters_before"]
    before, after = (load_file(run / name / "model.safetensors") for name in ("finetuned/model", "start"))
    name = next(name for name in after if name.endswith("intermediate.dense.weight"))
    assert len(before[name]) == 2 * len(after[name]) == 2 * record["config"]["intermediate_size"]
    rows = {tuple(row) for row in before[name].float().tolist()}
    assert all(tuple(row) in rows for row in after[name].float().tolist())
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    assert main(["verify", str(tmp_path / "export"), "--against", str(run)]) == 0
    assert load_file(tmp_path / "export" / "model.safetensors")[name].shape == after[name].shape
