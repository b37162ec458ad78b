"""Families of models under FSDP2: masks and a training step are those of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pst_ds import PSTConfig, inject_pst
from pst_ds.checkpoint.adapter import adapter_state
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import pst_layers
from tests.nn.expert_families import FAMILIES as OF_EXPERTS
from tests.nn.expert_families import tiny_model
from tests.nn.test_targets import FAMILIES

BUILT: dict[str, Callable[[], nn.Module]] = {name: family[0] for name, family in FAMILIES.items()}
LEFT_DENSE = {"jamba": ("mamba",)}
UPDATED = {"bert": ("word_embeddings",), "roberta": ("word_embeddings", "position_embeddings")}
"""Embeddings with a low-rank update."""


def _stepped(name: str, split: Callable[[nn.Module], object]):
    torch.manual_seed(3)
    model = BUILT[name]() if name in BUILT else tiny_model(name)
    chosen = {"exclude_modules": LEFT_DENSE.get(name, ()), "update_embeddings": UPDATED.get(name, ())}
    model = inject_pst(model, PSTConfig(**chosen, score_rank=2, update_rank=2)).eval()
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    split(model)
    masks = update_masks(model, 0.5)
    model(input_ids=torch.arange(1, 13).view(1, 12)).logits.square().sum().backward()
    torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1).step()
    return masks, adapter_state(model, keep=True)


def _split_by_blocks(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in (block for blocks in reversed(lists) for block in blocks):  # inner ones first
        fully_shard(block)
    fully_shard(model)


def _stepped_by_fsdp2(names: list[str]):
    return [_stepped(name, _split_by_blocks) for name in names]


@pytest.mark.zero3
@pytest.mark.parametrize("names", [list(BUILT), list(OF_EXPERTS)], ids=["dense", "experts"])
def test_a_step_of_a_family_is_that_of_one_process(run_ranks, names):
    expected = [_stepped(name, lambda model: None) for name in names]
    for world_size in (1, 2, 3):
        for found in run_ranks(_stepped_by_fsdp2, world_size, names):
            for name, (masks, state), (expected_masks, expected_state) in zip(names, found, expected, strict=True):
                assert masks == expected_masks, name
                for part, values in state.items():
                    assert torch.allclose(values, expected_state[part], rtol=1e-4, atol=1e-6), (name, part)
