"""The shipped DeepSpeed configs through the front door, and what a rank holds under each ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.pst import PSTConfig
from pst_ds.config.toml import load_run
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import zero3
from pst_ds.parallel.engine import build_engine, optimizer_bytes
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import prepare, train_prepared


def _train(folder, deepspeed_config):
    settings = [f'output_dir="{folder}"', f'deepspeed_config="{deepspeed_config}"', "train.num_steps=4"]
    run = load_run("tests/data/world_size.toml", settings)
    return train_prepared(prepare(run, launch_environment()), quiet=True)


def _losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


@pytest.mark.zero3
def test_every_shipped_config_trains_as_one_process_does(run_ranks, tmp_path):
    alone = _train(tmp_path / "alone", "")
    trained = dict(read_checkpoint(tmp_path / "alone" / "checkpoints" / "final").trained)
    for name in ("zero2", "zero3", "zero3_offload"):
        folder = tmp_path / name
        for result in run_ranks(_train, 2, folder, f"ds_configs/{name}.json"):
            assert result["mask_checksum"] == alone["mask_checksum"], name
            assert result["trained_parameters"] == alone["trained_parameters"]
        assert _losses(folder) == pytest.approx(_losses(tmp_path / "alone"), rel=1e-4), name
        own = dict(read_checkpoint(folder / "checkpoints" / "final").trained)
        assert own.keys() == trained.keys()
        assert all(own[n].shape == trained[n].shape for n in own)


WIDTH, HIDDEN = 256, 509  # 509 is prime: every shard of these weights is padded


class _Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def _held(stage, world_size, dtype, zero):
    """(trainable parameters, bytes of optimizer state here, pruned weights, mask bytes here) after a step."""
    torch.manual_seed(0)
    model = inject_pst(_Stack().to(dtype), PSTConfig(), num_shards=world_size if stage == 3 else 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1 << 16, **zero},
    }  # fmt: skip
    engine = build_engine(model, [{"params": trained, "lr": 1e-3}], ds_config=config)
    engine.backward(engine(torch.randn(3, WIDTH, dtype=dtype)).float().square().mean())
    engine.step()
    layers = pst_layers(engine.module).values()
    masks = sum(zero3.shard_of(layer.pst_mask).values.nbytes for layer in layers)
    return sum(map(zero3.full_numel, trained)), optimizer_bytes(engine), sum(x.layout.numel for x in layers), masks


@pytest.mark.zero3
@pytest.mark.parametrize(
    ("stage", "world_size", "dtype", "zero"),
    [
        (1, 2, torch.bfloat16, {}),
        (3, 3, torch.bfloat16, {}),
        (3, 2, torch.float32, {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
    ],
    ids=["1", "3", "3-offload"],
)
def test_a_rank_holds_its_share_of_optimizer_state_and_masks(run_ranks, stage, world_size, dtype, zero):
    for trained, optimizer, weights, masks in run_ranks(_held, world_size, stage, world_size, dtype, zero):
        assert optimizer == pytest.approx(trained * 12 / world_size, rel=0.01)
        assert masks == pytest.approx(weights / 8 / (world_size if stage == 3 else 1), rel=0.01)
