"""Weights of other ranks around a shard, on real ZeRO-3 partitions."""

from functools import partial

import pytest
import torch
from torch import nn

from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.halo import fetch_halos

SHAPES = ((5, 7), (3, 2), (4, 25), (1, 1))


def _widen(step, numel, start, stop):
    if start == stop:
        return start, stop
    return start // step * step, min(-(-stop // step) * step, numel)


def _halos(step, dtype):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in SHAPES).to(dtype)
    whole = [layer.weight.detach().clone().flatten() for layer in model]
    frozen = [layer.weight for layer in model]
    model.append(nn.Linear(2, 2).to(dtype))  # something to train
    for weight in frozen:
        weight.requires_grad_(False)
    zero = {"stage": 3, "reduce_bucket_size": 1 << 10, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
    }
    build_engine(model, [{"params": list(model[-1].parameters()), "lr": 0.0}], ds_config=config)
    widen = [partial(_widen, step, w.numel()) for w in whole]
    halos = fetch_halos(
        frozen, [sharding.split_of(p) for p in frozen], widen, [sharding.shard_of(p).values for p in frozen]
    )
    for weight, values, halo, wide in zip(frozen, whole, halos, widen, strict=True):
        shard = sharding.shard_of(weight)
        stop = shard.start + shard.values.numel()
        first, last = wide(shard.start, stop)
        assert torch.equal(halo.before, values[first : shard.start])
        assert torch.equal(halo.after, values[stop:last])
    return sum(h.before.numel() + h.after.numel() for h in halos)


@pytest.mark.zero3
@pytest.mark.parametrize("step", [1, 4, 30, 1000])
def test_every_rank_gets_what_it_lacks(run_ranks, step):
    fetched = run_ranks(_halos, 4, step, torch.bfloat16 if step == 4 else torch.float32)
    assert (sum(fetched) == 0) == (step == 1)


def test_nothing_is_fetched_where_nothing_is_split():
    weight = nn.Linear(3, 4).weight
    (halo,) = fetch_halos([weight], [sharding.split_of(weight)], [lambda a, b: (a, b)], [weight.detach().flatten()])
    assert halo.before.numel() == halo.after.numel() == 0
    assert halo.before.dtype == weight.dtype
