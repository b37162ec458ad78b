"""Models that FSDP2 or tensor parallelism has split are refused by every public function, in one message."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import pst_ds
from pst_ds.errors import InputError

CONFIG = pst_ds.PSTConfig()
SCHEDULE = pst_ds.CubicSchedule(final_sparsity=0.5, num_steps=10)


def _model() -> nn.Module:
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained("tests/data/tiny-bert"))


def _refusals(uses: list[partial]) -> list[str]:
    found = []
    for use in uses:
        with pytest.raises(InputError) as refusal:
            use()
        found.append(str(refusal.value))
    return found


def _of_a_split_base(folder: str) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    pst_ds.save_pretrained(pst_ds.inject_pst(_model(), CONFIG), folder)
    model = fully_shard(_model(), mesh=init_device_mesh("cpu", (1,)))
    return _refusals([partial(pst_ds.inject_pst, model, CONFIG), partial(pst_ds.load_pretrained, model, folder)])


def _of_a_split_pst_model(splits: str, base_grid: pst_ds.Grid | None, folder: str) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = pst_ds.inject_pst(_model(), CONFIG, base_grid=base_grid)
    pst_ds.adapter_checkpoints(model)
    masks, optimizer = pst_ds.MaskUpdater(model, SCHEDULE), pst_ds.pst_optimizer(model)
    optimizer.step()
    fully_shard(model.get_submodule(splits), mesh=init_device_mesh("cpu", (1,)))
    layer = model.bert.encoder.layer[0].intermediate.dense
    return _refusals([
        partial(pst_ds.inject_pst, model, CONFIG),
        partial(pst_ds.MaskUpdater, model, SCHEDULE),
        partial(masks.after_step, optimizer),
        partial(pst_ds.pst_optimizer, model),
        partial(pst_ds.print_trainable_parameters, model),
        partial(pst_ds.save_pretrained, model, folder),
        partial(pst_ds.merge_and_unload, model),
        partial(model.state_dict),
        partial(layer.product, torch.zeros(2, layer.in_features)),
    ])  # fmt: skip


@pytest.mark.zero3
def test_a_base_that_is_split_is_refused(run_ranks, tmp_path):
    (messages,) = run_ranks(_of_a_split_base, 1, str(tmp_path))
    _require_one_message(messages, "bert.embeddings.word_embeddings.weight")


@pytest.mark.zero3
@pytest.mark.parametrize("base_grid", [None, pst_ds.Grid(8)])
@pytest.mark.parametrize("splits", ["", "bert.encoder.layer.0.intermediate.dense"])
def test_a_pst_model_that_is_split_is_refused(run_ranks, tmp_path, splits, base_grid):
    (messages,) = run_ranks(_of_a_split_pst_model, 1, splits, base_grid, str(tmp_path))
    _require_one_message(messages[:-1], splits)
    _require_one_message(messages[-1:], "")


def _require_one_message(messages: list[str], name: str) -> None:
    (message,) = set(messages)
    assert message.startswith(name)
    assert "is a DTensor: FSDP2" in message
    assert "DeepSpeed ZeRO" in message
