"""Frozen embeddings and output layers in few bits: what becomes of them, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from pst_ds import PSTConfig, inject_pst, load_pretrained, merge_and_unload, print_trainable_parameters, save_pretrained
from pst_ds.checkpoint.adapter import PretrainedError
from pst_ds.core import coded_weight
from pst_ds.core.head_loss import head_loss
from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.nn.language_head import language_head
from pst_ds.nn.tables.coded import CodedEmbedding, CodedOutput, coded_tables
from pst_ds.nn.targets import InjectionError
from pst_ds.parallel import sharding
from tests.pairs import every_pair

GRID = Grid(4, 32)


def llama(*, tied=False, rounded=None):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if rounded:
        ends = {model.model.embed_tokens.weight, model.lm_head.weight}
        for weight in ends:
            weight.data.copy_(round_to_grid(weight.data, None, rounded))
    return model


IDS = torch.tensor([[5, 0, 89, 41, 41, 7]])


@every_pair
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", [GRID, Grid(4), Grid(8)], ids=str)
def test_codes_compute_as_the_weights_that_they_are_would(grid, tied, capsys):
    """Logits, gradients and what is merged, bit for bit, in a vocabulary that is one slice."""
    coded = inject_pst(llama(tied=tied), PSTConfig(), embedding_grid=grid)
    plain = inject_pst(llama(tied=tied, rounded=grid), PSTConfig())
    found = []
    for model in (coded, plain):
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        grads = [param.grad for param in model.parameters() if param.requires_grad]
        vectors = model.get_input_embeddings()(IDS[0]).detach()
        print_trainable_parameters(model)
        merged = merge_and_unload(model)
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
        found.append(([out.logits, vectors, *grads, *merged.state_dict().values()], capsys.readouterr().out))
    (tensors, said), (same_tensors, same_said) = found
    assert said == same_said
    assert all(torch.equal(one, other) for one, other in zip(tensors, same_tensors, strict=True))


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_loss_in_chunks_reads_slices_of_the_vocabulary(monkeypatch, with_bias):
    """Value and gradients are those of the whole matrix; no more than a slice of rows is made of codes at a time."""
    plain, coded = llama(rounded=GRID), llama()
    for model in (plain, coded):
        if with_bias:
            model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 90))
        inject_pst(model, PSTConfig(), embedding_grid=GRID if model is coded else None)
        if with_bias:
            model.lm_head.bias.requires_grad_()
    monkeypatch.setitem(coded_weight._TABLE_AT_A_TIME, "cpu", 64 * 7)
    made, dense = [], coded_weight.CodedWeight.dense
    monkeypatch.setattr(coded_weight.CodedWeight, "dense", lambda table: made.append(table.shape) or dense(table))
    hidden, results = torch.randn(5, 64), []
    for model in (plain, coded):
        head, states = language_head(model), hidden.clone().requires_grad_()
        loss = head_loss(states, head.readout, IDS[0, :5])
        loss.backward()
        own = states.clone().detach().requires_grad_()
        logits = model.lm_head(own)
        logits.square().sum().backward()
        of_bias = [head.module.bias.grad] if with_bias else []
        results.append([loss, states.grad, logits, own.grad, *of_bias])
    assert max(rows for rows, _ in made) == 7
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64)], ids=str)
def test_logits_can_be_changed_in_place(shape):
    model, found = inject_pst(llama(), PSTConfig(), embedding_grid=GRID), []
    for in_place in (True, False):
        states = torch.linspace(-1.0, 1.0, math.prod(shape)).view(shape).requires_grad_()
        logits = model.lm_head(states)
        if in_place:
            logits /= 8
        else:
            logits = logits / 8
        logits.square().sum().backward()
        found.append((logits.detach(), states.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_no_weight_stays_and_casts_leave_the_codes():
    model = inject_pst(llama(), PSTConfig(), embedding_grid=GRID)
    kinds = {name: type(table) for name, table in coded_tables(model).items()}
    assert kinds == {"model.embed_tokens": CodedEmbedding, "lm_head": CodedOutput}
    assert model.lm_head.codes.numel() == 90 * 64 // 2
    assert model.lm_head.scales.numel() == 90 * 64 // 32 * 2
    codes = model.lm_head.codes.clone()
    model.bfloat16()
    assert torch.equal(model.lm_head.codes, codes)
    assert copy.deepcopy(model)(input_ids=IDS).logits.dtype == torch.bfloat16
    with pytest.raises(IndexError):
        model.model.embed_tokens(torch.tensor([90]))


def test_shapes_on_the_meta_device_are_those_of_values():
    with torch.device("meta"):
        shapes = inject_pst(llama(), PSTConfig(relative_magnitude=False), embedding_grid=GRID)
    values = inject_pst(llama(), PSTConfig(relative_magnitude=False), embedding_grid=GRID)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in values.named_parameters()}


def test_an_adapter_state_goes_onto_tables_in_the_same_bits(tmp_path):
    model = inject_pst(llama(), PSTConfig(), embedding_grid=GRID)
    save_pretrained(model, tmp_path)
    for loaded in (llama(), inject_pst(llama(), PSTConfig(), embedding_grid=GRID)):
        assert torch.equal(load_pretrained(loaded, tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(PretrainedError, match="embedding_grid = int4, a scale for 32 inputs, and the model was"):
        load_pretrained(inject_pst(llama(), PSTConfig()), tmp_path)


class Scaled(torch.nn.Embedding):
    """An embedding that does more than look rows up."""


def scaled():
    model = llama()
    model.model.embed_tokens = Scaled(90, 64)
    return model


def damaged():
    model = llama()
    model.lm_head.weight.data[3, 3] = float("inf")
    return model


@pytest.mark.parametrize(
    ("make", "config", "grid", "said"),
    [
        (llama, PSTConfig(update_embeddings=("embed_tokens",)), GRID, "embed_tokens would be frozen in few bits, and"),
        (llama, PSTConfig(modules_to_save=("lm_head",)), GRID, "modules_to_save name lm_head; leave one of them out"),
        (
            llama,
            PSTConfig(),
            Grid(4, 128),
            "embed_tokens.weight: embeddings in few bits: groups of 128 do not divide 64",
        ),
        (scaled, PSTConfig(), GRID, "model.embed_tokens is a Scaled, and only a plain nn.Embedding"),
        (damaged, PSTConfig(), GRID, "lm_head.weight has NaN or infinite values"),
        (lambda: llama().model.layers[0], PSTConfig(target_modules=("q_proj",)), GRID, "names no token embedding"),
    ],
)
def test_what_is_refused_is_named(make, config, grid, said):
    with pytest.raises(InjectionError, match=said):
        inject_pst(make(), config, embedding_grid=grid)


def test_an_encoder_has_its_token_embedding_alone_in_few_bits():
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    model = inject_pst(BertForSequenceClassification(config), PSTConfig(), embedding_grid=GRID)
    assert list(coded_tables(model)) == ["bert.embeddings.word_embeddings"]
    model(input_ids=IDS % 60, labels=torch.tensor([1])).loss.backward()


def _on_ranks():
    """What a rank holds of a partitioned model's tables, and their values, gathered."""
    import deepspeed

    model = llama()
    deepspeed.zero.Init(
        module=model, config_dict_or_path={"train_batch_size": dist.get_world_size(), "zero_optimization": {"stage": 3}}
    )
    inject_pst(model, PSTConfig(relative_magnitude=False), embedding_grid=GRID)
    held = {name: table.codes.ds_tensor.nbytes for name, table in coded_tables(model).items()}
    values = {}
    for name, table in coded_tables(model).items():
        with sharding.gathered([table.codes, table.scales]):
            values[name] = table.codes.detach().clone(), table.scales.detach().clone(), table.table().dense()
    return held, values


@pytest.mark.zero3
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_hold_shares_of_the_same_codes(run_ranks, world_size):
    alone = coded_tables(inject_pst(llama(), PSTConfig(), embedding_grid=GRID))
    for held, values in run_ranks(_on_ranks, world_size):
        assert held == {name: -(-table.codes.numel() // world_size) for name, table in alone.items()}
        for name, table in alone.items():
            for one, other in zip(values[name], (table.codes, table.scales, table.table().dense()), strict=True):
                assert torch.equal(one, other)
