"""What a full or failing disk leaves behind: the older checkpoint, one message on every rank, and saves that work."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pst_ds.checkpoint import writer as checkpoint_writer
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.checkpoint.writer import CheckpointWriter
from pst_ds.parallel.ranks import barrier, is_main, rank
from tests.checkpoint.small_engine import assert_holds, optimizer_values, save_checkpoint, state_of, trained_engine


def _failing(patch, owner, name, number, error):
    """Call ``number`` (from 0) of ``owner.name`` raises."""
    original, calls = getattr(owner, name), iter(range(1000))

    def call(*arguments, **keywords):
        if next(calls) == number:
            raise error
        return original(*arguments, **keywords)

    patch.setattr(owner, name, call)


NO_SPACE = OSError(28, "No space left on device")
FAILURES = {  # name: (rank, owner of the function, its name, which call, error, what is said)
    "the shard of rank 1": (1, checkpoint_writer, "write_pieces", 0, NO_SPACE, f"rank 1: {NO_SPACE}"),
    "the shard of rank 0": (0, checkpoint_writer, "write_pieces", 0, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the manifest": (0, checkpoint_writer, "write_new", 0, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the sums": (0, checkpoint_writer, "write_new", 1, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the name": (0, checkpoint_writer, "publish", 0, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the rename": (0, Path, "rename", 0, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the folder": (1, Path, "mkdir", 0, NO_SPACE, f"rank 1: {NO_SPACE}"),
    "memory of rank 1": (
        1,
        checkpoint_writer,
        "tensor_bytes",
        1,
        MemoryError("no room"),
        "rank 1: MemoryError: no room",
    ),
    "memory of rank 0": (
        0,
        checkpoint_writer,
        "tensor_bytes",
        1,
        MemoryError("no room"),
        "rank 0: MemoryError: no room",
    ),
    "a state that is no JSON": (0, checkpoint_writer, "manifest_bytes", 0, TypeError("set"), "rank 0: TypeError: set"),
}


def _fail_everywhere(folder):
    """[what failed, what was said, what was left, whether the older was whole, what the next save said] of a rank."""
    engine, _ = trained_engine(seed=1)
    writer, found = CheckpointWriter(folder, engine), []
    for name, (failing_rank, owner, function, number, error, _) in FAILURES.items():
        writer.save("older", state_of(engine.module, step=1))
        assert writer.wait().error == ""
        with pytest.MonkeyPatch.context() as patch:
            if rank() == failing_rank:
                _failing(patch, owner, function, number, error)
            writer.save("newer", state_of(engine.module, step=2), when_written=lambda: pytest.fail("not written"))
            written = writer.wait()
        barrier()
        left, older = sorted(p.name for p in folder.iterdir()), read_checkpoint(folder / "older").state.step
        barrier()
        writer.save("newer", state_of(engine.module, step=3))
        again = writer.wait()
        step = read_checkpoint(folder / "newer").state.step
        barrier()
        if is_main():
            shutil.rmtree(folder / "newer")
        found.append((name, written.error, written.bytes, left, older, again.error, step))
    return found


@pytest.mark.zero3
def test_a_failing_disk_is_told_on_every_rank_and_leaves_the_older_checkpoint(run_ranks, tmp_path):
    one, other = run_ranks(_fail_everywhere, 2, tmp_path / "c")
    assert one == other
    for name, said, size, left, older, again, step in one:
        assert (said, size, left, older, again, step) == (FAILURES[name][-1], 0, ["older"], 1, "", 3), name
    assert len(one) == len(FAILURES)


def _links_fail(folder):
    """What a rank hears when all is written and the links cannot be made, and of the save after it."""
    engine, _ = trained_engine()
    writer, said = CheckpointWriter(folder, engine), []
    for error in (NO_SPACE, ValueError("odd")):

        def when_written(error=error):
            raise error

        writer.save("c", state_of(engine.module), when_written=when_written)
        said.append(writer.wait().error)
        assert read_checkpoint(folder / "c").state == state_of(engine.module)
    return said


@pytest.mark.zero3
def test_an_error_after_the_last_rename_is_told_on_every_rank_and_the_checkpoint_is_there(run_ranks, tmp_path):
    wanted = [f"rank 0: {NO_SPACE}", "rank 0: ValueError: odd"]
    assert run_ranks(_links_fail, 2, tmp_path / "c") == [wanted, wanted]


def test_save_checkpoint_raises_what_went_wrong(tmp_path, monkeypatch):
    engine, _ = trained_engine()
    _failing(monkeypatch, checkpoint_writer, "write_pieces", 0, NO_SPACE)
    with pytest.raises(OSError, match=r"c could not be written: rank 0: .*No space left on device"):
        save_checkpoint(tmp_path / "c", engine, state_of(engine.module))
    save_checkpoint(tmp_path / "c", engine, state_of(engine.module))
    assert read_checkpoint(tmp_path / "c").state == state_of(engine.module)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with room for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"{' '.join(mount)}: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_costs_the_newest_checkpoint_only(small_disk):
    engine, keep = trained_engine()
    writer, values, said = CheckpointWriter(small_disk, engine), optimizer_values(engine), ""
    whole = []
    while not said:
        writer.save(f"step-{len(whole):08d}", state_of(engine.module))
        said = writer.wait().error
        whole += [] if said else [f"step-{len(whole):08d}"]
        assert sorted(p.name for p in small_disk.iterdir()) == whole
    assert said.startswith("rank 0: [Errno 28] No space left on device")
    assert len(whole) > 1
    for name in whole:
        assert_holds(small_disk / name, values, keep)
    shutil.rmtree(small_disk / whole[0])
    writer.save("after", state_of(engine.module))
    assert writer.wait().error == ""
    assert_holds(small_disk / "after", values, keep)
