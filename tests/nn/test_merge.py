"""Merged models: plain modules that compute what the masked ones did, with exact zeros."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config
from transformers.pytorch_utils import Conv1D

from pst_ds.config.pst import PSTConfig
from pst_ds.errors import InputError
from pst_ds.masks.update import update_masks
from pst_ds.nn.adapter_checkpoints import adapter_checkpoints
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.linear import PSTLinear
from pst_ds.nn.merge import merge_and_unload, print_trainable_parameters
from pst_ds.nn.tables.embedding import PSTEmbedding
from tests.pairs import every_pair

BERT = AutoConfig.from_pretrained("tests/data/tiny-bert")
GPT2 = GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2, n_positions=48, initializer_range=0.2)


def _trained(model_class, config, dtype, **settings):
    torch.manual_seed(0)
    model = inject_pst(model_class.from_config(config, dtype=dtype), PSTConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in (p for p in model.parameters() if p.requires_grad):
            param.add_((0.05 * torch.randn(param.shape, generator=generator)).to(param.dtype))
    update_masks(model, 0.7)
    return model


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_class", "config", "settings"),
    [
        (AutoModelForSequenceClassification, BERT, {"update_embeddings": ("word_embeddings",)}),
        (AutoModelForCausalLM, GPT2, {}),
    ],
)
def test_a_merged_model_has_the_masked_one_s_logits_and_exact_zeros(model_class, config, settings, dtype):
    model = _trained(model_class, config, dtype, **settings)
    ids = torch.randint(5, 30, (3, 11), generator=torch.Generator().manual_seed(2))
    logits = model(input_ids=ids).logits
    masked = {name: layer.masked_weight() for name, layer in pst_layers(model).items()}
    sizes = {name: layer.layout for name, layer in pst_layers(model).items()}
    adapter_checkpoints(model)
    assert merge_and_unload(model) is model
    assert not any(isinstance(module, PSTLinear | PSTEmbedding) for module in model.modules())
    assert not any("pst" in name for name in model.state_dict())
    assert torch.equal(model(input_ids=ids).logits, logits)
    for name, weight in masked.items():
        plain = model.get_submodule(name)
        assert type(plain) is (Conv1D if sizes[name].transposed else nn.Linear)
        assert torch.equal(plain.weight, weight)
        matrices = plain.weight.split(plain.weight.shape[1] // sizes[name].num_matrices, dim=1)
        for matrix in matrices:
            zeros = matrix[matrix == 0]
            assert zeros.numel() == math.floor(0.7 * matrix.numel())
            assert not torch.signbit(zeros).any()
    assert not any(
        param.requires_grad
        for name, param in model.named_parameters()
        if "classifier" not in name and "pooler" not in name
    )


def test_a_merged_folder_is_an_ordinary_one(tmp_path):
    model = _trained(AutoModelForSequenceClassification, BERT, torch.float32)
    ids = torch.arange(5, 15).view(1, -1)
    logits = model(input_ids=ids).logits
    merge_and_unload(model).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(input_ids=ids).logits, logits)
    inject_pst(loaded, PSTConfig())  # and may be pruned on


def test_an_update_beside_the_mask_is_not_merged():
    model = _trained(AutoModelForCausalLM, GPT2, torch.float32, update_form="beside")
    ids = torch.randint(5, 30, (3, 11), generator=torch.Generator().manual_seed(2))
    logits = model(input_ids=ids).logits
    with pytest.raises(InputError, match="a merged one would have no zeros"):
        merge_and_unload(model)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_kept_negative_zero_becomes_a_positive_one():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4)])
    with torch.no_grad():
        model.blocks[0].weight[0, 0] = -0.0
    inject_pst(model, PSTConfig(update_rank=0))
    assert torch.signbit(pst_layers(model)["blocks.0"].masked_weight()[0, 0])
    merge_and_unload(model)
    assert not torch.signbit(model.blocks[0].weight[0, 0])


def test_a_layer_held_twice_is_merged_in_both_places():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4)])
    model.also = model.blocks[0]
    inject_pst(model, PSTConfig())
    merge_and_unload(model)
    assert type(model.also) is nn.Linear
    assert model.also is model.blocks[0]


def test_merging_a_layer_that_was_never_called_warns_where_others_were():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    inject_pst(model, PSTConfig())
    fresh = copy.deepcopy(model)
    model.blocks[1](input=torch.ones(1, 4))
    with pytest.warns(UserWarning, match=r"^blocks\.0 was merged, but no forward pass has called it"):
        merge_and_unload(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_and_unload(fresh)


def test_trainable_parameters_are_worded_as_peft_does(capsys):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(GPT2)
    get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).print_trainable_parameters()
    peft = capsys.readouterr().out
    settings = {"score_rank": 0, "structured_scores": False, "update_rank": 4, "fused_modules": ()}
    model = inject_pst(AutoModelForCausalLM.from_config(GPT2), PSTConfig(target_modules=("c_attn",), **settings))
    print_trainable_parameters(model)
    assert capsys.readouterr().out == peft


def _refused():
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(4, 4)])
    inject_pst(model, PSTConfig())
    with pytest.raises(InputError, match=r"FSDP2 has them in shards\. Call save_pretrained\(model, FOLDER\) on every"):
        merge_and_unload(model)


@pytest.mark.zero3
def test_partitioned_weights_are_refused_with_the_way_out(run_ranks):
    run_ranks(_refused, 2)
