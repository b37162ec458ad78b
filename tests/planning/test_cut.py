"""The plan of a cut against the FLOPs of a real one, and what it depends on."""

from __future__ import annotations

import pytest
import torch

from pst_ds.config.one_shot import PruneConfig
from pst_ds.config.toml import run_from_table
from pst_ds.parallel.ranks import all_ranks
from pst_ds.planning import cut
from pst_ds.planning.machines import MACHINES
from pst_ds.planning.start import StartData
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.channels import cut_channels
from pst_ds.prune.model_files import ModelFiles
from tests.nn.expert_families import tiny_model

from .test_start import ENDLESS, FP32, _llama, _Products


def _plan(folder, machine=ENDLESS, ranks=1, **asked):
    run = run_from_table({"output_dir": "out", "task": "causal-lm", "model": {"path": str(folder)},
                          "data": {"train": "a.jsonl"}, "train": {"num_steps": 1}})  # fmt: skip
    config = PruneConfig(method="channels", **{"samples": 16, **asked})
    return cut.cut_plan(run, StartData(config, ranks, length=256, batch=8, itemsizes=(4, 4)), machine)


def test_products_are_those_of_a_real_cut(monkeypatch, tmp_path):
    monkeypatch.setitem(FP32, "cpu", 1.0)
    monkeypatch.setattr(cut, "FP64", 1.0)
    _llama().save_pretrained(tmp_path / "base")
    ids = torch.randint(0, 96, (16, 256), generator=torch.Generator().manual_seed(0))
    data = Calibration([{"input_ids": some} for some in ids.split(8)], torch.device("cpu"), torch.float32, all_ranks())
    files = ModelFiles(str(tmp_path / "base"), tmp_path / "out", 1 << 30)
    config = PruneConfig(method="channels", ffn=0.5)
    with files.working({}), _Products() as counted:
        cut_channels(files, config, (), data)
    seconds, tokens = _plan(tmp_path / "base", ffn=0.5).time, 16 * 256
    attention = 3 * 4 * tokens * 256 * 256  # in products of four dimensions, not counted
    assert seconds["statistics"] - attention + seconds["removal"] == pytest.approx(counted.flops, rel=0.1)


def test_ranks_share_experts(tmp_path):
    config = tiny_model("qwen2_moe").config
    config.moe_intermediate_size = config.shared_expert_intermediate_size = 64
    config.save_pretrained(tmp_path)
    cpu = MACHINES["cpu"]
    alone, two = (_plan(tmp_path, cpu, ranks, ffn=0.5) for ranks in (1, 2))
    assert two.time["removal"] < 0.7 * alone.time["removal"]
    assert two.memory["hidden_states"] <= alone.memory["hidden_states"]
    assert alone.traffic["received"] == 0 < two.traffic["received"]
    assert alone.memory["peak"] > sum(alone.memory[name] for name in ("libraries", "block", "removal"))
