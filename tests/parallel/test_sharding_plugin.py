"""A sharding that another package adds: two ranks in one process, threads, hold half of each weight and mask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed import multi_threaded_pg

from pst_ds import Grid, PSTConfig, inject_pst
from pst_ds.core.bits import relayout
from pst_ds.masks.scales import RoundingStats, update_scales
from pst_ds.masks.update import MaskStats, mask_stats, update_masks
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.sharding import registry
from tests.plugins import install

RANKS = 2
WIDTHS = {
    "matrix": (20, 13, 7, 32),
    "row": (20, 13, 7, 32),
    "global": (20, 13, 7, 32),
    "2:4": (20, 12, 4, 13),
    "8x1": (13, 8, 24),
}
"""Widths of the model for each pattern. Shards end inside rows, groups and blocks, and one shard is padded."""


class Halves(sharding.Sharding):
    """Rank i has half i of the flat values, in an attribute of the parameter, which itself is empty."""

    def owns(self, param: Tensor) -> bool:
        return hasattr(param, "own_half")

    def ranks(self, param: nn.Parameter) -> int:
        return RANKS

    def rank(self, param: nn.Parameter) -> int:
        return dist.get_rank()

    def shape(self, param: nn.Parameter) -> torch.Size:
        return param.whole_shape

    def local(self, param: nn.Parameter) -> Tensor:
        return param.own_half

    def gather(self, param: nn.Parameter) -> Tensor:
        padded = param.own_half.new_zeros(self.split(param).share)
        padded[: param.own_half.numel()] = param.own_half
        (values,) = self.all_gathered([param], [padded], None)
        return values


def halve(param: nn.Parameter) -> None:
    """Keep only this rank's half of ``param``."""
    values = param.detach().flatten()
    share = -(-values.numel() // RANKS)
    param.whole_shape = param.shape
    param.own_half = values[dist.get_rank() * share :][:share].clone()
    param.data = param.new_empty(0)


@pytest.fixture
def halves_are_installed(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(install(tmp_path, "pst_ds.shardings", halves=f"{__name__}:Halves"))
    # as in a new process, in which nothing has asked for a sharding
    monkeypatch.setattr(registry, "_asked", [])
    vars(registry.SHARDINGS).pop("_entries", None)
    yield
    vars(registry.SHARDINGS).pop("_entries", None)


def on_two_threads(function: Callable[[], object]) -> list:
    """Return what ``function`` returns on each of two ranks, by rank."""
    store = dist.HashStore()

    def run(rank: int) -> object:
        dist.init_process_group("threaded", rank=rank, world_size=RANKS, store=store)
        try:
            return function()
        except BaseException as error:
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # so that the other thread stops waiting
            raise
        finally:
            dist.destroy_process_group()

    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        with ThreadPoolExecutor(RANKS) as threads:
            return list(threads.map(run, range(RANKS)))
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        multi_threaded_pg._uninstall_threaded_pg()
        multi_threaded_pg.ProcessLocalGroup.reset()


def model_with_equal_scores(pattern: str, num_shards: int | None) -> nn.Module:
    """Return a model of coarse values, the same in every call."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential()
    for inputs, outputs in itertools.pairwise(WIDTHS[pattern]):
        model.append(nn.ModuleDict({"linear": nn.Linear(inputs, outputs)}))
    for param in model.parameters():
        param.data = (torch.randn(param.shape, generator=generator) * 8).round() / 50
    config = PSTConfig(target_modules=("linear",), score_rank=2, update_rank=2, pattern=pattern)
    inject_pst(model, config, num_shards=num_shards, grid=Grid(bits=8))
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = (torch.randn(param.shape, generator=generator) * 8).round() / 32
    return model


def updated(model: nn.Module) -> tuple[MaskStats, MaskStats, RoundingStats, list[list[int]]]:
    """Return the outcomes of two mask updates and a search of scales, and the bits of each mask."""
    first = update_masks(model, 0.3, progress=0.6)
    second = update_masks(model, 0.5)
    assert mask_stats(model).checksum == second.checksum
    scales = update_scales(model)
    bits = [
        relayout(sharding.whole(layer.pst_mask), layer.layout.numel, layer.num_shards, 1).tolist()
        for layer in pst_layers(model).values()
    ]
    return first, second, scales, bits


def updated_in_halves(pattern: str) -> tuple[MaskStats, MaskStats, RoundingStats, list[list[int]]]:
    model = model_with_equal_scores(pattern, num_shards=RANKS)
    for layer in pst_layers(model).values():
        halve(layer.weight)
        halve(layer.pst_mask)
        assert sharding.is_partitioned(layer.weight)
        assert sharding.num_shards(layer.pst_mask) == RANKS
        assert sharding.full_shape(layer.weight) == layer.weight_shape
    return updated(model)


@pytest.mark.usefixtures("halves_are_installed")
@pytest.mark.parametrize("pattern", WIDTHS)
def test_masks_in_halves_are_those_of_whole_weights(pattern):
    first, second, scales, bits = updated(model_with_equal_scores(pattern, num_shards=None))
    assert 0 < second.num_pruned < second.num_weights
    assert second.num_flipped > 0
    for in_halves in on_two_threads(lambda: updated_in_halves(pattern)):
        assert in_halves[0] == first
        assert in_halves[1] == second
        assert in_halves[2].layer_errors == pytest.approx(scales.layer_errors)
        assert in_halves[3] == bits


@pytest.mark.usefixtures("halves_are_installed")
def test_a_plugin_is_asked_before_the_shardings_of_pst_ds():
    assert [type(each).__name__ for each in sharding.shardings()] == ["Halves", "FSDP2", "ZeRO3", "Whole"]
    param = nn.Parameter(torch.zeros(3))
    assert not sharding.is_partitioned(param)
    param.own_half = torch.zeros(2)
    assert type(sharding.sharding_of(param)).__name__ == "Halves"
