"""What injection puts into a model that is partitioned is partitioned too, one layer at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import grid_of
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding

CONFIG = PSTConfig(target_modules=r"blocks\.\d", modules_to_save=(), update_embeddings=("words",), update_rank=3)
WIDTHS = (24, 40, 56, 40)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(64, WIDTHS[0])
        self.blocks = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(WIDTHS))


def _injected(num_shards=None, *, partitioned):
    model = Model()
    if partitioned:
        import deepspeed

        deepspeed.zero.Init(
            module=model, config_dict_or_path={"train_batch_size": 3, "zero_optimization": {"stage": 3}}
        )
    return inject_pst(model, CONFIG, num_shards=num_shards, grid=grid_of("int8", "row"))


def _own(model):
    return {name: param for name, param in model.named_parameters() if ".pst_" in name}


def _held(world_size):
    """Most bytes whole at a time; bytes held after injection; the values, gathered one by one."""
    split_as, whole = sharding.split_as, []

    def recorded(like, params):
        params = list(params)
        whole.append(sum(param.nbytes for param in params if not sharding.is_partitioned(param)))
        split_as(like, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "split_as", recorded)
        model = _injected(partitioned=True)
    assert all(layer.num_shards == world_size for layer in pst_layers(model).values())
    params = _own(model)
    assert all(param.numel() == 0 and param.requires_grad == (param.dtype != torch.uint8) for param in params.values())
    values = {}
    for name, param in params.items():
        with sharding.gathered([param]):
            values[name] = param.detach().clone()
    return max(whole), {name: param.ds_tensor.nbytes for name, param in params.items()}, values


@pytest.mark.zero3
@pytest.mark.parametrize("world_size", [3])
def test_a_rank_has_its_share_and_a_layer_at_most(run_ranks, world_size):
    alone = _own(_injected(world_size, partitioned=False))
    by_layer = {}
    for name, param in alone.items():
        layer = name.rpartition(".")[0]
        by_layer[layer] = by_layer.get(layer, 0) + param.nbytes
    for most_whole, held, values in run_ranks(_held, world_size, world_size):
        assert most_whole == max(by_layer.values())
        assert held == {name: -(-p.numel() // world_size) * p.element_size() for name, p in alone.items()}
        assert values.keys() == alone.keys()
        assert all(torch.equal(value, alone[name]) for name, value in values.items())
