"""Linear layers that cannot be replaced: refused by name, with an exclusion that can be followed to the end."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.targets import InjectionError


class _Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _blocks(*layers, **named):
    model = nn.Module()
    model.blocks = nn.ModuleList([*layers, *([nn.ModuleDict(named)] if named else [])])
    return model


def _refusal(model, **settings):
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(InjectionError) as caught:
        inject_pst(model, PSTConfig(modules_to_save=(), **settings))
    assert {name: type(module) for name, module in model.named_modules()} == before
    return str(caught.value)


def _follow(message):
    """The exclusion that a message ends in."""
    found = re.search(r"exclude_modules = (\[.*?\])", message)
    assert found is not None, message
    return tuple(ast.literal_eval(found[1]))


def _encoder(decoder=False):
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    return nn.ModuleDict({"layers": nn.ModuleList([kind(8, 2, 16, batch_first=True) for _ in range(2)])})


@pytest.mark.parametrize("build", [_encoder, lambda: _encoder(decoder=True), lambda: _blocks(_Block())])
def test_layers_that_an_attention_reads_without_calling_are_refused_with_all_that_must_be_left_out(build):
    model = build()
    message = _refusal(model)
    assert re.match(r"(layers|blocks)\.0\.\w*att\w*\.out_proj belongs to a MultiheadAttention, which reads", message)
    inject_pst(model, PSTConfig(modules_to_save=(), exclude_modules=_follow(message)))
    assert {name.rpartition(".")[2] for name in pst_layers(model)} <= {"linear1", "linear2", "fc"}
    assert pst_layers(model)


def test_a_named_out_proj_is_refused_too():
    message = _refusal(_blocks(_Block()), target_modules=("out_proj", "fc"))
    model = inject_pst(_blocks(_Block()), PSTConfig(
        modules_to_save=(), target_modules=("out_proj", "fc"), exclude_modules=_follow(message)
    ))  # fmt: skip
    assert list(pst_layers(model)) == ["blocks.0.fc"]


def test_leaving_out_the_matrix_alone_names_the_layer_in_the_next_message():
    """Leaving out the attention by name leaves out what is inside it too."""
    whole = _follow(_refusal(_blocks(_Block())))
    assert whole == ("attn", "attn.out_proj")
    model = inject_pst(_blocks(_Block()), PSTConfig(modules_to_save=(), exclude_modules=("attn",)))
    assert not any("attn" in name for name in pst_layers(model))
    assert set(_follow(_refusal(_blocks(_Block()), exclude_modules=("out_proj",)))) == set(whole)


def test_a_list_of_attentions_is_left_out_by_more_than_its_numbers():
    model = _blocks(attentions=nn.ModuleList([nn.MultiheadAttention(8, 2)]), linears=nn.ModuleList([nn.Linear(8, 8)]))
    inject_pst(model, PSTConfig(modules_to_save=(), exclude_modules=_follow(_refusal(model))))
    assert list(pst_layers(model)) == ["blocks.0.linears.0"]


def test_a_linear_layer_with_a_forward_of_its_own_is_refused():
    message = _refusal(_blocks(nn.Linear(8, 8), twice=Doubled(8, 8)))
    assert message.startswith("blocks.1.twice is a Doubled with an overridden forward")
    model = inject_pst(_blocks(nn.Linear(8, 8), twice=Doubled(8, 8)), PSTConfig(
        modules_to_save=(), exclude_modules=_follow(message)
    ))  # fmt: skip
    assert list(pst_layers(model)) == ["blocks.0"]
    patched = nn.Linear(8, 8)
    patched.forward = lambda x: 3 * x
    assert "blocks.0 is a Linear with an overridden forward" in _refusal(_blocks(patched))


def test_a_subclass_without_one_and_those_that_compute_the_same_are_pruned():
    class Named(nn.Linear):
        pass

    assert len(pst_layers(inject_pst(_blocks(Named(8, 8)), PSTConfig()))) == 1
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = FalconForCausalLM(config).eval()
    ids = torch.arange(6).view(1, 6)
    dense = model(input_ids=ids).logits
    inject_pst(model, PSTConfig(update_init="lora"))
    assert len(pst_layers(model)) == 4
    torch.testing.assert_close(model(input_ids=ids).logits, dense)


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        (lambda m: m.register_forward_hook(print), "forward"),
        (lambda m: m.register_forward_pre_hook(print), "forward pre-"),
        (lambda m: m.register_full_backward_hook(print), "backward"),
    ],
)
def test_hooks_are_not_lost(register, kind):
    linear = nn.Linear(8, 8)
    handle = register(linear)
    assert f"blocks.0 has a {kind} hook, which would be lost" in _refusal(_blocks(linear))
    handle.remove()
    inject_pst(_blocks(linear), PSTConfig())
    table = nn.ModuleDict({"words": nn.Embedding(5, 8), "layers": nn.ModuleList([nn.Linear(8, 8)])})
    register(table["words"])
    assert f"words has a {kind} hook" in _refusal(table, update_embeddings=("words",))


def test_a_computed_weight_is_refused():
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        model = _blocks(norm(nn.Linear(8, 8)))
        assert "blocks.0.weight is not a Parameter but computed from others, as by weight_norm" in _refusal(model)


def test_a_weight_that_is_not_contiguous_is_refused():
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.randn(8, 8).t())
    assert "blocks.0.weight is not contiguous in memory; make it so" in _refusal(_blocks(linear))
    linear.weight = nn.Parameter(linear.weight.contiguous())
    inject_pst(_blocks(linear), PSTConfig())
