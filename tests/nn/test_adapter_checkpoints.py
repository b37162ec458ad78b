"""State dicts without the frozen base: what is in them, and that they load where they must and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import pack_mask
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.adapter_checkpoints import adapter_checkpoints, whole_checkpoints
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding


class _Model(nn.Module):
    """Two layers in blocks, a head tied to another name, and a buffer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 7)
        self.blocks = nn.ModuleList([nn.Linear(7, 9), nn.Linear(9, 7)])
        self.classifier = nn.Linear(7, 3)
        self.score = self.classifier
        self.register_buffer("seen", torch.tensor(float(seed)))


def _injected(seed=0):
    return inject_pst(_Model(seed), PSTConfig(score_rank=2, update_rank=2, modules_to_save=("classifier",)))


def _trained():
    model = _injected()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in (p for p in model.parameters() if p.requires_grad):
            param.add_(torch.randn(param.shape, generator=generator))
    update_masks(model, 0.6)
    return model


@pytest.mark.parametrize("strict", [True, False])
def test_an_adapter_state_dict_has_what_changed_and_loads_into_the_same_base(strict):
    model, other = _trained(), _injected()
    for one in (model, other):
        adapter_checkpoints(one)
        adapter_checkpoints(one)  # a second time changes nothing
    state = model.state_dict()
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    masks = {f"{name}.pst_mask_bits" for name in pst_layers(model)}
    assert set(state) == trained | masks | {"seen"}
    assert mask_stats(other).checksum != mask_stats(model).checksum
    result = other.load_state_dict(state, strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert mask_stats(other).checksum == mask_stats(model).checksum
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert set(state) == set(model.state_dict())  # the caller's dict is left as it was


def test_what_training_changed_must_all_be_there():
    model = _trained()
    adapter_checkpoints(model)
    for gone in ("blocks.0.pst_A", "blocks.1.pst_mask_bits", "classifier.bias"):
        state = model.state_dict()
        del state[gone]
        with pytest.raises(RuntimeError, match=gone.replace("_bits", "")):
            _ready().load_state_dict(state)
    with pytest.raises(RuntimeError, match="unknown"):
        _ready().load_state_dict({**model.state_dict(), "unknown": torch.zeros(1)})
    state, nine = model.state_dict(), torch.zeros(9, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"blocks.0.pst_mask_bits has 9 bytes, not 8\. Load it into"):
        _ready().load_state_dict({**state, "blocks.0.pst_mask_bits": nine})
    del state["blocks.0.pst_mask_bits"]
    with pytest.raises(RuntimeError, match=r"blocks.0.pst_mask_shard has 9 bytes, not 8\. Load it on"):
        _ready().load_state_dict({**state, "blocks.0.pst_mask_shard": nine})


def test_the_bits_of_a_mask_have_one_layout_however_many_shards_it_lies_in():
    config = PSTConfig(score_rank=2, update_rank=2, modules_to_save=("classifier",))
    models = [inject_pst(_Model(), config, num_shards=shards) for shards in (1, 3)]
    for model in models:
        for layer in pst_layers(model).values():
            keep = torch.rand(layer.layout.numel, generator=torch.Generator().manual_seed(1)) > 0.6
            sharding.write_shard(layer.pst_mask, pack_mask(keep, layer.num_shards))
        adapter_checkpoints(model)
    one, three = (model.state_dict() for model in models)
    for name, layer in pst_layers(models[1]).items():
        assert torch.equal(one[f"{name}.pst_mask_bits"], three[f"{name}.pst_mask_bits"])
        assert layer.pst_mask.numel() > one[f"{name}.pst_mask_bits"].numel()  # each shard is padded
    fresh = inject_pst(_Model(), config, num_shards=3)
    adapter_checkpoints(fresh)
    fresh.load_state_dict(one)
    for layer, same in zip(pst_layers(fresh).values(), pst_layers(models[1]).values(), strict=True):
        assert torch.equal(layer.pst_mask, same.pst_mask)


def test_a_missing_value_is_missing_whatever_its_ending():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])
            self.proj, self.head = nn.Linear(8, 8), nn.Module()
            self.head.proj = nn.Linear(8, 8)

    model, wrapped = inject_pst(Model(), PSTConfig(modules_to_save=("head",))), nn.Module()
    adapter_checkpoints(model)
    state = model.state_dict()
    del state["head.proj.weight"]  # the frozen proj.weight may be missing, not this
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.proj\.weight"):
        model.load_state_dict(state)
    wrapped.module = model
    with pytest.raises(RuntimeError, match=r"Missing key.*module\.head\.proj\.weight"):
        wrapped.load_state_dict({f"module.{name}": value for name, value in state.items()})


def test_a_layer_in_two_places_is_kept_once():
    model = _Model()
    model.also = model.blocks[0]
    inject_pst(model, PSTConfig(modules_to_save=("classifier",)))
    adapter_checkpoints(model)
    state = model.state_dict()
    assert [name for name in state if "mask" in name] == ["blocks.0.pst_mask_bits", "blocks.1.pst_mask_bits"]
    assert model.load_state_dict(state).missing_keys == []


def _ready():
    model = _injected()
    adapter_checkpoints(model)
    return model


def test_whole_state_dicts_load_still_and_come_back():
    model, whole = _ready(), _trained().state_dict()
    assert "blocks.0.weight" in whole
    model.load_state_dict(whole)
    assert mask_stats(model).checksum == mask_stats(_trained()).checksum
    whole_checkpoints(model)
    assert set(model.state_dict()) == set(whole)


def test_names_with_a_wrapper_s_prefix_are_the_same():
    wrapped, other = nn.Module(), nn.Module()
    wrapped.module, other.module = _trained(), _ready()
    adapter_checkpoints(wrapped.module)
    state = wrapped.state_dict()
    assert all(name.startswith("module.") for name in state)
    assert "module.blocks.0.weight" not in state
    other.load_state_dict(state)
    assert mask_stats(other.module).checksum == mask_stats(wrapped.module).checksum


def test_safetensors_load_model_takes_one(tmp_path):
    """As accelerate's load_state does."""
    from safetensors.torch import load_model, save_file

    model, other = _trained(), _ready()
    adapter_checkpoints(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    assert mask_stats(other).checksum == mask_stats(model).checksum


def _save(folder, stage, marked):
    """Names in this rank's file of DeepSpeed's checkpoint, and whether a fresh engine gets the masks back."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage, "reduce_bucket_size": 1 << 12},
    }  # fmt: skip

    def engine_of(model):
        shards = 2 if stage == 3 else 1
        inject_pst(model, PSTConfig(score_rank=2, update_rank=2, modules_to_save=("classifier",)), num_shards=shards)
        if marked:
            adapter_checkpoints(model)
        params = [p for p in model.parameters() if p.requires_grad]
        return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(params), config=config)[0]

    engine = engine_of(_Model())
    update_masks(engine.module, 0.6)
    engine.save_checkpoint(str(folder), tag="here")
    again = engine_of(_Model())
    again.load_checkpoint(str(folder), tag="here")
    rank = torch.distributed.get_rank()
    name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    file = torch.load(folder / "here" / name, weights_only=False)
    frozen = set(file["module"]) | set(file["frozen_param_fragments"] or {})
    masks = {n.rpartition(".")[2] for n in file["module"] if ".pst_mask" in n}
    assert not marked or masks == {"pst_mask_shard" if stage == 3 else "pst_mask_bits"}
    own = sharding.shard_of(pst_layers(again.module)["blocks.0"].pst_mask).values
    assert torch.equal(own, sharding.shard_of(pst_layers(engine.module)["blocks.0"].pst_mask).values)
    return sorted(n for n in frozen if n.endswith(("embedding.weight", "blocks.0.weight"))), mask_stats(again.module)


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_s_checkpoints_leave_the_base_out_and_keep_the_masks(run_ranks, tmp_path, stage):
    for marked in (True, False):
        (names, masks), (other_names, other_masks) = run_ranks(_save, 2, tmp_path / str(marked), stage, marked)
        assert names == other_names == ([] if marked else ["blocks.0.weight", "embedding.weight"])
        assert masks == other_masks
        assert masks.sparsity == pytest.approx(0.6, abs=0.02)
