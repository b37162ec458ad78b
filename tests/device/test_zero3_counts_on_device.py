"""Bytes that a plan takes gradients and the optimizer to move under ZeRO-3, against what DeepSpeed moves on devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.parallel.engine import build_engine
from pst_ds.planning.time import REDUCE_BYTES, STEP_BYTES

from .pretended import counts, to_device

pytestmark = [pytest.mark.device, pytest.mark.zero3]
RANKS, LAYERS = 2, 4
REDUCING = ("reduce_independent_p_g_buckets_and_remove_grads", "independent_gradient_partition_epilogue")
CONFIG = {
    "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0, "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 1 << 19, "stage3_param_persistence_threshold": 0},
}  # fmt: skip


def _counting(owner, *names):
    """Count the bytes that these methods of ``owner`` move from now on; return what says how many."""
    moved = []

    def counted(method):
        def call(*args, **kwargs):
            before = counts.bytes_moved
            result = method(*args, **kwargs)
            moved.append(counts.bytes_moved - before)
            return result

        return call

    for name in names:
        setattr(owner, name, counted(getattr(owner, name)))
    return lambda: sum(moved)


def _moved(width):
    """Bytes of a step: by the reduction of gradients, and by the optimizer but for AdamW itself."""
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(LAYERS)]).bfloat16()
    groups = [{"params": list(model.parameters()), "lr": 1e-3, "name": "all"}]
    engine = build_engine(model, groups, ds_config=CONFIG)
    engine.backward(engine(to_device(torch.randn(4, width).bfloat16())).float().square().mean())
    engine.step()
    zero3 = engine.optimizer
    reduced, stepped, by_adam = (
        _counting(owner, *names) for owner, names in ((zero3, REDUCING), (zero3, ["step"]), (zero3.optimizer, ["step"]))
    )
    engine.backward(engine(to_device(torch.randn(4, width).bfloat16())).float().square().mean())
    engine.step()
    return reduced(), stepped() - by_adam()


def test_deepspeed_moves_for_a_trainable_what_is_planned(run_on_device):
    (small, *_), (large, *_) = (run_on_device(_moved, RANKS, width) for width in (128, 256))
    reduced, stepped = (b - a for a, b in zip(small, large, strict=True))
    more = LAYERS * (256**2 - 128**2)
    own_share = 8 / RANKS  # counted as read and written by the collective, then copied: 14 are left on many ranks
    assert reduced / more == pytest.approx(REDUCE_BYTES + own_share, rel=0.01)
    assert stepped / (more / RANKS) == pytest.approx(STEP_BYTES, rel=0.01)
