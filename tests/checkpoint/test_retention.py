"""The checkpoints of a run: what is kept, what is gone on from, and what is never followed or used."""

from __future__ import annotations

import errno
import functools
import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.atomic_files import replace_link
from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import CheckpointError, CheckpointState, read_checkpoint
from pst_ds.checkpoint.restore import base_fingerprint, magnitude_scales
from pst_ds.checkpoint.retention import clean_up, find, keep, newest_valid, settle, step_name
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.file_names import step_folders
from pst_ds.nn.inject import inject_pst
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.ranks import barrier, is_main
from pst_ds.train.run_folder import open_checkpoint, same_on_all_ranks, set_aside_checkpoints
from tests.checkpoint.small_engine import save_checkpoint


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 9)])
        self.classifier = torch.nn.Linear(9, 2)


@functools.cache
def _engine():
    torch.manual_seed(0)
    model = inject_pst(_Net(), PSTConfig())
    params = [p for p in model.parameters() if p.requires_grad]
    return build_engine(model, [{"params": params, "lr": 1e-3, "name": "all"}], ds_config=None)


def _save(folder, step=1, best_step=None, **changes):
    state = {
        "step": step, "sparsity": 0.4, "masks_frozen": False, "precision": "fp32", "device_type": "cpu",
        "base_path": "base", "base_fingerprint": "f00d", "labels": [],
        "magnitude_scales": magnitude_scales(_engine().module),
        "metrics": {}, "progress": {"best_step": best_step}, **changes,
    }  # fmt: skip
    save_checkpoint(folder, _engine(), CheckpointState(**state))


def _saved(folder, *steps, **more):
    for step in steps:
        _save(folder / step_name(step), step, **more)
    return folder


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A checkpoint to be copied."""
    folder = tmp_path_factory.mktemp("one") / "c"
    _save(folder)
    return folder


def _shard(folder):
    return next(folder.glob("shard-00001-*"))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "truncated shard": lambda folder: _truncate(_shard(folder)),
    "no shard": lambda folder: _shard(folder).unlink(),
    "empty shard": lambda folder: _shard(folder).write_bytes(b""),
    "truncated manifest": lambda folder: _truncate(folder / "manifest.json"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file more": lambda folder: (folder / "x.pt").write_bytes(b"x"),
}


def test_finished_checkpoints_are_listed_newest_first_and_nothing_else_is(tmp_path):
    assert step_folders(tmp_path / "absent") == []
    for name in ("step-00000002", "step-00000010", "step-100000000", "step-00000009"):
        (tmp_path / name).mkdir()
    for name in ("step-00000003.broken", "step-00000004.partial", "step-00000005.old", "step-7", "step-0000000x",
                 "xstep-00000008", "step-00000008 ", "step--0000008", "latest.d"):  # fmt: skip
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000011").write_text("a file")
    (tmp_path / "step-00000012").symlink_to("step-00000010")
    (tmp_path / "latest").symlink_to("step-100000000")
    found = [path.name for path in step_folders(tmp_path)]
    assert found == ["step-100000000", "step-00000010", "step-00000009", "step-00000002"]
    assert found[0] == step_name(10**8)
    assert found[1] == step_name(10)


@given(st.data())
def test_the_newest_good_ones_are_kept_and_the_best_that_they_know(tmp_path_factory, one, data):
    folder = tmp_path_factory.mktemp("keep")
    steps = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6, unique=True))
    damaged, best = set(), {}
    for step in steps:
        best[step] = data.draw(st.none() | st.sampled_from(steps))
        _save(folder / step_name(step), step, best[step])
        if data.draw(st.integers(0, 2)) == 0:
            DAMAGES[data.draw(st.sampled_from(sorted(DAMAGES)))](folder / step_name(step))
            damaged.add(step)
    keep_last = data.draw(st.integers(1, 4))
    good = sorted(set(steps) - damaged, reverse=True)
    known_best = {best[step] for step in good[:keep_last]}
    doomed = {s for s in steps if sum(g > s for g in good) >= keep_last and s not in known_best}
    assert sorted(keep(folder, keep_last)) == sorted(map(step_name, doomed))
    assert _names(folder) == sorted(map(step_name, set(steps) - doomed))
    for step in good[:keep_last]:
        assert read_checkpoint(folder / step_name(step)).state.step == step
    assert keep(folder, keep_last) == []  # and then all is as it should be


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_only_good_one_is_never_removed(tmp_path, damage):
    _saved(tmp_path, 1, 2, 3, 4)
    for step in (2, 3, 4):
        DAMAGES[damage](tmp_path / step_name(step))
    assert keep(tmp_path, 1) == []
    assert _names(tmp_path) == [step_name(step) for step in (1, 2, 3, 4)]
    DAMAGES[damage](tmp_path / step_name(1))
    assert keep(tmp_path, 1) == []
    assert len(_names(tmp_path)) == 4


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it_by_its_name(tmp_path, monkeypatch):
    _saved(tmp_path, 1, 2)

    def killed(path, **keywords):
        _shard(path).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            keep(tmp_path, 1)
    assert [path.name for path in step_folders(tmp_path)] == [step_name(2)]
    clean_up(tmp_path)
    assert _names(tmp_path) == [step_name(2)]


def test_what_a_killed_process_left_is_cleaned_up(tmp_path, one):
    clean_up(tmp_path / "absent")
    whole = {"step-00000001", "step-00000002", "step-00000003"}
    shutil.copytree(one, tmp_path / "step-00000001")
    shutil.copytree(one, tmp_path / "step-00000002.old")  # killed between the two renames
    shutil.copytree(one, tmp_path / "step-00000003")
    shutil.copytree(one, tmp_path / "step-00000003.old")  # killed after them
    (tmp_path / "step-00000003.old" / "x").write_text("x")
    shutil.copytree(one, tmp_path / "step-00000004.partial")
    (tmp_path / "step-00000005.partial").write_text("a file")
    (tmp_path / "step-00000006.partial").symlink_to("step-00000001")
    (tmp_path / ".latest.partial").symlink_to("step-00000001")
    (tmp_path / ".x.partial").write_text("half")
    (tmp_path / "latest").symlink_to("step-00000001")
    others = {"step-00000007.broken", "notes.partial", "notes.old"}
    for name in others:
        (tmp_path / name).mkdir()
    clean_up(tmp_path)
    assert set(_names(tmp_path)) == whole | others | {"latest"}
    for name in whole:
        read_checkpoint(tmp_path / name)


def test_a_run_goes_on_from_the_newest_that_is_whole_and_sets_damaged_ones_aside(tmp_path):
    assert newest_valid(tmp_path / "absent") == (None, [])
    _saved(tmp_path, 9, 10, 11)
    _truncate(_shard(tmp_path / step_name(11)))
    raw = bytearray(_shard(tmp_path / step_name(10)).read_bytes())
    raw[-1] ^= 1  # which the length does not show
    _shard(tmp_path / step_name(10)).write_bytes(raw)
    (tmp_path / f"{step_name(11)}.broken").mkdir()  # of an earlier time
    (tmp_path / f"{step_name(11)}.broken" / "x").write_text("x")
    checkpoint, problems = newest_valid(tmp_path)
    assert (checkpoint.folder, checkpoint.state.step) == (tmp_path / step_name(9), 9)
    assert [step_name(step) in problem for step, problem in zip((11, 10), problems, strict=True)] == [True, True]
    assert _names(tmp_path) == [step_name(9), f"{step_name(10)}.broken", f"{step_name(11)}.broken"]
    assert not (tmp_path / f"{step_name(11)}.broken" / "x").exists()
    assert newest_valid(tmp_path)[1] == []
    _truncate(tmp_path / step_name(9) / "SHA256SUMS")
    checkpoint, problems = newest_valid(tmp_path)
    assert (checkpoint, len(problems)) == (None, 1)


def _corrupt(path, chance):
    """Cut a file off, or flip a bit of it."""
    data = bytearray(path.read_bytes())
    if chance.random() < 0.4:
        del data[chance.choice([0, len(data) - 1, chance.randrange(len(data))]) :]
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _corruptions(folder, seed, count):
    """For each of ``count`` corruptions of the newer of two checkpoints: what is gone on from, and what is left."""
    chance, newer, found = random.Random(seed), folder / step_name(2), []
    files = sorted(path.name for path in newer.iterdir())
    for i in range(count):
        path = newer / files[i % len(files)]
        whole = path.read_bytes()
        barrier()
        if is_main():
            _corrupt(path, chance)
        barrier()
        checkpoint, problems = newest_valid(folder)
        found.append((checkpoint.state.step, len(problems), str(newer) in problems[0], _names(folder)))
        barrier()
        if is_main():
            newer.with_name(f"{newer.name}.broken").rename(newer)
            path.write_bytes(whole)
        barrier()
    assert newest_valid(folder)[0].state.step == 2
    return found


WANTED = (1, 1, True, [step_name(1), f"{step_name(2)}.broken"])


@pytest.mark.zero3
def test_after_any_corruption_the_checkpoint_before_is_used(run_ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    run_ranks(_saved, 2, folder, 1, 2)
    assert len(_names(folder / step_name(2))) == 4  # two shards
    assert _corruptions(folder, seed=1, count=80) == [WANTED] * 80
    assert run_ranks(_corruptions, 2, folder, 2, 12) == [[WANTED] * 12] * 2


def _files_verified(folder):
    seen, original = [], checkpoints.file_sha256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "file_sha256", lambda path: (seen.append(path.name), original(path))[1])
        newest_valid(folder)
    return seen


@pytest.mark.zero3
def test_ranks_share_the_files_that_they_verify(run_ranks, tmp_path):
    run_ranks(_saved, 2, tmp_path, 1)
    verified = run_ranks(_files_verified, 2, tmp_path)
    files = [name for name in _names(tmp_path / step_name(1)) if name != "SHA256SUMS"]
    assert sorted([*verified[0], *verified[1]]) == files
    assert all(verified)


def _unreadable_on_rank_1(folder):
    original = checkpoints.check_sums

    def check_sums(path, sums):
        if path.name == step_name(2) and not is_main():
            raise OSError(errno.EIO, "Input/output error")
        original(path, sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "check_sums", check_sums)
        checkpoint, problems = newest_valid(folder)
    return checkpoint.state.step, problems


@pytest.mark.zero3
def test_all_ranks_leave_what_one_cannot_read(run_ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    run_ranks(_saved, 2, folder, 1, 2)
    assert run_ranks(_unreadable_on_rank_1, 2, folder) == [(1, ["[Errno 5] Input/output error"])] * 2
    assert _names(folder) == [step_name(1), f"{step_name(2)}.broken"]


def _links(folder):
    return {path.name: str(path.readlink()) for path in folder.iterdir() if path.is_symlink()}


def test_links_follow_what_is_there_and_superfluous_ones_are_removed(tmp_path):
    _saved(tmp_path, 1, 2, 3, best_step=2)
    settle(tmp_path, 2, best_step=None, is_last=False, keep_last=3)
    assert _links(tmp_path) == {"latest": step_name(2)}  # neither a best nor a last one is known
    settle(tmp_path, 3, best_step=2, is_last=True, keep_last=1)
    assert _links(tmp_path) == {"latest": step_name(3), "best": step_name(2), "final": step_name(3)}
    assert [path.name for path in step_folders(tmp_path)] == [step_name(3), step_name(2)]
    settle(tmp_path, 3, best_step=1, is_last=False, keep_last=1)  # which is not there any more
    assert _links(tmp_path) == {"latest": step_name(3), "best": step_name(2), "final": step_name(3)}
    (tmp_path / step_name(2)).rename(tmp_path / "elsewhere")
    settle(tmp_path, 3, best_step=2, is_last=False, keep_last=1)
    assert _links(tmp_path) == {"latest": step_name(3), "final": step_name(3)}


def test_a_link_is_followed_to_a_checkpoint_beside_it_only(tmp_path, one):
    outside, folder = tmp_path / "step-00000001", tmp_path / "run"
    shutil.copytree(one, outside)
    shutil.copytree(one, folder / "step-00000002")
    replace_link(folder / "latest", "step-00000002")
    assert find(folder, "latest") == find(folder, "step-00000002") == folder / "step-00000002"
    for target in (outside, "../step-00000001", "../run/step-00000002", ".", "final", "step-1"):
        for link in ("best", "step-00000003"):
            (folder / link).unlink(missing_ok=True)
            (folder / link).symlink_to(target)
            if (folder / link).exists() or link != "best":
                with pytest.raises(
                    CheckpointError, match=r"is a link to .*; it must name a checkpoint in the same folder"
                ):
                    find(folder, link)
    (folder / "step-00000004").symlink_to(outside)  # and not by two steps either
    replace_link(folder / "best", "step-00000004")
    with pytest.raises(CheckpointError, match="is a link to"):
        find(folder, "best")


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(tmp_path, one):
    with pytest.raises(CheckpointError, match=r"no checkpoint 'best' in .*There are: none|no checkpoint 'final'"):
        find(tmp_path, "best")
    for step in (3, 20):
        shutil.copytree(one, tmp_path / step_name(step))
    replace_link(tmp_path / "latest", step_name(20))
    replace_link(tmp_path / "final", step_name(4))  # there is none
    for name in ("step-00000004", "final"):
        with pytest.raises(CheckpointError) as caught:
            find(tmp_path, name)
        said = f"no checkpoint {name!r} in {tmp_path}. There are: latest, step-00000020, step-00000003"
        assert str(caught.value) == said
    replace_link(tmp_path / "final", step_name(20))
    assert find(tmp_path, "best") == tmp_path / step_name(20)
    replace_link(tmp_path / "best", step_name(3))
    assert find(tmp_path, "best") == tmp_path / step_name(3)
    shutil.rmtree(tmp_path / step_name(3))
    assert find(tmp_path, "best") == tmp_path / step_name(20)  # a link to nothing is no choice


def test_checkpoints_are_set_aside_under_a_name_that_is_free(tmp_path, capsys):
    for count, name in enumerate(("checkpoints.previous", "checkpoints.previous-2", "checkpoints.previous-3")):
        _saved(tmp_path / "checkpoints", count + 1)
        replace_link(tmp_path / "checkpoints" / "latest", step_name(count + 1))
        set_aside_checkpoints(tmp_path)
        assert capsys.readouterr().out == f"{tmp_path}/checkpoints of an earlier run is now {tmp_path / name}\n"
        assert read_checkpoint(find(tmp_path / name, "latest")).state.step == count + 1
    assert len(_names(tmp_path)) == 3


@pytest.mark.parametrize("left", [(), ("step-00000002.partial/shard",), (".latest.partial",)])
def test_what_holds_no_checkpoint_takes_the_place_of_none(tmp_path, capsys, left):
    """Killed while the first checkpoint after a restart was written, and restarted."""
    _saved(tmp_path / "checkpoints", 1)
    set_aside_checkpoints(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "best").symlink_to(step_name(9))
    for name in left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    capsys.readouterr()
    set_aside_checkpoints(tmp_path)
    assert list(folder.iterdir()) == []
    assert [name for name in _names(tmp_path) if name != "checkpoints"] == ["checkpoints.previous"]
    assert read_checkpoint(tmp_path / "checkpoints.previous" / step_name(1)).state.step == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ending", [".broken", ".old"])
def test_a_damaged_checkpoint_or_one_between_two_names_is_set_aside_too(tmp_path, ending):
    _saved(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints" / step_name(1)).rename(tmp_path / "checkpoints" / (step_name(1) + ending))
    set_aside_checkpoints(tmp_path)
    kept = step_name(1) + (ending if ending == ".broken" else "")
    assert _names(tmp_path / "checkpoints.previous") == [kept]


def test_another_base_model_is_refused(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"one")
    run = load_run(
        "tests/data/world_size.toml",
        [f"output_dir={json.dumps(str(tmp_path / 'run'))}", f"model.path={json.dumps(str(base))}"],
    )
    folder = tmp_path / "run" / "checkpoints" / step_name(3)
    _save(folder, base_path=str(base), base_fingerprint=base_fingerprint(base))
    replace_link(folder.with_name("final"), folder.name)
    assert open_checkpoint(run, "best").folder == folder  # no best was chosen
    (base / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(run, "final")
    assert f"model.path = {str(base)!r} is not the base model that {folder}" in str(caught.value)
    assert "Set model.path to the folder of that model" in str(caught.value)


def _saved_by_a_run(folder, steps):
    """Checkpoints of these steps, the last as ``latest``."""
    for step in steps:
        _save(folder / step_name(step), step)
    settle(folder, steps[-1], best_step=None, is_last=False, keep_last=len(steps))


def _removing_during(monkeypatch, at, remove):
    """Call ``remove()`` once, when a reader calls the function ``at`` of the module that reads checkpoints."""
    from pst_ds.checkpoint import format as module

    original = getattr(module, at)

    def late(*arguments, **options):
        monkeypatch.setattr(module, at, original)
        remove()
        return original(*arguments, **options)

    monkeypatch.setattr(module, at, late)


POINTS = ("listed_files", "open_checkpoint", "_opened", "file_sha256", "check_sums")
"""Functions between which a run may remove the checkpoint, in the order in which a reader calls them."""


@pytest.mark.parametrize("at", POINTS)
def test_a_reader_of_latest_takes_the_newer_one_if_the_run_removes_what_it_reads(tmp_path, monkeypatch, at):
    _saved_by_a_run(tmp_path, [1])

    def run_goes_on():
        _save(tmp_path / step_name(2), 2)
        settle(tmp_path, 2, best_step=None, is_last=False, keep_last=1)

    _removing_during(monkeypatch, at, run_goes_on)
    checkpoint = checkpoints.read(tmp_path, "latest")
    assert not (tmp_path / step_name(1)).exists()
    assert checkpoint.folder.name == step_name(2)


def test_values_are_read_after_the_run_has_removed_the_checkpoint(tmp_path):
    _saved_by_a_run(tmp_path, [1])
    expected = {name: value.clone() for name, value in checkpoints.read(tmp_path, "latest").trained.items()}
    checkpoint = checkpoints.read(tmp_path, "latest")
    shutil.rmtree(tmp_path / step_name(1))
    assert expected
    assert all(torch.equal(checkpoint.trained[name], value) for name, value in expected.items())


@pytest.mark.parametrize("at", POINTS)
def test_a_checkpoint_that_was_named_and_is_removed_is_one_message(tmp_path, monkeypatch, at):
    _saved_by_a_run(tmp_path, [1, 2])
    _removing_during(monkeypatch, at, lambda: keep(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"step-00000001 was removed .* Raise checkpoint\.keep_last"):
        checkpoints.read(tmp_path, step_name(1))


def test_a_reader_gives_up_on_a_run_that_always_saves_faster(tmp_path, monkeypatch):
    _saved_by_a_run(tmp_path, [1])
    source, step = tmp_path.with_name("source"), [1]
    shutil.copytree(tmp_path / step_name(1), source)

    def replaced(folder):
        step[0] += 1
        shutil.copytree(source, tmp_path / step_name(step[0]))
        replace_link(tmp_path / "latest", step_name(step[0]))
        shutil.rmtree(folder)
        raise CheckpointError("gone")

    monkeypatch.setattr(checkpoints, "read_checkpoint", replaced)
    with pytest.raises(CheckpointError, match=r"the run saves faster\. Raise checkpoint\.keep_last"):
        checkpoints.read(tmp_path, "latest")
    assert step[0] == 21


def test_a_damaged_checkpoint_is_not_read_twice(tmp_path, monkeypatch):
    _saved_by_a_run(tmp_path, [1])
    (shard,) = (tmp_path / step_name(1)).glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    calls = []
    monkeypatch.setattr(checkpoints, "read_checkpoint", lambda path: calls.append(path) or read_checkpoint(path))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.read(tmp_path, "latest")
    assert len(calls) == 1


def _opened_at_different_times(folder):
    mine = read_checkpoint(folder / step_name(1 if is_main() else 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pst_ds.train.run_folder.open_checkpoint", lambda run, name: read_checkpoint(folder / name))
        return same_on_all_ranks(None, mine).folder.name


@pytest.mark.zero3
def test_ranks_that_opened_latest_before_and_after_a_save_use_the_newer_one(run_ranks, tmp_path):
    _saved_by_a_run(tmp_path, [1, 2])
    assert run_ranks(_opened_at_different_times, 2, tmp_path) == [step_name(2)] * 2
