"""Pruning on several ranks: each has its pieces of the calibration data and its rows, and all have the same result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from pst_ds.config.one_shot import PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import Grid
from pst_ds.nn.targets import resolve_targets
from pst_ds.parallel.ranks import all_ranks
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.budgets import rules_by_saliency
from pst_ds.prune.model import prune_layers
from pst_ds.prune.rules import layer_rules, settings_for
from pst_ds.prune.whole_experts import drop_experts
from pst_ds.train.one_shot.pruning import prune_model
from tests.nn.expert_families import tiny_model

from .conftest import FAMILIES, stopped_after

IDS = torch.randint(0, 48, (10, 9), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": ids} for ids in IDS.split(4)]
LARGER = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
"""With several panels in each matrix."""


def _model(family, dtype):
    if family not in FAMILIES:
        return tiny_model(family).to(dtype)
    class_name, config = FAMILIES[family]
    kind = getattr(transformers, class_name)
    torch.manual_seed(1)
    return kind(kind.config_class(**{**config, **(LARGER if family == "llama" else {})})).eval().to(dtype)


def _pruned(family, method, pattern, options):
    """(outcome of every layer, the weights' bits) on every rank."""
    model = _model(family, options.get("stored", torch.float32))
    data = Calibration(BATCHES, torch.device("cpu"), options.get("dtype", torch.float32), all_ranks())
    if method == "reap":
        found = drop_experts(model, 0.5, data)
        return [(one.kept, one.scores) for one in found], _bits(model)
    budgets = options.get("budgets", "")
    config = settings_for(model, PSTConfig(), method, pattern)
    grid = options.get("grid")
    rules = layer_rules(resolve_targets(model, config), method, 0.5, grid=grid)
    if budgets == "saliency":
        rules = rules_by_saliency(model, rules, data)
    layers = prune_layers(model, rules, method, data, reconstruct=options.get("reconstruct", 0))
    return layers, _bits(model), [layer.scales if layer.scales is None else layer.scales.tolist() for layer in layers]


def _bits(model):
    return {name: tensor.detach().clone().float() for name, tensor in model.named_parameters()}


BF16 = torch.bfloat16
CASES = {
    "alps by row": ("llama", "alps", "row", {}),
    "alps in bf16, matrices by saliency, fitted": (
        "llama", "alps", "matrix", {"dtype": BF16, "stored": BF16, "budgets": "saliency", "reconstruct": 2},
    ),
    "alps in blocks": ("llama", "alps", "4x2", {}),
    "sparsegpt over the matrix": ("llama", "sparsegpt", "matrix", {}),
    "sparsegpt to int4": ("llama", "sparsegpt", "row", {"grid": Grid(4, 32)}),
    "sparsegpt over the matrix to int8": ("llama", "sparsegpt", "matrix", {"grid": Grid(8)}),
    "whole experts": ("mixtral", "reap", "", {}),
    "wanda": ("llama", "wanda", "2:4", {}),
    "transposed and fused": ("gpt2", "alps", "matrix", {}),
    "shared projections": ("deberta_v2", "sparsegpt", "row", {}),
    "experts": ("mixtral", "alps", "row", {"reconstruct": 1}),
    "experts to int8": ("gpt_oss", "sparsegpt", "row", {"grid": Grid(8)}),
}  # fmt: skip


@pytest.mark.zero3
@pytest.mark.parametrize("case", CASES)
def test_every_number_of_ranks_has_the_same_bits(run_ranks, case, monkeypatch):
    monkeypatch.setattr("pst_ds.prune.blocks.PIECE_TOKENS", 18)  # two texts
    arguments = CASES[case]
    alone = _pruned(*arguments)
    for ranks in (2, 3, 4):
        for found in run_ranks(_pruned, ranks, *arguments):
            assert str(found[0]) == str(alone[0])
            assert found[2:] == alone[2:]
            assert {n for n, bits in found[1].items() if not torch.equal(bits, alone[1][n])} == set()


def _prune_folder(out, blocks):
    """Prune a model folder; stop after so many blocks as if a disk were full."""
    config = PruneConfig(method="alps", budgets="saliency", reconstruct=1, samples=12, sparsity=0.5)
    return stopped_after(blocks, lambda: prune_model("tests/data/causal_lm.toml", out, config))


@pytest.mark.zero3
def test_a_killed_prune_continues_on_another_number_of_ranks(run_ranks, tmp_path):
    assert _prune_folder(tmp_path / "alone", 0) == ""
    assert run_ranks(_prune_folder, 2, tmp_path / "shared", 1) == ["no space left on device"] * 2
    assert not (tmp_path / "shared").exists()
    assert run_ranks(_prune_folder, 3, tmp_path / "shared", 0) == [""] * 3
    for file in sorted((tmp_path / "alone").iterdir()):
        assert Path(tmp_path / "shared" / file.name).read_bytes() == file.read_bytes(), file.name
