"""Pretrained weights that every rank reads its part of: those that one process reads, from whatever files."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import LlamaConfig, Qwen3MoeConfig

from pst_ds import PSTConfig, inject_pst
from pst_ds.core.coded_weight import CodedWeight, CodeLayout
from pst_ds.core.quantization import Grid
from pst_ds.errors import InputError
from pst_ds.nn import sharded_weights
from pst_ds.nn.base_model import Pretrained
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import rank

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 67}
CONFIGS = {
    "tied": LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    "experts": Qwen3MoeConfig(
        **SIZES, num_key_value_heads=1, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=1, tie_word_embeddings=False,
    ),
}  # fmt: skip


def _save(folder, case):
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[case])
    model.save_pretrained(folder / case, max_shard_size="20KB")
    return model


def _loaded(folder, case, dtype):
    """The values of all parameters, gathered one by one; the tensors that were left to rank 0."""
    from transformers.integrations import HfDeepSpeedConfig

    bf16 = {"bf16": {"enabled": dtype == torch.bfloat16}}
    keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **bf16})
    left, load = [], transformers.modeling_utils._load_state_dict_into_zero3_model

    def noted(model, state, load_config=None):
        left.extend(state)
        return load(model, state, load_config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "_load_state_dict_into_zero3_model", noted)
        model, missing = Pretrained(str(folder / case)).load(transformers.AutoModelForCausalLM, "", dtype=dtype)
        assert transformers.modeling_utils._load_state_dict_into_zero3_model is noted
    values = {}
    for name, param in model.named_parameters():
        assert sharding.is_partitioned(param)
        with sharding.gathered([param]):
            values[name] = param.detach().clone()
    del keep
    return values, missing, left


def _all(folder):
    found = {case: _loaded(folder, case, torch.bfloat16) for case in CONFIGS}
    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:
            patch.setattr(sharded_weights, "_read_shard", _cut_off)
        with pytest.raises(InputError, match=r"cannot be loaded .*rank 1 on .*: a file was cut off"):
            _loaded(folder, "tied", torch.float32)
    return found


def _cut_off(*_):
    raise OSError("a file was cut off")


@pytest.mark.zero3
def test_ranks_have_the_values_of_one_process_and_an_error_of_one_is_that_of_all(run_ranks, tmp_path):
    expected = {case: _save(tmp_path, case) for case in CONFIGS}
    for found in run_ranks(_all, 3, tmp_path):
        for case, (values, missing, left) in found.items():
            own = {name: param.to(torch.bfloat16) for name, param in expected[case].named_parameters()}
            assert values.keys() == own.keys()
            assert [name for name, value in values.items() if not torch.equal(value, own[name])] == []
            assert missing == []
            assert all(".experts." in name for name in left)
            assert bool(left) == (case == "experts")


def _encoded(folder):
    """What lay in memory of linear layers' weights while each became codes, and the weights that came of them."""
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    place, kind = Pretrained(str(folder / "tied")), transformers.AutoModelForCausalLM
    model, missing = place.load(kind, "", linear_later=True, dtype=torch.float32)
    linear = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    in_memory, encode = [sum(sharding.shard_of(p).values.numel() for p in linear.values())], CodeLayout.encode

    def noted(*args):
        in_memory.append(sum(not sharding.is_unfilled(p) and p.ds_tensor.numel() > 0 for p in linear.values()))
        return encode(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CodeLayout, "encode", noted)
        inject_pst(model, PSTConfig(target_modules=["q_proj", "down_proj"]), base_grid=Grid(4))
    values = {}
    for name, param in model.named_parameters():
        with sharding.gathered([param]):
            values[name] = param.detach().clone()
    del keep
    return in_memory, missing, values


@pytest.mark.zero3
@pytest.mark.parametrize("world", [1, 2, 3])
def test_weights_that_become_codes_are_read_one_at_a_time(run_ranks, tmp_path, world):
    whole = inject_pst(_save(tmp_path, "tied"), PSTConfig(target_modules=["q_proj", "down_proj"]), base_grid=Grid(4))
    expected = dict(whole.named_parameters())
    for in_memory, missing, values in run_ranks(_encoded, world, tmp_path):
        assert in_memory == [0, 1, 1, 1, 1]
        assert missing == []
        kept = [name for name in expected if "pst_" not in name]
        assert [name for name in kept if not torch.equal(values[name], expected[name])] == []
        for name, layer in pst_layers(whole).items():
            codes = values[f"{name}.pst_base_codes"], values[f"{name}.pst_base_scales"]
            layout = CodeLayout(layer.base_codes.layout.stored, world)
            assert torch.equal(CodedWeight(layout, *codes, torch.float32).dense(), layer.base_weight().dense())


def test_one_process_reads_as_ever(tmp_path):
    model = _save(tmp_path, "tied")
    with sharded_weights.read_by_every_rank():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
