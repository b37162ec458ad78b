"""Gradients of x, A, B, R, C, U, V and bias under every ZeRO stage against float64 autograd of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_range
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine

BOUND = 1e-6
WIDTH, HIDDEN, TOKENS = 24, 41, 10


class Toy(nn.Module):
    """Two blocks, one with a Conv1D that fuses three matrices; loss is a weighted sum of the output."""

    def __init__(self, checkpointing: str = ""):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN), "down": nn.Linear(HIDDEN, WIDTH), "c_attn": conv})
            for conv in (Conv1D(3 * WIDTH, WIDTH), Conv1D(3 * WIDTH, WIDTH))
        )
        self.checkpointing = checkpointing

    def _block(self, x, block):
        q, k, v = block["c_attn"](x).chunk(3, -1)
        x = x + torch.tanh(q * k) * v
        return x + block["down"](torch.tanh(block["up"](x)))

    def forward(self, x, target):
        for block in self.layers:
            if self.checkpointing:
                x = checkpoint(self._block, x, block, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = self._block(x, block)
        return (x * target).mean()


def _model(num_shards, checkpointing=""):
    torch.manual_seed(11)
    model = inject_pst(Toy(checkpointing), PSTConfig(modules_to_save=(), update_init_scale=1.0), num_shards=num_shards)
    generator = torch.Generator().manual_seed(12)
    for layer in pst_layers(model).values():
        layer.bias.requires_grad_(True)
        for _, param in layer.factor_parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.2
        keep = torch.rand(layer.layout.numel, generator=generator) > 0.4
        from pst_ds.core.bits import pack_mask

        layer.pst_mask.data = pack_mask(keep, num_shards)
    return model


def _batch(rank, micro):
    generator = torch.Generator().manual_seed(100 + 10 * rank + micro)
    return torch.randn(2, TOKENS, WIDTH, generator=generator), torch.randn(2, TOKENS, WIDTH, generator=generator)


def _reference(world_size, accumulation):
    """{name: gradient} in float64, averaged over ranks and micro-batches; x of rank 0's first micro-batch."""
    model = _model(1)
    leaves, weights = {}, {}
    for name, layer in pst_layers(model).items():
        params = {n: p.detach().double().requires_grad_() for n, p in layer.factor_parameters()}
        bias = layer.bias.detach().double().requires_grad_()
        mask = unpack_range(layer.pst_mask, layer.layout.numel, layer.num_shards, 0, layer.layout.numel)
        mask = mask.view(layer.layout.shape)
        stored = layer.weight.detach().double()
        if layer.layout.transposed:
            mask, stored = mask.t(), stored.t()
        parts, rows = layer.layout.num_matrices, layer.layout.out_features // layer.layout.num_matrices

        def low_rank(left, right, params=params, parts=parts, rows=rows):
            return torch.cat(
                [params[left][p * rows : (p + 1) * rows] @ params[right][p * 8 : (p + 1) * 8] for p in range(parts)]
            )

        weight = stored + low_rank("U", "V")
        scales = torch.tensor(layer.magnitude_scales, dtype=torch.float64).repeat_interleave(rows)[:, None]
        columns = params["C"].repeat_interleave(rows, 0)
        score = weight.abs() / scales + low_rank("A", "B") + params["R"][:, None] + columns
        soft_mask = mask.double() + score - score.detach()  # straight-through
        weights[name] = (soft_mask * weight, bias)
        leaves.update({f"{name}.pst_{n}": p for n, p in params.items()}, **{f"{name}.bias": bias})

    def block(x, i):
        def linear(v, leaf):
            weight, bias = weights[f"layers.{i}.{leaf}"]
            return v @ weight.t() + bias

        q, k, v = linear(x, "c_attn").chunk(3, -1)
        x = x + torch.tanh(q * k) * v
        return x + linear(torch.tanh(linear(x, "up")), "down")

    total, first_x = 0.0, None
    for rank in range(world_size):
        for micro in range(accumulation):
            x, target = (t.double() for t in _batch(rank, micro))
            x.requires_grad_()
            first_x = x if first_x is None else first_x
            total = total + (block(block(x, 0), 1) * target).mean()
    (total / (world_size * accumulation)).backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return grads, first_x.grad * world_size * accumulation


ZERO = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3 persistent": {"stage": 3, "stage3_param_persistence_threshold": 1 << 20},
    "3 offload": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "3 hpZ": {"stage": 3, "zero_hpz_partition_size": 2},
    "3 in nodes": {"stage": 3},
    "3 whole": {"stage": 3},
}
COPY_RANKS = {"3 in nodes": 2, "3 whole": 1}
"""Ranks that share a copy of the frozen weights; in hpZ by the JSON, trained ones have copies too."""


def _zero(kind):
    whole = {
        "reduce_bucket_size": 1 << 14, "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, **ZERO[kind],
    }  # fmt: skip
    return {k: v for k, v in whole.items() if whole["stage"] == 3 or not k.startswith("stage3_")}


def _gradients(kind, world_size, accumulation, checkpointing):
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    model = _model(world_size if kind.startswith("3") else 1, checkpointing)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(kind),
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    with sharding.copying_frozen(COPY_RANKS.get(kind, 0)):
        engine = build_engine(model, [{"params": trained, "lr": 0.0}], ds_config=config)
    first_x = None
    for micro in range(accumulation):
        x, target = _batch(dist.get_rank(), micro)
        x.requires_grad_()
        first_x = x if first_x is None else first_x
        engine.backward(engine(x, target))
        if micro < accumulation - 1:
            engine.step()
    grads = {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters() if p.requires_grad}
    return grads, first_x.grad * accumulation


def _relative(ours, reference):
    return float((ours.double() - reference).norm() / reference.norm())


@pytest.mark.few(5)
@pytest.mark.zero3
@pytest.mark.parametrize(
    ("kind", "world_size", "accumulation", "checkpointing"),
    [
        ("0", 2, 1, ""),
        ("1", 2, 1, ""),
        ("2", 2, 1, ""),
        ("2", 2, 2, "reentrant"),
        ("3", 1, 1, ""),
        ("3", 2, 2, ""),
        ("3", 2, 1, "non-reentrant"),
        ("3", 2, 1, "reentrant"),
        ("3", 3, 2, "non-reentrant"),
        ("3 persistent", 2, 1, ""),
        ("3 offload", 2, 2, ""),
        ("3 offload", 2, 1, "reentrant"),
        ("3 hpZ", 4, 2, "non-reentrant"),
        ("3 hpZ", 4, 1, "reentrant"),
        ("3 in nodes", 4, 1, "reentrant"),
        ("3 whole", 2, 2, "non-reentrant"),
        ("3 whole", 2, 1, "reentrant"),
    ],
)
def test_gradients_match_float64(run_ranks, kind, world_size, accumulation, checkpointing):
    expected, expected_x = _reference(world_size, accumulation)
    ranks = run_ranks(_gradients, world_size, kind, world_size, accumulation, checkpointing)
    for grads, _ in ranks:
        assert grads.keys() == expected.keys()
        worst = {name: _relative(grads[name], expected[name]) for name in expected}
        assert max(worst.values()) <= BOUND, worst
    assert _relative(ranks[0][1], expected_x) <= BOUND
