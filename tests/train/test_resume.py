"""A run that was stopped goes on as if it had not been: on the same ranks to the bit, on others with the same masks."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.data import labelled as data
from pst_ds.masks.update import mask_stats
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train.resume import require_same_run
from pst_ds.train.run import prepare, train_prepared
from tests.train.stopping import stopping

STOP_AT, NUM_STEPS = 9, 20
EARLY, SHORT, OF_SHORT = 5, 14, "train.num_steps=14"
"""Where many runs are stopped, and how long they are: between two log lines, and three mask updates before the end."""
KINDS = ("master", "exp_avg", "exp_avg_sq")
STAGES = {
    "local": "",
    "0": '{"zero_optimization": {"stage": 0}}',
    "1": '{"zero_optimization": {"stage": 1}}',
    "2": '{"zero_optimization": {"stage": 2}}',
    "3": '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}',
    "3-persistent": '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100000}}',
    "3-offload": '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}',
}


def _settings(folder, stage, *more):
    """A run with dropout, clipping and a log line in every third step, so that a stop falls between two."""
    config = ""
    if STAGES[stage]:
        path = Path(folder).parent / f"stage-{stage}-{rank()}.json"
        path.write_text(STAGES[stage])
        config = str(path)
    return [
        f"output_dir={json.dumps(str(folder))}", f"deepspeed_config={config}", "model.dropout=0.1",
        "train.log_interval=3", "eval.interval=4", "schedule.cooldown_fraction=0.3", "checkpoint.interval=4", *more,
    ]  # fmt: skip


def _train(folder, stage, *more, resume=False):
    run = load_run("tests/data/world_size.toml", _settings(folder, stage, *more))
    prepared = prepare(run, LaunchEnvironment(rank(), world_size(), rank()))
    return train_prepared(prepared, resume=resume, quiet=True)


def _stopped(folder, stage, *more, at=STOP_AT, resume=False):
    """Train until a signal on the last rank asks to stop at batch ``at``; the message."""
    with stopping(at) as caught:
        _train(folder, stage, *more, resume=resume)
    return str(caught.value)


def _lines(folder, *dropped):
    """metrics.jsonl without times, and without the lines that only a stopped run has."""
    times = {"seconds", "tokens_per_second", "tokens_per_second_per_rank", "data_wait", "peak_memory_bytes"}
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]

    def kept(name):
        return name not in times and not name.startswith(("time/", "ranks/", "bytes_"))

    lines = [line for line in lines if line["event"] not in ("checkpoint", "straggler")]
    return [{k: v for k, v in line.items() if kept(k)} for line in lines]


def _values(folder, name="final"):
    """All that a checkpoint holds of the tensors, whole."""
    checkpoint = read_checkpoint((Path(folder) / "checkpoints" / name).resolve())
    shapes = checkpoint.contents.trained
    found = {
        f"{kind} {n}": checkpoint.values(n, kind, 0, torch.Size(shape).numel())
        for n, shape in shapes.items()
        for kind in KINDS
    }
    found |= {f"scales {n}": scales for n, scales in checkpoint.scales.items()}
    return found | {f"mask {n}": bits for n, bits in checkpoint.masks.items()}


def _differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def _go_on(folder, stage, *more):
    return _train(folder, stage, *more, resume=True)


def _assert_same_run(folder, *outcomes, at=STOP_AT, num_steps=NUM_STEPS):
    for whole, said, resumed in zip(*outcomes, strict=True):
        assert f"stopped by SIGUSR1 after step {at} of {num_steps}, saved in {folder}/stopped" in said
        assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}
    assert _lines(folder / "whole") == _lines(folder / "stopped")
    assert _differing(_values(folder / "whole"), _values(folder / "stopped")) == []
    assert _differing(_values(folder / "whole", "best"), _values(folder / "stopped", "best")) == []


@pytest.mark.parametrize("method", ["pst", "magnitude", "dense"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.few(1)
def test_a_stopped_run_ends_as_an_uninterrupted_one_on_one_process(tmp_path, method, precision):
    more = (f"method={method}", f"train.precision={precision}", "train.gradient_accumulation_steps=2")
    whole = _train(tmp_path / "whole", "local", *more)
    said = _stopped(tmp_path / "stopped", "local", *more)
    _assert_same_run(tmp_path, [whole], [said], [_train(tmp_path / "stopped", "local", *more, resume=True)])


@pytest.mark.zero3
@pytest.mark.parametrize(
    ("stage", "precision"),
    [("0", "fp32"), ("0", "bf16"), ("1", "bf16"), ("2", "fp32"), ("3", "bf16"), ("3-persistent", "fp32"),
     ("3-offload", "bf16")],
)  # fmt: skip
@pytest.mark.few(3)
def test_a_stopped_run_ends_as_an_uninterrupted_one_on_two_ranks(run_ranks, tmp_path, stage, precision):
    more = (f"train.precision={precision}", 'pst.pattern="2:4"', "schedule.final_sparsity=0.5", OF_SHORT)
    whole = run_ranks(_train, 2, tmp_path / "whole", stage, *more)
    said = run_ranks(partial(_stopped, at=EARLY), 2, tmp_path / "stopped", stage, *more)
    resumed = run_ranks(_go_on, 2, tmp_path / "stopped", stage, *more)
    _assert_same_run(tmp_path, whole, said, resumed, at=EARLY, num_steps=SHORT)


ROUNDED = (
    'quantization.values="int4"', 'quantization.group="row"', "quantization.interval=4",
    "schedule.cooldown_fraction=0.7",
)  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "ranks", "precision"),
    [("gmp", 1, "bf16"), ("pst", 1, "bf16"), pytest.param("pst", 2, "fp32", marks=pytest.mark.zero3)],
)
def test_a_run_that_rounds_goes_on_with_its_scales(run_ranks, tmp_path, method, ranks, precision):
    """It is stopped after step 9, between the searches after 6 and 10."""
    stage, more = "local" if ranks == 1 else "3", (*ROUNDED, f"method={method}", f"train.precision={precision}")
    whole = run_ranks(_train, ranks, tmp_path / "whole", stage, *more)
    said = run_ranks(_stopped, ranks, tmp_path / "stopped", stage, *more)
    _assert_same_run(tmp_path, whole, said, run_ranks(_go_on, ranks, tmp_path / "stopped", stage, *more))
    scales = read_checkpoint(tmp_path / "whole" / "checkpoints" / "final").scales
    assert all(bool((of_layer != 1.0).all()) for of_layer in scales.values())
    searches = [line["step"] for line in _lines(tmp_path / "whole") if line["event"] == "rounding"]
    assert searches == [6, 10, 14, 18]


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize(("ranks", "stage"), [(3, "3"), (1, "local")])
def test_scales_are_read_on_other_ranks(run_ranks, tmp_path, ranks, stage):
    more = (*ROUNDED, "quantization.interval=8")  # none is searched after the steps that both stop after, 9 and 10
    run_ranks(_stopped, 2, tmp_path / "run", "3", *more)
    before = _values(tmp_path / "run", "latest")
    run_ranks(_stopped_at_once, ranks, tmp_path / "run", stage, *more)
    after = _values(tmp_path / "run", "latest")
    assert read_checkpoint((tmp_path / "run" / "checkpoints" / "latest").resolve()).state.step == STOP_AT + 1
    differing = _differing(before, after)
    assert any(name.startswith("master") for name in differing)
    assert not [name for name in differing if name.startswith("scales")]


def _stopped_at_once(folder, stage, *more):
    return _stopped(folder, stage, *more, at=1, resume=True)


SOME_LAYERS = (
    "schedule.final_sparsity=0.0", "schedule.update_interval=2",
    'pst.overrides=[{modules = ["intermediate.dense"], final_sparsity = 0.5}]',
)  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.zero3)])
def test_a_run_that_prunes_some_layers_alone_ramps_and_goes_on(run_ranks, tmp_path, ranks):
    stage = "local" if ranks == 1 else "3"
    whole = run_ranks(_train, ranks, tmp_path / "whole", stage, *SOME_LAYERS)
    said = run_ranks(_stopped, ranks, tmp_path / "stopped", stage, *SOME_LAYERS)
    _assert_same_run(tmp_path, whole, said, run_ranks(_go_on, ranks, tmp_path / "stopped", stage, *SOME_LAYERS))
    masks = read_checkpoint(tmp_path / "whole" / "checkpoints" / "final").masks
    sizes = {name: 8 * len(bits) for name, bits in masks.items()}
    for name, bits in masks.items():
        zeros = sizes[name] - sum(int(b).bit_count() for b in bits.tolist())
        assert zeros == ("intermediate.dense" in name) * sizes[name] // 2, name
    share = sum(size for name, size in sizes.items() if "intermediate.dense" in name) / sum(sizes.values())
    settings = _settings(tmp_path / "whole", "local", *SOME_LAYERS)
    ramp = load_run("tests/data/world_size.toml", settings).make_schedules(20).masks
    updates = [line for line in _lines(tmp_path / "whole") if line["event"] == "mask_update"]
    assert [line["step"] for line in updates] == [step for step in range(21) if ramp.updates_masks_at(step)]
    for line in updates:
        left = (ramp.ramp_end - line["step"]) / (ramp.ramp_end - ramp.ramp_start)
        assert line["sparsity/target"] == 0.0
        assert line["sparsity/actual"] == pytest.approx(share * 0.5 * (1.0 - left**3), abs=1e-3)


def _masks_at_load(folder, stage, more):
    """The masks in a model that a checkpoint was loaded into, and what the run then ends with."""
    from pst_ds.train import run as run_module

    seen = {}
    restore = run_module.restore

    def spied(engine, checkpoint, run):
        state = restore(engine, checkpoint, run)
        masks = mask_stats(engine.module)
        seen.update(step=state.step, checksum=masks.checksum, layers=len(pst_layers(engine.module)))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "restore", spied)
        result = _train(folder, stage, *more, resume=True)
    return seen, result


def _batches_of_rank(folder, stage, more):
    """Which examples every global batch had, seen by this rank, and how the run ended."""
    batches = []
    order = data.GlobalBatches.micro_batches
    with pytest.MonkeyPatch.context() as patch:
        noted = lambda self, batch, *more: (batches.append(list(batch)), order(self, batch, *more))[1]  # noqa: E731
        patch.setattr(data.GlobalBatches, "micro_batches", noted)
        return (*_masks_at_load(folder, stage, more), batches)


WITHOUT_DROPOUT = ("model.dropout=0.0", "eval.interval=0", OF_SHORT)
"""Dropout differs by rank."""


def _step_lines(folder):
    return {line["step"]: line for line in _lines(folder) if line["event"] == "step"}


@pytest.fixture(scope="module")
def steps_of_whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        _train(folder / "run", "local", *WITHOUT_DROPOUT)
    return _step_lines(folder / "run")


@pytest.mark.zero3
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, "3"), (1, "local")), ((2, "2"), (2, "3")), ((2, "3"), (2, "2")), ((2, "3"), (3, "3")),
     ((1, "local"), (2, "3")), ((3, "1"), (1, "3")), ((2, "0"), (2, "1"))],
)  # fmt: skip
@pytest.mark.few(1)
def test_a_run_goes_on_with_other_ranks_and_stages(run_ranks, steps_of_whole, tmp_path, before, after):
    stopped = tmp_path / "stopped"
    run_ranks(partial(_stopped, at=EARLY), before[0], stopped, before[1], *WITHOUT_DROPOUT)
    saved = read_checkpoint((stopped / "checkpoints" / "latest").resolve())
    outcomes = run_ranks(_batches_of_rank, after[0], stopped, after[1], WITHOUT_DROPOUT)
    texts = [json.loads(line)["text"] for line in Path("tests/data/train.jsonl").read_text().splitlines()]
    lengths = [len(text.split()) + 2 for text in texts]
    expected = data.GlobalBatches(lengths, 24, 7).epoch(0) + data.GlobalBatches(lengths, 24, 7).epoch(1)
    for seen, result, batches in outcomes:
        assert seen["step"] == EARLY
        assert seen["checksum"] == saved.state.progress["masks"]["checksum"]
        assert result["steps"] == SHORT
        assert batches[: SHORT - EARLY] == expected[EARLY:SHORT]  # a few more are made ahead
    of_resumed = _step_lines(stopped)
    assert steps_of_whole.keys() == of_resumed.keys()
    for step, line in steps_of_whole.items():
        assert of_resumed[step]["loss"] == pytest.approx(line["loss"], rel=2e-4), step
        assert of_resumed[step]["sparsity/actual"] == line["sparsity/actual"]


@pytest.mark.thorough
def test_a_run_can_be_stopped_again_and_again(tmp_path):
    _train(tmp_path / "whole", "local")
    _stopped(tmp_path / "stopped", "local", at=3)
    for _ in range(3):
        _stopped(tmp_path / "stopped", "local", at=4, resume=True)
    _train(tmp_path / "stopped", "local", resume=True)
    assert _lines(tmp_path / "whole") == _lines(tmp_path / "stopped")
    assert _differing(_values(tmp_path / "whole"), _values(tmp_path / "stopped")) == []


def test_a_finished_run_is_finished_again(tmp_path):
    whole = _train(tmp_path / "run", "local")
    before = _lines(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()  # killed before it was written
    again = _train(tmp_path / "run", "local", resume=True)
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == again
    assert _lines(tmp_path / "run") == before


@pytest.mark.thorough
def test_links_that_a_crash_left_behind_are_mended(tmp_path):
    """Killed after the last checkpoint had its name, before any link moved; and one to a checkpoint that is no more."""
    _train(tmp_path / "run", "local", "checkpoint.keep_last=1")
    folder = tmp_path / "run" / "checkpoints"
    links = {name: (folder / name).readlink() for name in ("latest", "best", "final")}
    names = sorted(path.name for path in folder.iterdir())
    shutil.copytree(folder / "step-00000020", folder / "step-00000012")  # superfluous
    for name in links:
        (folder / name).unlink()
    (folder / "best").symlink_to("step-00000099")
    _train(tmp_path / "run", "local", "checkpoint.keep_last=1", resume=True)
    assert {name: (folder / name).readlink() for name in links} == links
    assert sorted(path.name for path in folder.iterdir()) == names


def test_with_nothing_saved_a_resumed_run_begins(tmp_path, capsys):
    run = load_run("tests/data/world_size.toml", _settings(tmp_path / "run", "local", "train.num_steps=2"))
    prepared = prepare(run, LaunchEnvironment(0, 1, 0))
    assert train_prepared(prepared, resume=True)["steps"] == 2
    assert "nothing was saved in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        _stopped(folder / "run", "local")
    return folder / "run"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seed=8", "seed = 8: the run in"),
        ("pst.seed=0", "pst.seed = 0: the run in"),
        ("train.num_steps=30", "train.num_steps = 30: the run in"),
        ("train.batch_size=12", "has 24, and resuming cannot change this setting"),
        ("schedule.final_sparsity=0.7", "schedule.final_sparsity = 0.7: the run in"),
        ("pst.score_rank=4", "pst.score_rank = 4: the run in"),
        ('pst.pattern="2:4"', "schedule.final_sparsity = 0.8, but pst.pattern"),
        ("data.train=tests/data/validation.jsonl", "differs from the data of the run in"),
        ("data.label_names=['good', 'bad']", "tokens, labels or data.document_mask have changed"),
    ],
)
def test_another_run_is_not_taken_for_this_one(stopped, tmp_path, setting, said):
    folder = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    with pytest.raises(ConfigError) as caught:
        _go_on(folder, "local", setting)
    assert said in str(caught.value)
    assert (folder / "checkpoints" / f"step-{STOP_AT:08d}").is_dir()


def test_the_seed_that_counts_is_compared_not_where_it_stands(stopped):
    checkpoint = read_checkpoint(stopped / "checkpoints" / "latest")
    state = checkpoint.state
    num_examples = len(Path("tests/data/train.jsonl").read_text().splitlines())

    def changes(*overrides):
        run = load_run("tests/data/world_size.toml", _settings(stopped, "local", *overrides))
        run = run.with_rates(width=32, num_steps=run.train.num_steps, num_examples=num_examples, num_labels=2)
        return require_same_run(checkpoint, run, state.base_fingerprint, state.progress["data_digest"])

    assert state.progress["run"]["pst"]["seed"] == 7
    assert changes() == changes("pst.seed=7") == []
    with pytest.raises(ConfigError, match=r"^seed = 8: the run in"):  # not the pst.seed that follows it
        changes("seed=8")
    state.progress["run"]["pst"]["seed"] = 0  # as runs had it when factors did not follow the seed
    assert changes("pst.seed=0") == []
    with pytest.raises(ConfigError, match=r"^pst\.seed = 7: the run in .* has 0"):
        changes()


def test_rates_may_be_changed_and_it_is_said(stopped, tmp_path, capsys):
    folder = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    changed = ("train.update_learning_rate=1e-4", "eval.interval=5", "data.label_names=['bad', 'good']")
    run = load_run("tests/data/world_size.toml", _settings(folder, "local", *changed))
    train_prepared(prepare(run, LaunchEnvironment(0, 1, 0)), resume=True)
    said = capsys.readouterr().err
    assert f"resuming from {folder}/checkpoints/step-{STOP_AT:08d}, after step {STOP_AT}" in said
    assert "train.update_learning_rate = 0.0001 (was 0.00251984" in said


def test_a_base_model_of_other_values_is_refused(stopped, tmp_path):
    folder = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    base = Path(shutil.copytree("tests/data/tiny-bert", tmp_path / "base"))
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (base / "model.safetensors").write_bytes(raw)
    with pytest.raises(ConfigError, match="is not the base model that"):
        _go_on(folder, "local", f"model.path={json.dumps(str(base))}")
