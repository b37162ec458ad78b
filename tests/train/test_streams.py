"""Runs on streams: killed and resumed they are the same run, on other ranks they are refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.data.preparation import readers
from pst_ds.errors import InputError
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train import loop as loop_module
from pst_ds.train.run import prepare, train_prepared

RUN_FILE = "tests/data/causal_lm.toml"
STEPS, INTERVAL = 8, 3


class _Killed(Exception):
    """Ends a run in the middle of a step, on all ranks."""


@pytest.fixture
def sources(tmp_path, alone):
    """A stream in two compressed files, and text that is tokenised once, as [[data.sources]]."""
    lines = Path("tests/data/train.jsonl").read_text().splitlines(keepends=True)
    for i in range(2):
        (tmp_path / f"streamed-{i}.jsonl.gz").write_bytes(gzip.compress("".join(lines[i::3]).encode()))
    (tmp_path / "kept.jsonl").write_text("".join(lines[2::3]))
    return [
        {"path": str(tmp_path / "streamed-*.gz"), "weight": 0.6, "stream": True},
        {"path": str(tmp_path / "kept.jsonl"), "weight": 0.4},
    ]


def _toml(sources):
    tables = ("{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in of.items()) + "}" for of in sources)
    return f"[{', '.join(tables)}]"


def _run(folder, sources, **more):
    config = "ds_configs/zero3_cpu.json" if world_size() > 1 else ""
    settings = {
        "output_dir": str(folder), "deepspeed_config": config, "data.train": "", "data.validation": "", "data.test": "",
        "train.num_steps": STEPS, "train.num_epochs": 0.0, "train.batch_size": 5, "train.log_interval": 1,
        "data.max_length": 24, "checkpoint.interval": INTERVAL, **more,
    }  # fmt: skip
    return load_run(
        RUN_FILE, [*(f"{k}={json.dumps(v)}" for k, v in settings.items()), f"data.sources={_toml(sources)}"]
    )


def _train(folder, sources, *, resume=False, kill_at=0, **more):
    """Train; return (tokens of this rank's part of each batch, checksum of the masks). ``kill_at``: a batch."""
    taken, agreed = [], loop_module.agreed

    def recorded(batch, degree):
        found, places = agreed(batch, degree)
        taken.append([one.inputs["input_ids"].tolist() for one in found.micro_batches])
        shares = [one.share for one in found.micro_batches]
        assert all(share > 0 for share in shares)
        if len(taken) == kill_at:
            raise _Killed
        return found, places

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "agreed", recorded)
        run = _run(folder, sources, **more)
        try:
            result = train_prepared(
                prepare(run, LaunchEnvironment(rank(), world_size(), rank())), resume=resume, quiet=True
            )
        except _Killed:
            return taken, None
    return taken, result["mask_checksum"]


def _kill_and_resume(folder, sources):
    """Return (a whole run, what the resumed run took and came to, the losses of both)."""
    whole = _train(folder / "whole", sources)
    assert _train(folder / "run", sources, kill_at=STEPS - 1)[1] is None
    resumed = _train(folder / "run", sources, resume=True)
    return whole, resumed, _losses(folder / "whole"), _losses(folder / "run")


def _losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["losses"] for line in lines if line["event"] == "step"}


def _require_same(whole, resumed, losses, again):
    assert resumed[1] == whole[1]
    assert resumed[0] == whole[0][INTERVAL * 2 :]
    assert len({str(batch) for batch in whole[0]}) == STEPS
    assert again == losses


def test_a_killed_run_goes_on_with_the_same_batches(tmp_path, sources):
    _require_same(*_kill_and_resume(tmp_path, sources))


@pytest.mark.thorough
@pytest.mark.zero3
def test_two_ranks_read_parts_of_their_own_and_go_on_with_them(run_ranks, tmp_path, sources):
    one, other = run_ranks(_kill_and_resume, 2, tmp_path, sources)
    for of_rank in (one, other):
        _require_same(*of_rank)
    assert one[0][0] != other[0][0]
    assert one[0][1] == other[0][1]


@pytest.mark.thorough
@pytest.mark.zero3
def test_another_number_of_readers_is_refused(run_ranks, tmp_path, sources):
    run_ranks(_killed, 2, tmp_path / "run", sources)
    with pytest.raises(ConfigError, match=r"streamed.*split between 2 readers .*, and now there are 1 with 1"):
        _train(tmp_path / "run", sources, resume=True)


def test_other_files_are_refused(tmp_path, sources):
    _train(tmp_path / "run", sources, kill_at=STEPS - 1)
    (tmp_path / "streamed-1.jsonl.gz").write_bytes(gzip.compress(b'{"text": "another plot"}\n'))
    with pytest.raises(ConfigError, match=r"data\.sources .*streamed.* differs from the data of the run in"):
        _train(tmp_path / "run", sources, resume=True)


def _killed(folder, sources):
    assert _train(folder, sources, kill_at=STEPS - 1)[1] is None


def _refused(folder, sources):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "ROWS_AT_A_TIME", 4)
        with pytest.raises(InputError) as caught:
            _train(folder, sources)
    return str(caught.value)


@pytest.mark.zero3
def test_a_text_that_one_rank_cannot_read_ends_all(run_ranks, tmp_path, sources):
    damaged = tmp_path / "streamed-1.jsonl.gz"
    damaged.write_bytes(gzip.compress(gzip.decompress(damaged.read_bytes()) + b"{broken"))
    for message in run_ranks(_refused, 2, tmp_path / "run", sources):
        assert "rank 1" in message
        assert "streamed-1.jsonl.gz" in message
        assert "is not JSON" in message


def test_a_run_of_epochs_is_refused(tmp_path, sources):
    with pytest.raises(
        ConfigError, match=r"train\.num_epochs is set, and data\.sources has a stream .* Set train\.num"
    ):
        _run(tmp_path, sources, **{"train.num_steps": 0, "train.num_epochs": 1.0})


def test_norms_of_inputs_are_measured_on_a_stream(tmp_path, sources):
    more = {"pst.magnitude": "activation", "pst.calibration_examples": 4}
    assert _train(tmp_path / "run", sources, **more)[1]
