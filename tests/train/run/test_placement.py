"""Where frozen weights are held, on four ranks as two nodes: what each rank receives, and that nothing else changes."""

from __future__ import annotations

import json
import os
from math import ceil
from pathlib import Path

import pytest
import torch

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.toml import load_run
from pst_ds.parallel import stop_signals
from pst_ds.parallel.ds_config import DeepSpeedConfigError, place_frozen
from pst_ds.parallel.launch import launch_environment
from pst_ds.parallel.placement import copy_ranks
from pst_ds.parallel.stop_signals import StoppedError
from pst_ds.train import loop
from pst_ds.train.prepare import prepare
from pst_ds.train.resolved import resolve
from pst_ds.train.run import train_prepared

RANKS, NODE, GIB = 4, 2, 1 << 30
PLACEMENTS = {"sharded": 0, "auto": NODE, "replicated": 1}
SMALL_SUMS = 3 * 2 * 8 + RANKS * 4 * 8
"""Bytes of three sums of a double (overflow, norm), and of the four doubles of each rank that judge a batch."""


def _run(folder, *settings):
    return load_run("tests/data/world_size.toml", [f'output_dir="{folder}"', "train.num_steps=8", *settings])


def _train(folder, settings, resume=False):
    os.environ |= {"LOCAL_WORLD_SIZE": str(NODE), "LOCAL_RANK": str(int(os.environ["RANK"]) % NODE)}
    context = prepare(_run(folder, *settings), launch_environment())
    train_prepared(context, quiet=True, resume=resume)
    return context.copy_ranks


def _lines(folder, event):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def _outcome(folder):
    checkpoint = read_checkpoint(Path(folder) / "checkpoints" / "final")
    losses = {line["step"]: line["loss"] for line in _lines(folder, "step")}
    return losses, dict(checkpoint.masks), dict(checkpoint.trained)


def _same(a, b):
    for mine, others in zip(a[1:], b[1:], strict=True):
        assert mine.keys() == others.keys()
        assert all(torch.equal(torch.as_tensor(mine[n]), torch.as_tensor(others[n])) for n in mine)
    assert a[0] == b[0]


def _padded(params):
    return sum(ceil(p.numel() / RANKS) * RANKS * p.element_size() for p in params)


@pytest.mark.zero3
@pytest.mark.parametrize("deepspeed_config", ["zero3_cpu", pytest.param("zero3", marks=pytest.mark.thorough)])
def test_only_factors_travel_between_nodes_and_masks_once_after_an_update(run_ranks, tmp_path, deepspeed_config):
    """In zero3.json, unlike zero3_cpu.json, DeepSpeed gathers small parameters like these after every step."""
    params = list(resolve(_run(tmp_path), reads_data=False, num_shards=RANKS).shapes.model.parameters())
    trained = _padded(p for p in params if p.requires_grad)
    masks = _padded(p for p in params if p.dtype == torch.uint8)
    frozen = _padded(p for p in params if not p.requires_grad)
    factors = 2 * trained + SMALL_SUMS  # gathered once, their gradients reduced once
    # in a ring of w ranks each receives (w - 1) / w of the bytes, and one in NODE of them comes from the other node
    ring, in_node = (RANKS - 1) / RANKS / NODE, (NODE - 1) / NODE
    expected = {
        "sharded": [(ring * (factors + frozen),) * 2] * 2,
        "auto": [
            (ring * factors + in_node * frozen, ring * factors),
            (ring * (factors + masks) + in_node * (frozen - masks), ring * (factors + masks)),
        ],
        "replicated": [(ring * factors,) * 2, (ring * (factors + masks),) * 2],
    }
    outcomes = []
    for place, copies in PLACEMENTS.items():
        settings = [f'model.base_placement="{place}"', f'deepspeed_config="ds_configs/{deepspeed_config}.json"']
        assert run_ranks(_train, RANKS, tmp_path / place, settings) == [copies] * RANKS
        steps = {line["step"]: line for line in _lines(tmp_path / place, "step")}
        updates = [line["step"] for line in _lines(tmp_path / place, "mask_update")]
        assert {5, 7} <= set(updates)
        for step, bytes_of_step in zip((5, 6), expected[place], strict=True):
            assert (steps[step]["bytes_within_node"], steps[step]["bytes_between_nodes"]) == bytes_of_step, (
                place,
                step,
            )
        outcomes.append(_outcome(tmp_path / place))
        _same(outcomes[0], outcomes[-1])


def _stopped(folder, settings):
    set_rates = loop.set_rates

    def stopping(run_loop, step):
        stop_signals._asked_by = 10 if step >= 5 else 0
        set_rates(run_loop, step)

    loop.set_rates = stopping  # this process ends soon
    with pytest.raises(StoppedError):
        _train(folder, settings)


@pytest.mark.zero3
@pytest.mark.parametrize(
    "settings",
    [
        ["model.base_bits=4", "model.base_group=row", "model.embedding_bits=8"],
        pytest.param(["schedule.solves=2", "train.num_steps=16"], marks=pytest.mark.thorough),
    ],
)
def test_a_run_that_resumes_in_another_placement_ends_with_the_same_bits(run_ranks, tmp_path, settings):
    """Weights that are quantised, or solved for, replace copies that were made before."""
    run_ranks(_train, RANKS, tmp_path / "whole", [*settings, "model.base_placement=sharded"])
    run_ranks(_stopped, RANKS, tmp_path / "stopped", settings)
    resumed = [*settings, "model.base_placement=replicated"]
    assert run_ranks(_train, RANKS, tmp_path / "stopped", resumed, True) == [1] * RANKS
    _same(_outcome(tmp_path / "whole"), _outcome(tmp_path / "stopped"))


def test_auto_copies_weights_into_a_node_where_they_fit_in_half_of_the_memory():
    share = 149 * GIB / 8 + 149 * GIB / 64  # 70B in 16 bits with masks
    assert copy_ranks("auto", 149 * GIB, 64, 8, 2 * share) == 8
    assert copy_ranks("auto", 149 * GIB, 64, 8, 2 * share - 16) == 0
    assert copy_ranks("node", 149 * GIB, 64, 8, 0) == 8
    assert copy_ranks("auto", GIB, 4, 1, 80 * GIB) == 1  # a copy in a node of one rank is whole
    assert copy_ranks("replicated", GIB, 8, 8, 0) == 1
    for ranks, node_size in ((8, 8), (3, 1 << 60), (12, 8), (1, 1)):
        assert copy_ranks("node", GIB, ranks, node_size, 80 * GIB) == 0
    assert copy_ranks("auto", 0, 64, 8, 80 * GIB) == 0  # everything trains
    assert copy_ranks("sharded", GIB, 64, 8, 80 * GIB) == 0


def _placed(wanted, **zero):
    config = {"zero_optimization": {"stage": 3, **zero}}
    chosen = place_frozen(config, wanted, GIB, 16, 8, 80 * GIB, names=("my/ds.json", "my/run.toml"))
    return chosen, config["zero_optimization"].get("zero_hpz_partition_size")


def test_a_size_in_the_json_decides_unless_the_run_file_does():
    assert _placed("auto") == _placed("node", zero_hpz_partition_size=8) == (8, 8)
    assert _placed("auto", zero_hpz_partition_size=4) == (4, 4)
    assert _placed("auto", zero_hpz_partition_size=1) == (0, 1)
    assert _placed("replicated") == (1, 1)
    assert _placed("auto", offload_param={"device": "cpu"}) == (0, 1)
    assert _placed("sharded") == (0, 1)
    with pytest.raises(DeepSpeedConfigError) as caught:
        _placed("node", zero_hpz_partition_size=4)
    assert str(caught.value) == (
        "my/ds.json has zero_optimization.zero_hpz_partition_size = 4, but my/run.toml has model.base_placement = "
        '"node", which makes it 8. Fix: write "auto" in my/ds.json'
    )
    with pytest.raises(DeepSpeedConfigError, match=r'base_placement = "replicated" keeps .* Fix: remove it'):
        _placed("replicated", offload_param={"device": "cpu"})


def _remark():
    rank = int(os.environ["RANK"])  # nodes of two ranks and one
    os.environ |= {"LOCAL_WORLD_SIZE": "2" if rank < 2 else "1", "LOCAL_RANK": str(rank % 2)}
    context = prepare(_run("unused"), launch_environment())
    return context.copy_ranks, context.remark


@pytest.mark.zero3
def test_unequal_nodes_have_no_copies_and_say_so(run_ranks):
    for copies, remark in run_ranks(_remark, 3):
        assert copies == 0
        assert remark.startswith('model.base_placement = "auto": nodes have different numbers of ranks')
