"""Runs on stores and mixtures: stopped, resumed and on other ranks they take the same batches, or are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.data import labelled
from pst_ds.data.preparation.pieces import Reading
from pst_ds.data.preparation.prepare import plan_store, prepare_store
from pst_ds.parallel import stop_signals
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train.run import StoppedError, prepare, train_prepared

LLAMA = "tests/data/tiny-llama"
RUN_FILE = "tests/data/causal_lm.toml"
BATCH, STEPS = 6, 8


@pytest.fixture
def sources(tmp_path, alone):
    """Three stores of texts that differ, as [[data.sources]] of a run."""
    lines = Path("tests/data/train.jsonl").read_text().splitlines()
    found = []
    for i, weight in enumerate([0.5, 0.3, 0.2]):
        path = tmp_path / f"{i}.jsonl"
        path.write_text("\n".join(lines[i::3]) + "\n")
        _prepare(path, tmp_path / f"store-{i}")
        found.append({"path": str(tmp_path / f"store-{i}"), "weight": weight})
    return found


def _prepare(path, out, *, force=False):
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    prepare_store(plan_store([str(path)], tokenizer, Reading(), piece_bytes=2000), tokenizer, out, force=force)


def _toml(sources):
    return (
        "[" + ", ".join("{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in of.items()) + "}" for of in sources) + "]"
    )


def _settings(folder, sources, **more):
    config = "ds_configs/zero3_cpu.json" if world_size() > 1 else ""
    settings = {
        "output_dir": str(folder), "deepspeed_config": config, "data.train": "", "data.validation": "", "data.test": "",
        "train.num_steps": STEPS, "train.num_epochs": 0.0, "train.batch_size": BATCH, "train.log_interval": 1,
        "data.max_length": 24, "checkpoint.interval": 3, **more,
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()] + [f"data.sources={_toml(sources)}"]


def _train(folder, sources, *, resume=False, stop_at=0):
    """Train, and return the batches; ``stop_at`` asks to stop at a batch."""
    batches, order, calls = [], labelled.GlobalBatches.micro_batches, iter(range(1, 10**6))

    def micro_batches(self, batch, *arguments):
        batches.append(list(batch))
        if stop_at and next(calls) == stop_at:
            stop_signals._asked_by = 10
        return order(self, batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop_signals, "_asked_by", 0)
        patch.setattr(labelled.GlobalBatches, "micro_batches", micro_batches)
        run = load_run(RUN_FILE, _settings(folder, sources))
        try:
            result = train_prepared(
                prepare(run, LaunchEnvironment(rank(), world_size(), rank())), resume=resume, quiet=True
            )
        except StoppedError:
            return batches[:STEPS], None
    return batches[:STEPS], result["mask_checksum"]


def _lines(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "mask_checksum")
    return [{k: line[k] for k in kept if k in line} for line in lines if line["event"] in ("step", "mask_update")]


def test_a_mixture_stopped_and_resumed_is_the_same_run(tmp_path, sources):
    whole, checksum = _train(tmp_path / "whole", sources)
    assert _train(tmp_path / "run", sources, stop_at=2)[1] is None
    taken, resumed_checksum = _train(tmp_path / "run", sources, resume=True)
    assert resumed_checksum == checksum
    assert _lines(tmp_path / "run") == _lines(tmp_path / "whole")
    first = whole.index(taken[0])
    assert first > 0
    assert taken[: STEPS - first] == whole[first:]


@pytest.mark.thorough
@pytest.mark.zero3
def test_other_ranks_take_the_same_batches_of_a_mixture(run_ranks, tmp_path, sources):
    whole, _ = _train(tmp_path / "one", sources)
    two = run_ranks(_train, 2, tmp_path / "two", sources)
    for batches, _ in two:
        assert batches == whole
    assert two[0][1] == two[1][1]


def test_a_store_that_changed_under_a_run_is_refused(tmp_path, sources):
    _train(tmp_path / "run", sources, stop_at=2)
    moved = [{**of, "path": f"{of['path']}-moved"} for of in sources]
    for before, after in zip(sources, moved, strict=True):
        shutil.copytree(before["path"], after["path"])
    lines = Path("tests/data/train.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[1::3] + lines[:1]) + "\n")
    _prepare(tmp_path / "other.jsonl", Path(sources[1]["path"]), force=True)
    with pytest.raises(ConfigError, match=r"data\.sources .*store-1.* differs from the data of the run in"):
        _train(tmp_path / "run", sources, resume=True)
    assert _train(tmp_path / "run", moved, resume=True)[1]
    reweighted = [{**of, "weight": weight} for of, weight in zip(moved, [0.4, 0.4, 0.2], strict=True)]
    with pytest.raises(ConfigError, match=r"differs from the data of the run in"):
        _train(tmp_path / "run", reweighted, resume=True)
