"""FSDP2: masks, factors and checkpoints of models that ``fully_shard`` has split, against ZeRO-3 and one process."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils.checkpoint import checkpoint

from pst_ds import (
    CubicSchedule,
    Grid,
    MaskUpdater,
    PSTConfig,
    adapter_checkpoints,
    inject_pst,
    load_pretrained,
    merge_and_unload,
    pst_optimizer,
    save_pretrained,
)
from pst_ds.checkpoint.adapter import adapter_state
from pst_ds.config.pst import Override
from pst_ds.core.bits import relayout
from pst_ds.errors import InputError
from pst_ds.masks.scales import update_scales
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine
from tests.pairs import every_pair

WIDTHS = (20, 13, 2, 40)
"""Rows that no world size divides, rows of incomplete bytes, and fewer rows than ranks."""


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, checkpointing: bool):
        super().__init__()
        self.linear, self.checkpointing = nn.Linear(inputs, outputs), checkpointing

    def forward(self, x):
        if self.checkpointing:
            return checkpoint(lambda x: self.linear(x).tanh(), x, use_reentrant=False)
        return self.linear(x).tanh()


class Model(nn.Module):
    def __init__(self, checkpointing: bool = False):
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.Sequential(*(Block(*ends, checkpointing) for ends in itertools.pairwise(WIDTHS)))
        self.classifier = nn.Linear(WIDTHS[-1], 3)
        for param in self.parameters():  # coarse values make many equal scores
            param.data = (param.data * 50).round() / 50

    def forward(self, x):
        return self.classifier(self.blocks(x))


CONFIG = PSTConfig(target_modules=("linear",), modules_to_save=("classifier",), score_rank=2, update_rank=2)
GRID = Grid(bits=8)
PATTERNS = {
    "matrix": {},
    "trained weights": {"train_weights": True},
    "row": {"pattern": "row"},
    "global": {"pattern": "global"},
    "blocks that ranks share": {"overrides": (Override(modules=r"blocks\.2.*", pattern="8x1"),)},
    "2:4": {"overrides": (Override(modules=r"blocks\.0.*", pattern="2:4"),)},
}
SHARED = PATTERNS["blocks that ranks share"]


def _mid_ramp(num_shards=None, *, checkpointing=False, grid=None, **settings) -> Model:
    """A model whose factors are not 0, the same in every call."""
    config = PSTConfig(**{**vars(CONFIG), **settings})
    model = inject_pst(Model(checkpointing), config, num_shards=num_shards, grid=grid)
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = (torch.randn(param.shape, generator=generator) * 8).round() / 32
    return model


def _sharded(model: Model, **options) -> Model:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _masks(model: nn.Module) -> list[list[int]]:
    return [
        relayout(sharding.whole(layer.pst_mask), layer.layout.numel, layer.num_shards, 1).tolist()
        for layer in pst_layers(model).values()
    ]


def _updated_by_fsdp2(pattern: str):
    model = _sharded(_mid_ramp(grid=GRID, **PATTERNS[pattern]))
    return update_masks(model, 0.5), update_scales(model), _masks(model)


def _updated_by_zero3(world_size: int, pattern: str):
    model = _mid_ramp(world_size, grid=GRID, **PATTERNS[pattern])
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine = build_engine(model, groups, ds_config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
    return update_masks(engine.module, 0.5), update_scales(engine.module), _masks(engine.module)


@pytest.mark.zero3
@pytest.mark.few(3)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_and_scales_are_those_of_zero3(run_ranks, pattern):
    masks, scales, bits = run_ranks(_updated_by_zero3, 2, 2, pattern)[0]
    assert 0 < masks.num_pruned < masks.num_weights
    for world_size in (1, 2, 3):
        for result in run_ranks(_updated_by_fsdp2, world_size, pattern):
            assert result[0] == masks
            assert result[1].layer_errors == pytest.approx(scales.layer_errors)
            assert result[2] == bits


def _trained(split: Callable[[Model], Model], *, checkpointing: bool = False, steps: int = 4, **options):
    """A model after some steps, on the same batch on every rank, with its optimizer and masks."""
    model = split(_mid_ramp(checkpointing=checkpointing, **options))
    optimizer = pst_optimizer(model, num_steps=10)
    masks = MaskUpdater(model, CubicSchedule(final_sparsity=0.6, num_steps=10, update_interval=1))
    _train(model, optimizer, masks, steps)
    return model, optimizer, masks


def _train(model, optimizer, masks, steps: int) -> None:
    x = torch.randn(5, WIDTHS[0], generator=torch.Generator().manual_seed(7)).to(model.classifier.weight.dtype)
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.after_step(optimizer)
    with torch.no_grad():  # FSDP2 keeps parameters of the root gathered after this
        model(x)


def _state(model) -> tuple[str, dict[str, torch.Tensor]]:
    return mask_stats(model).checksum, adapter_state(model, keep=True)


def _trained_by_fsdp2(reshards: bool, checkpointing: bool):
    return _state(_trained(partial(_sharded, reshard_after_forward=reshards), checkpointing=checkpointing)[0])


@every_pair
@pytest.mark.zero3
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reshards", [False, True])
def test_training_is_that_of_one_process(run_ranks, reshards, checkpointing):
    model, _, masks = _trained(lambda model: model)
    expected = adapter_state(model)
    for world_size in (1, 2, 3):
        for checksum, state in run_ranks(_trained_by_fsdp2, world_size, reshards, checkpointing):
            assert checksum == masks.masks.checksum
            assert state.keys() == expected.keys()
            for name, values in state.items():
                torch.testing.assert_close(values, expected[name])


def _with_open_gates(model: Model) -> Model:
    """Move the gates of learned ranks from around 0, where all are closed, to around 1."""
    for layer in pst_layers(model).values():
        gates = layer.update_parameters().get("G")
        if gates is not None:
            gates.data += 1.0
    return model


def _form_trained_by_fsdp2(form: str):
    return _state(_trained(lambda model: _sharded(_with_open_gates(model)), update_form=form)[0])


@pytest.mark.zero3
@pytest.mark.parametrize("form", ["spp", "learned-ranks"])
def test_an_update_form_trains_as_on_one_process(run_ranks, form):
    model, _, masks = _trained(_with_open_gates, update_form=form)
    expected = adapter_state(model)
    for checksum, state in run_ranks(_form_trained_by_fsdp2, 2, form):
        assert checksum == masks.masks.checksum
        assert state.keys() == expected.keys()
        for name, values in state.items():
            torch.testing.assert_close(values, expected[name])


def _trained_by_hsdp():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return [
        _state(_trained(lambda model, dtype=dtype: _sharded(model.to(dtype), mesh=mesh), **SHARED)[0])
        for dtype in (torch.bfloat16, torch.float32)
    ]


@pytest.mark.zero3
def test_hsdp_replicates_shards_and_bf16_has_fp32_masters(run_ranks):
    alone = [_state(_trained(to_dtype, **SHARED)[0]) for to_dtype in (Model.bfloat16, Model.float)]
    for together in run_ranks(_trained_by_hsdp, 4):
        for (checksum, state), (expected_checksum, expected) in zip(together, alone, strict=True):
            assert checksum == expected_checksum
            for name, values in state.items():
                torch.testing.assert_close(values, expected[name])
        in_bf16 = together[0][1]["blocks.0.linear.pst_A"]
        assert (in_bf16 != in_bf16.bfloat16()).any()


def _trained_in_mixed_precision():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return _state(_trained(partial(_sharded, mp_policy=policy))[0])


@pytest.mark.zero3
def test_mixed_precision_casts_everything_but_masks(run_ranks):
    (one,), two = run_ranks(_trained_in_mixed_precision, 1), run_ranks(_trained_in_mixed_precision, 2)
    for checksum, state in two:
        assert checksum == one[0]
        assert all(torch.equal(values, one[1][name]) for name, values in state.items())


def _saved(folder: str):
    model, _, masks = _trained(_sharded)
    adapter_checkpoints(model)
    state = get_model_state_dict(model)
    assert not [name for name in state if name.endswith("weight") and "classifier" not in name]
    dcp.save({"model": state, "masks": masks.state_dict()}, checkpoint_id=folder + "/dcp")
    save_pretrained(model, folder + "/pst", step=masks.step)
    return _state(model)


def _loaded(folder: str):
    model = _sharded(inject_pst(Model(), CONFIG))
    adapter_checkpoints(model)
    state = get_model_state_dict(model)
    dcp.load({"model": state}, checkpoint_id=folder + "/dcp")
    set_model_state_dict(model, state)
    before = _sharded(load_pretrained(Model(), folder + "/pst"))
    after = load_pretrained(_sharded(inject_pst(Model(), CONFIG)), folder + "/pst")
    return [_state(model), _state(before), _state(after)]


@pytest.mark.zero3
def test_checkpoints_are_loaded_on_other_numbers_of_ranks(run_ranks, tmp_path):
    (checksum, expected), *_ = run_ranks(_saved, 3, str(tmp_path))
    loads = [load for world_size in (1, 2) for loads in run_ranks(_loaded, world_size, str(tmp_path)) for load in loads]
    loads.append(_state(load_pretrained(Model(), str(tmp_path / "pst"))))
    for found, state in loads:
        assert found == checksum
        assert state.keys() == expected.keys()
        assert all(torch.equal(values, expected[name]) for name, values in state.items())


def _tiny_llama() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained("tests/data/tiny-llama")


def _trained_by_the_trainer(folder: str, state_dict_type: str, resume_from: str | None):
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainingArguments

    from pst_ds.hf import PSTCallback, trainer_optimizer

    options = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": state_dict_type}
    fixed = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    arguments = TrainingArguments(folder, **fixed, fsdp=True, fsdp_config={**options, **layers})
    assert PartialState().num_processes == 2
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate has no FSDP on CPUs
    model = inject_pst(_tiny_llama(), PSTConfig())
    data = [{"input_ids": torch.arange(i, i + 9), "labels": torch.arange(i, i + 9)} for i in range(24)]
    pst = {"callbacks": [PSTCallback(final_sparsity=0.5)], "optimizer_cls_and_kwargs": trainer_optimizer(model)}
    Trainer(model, arguments, train_dataset=data, **pst).train(resume_from_checkpoint=resume_from)
    assert all(sharding.is_partitioned(param) for param in model.parameters())
    return _state(model)


@pytest.mark.zero3
@pytest.mark.few(1)
@pytest.mark.parametrize("state_dict_type", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_the_trainer_resumes_bit_identically(run_ranks, tmp_path, monkeypatch, state_dict_type):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)  # the port is not used
    (checksum, state), other = run_ranks(_trained_by_the_trainer, 2, str(tmp_path), state_dict_type, None)
    saved = load_pretrained(_tiny_llama(), tmp_path / "checkpoint-6")
    found = [other, _state(saved)]
    found += run_ranks(_trained_by_the_trainer, 2, str(tmp_path), state_dict_type, str(tmp_path / "checkpoint-3"))
    for again, values in found:
        assert again == checksum
        assert all(torch.equal(values[name], value) for name, value in state.items())


def test_weights_of_rank_0_only_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "True")
    with pytest.raises(InputError, match=r"cpu_ram_efficient_loading = true: .* Set it to false, in fsdp_config"):
        inject_pst(Model(), CONFIG)


def _refusals() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def in_part(**options):
        model = inject_pst(Model(), CONFIG, **options)
        fully_shard(model.blocks[0])
        return model

    two = in_part()
    fully_shard(two, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("other",)))
    by_columns = _sharded(_mid_ramp(), shard_placement_fn=lambda param: Shard(int(param.shape == (13, 20))))
    whole = _sharded(_mid_ramp())
    x = torch.randn(2, WIDTHS[0])
    uses = [
        partial(inject_pst, _sharded(Model()), CONFIG),
        partial(update_masks, in_part(), 0.5),
        partial(update_masks, two, 0.5),
        partial(update_masks, _sharded(_mid_ramp(2)), 0.5),
        partial(update_masks, _sharded(inject_pst(Model(), CONFIG, base_grid=GRID)), 0.5),
        partial(update_masks, by_columns, 0.5),
        partial(merge_and_unload, whole),
        partial(whole.blocks[0].linear, x),
    ]
    messages = []
    for use in uses:
        with pytest.raises(InputError) as refusal:
            use()
        messages.append(str(refusal.value))
    return messages


@pytest.mark.zero3
def test_what_masks_do_not_support_is_refused_alike_on_every_rank(run_ranks):
    messages, others = run_ranks(_refusals, 2)
    assert messages == others
    parts = [
        "blocks.0.linear.weight is a DTensor: .* Call inject_pst first, on whole weights, and then fully_shard",
        "FSDP2 has split blocks.0.linear.weight, and not blocks.1.linear.weight: .* Call fully_shard on the whole",
        "FSDP2 has split pruned layers over several meshes. Give every fully_shard the same mesh",
        "FSDP2 has split blocks.0.linear, whose mask .* Call inject_pst without num_shards and base_grid",
        "FSDP2 has split blocks.0.linear, whose mask .* Call inject_pst without num_shards and base_grid",
        r"blocks.0.linear.weight is a DTensor with placements \(Shard\(dim=1\),\): .* Remove tensor parallelism",
        "merge_and_unload needs whole weights, and ZeRO-3 or FSDP2 has them in shards. Call save_pretrained",
        "weight is a DTensor: .* Call the module that fully_shard was given, not one inside it",
    ]
    for message, part in zip(messages, parts, strict=True):
        assert re.search(part, message), message
