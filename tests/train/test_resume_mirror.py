"""Runs whose checkpoints are mirrored: killed, moved and resumed they end as an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from pst_ds import remote_folder
from pst_ds.checkpoint.mirror import copies
from pst_ds.checkpoint.retention import newest_valid
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.file_names import step_folders
from pst_ds.parallel.ranks import world_size
from pst_ds.remote_folder import RemoteFolder
from pst_ds.train import loop as loop_module
from tests.train.stopping import train_here

RUN_FILE = "tests/data/world_size.toml"
STEPS = 12
WAIT_SECONDS = 120.0


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote_folder, "_PAUSES_SECONDS", (0.0,))


def _settings(folder, mirror=""):
    return [
        f"output_dir={json.dumps(str(folder))}", f"checkpoint.mirror={json.dumps(str(mirror))}",
        "checkpoint.interval=3", "model.dropout=0.1", f"train.num_steps={STEPS}", "eval.interval=4",
    ]  # fmt: skip


def _words(folder, mirror):
    """The settings as a command line has them."""
    settings = [*_settings(folder, mirror), "deepspeed_config="]
    return [word for setting in settings for word in ("--set", setting)]


def _train(folder, mirror="", *, resume=False, stop_at=0):
    settings = _settings(folder, mirror)
    return train_here(RUN_FILE, settings, resume=resume, stop_at=stop_at, ranks=world_size() > 1)


def _events(folder, name):
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def _losses(folder):
    return {line["step"]: line["losses"] for line in _events(folder, "step")}


def _masks(folder):
    return {line["step"]: line["mask_checksum"] for line in _events(folder, "mask_update")}


def _without_seconds(result):
    return {**result, "seconds": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run without a mirror; its folder and its result."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, _train(folder)


def _train_and_die(folder, mirror, files):
    """Train, and be killed in the middle of the mirror's file number ``files``."""
    put = RemoteFolder.put
    calls = iter(range(1, 10**6))

    def dying(self, path, name):
        if next(calls) < files:
            put(self, path, name)
            return
        data = path.read_bytes()
        self._write(name, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    RemoteFolder.put = dying
    _train(folder, mirror)


def _killed(folder, mirror, files):
    process = multiprocessing.get_context("fork").Process(target=_train_and_die, args=(folder, mirror, files))
    process.start()
    process.join(WAIT_SECONDS)
    assert process.exitcode == -signal.SIGKILL


def test_a_run_killed_while_it_copies_resumes_from_the_mirror(whole, imported_by_ranks, tmp_path, capsys):
    folder, mirror = tmp_path / "run", tmp_path / "mirror"
    _killed(folder, mirror, files=3)
    remote = RemoteFolder(str(mirror), "checkpoint.mirror")
    done = copies(remote)
    assert 1 <= len(done) < len(remote.names())  # one is there in part
    shutil.rmtree(folder)
    result = _train(folder, mirror, resume=True)
    assert _without_seconds(result) == _without_seconds(whole[1])
    first = int(done[0][5:]) + 1
    losses, masks = _losses(whole[0]), _masks(whole[0])
    assert _losses(folder) == {step: values for step, values in losses.items() if step >= first}
    assert _masks(folder) == {step: value for step, value in masks.items() if step >= first}
    # the mirror has what the run has, and nothing in part
    kept = [path.name for path in step_folders(folder / "checkpoints")]
    assert copies(remote) == kept
    assert set(remote.names()) == set(kept)
    assert "WARNING" not in capsys.readouterr().err


def test_a_local_checkpoint_that_is_newer_is_used_and_copied(whole, imported_by_ranks, tmp_path):
    folder, mirror = tmp_path / "run", tmp_path / "mirror"
    _killed(folder, mirror, files=2)
    remote = RemoteFolder(str(mirror), "checkpoint.mirror")
    newest, _ = newest_valid(folder / "checkpoints")
    assert newest.folder.name not in copies(remote)
    fetched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFolder, "get", lambda self, name, path: fetched.append(name))
        assert _without_seconds(_train(folder, mirror, resume=True)) == _without_seconds(whole[1])
    assert fetched == []
    assert newest.state.step in [line["step"] for line in _events(folder, "mirrored")]
    assert copies(remote) == [path.name for path in step_folders(folder / "checkpoints")]


def test_a_slow_mirror_delays_no_step(whole, tmp_path, monkeypatch):
    """The first copy ends only after the last step has begun."""
    last_step_begins = threading.Event()
    put, set_rates = RemoteFolder.put, loop_module.set_rates

    def slow(self, path, name):
        assert last_step_begins.wait(WAIT_SECONDS)
        put(self, path, name)

    def watched(loop, step):
        if step == STEPS - 1:
            last_step_begins.set()
        set_rates(loop, step)

    monkeypatch.setattr(RemoteFolder, "put", slow)
    monkeypatch.setattr(loop_module, "set_rates", watched)
    result = _train(tmp_path / "run", tmp_path / "mirror")
    assert _without_seconds(result) == _without_seconds(whole[1])
    copied = [line["step"] for line in _events(tmp_path / "run", "mirrored")]
    assert (copied[0], copied[-1]) == (3, STEPS)
    assert 6 not in copied  # the newest is next
    assert [path.name for path in step_folders(tmp_path / "run" / "checkpoints")] == copies(
        RemoteFolder(str(tmp_path / "mirror"), "checkpoint.mirror")
    )


def test_a_failing_mirror_costs_a_warning_per_checkpoint_and_not_the_run(whole, tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise InputError("the store is full")

    monkeypatch.setattr(RemoteFolder, "put", failing)
    assert _without_seconds(_train(tmp_path / "run", tmp_path / "mirror")) == _without_seconds(whole[1])
    failed = [line["step"] for line in _events(tmp_path / "run", "mirror_failed")]
    assert failed[-1] == STEPS
    said = capsys.readouterr().err
    for step in failed:
        assert said.count(f"mirror/step-{step:08d} could not be written: rank 0: the store is full. The run goes") == 1
    assert said.count("WARNING") == len(failed)


def test_a_new_run_does_not_overwrite_a_mirror(tmp_path, capsys):
    _train(tmp_path / "run", tmp_path / "mirror")
    for more in ([], ["--restart"]):
        settings = [
            word for setting in _settings(tmp_path / "other", tmp_path / "mirror") for word in ("--set", setting)
        ]
        assert main(["train", RUN_FILE, *settings, "--set", "deepspeed_config=", *more]) == 2
        said = capsys.readouterr().err
        assert "has checkpoints up to step-00000012: continue them with --resume, or name another" in said
        assert not (tmp_path / "other").exists()


def test_a_finished_run_comes_back_whole(whole, tmp_path, verb):
    folder = tmp_path / "run"
    _train(folder, tmp_path / "mirror")
    shutil.rmtree(folder)
    _train(folder, tmp_path / "mirror", resume=True)
    assert (folder / "checkpoints" / "final").resolve().name == "step-00000012"
    assert (folder / "checkpoints" / "best").resolve() == (folder / "checkpoints" / "best").resolve(strict=True)
    assert json.loads((folder / "result.json").read_text())["mask_checksum"] == whole[1]["mask_checksum"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nowhere://bucket/a", "checkpoint.mirror = 'nowhere://bucket/a' cannot be opened: Protocol not known"),
        ("/dev/null/a", "checkpoint.mirror = '/dev/null/a' cannot be written: "),
    ],
)
def test_a_wrong_address_is_one_message_before_any_work(tmp_path, capsys, monkeypatch, address, said):
    monkeypatch.setattr("pst_ds.train.run.load_splits", None)  # which is the first work of a run
    assert main(["train", RUN_FILE, *_words(tmp_path / "run", address)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_solved_bases_are_not_mirrored(tmp_path):
    with pytest.raises(
        ConfigError, match=r"checkpoint.mirror = .* does not hold the model folders that schedule.solves"
    ):
        load_run(RUN_FILE, [*_settings(tmp_path, "mirror"), "schedule.solves=2"])


def test_the_stage_of_finetune_has_a_folder_of_its_own():
    run = load_run(RUN_FILE, [*_settings("run", "s3://bucket/a/"), 'finetune.method="dense"', "finetune.num_steps=1"])
    assert run.finetuning().checkpoint.mirror == "s3://bucket/a/finetuned"


@pytest.mark.zero3
def test_two_ranks_resume_from_a_mirror(run_ranks, tmp_path):
    folder, mirror = tmp_path / "run", tmp_path / "mirror"
    whole = run_ranks(_train, 2, tmp_path / "whole")
    run_ranks(partial(_train, stop_at=7), 2, folder, mirror)
    shutil.rmtree(folder)
    resumed = run_ranks(partial(_train, resume=True), 2, folder, mirror)
    assert list(map(_without_seconds, resumed)) == list(map(_without_seconds, whole))
    losses = _losses(tmp_path / "whole")
    assert _losses(folder) == {step: values for step, values in losses.items() if step > 7}
