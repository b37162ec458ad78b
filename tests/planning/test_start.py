"""The plan of one-shot pruning against a start that is counted: FLOPs, bytes that a rank receives, and sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.config.one_shot import PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.core.one_shot.alps import PENALTIES
from pst_ds.core.one_shot.shares import Ranks
from pst_ds.core.select import RankSums
from pst_ds.nn.inject import inject_pst
from pst_ds.nn.targets import resolve_targets
from pst_ds.planning.machines import MACHINES
from pst_ds.planning.shapes import block_sizes, model_numbers
from pst_ds.planning.start import FACTORISATION, FP32, BlockSizes, InputGroup, StartData, start_plan
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.budgets import rules_by_saliency
from pst_ds.prune.model import prune_layers
from pst_ds.prune.rules import layer_rules, settings_for

SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 96, "vocab_size": 96}  # fmt: skip
WEIGHTS = 2 * 256 * 384 + 2 * 192 * 256 + 3 * 256 * 384
CONFIG = PruneConfig(method="alps", sparsity=0.5, pattern="matrix", budgets="saliency", reconstruct=2, samples=16)
ENDLESS = replace(MACHINES["cpu"], flops=1.0, memory_bytes=1e30, node_bytes=1e30, network_bytes=1e30, latency=0.0)
"""Its seconds are FLOPs."""


def _sizes():
    model = _llama("meta")
    inject_pst(model, PSTConfig())
    return block_sizes(model, model_numbers(model))


def _cost(machine, config=CONFIG, ranks=2):
    return start_plan(_sizes(), StartData(config, ranks, length=256, batch=8, itemsizes=(4, 4)), machine)


def _llama(device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def test_a_block_and_the_rest_are_counted_from_a_model_without_values():
    groups = (InputGroup(2 * 384, 256), InputGroup(256, 384)) * 2
    found = _sizes()
    assert found == BlockSizes(
        blocks=2, numel=WEIGHTS + 512, active_share=1.0, groups=groups, largest_layer=256 * 384,
        outside=2 * 96 * 256 + 256, width=256, vocabulary=96,
    )  # fmt: skip
    assert found.weights == WEIGHTS


class _Received:
    """Rank 0 of two, which the other one sends what it sends itself."""

    bytes: ClassVar[int] = 0

    @classmethod
    def ranks(cls):
        def counted(result, received):
            cls.bytes += int(received)
            return result

        sums = RankSums(lambda values: counted(values.clone(), values.nbytes))
        return Ranks(
            0, 2, sums,
            lambda value, source: counted(value.clone(), value.nbytes / 2),  # on the average of both ranks
            lambda values: counted(values[0], values.nbytes / 2),
            lambda value: counted(torch.stack([value, value]), value.nbytes),
        )  # fmt: skip


class _Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.flops += 2 * out.numel() * args[-1].shape[0]
        return out


def test_flops_and_traffic_are_those_of_a_real_start(monkeypatch):
    monkeypatch.setitem(FP32, "cpu", 1.0)
    model, ids = _llama(), torch.randint(0, 96, (16, 256), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": some} for some in ids.split(8)]
    data = Calibration(batches, torch.device("cpu"), torch.float32, _Received.ranks())
    # ranking rows together exchanges counts, which are few compared with larger layers only
    settings = settings_for(model, PSTConfig(), "alps", "row")
    rules = layer_rules(resolve_targets(model, settings), "alps", 0.5)
    with _Products() as budgets:
        rules = rules_by_saliency(model, rules, data)
    _Received.bytes = 0
    with _Products() as pruning:
        prune_layers(model, rules, "alps", data, reconstruct=2)
    # the rows of the other rank are not pruned
    plan = _cost(ENDLESS, replace(CONFIG, sparsity=0.25))
    assert plan.time["budgets"] == pytest.approx(budgets.flops, rel=0.15)
    inverses = 2 * PENALTIES / 2 * (2 * 256**3 + 2 * 384**3) / FACTORISATION  # which torch does not count
    planned = plan.time["statistics"] + plan.time["pruning"] - inverses + plan.time["fit"]
    assert planned == pytest.approx(pruning.flops, rel=0.1)
    assert plan.traffic["received"] == pytest.approx(_Received.bytes, rel=0.1)


def test_memory_is_shared_where_ranks_share_the_work():
    two, eight = (_cost(MACHINES["cpu"], ranks=ranks).memory for ranks in (2, 8))
    assert (two["outside_of_blocks"], two["block"]) == (4 * (2 * 96 * 256 + 256), 4 * (WEIGHTS + 512))
    assert two["hidden_states"] == 4 * eight["hidden_states"] == 2 * 4 * 2048 * 256
    assert two["fit"] - eight["fit"] == WEIGHTS / 2 * (16 / 2 - 16 / 8 + 4 * (2 - 1))
    assert two["pruning"] > 20 * 384**2
    on_gpu = _cost(MACHINES["h100"]).memory
    pruned = two["block"] + two["hidden_states"]
    assert on_gpu["host"] == two["outside_of_blocks"] + max(pruned, two["budgets"], two["last_file"])
    working = max(two[name] for name in ("statistics", "pruning", "fit"))
    assert on_gpu["peak"] - on_gpu["libraries"] == two["block"] + working
    assert two["peak"] == two["libraries"] + two["outside_of_blocks"] + max(pruned + working, two["budgets"])


def test_methods_that_compute_less_take_less():
    alps, sparsegpt, wanda = (
        _cost(MACHINES["cpu"], PruneConfig(method=method, sparsity=0.5, samples=16))
        for method in ("alps", "sparsegpt", "wanda")
    )
    assert alps.time["all"] > sparsegpt.time["all"] > wanda.time["all"]
    assert alps.traffic["received"] > sparsegpt.traffic["received"] > wanda.traffic["received"]
    assert alps.memory["fit"] == alps.memory["budgets"] == alps.time["fit"] == 0


def test_70b_on_64_gpus_starts_in_20_minutes():
    hidden, inner = 8192, 28672
    groups = InputGroup(2 * hidden + 2 * 1024, hidden), InputGroup(2 * inner, hidden), InputGroup(hidden, inner)
    numel = sum(g.outputs * g.inputs for g in groups)
    block = BlockSizes(80, numel, 1.0, groups, hidden * inner, 2 * 32000 * hidden, hidden, 32000)
    plan = start_plan(block, StartData(replace(CONFIG, samples=128), 64, 2048, 8, (2, 2)), MACHINES["h100"])
    assert plan.time["all"] < 20 * 60
    assert plan.memory["peak"] < 40e9
