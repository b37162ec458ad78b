"""An engine that is said to skip a step whose gradients are not finite does so on all ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pst_ds.parallel import sharding
from pst_ds.parallel.engine import LocalEngine, build_engine, skips_non_finite
from pst_ds.parallel.ranks import rank

STAGES = {"clipped": {"gradient_clipping": 1.0}, "not clipped": {"gradient_clipping": 0.0}}
UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}
NO_NORM = {"zero_optimization": {"stage": 2, "compute_grad_norm": False}, "gradient_clipping": 0.0}
CASES = [
    *[({"zero_optimization": {"stage": s}, **clip}, s > 0) for s in (0, 1, 2, 3) for clip in STAGES.values()],
    *[({"zero_optimization": {"stage": s}, "bf16": {"enabled": True}}, s > 0) for s in (0, 1, 2, 3)],
    *[({"zero_optimization": {"stage": s}, **UNCHECKED}, s == 3) for s in (1, 2, 3)],
    (NO_NORM, False),
    ({**NO_NORM, "bf16": {"enabled": True}}, True),
]
"""DeepSpeed's settings, and whether its engine is known to skip such steps."""


def _after_a_bad_step(config, bad):
    """Whether the engine skips such steps, whether it has applied this one, and whether all values stayed finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if config.get("bf16"):
        model = model.bfloat16()
    groups = [{"params": list(model.parameters()), "lr": 1e-2, "name": "all"}]
    engine = build_engine(model, groups, ds_config={"train_micro_batch_size_per_gpu": 2, **config})
    x = torch.randn(2, 8, dtype=next(iter(model.parameters())).dtype)
    factor = bad if rank() == 1 else 1.0
    engine.backward(engine(x).float().square().mean() * factor)
    engine.step()
    values = torch.cat([sharding.shard_of(param).values.flatten() for param in model.parameters()])
    return skips_non_finite(engine), engine.was_step_applied(), bool(values.isfinite().all())


@pytest.mark.zero3
@pytest.mark.few(4)
@pytest.mark.parametrize(("config", "skips"), CASES, ids=str)
def test_deepspeed_skips_what_it_is_said_to_skip(run_ranks, config, skips):
    for bad in (math.nan, math.inf):
        for says, was_applied, is_finite in run_ranks(_after_a_bad_step, 2, config, bad):
            assert says is skips
            if skips:
                assert not was_applied
                assert is_finite


def test_one_process_skips_it():
    model = nn.Linear(2, 2)
    assert skips_non_finite(LocalEngine(model, [{"params": list(model.parameters()), "lr": 1e-2}]))


def test_an_unknown_engine_is_not_trusted_to_skip_it():
    class Unknown:
        optimizer = None

    assert not skips_non_finite(Unknown())  # type: ignore[arg-type]
