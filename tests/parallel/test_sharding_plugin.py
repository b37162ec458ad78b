"""The sharding of docs/background/architecture.md, installed as another package: two ranks hold half of each weight.

Masks are updated by threads of one process; training uses two processes.
"""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.testing._internal.distributed import multi_threaded_pg

from pst_ds import (
    CubicSchedule,
    Grid,
    MaskUpdater,
    PSTConfig,
    inject_pst,
    load_pretrained,
    pst_parameter_groups,
    save_pretrained,
)
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.checkpoint.restore import load_into, load_optimizer, trainable
from pst_ds.core.bits import relayout
from pst_ds.masks.scales import RoundingStats, update_scales
from pst_ds.masks.update import MaskStats, mask_stats, update_masks
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import optimizer_state, sharding
from pst_ds.parallel.engine import Engine, LocalEngine, ParamGroup
from pst_ds.parallel.ranks import world_size
from pst_ds.parallel.sharding import registry
from tests.checkpoint.small_engine import save_checkpoint, state_of
from tests.plugins import install

PAGE = Path(__file__).resolve().parents[2] / "docs/background/architecture.md"
RANKS = 2
WIDTHS = {
    "matrix": (20, 13, 7, 32),
    "row": (20, 13, 7, 32),
    "global": (20, 13, 7, 32),
    "2:4": (20, 12, 4, 13),
    "8x1": (13, 8, 24),
}
"""Widths of the model for each pattern. Shards end inside rows, groups and blocks, and one shard is padded."""

_GRID = Grid(bits=8)
STEPS = 6
SAVED_AFTER = 3
SCHEDULE = CubicSchedule(
    num_steps=STEPS, final_sparsity=0.7, warmup_fraction=0.0, cooldown_fraction=0.0, update_interval=1
)


@pytest.fixture
def halves_are_installed(tmp_path, monkeypatch) -> Iterator[None]:
    section = PAGE.read_text(encoding="utf-8").split("\n## Add a sharding\n")[1].partition("\n## ")[0]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "halves_plugin.py").write_text(example[1], encoding="utf-8")
    monkeypatch.syspath_prepend(install(tmp_path, "pst_ds.shardings", halves="halves_plugin:Halves"))
    monkeypatch.delitem(sys.modules, "halves_plugin", raising=False)
    # as in a new process, in which nothing has asked for a sharding
    monkeypatch.setattr(registry, "_asked", [])
    vars(registry.SHARDINGS).pop("_entries", None)
    yield
    vars(registry.SHARDINGS).pop("_entries", None)


def halve(param: nn.Parameter) -> None:
    importlib.import_module("halves_plugin").halve(param)


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


def model_with_equal_scores(pattern: str, num_shards: int | None, grid: Grid | None = _GRID) -> nn.Module:
    """Return a model of coarse values, the same in every call."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential()
    for inputs, outputs in itertools.pairwise(WIDTHS[pattern]):
        model.append(nn.ModuleDict({"linear": nn.Linear(inputs, outputs)}))
    for param in model.parameters():
        param.data = (torch.randn(param.shape, generator=generator) * 8).round() / 50
    config = PSTConfig(target_modules=("linear",), score_rank=2, update_rank=2, pattern=pattern)
    inject_pst(model, config, num_shards=num_shards, grid=grid)
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
    assert [type(each).__name__ for each in sharding.shardings()] == ["Halves", "InFlat", "FSDP2", "ZeRO3", "Whole"]
    param = nn.Parameter(torch.zeros(3))
    assert not sharding.is_partitioned(param)
    param.own_half = torch.zeros(2)
    assert type(sharding.sharding_of(param)).__name__ == "Halves"


class HalvesEngine(LocalEngine):
    """Trains a model whose parameters are divided: gathers them for the passes, and divides the sums of gradients."""

    def __init__(self, module: nn.Module, param_groups: list[ParamGroup]):
        for param in module.parameters():
            halve(param)
        groups = [group | {"params": [param.own_half for param in group["params"]]} for group in param_groups]
        super().__init__(module, groups)

    @contextmanager
    def passes(self) -> Iterator[None]:
        params = list(self.module.parameters())
        for param in params:
            param.data = sharding.whole(param)
        yield
        for param in params:
            if param.grad is not None:
                dist.all_reduce(param.grad)
                mean = param.grad.flatten() / RANKS
                param.own_half.grad = sharding.own_part(param, mean).clone()
                param.grad = None
            param.data = param.new_empty(0)


@dataclass
class Trained:
    """The outcome of training, on one rank."""

    losses: list[float]
    values: dict[str, Tensor]
    """Full masters and moments, by kind and name of the parameter."""
    masks: dict[str, list[int]]
    """Bits of the masks in one shard."""
    sparsity: float


def engine_of(model: nn.Module) -> Engine:
    groups = pst_parameter_groups(model, num_steps=STEPS, score_learning_rate=0.02, update_learning_rate=0.02)
    return LocalEngine(model, groups) if world_size() == 1 else HalvesEngine(model, groups)


def train(engine: Engine, first: int, last: int, checkpoints: Path | None = None) -> Trained:
    """Take steps ``first`` to ``last``; save a checkpoint on the way if there is a folder for it. Collective."""
    masks = MaskUpdater(engine.module, SCHEDULE, step=first)
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, WIDTHS["matrix"][0], generator=generator)
        targets = torch.randn(8, WIDTHS["matrix"][-1], generator=generator)
        if isinstance(engine, HalvesEngine):
            with engine.passes():
                loss = passed(engine, inputs, targets)
        else:
            loss = passed(engine, inputs, targets)
        engine.step()
        masks.after_step(engine)
        losses.append(loss)
        if checkpoints is not None and step + 1 == SAVED_AFTER:
            save_checkpoint(checkpoints / "saved", engine, state_of(engine.module, step=SAVED_AFTER))
            save_pretrained(engine.module, checkpoints / "adapter", step=SAVED_AFTER)
    return outcome_of(engine, losses, masks.masks.sparsity)


def passed(engine: Engine, inputs: Tensor, targets: Tensor) -> float:
    hidden = inputs
    for block in engine.module:
        hidden = block["linear"](hidden)
    loss = functional.mse_loss(hidden, targets)
    engine.backward(loss)
    return loss.item()


def outcome_of(engine: Engine, losses: list[float], sparsity: float) -> Trained:
    named = trainable(engine.module)
    names = [name for name, _ in named]
    masters = sharding.fp32_masters([param for _, param in named])
    values = {f"master {name}": master.clone() for name, master in zip(names, masters, strict=True)}
    fragments = optimizer_state.local_fragments(engine, named)
    for kind in optimizer_state.KINDS:
        for fragment, own in zip(fragments, optimizer_state.values(engine, fragments, kind), strict=True):
            full = torch.zeros(sharding.full_numel(dict(named)[fragment.name]))
            full[fragment.start : fragment.stop] = own
            if world_size() > 1:
                dist.all_reduce(full)  # every value is in one fragment, so the sum puts them together
            values[f"{kind} of fragments of {fragment.name}"] = full
    masks = {
        name: relayout(sharding.whole(layer.pst_mask), layer.layout.numel, layer.num_shards, 1).tolist()
        for name, layer in pst_layers(engine.module).items()
    }
    return Trained(losses=losses, values=values, masks=masks, sparsity=sparsity)


def new_model() -> nn.Module:
    return model_with_equal_scores("matrix", num_shards=world_size(), grid=None)


def trained_and_saved(folder: Path) -> Trained:
    return train(engine_of(new_model()), 0, STEPS, checkpoints=folder)


def resumed(folder: Path) -> Trained:
    """Continue from the checkpoint in a new model, divided over any number of ranks."""
    engine = engine_of(new_model())
    checkpoint = read_checkpoint(folder / "saved")
    load_into(engine.module, checkpoint)
    load_optimizer(engine, checkpoint)
    optimizer_state.set_counters(engine, applied=SAVED_AFTER, skipped=0, accumulation=1)
    return train(engine, SAVED_AFTER, STEPS)


def loaded_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return masters and masks of the adapter folder, loaded into a model that is divided already."""
    engine = engine_of(new_model())
    load_pretrained(engine.module, folder / "adapter")
    loaded = outcome_of(engine, [], 0.0)
    return {key: value for key, value in loaded.values.items() if key.startswith("master ")}, loaded.masks


def assert_same(one: Trained, other: Trained) -> None:
    assert one.masks == other.masks
    assert one.sparsity == other.sparsity
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert list(one.values) == list(other.values)
    for key, values in one.values.items():
        torch.testing.assert_close(values, other.values[key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.zero3
@pytest.mark.usefixtures("halves_are_installed")
def test_training_in_halves_saves_and_restores_like_training_of_whole_weights(run_ranks, tmp_path):
    whole = trained_and_saved(tmp_path / "whole")
    assert whole.sparsity == pytest.approx(0.7, abs=0.01)
    in_halves = run_ranks(trained_and_saved, RANKS, tmp_path / "halves")
    for of_rank in in_halves:
        assert_same(of_rank, whole)
    for source in ("whole", "halves"):
        rest = [resumed(tmp_path / source), *run_ranks(resumed, RANKS, tmp_path / source)]
        for continued in rest:
            continued.losses = [*whole.losses[:SAVED_AFTER], *continued.losses]
            assert_same(continued, whole)
    adapters = [loaded_adapter(tmp_path / "whole"), *run_ranks(loaded_adapter, RANKS, tmp_path / "halves")]
    for values, masks in adapters[1:]:
        assert masks == adapters[0][1]
        for key, value in values.items():
            torch.testing.assert_close(value, adapters[0][0][key], rtol=1e-5, atol=1e-7, msg=key)
