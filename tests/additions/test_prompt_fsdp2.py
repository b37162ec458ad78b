"""A prompt in a script's own loop: what two ranks of FSDP2 train is what one process trains."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds import CubicSchedule, MaskUpdater, PSTConfig, inject_pst, pst_optimizer
from pst_ds.additions.prompt import PromptSettings
from pst_ds.checkpoint.adapter import adapter_state
from pst_ds.masks.update import mask_stats
from pst_ds.nn.addition import attach_additions
from pst_ds.parallel.ranks import rank, world_size

LLAMA = "tests/data/tiny-llama"
NAME = "model.pst_prompt.vectors"


def _whole(model):
    return model


def _split(model, *, body):
    """``body``: split the base model too, whose hooks insert the prompt."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    if body:
        fully_shard(model.model)
    return fully_shard(model)


def _trained(split):
    """Train some steps on this rank's sequences of a batch; return the masks' checksum and what was trained."""
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    settings = PromptSettings(text="a good plot", learning_rate=0.02)
    attach_additions(model, {"prompt": settings}, AutoTokenizer.from_pretrained(LLAMA), seed=0)
    inject_pst(model, PSTConfig(modules_to_save=(), score_rank=2, update_rank=2))
    model = split(model)
    optimizer = pst_optimizer(model, num_steps=6)
    masks = MaskUpdater(model, CubicSchedule(final_sparsity=0.5, num_steps=6, update_interval=2))
    ids = torch.randint(4, 30, (4, 8), generator=torch.Generator().manual_seed(1))[rank() :: world_size()]
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.after_step(optimizer)
    return mask_stats(model).checksum, adapter_state(model, keep=True)


@pytest.mark.zero3
@pytest.mark.parametrize("body", [False, True], ids=["blocks split", "base model split too"])
def test_two_ranks_train_as_one_process_does(run_ranks, body):
    start = _prompt_before_training()
    checksum, expected = _trained(_whole)
    assert (expected[NAME] - start).abs().max() > 0.01
    for found, state in run_ranks(partial(_trained, partial(_split, body=body)), 2):
        assert found == checksum
        assert state.keys() == expected.keys()
        for name, values in state.items():
            if values.is_floating_point():
                torch.testing.assert_close(values, expected[name], atol=1e-4, rtol=1e-3)


def _prompt_before_training():
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    settings = PromptSettings(text="a good plot")
    attach_additions(model, {"prompt": settings}, AutoTokenizer.from_pretrained(LLAMA), seed=0)
    return model.get_parameter(NAME).detach()
