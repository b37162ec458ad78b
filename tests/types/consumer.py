"""A script that uses the public names, which ``make types`` checks with all that --strict has; never run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_type

import torch
from torch import nn

import pst_ds
import pst_ds.hf
from pst_ds.inference.encoder.encoder import Encoder
from pst_ds.masks.update import MaskStats
from pst_ds.parallel.master_adamw import MasterAdamW

config = pst_ds.PSTConfig(score_rank=4, update_rank=4)
assert_type(config.score_rank, int)
schedule = pst_ds.CubicSchedule(final_sparsity=0.9, num_steps=100)
assert_type(schedule.sparsity_at(10), float)
assert_type(pst_ds.OneShotSchedule(0.5).updates_masks_at(0), bool)


class Classifier(nn.Module):
    num_labels = 2


def train(model: Classifier, loss_of: Callable[[nn.Module], torch.Tensor]) -> nn.Module:
    model = assert_type(pst_ds.inject_pst(model, config), Classifier)
    assert_type(pst_ds.pst_parameter_groups(model), list[dict[str, Any]])
    optimizer = assert_type(pst_ds.pst_optimizer(model), MasterAdamW)
    masks = pst_ds.MaskUpdater(model, schedule)
    pst_ds.print_trainable_parameters(model)
    pst_ds.adapter_checkpoints(model)
    while not assert_type(masks.is_final, bool):
        loss_of(model).backward()
        optimizer.step()
        assert_type(masks.after_step(optimizer), MaskStats | None)
    pst_ds.save_pretrained(model, "adapter", step=masks.step)
    assert_type(pst_ds.load_pretrained(model, "adapter").num_labels, int)
    return assert_type(pst_ds.merge_and_unload(model), nn.Module)


def with_trainer(model: nn.Module) -> pst_ds.hf.PSTCallback:
    assert_type(pst_ds.hf.trainer_optimizer(model), tuple[type[MasterAdamW], dict[str, Any]])
    packed = pst_ds.hf.PackedWeightsConfig(load_as="dense")
    assert_type(packed.dequantize, bool)
    return pst_ds.hf.PSTCallback(schedule)


def predicted(texts: list[str]) -> None:
    model = pst_ds.load("folder", threads=1)
    if isinstance(model, Encoder):
        assert_type(model.predict(texts)[0]["probabilities"], dict[str, float])
    else:
        assert_type(model.generate([{"role": "user", "content": texts[0]}], 16, temperature=0.7), str)


_ = pst_ds.no_such_name  # type: ignore[attr-defined]
pst_ds.PSTConfig(score_rank="four")  # type: ignore[arg-type]
