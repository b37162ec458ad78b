"""Heads of language models: families against their own forward pass, and models whose loss is something else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pst_ds import PSTConfig, inject_pst
from pst_ds.core.head_loss import ChunkSizes, head_loss, token_losses
from pst_ds.nn.language_head import UnknownHeadError, language_head

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {"final_logit_softcapping": 2.0}, "gemma3_text": {},
    "phi": {}, "phi3": {}, "gpt2": GPT, "gpt_neox": {}, "granite": {"logits_scaling": 3.0}, "cohere": {}, "olmo2": {},
    "mistral": {}, "smollm3": {}, "mixtral": {"num_local_experts": 2}, "glm4": {}, "starcoder2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
}  # fmt: skip
SCALES = {"gemma2": (1.0, 2.0), "granite": (1 / 3, 0.0), "cohere": (0.0625, 0.0)}
SMALL = ChunkSizes(least_rows=5, numbers=1, numbers_in_fp32=120)


def _model(family, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **more}))


def _own_way(model, head, labels, ids):
    after = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    places = (after != -100).nonzero().squeeze(1)

    def read(hidden):
        return head_loss(hidden.flatten(0, 1), head.readout, after[places], places, sizes=SMALL)

    with head.reading(read) as losses:
        model(input_ids=ids)
    return losses[0]


def _gradients(model):
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("trained", [(), ("lm_head", "embed_out")], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(10)
def test_loss_and_gradients_of_families_are_their_own(family, trained):
    model = _model(family)
    inject_pst(model, PSTConfig(exclude_modules=("experts", "gate") if family == "mixtral" else ()))
    model.eval()  # no dropout
    head = language_head(model)
    head.module.weight.requires_grad_(bool(trained))
    assert (head.scale, head.cap) == pytest.approx(SCALES.get(family, (1.0, 0.0)))
    ids = torch.randint(3, 60, (2, 24))
    labels = ids.clone()
    labels[0, :7] = labels[1, 20:] = -100
    expected = model(input_ids=ids, labels=labels).loss
    expected.backward()
    theirs = _gradients(model)
    model.zero_grad()
    loss = _own_way(model, head, labels, ids)
    loss.backward()
    ours = _gradients(model)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 8
    apart = {name: float((ours[name] - gradient).norm()) for name, gradient in theirs.items()}
    sizes = {name: float(gradient.norm()) for name, gradient in theirs.items()}
    assert math.hypot(*apart.values()) < 1e-6 * math.hypot(*sizes.values())
    assert all(apart[name] < 3e-6 * max(sizes[name], 1e-3 * max(sizes.values())) for name in sizes)
    assert "forward" not in vars(head.module)
    assert not head.module._forward_hooks
    assert not head.module._forward_pre_hooks


def test_losses_of_tokens_are_those_of_the_logits():
    model = _model("gemma2").eval()
    head, ids = language_head(model), torch.randint(3, 60, (2, 9))
    targets = torch.randint(60, (18,))
    with torch.no_grad(), head.reading(lambda h: token_losses(h.flatten(0, 1), head.readout, targets)) as found:
        model(input_ids=ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(found[0], expected, rtol=1e-5, atol=1e-6)


def test_models_without_values_have_heads_too():
    with torch.device("meta"):
        model = _model("granite")
    before = dict(model.named_modules())
    assert language_head(model).scale == pytest.approx(1 / 3)
    assert dict(model.named_modules()) == before


def test_other_losses_are_refused_with_the_reason():
    def refused(model, said):
        before = list(model.modules())
        with pytest.raises(UnknownHeadError, match=said):
            language_head(model)
        assert list(model.modules()) == before

    refused(_model("mixtral", output_router_logits=True), "a term of its routers")
    config = AutoConfig.for_model("llama", **SIZES)
    refused(AutoModelForSequenceClassification.from_config(config), "LlamaForSequenceClassification has no head")
    refused(nn.Linear(2, 2), "Linear has no head")
    pruned = _model("llama")
    inject_pst(pruned, PSTConfig(target_modules=("lm_head",)))
    refused(pruned, "head of class PSTLinear, not a plain")
    shifted = _model("llama")
    shifted.loss_function = lambda logits, labels, **_: logits.mean()
    refused(shifted, "not the cross-entropy of each next token")
    squared = _model("llama")
    forward = squared.forward

    def with_squares(**inputs):
        out = forward(**inputs)
        out.logits = out.logits.square()
        return out

    squared.forward = with_squares
    refused(squared, "something unknown with its logits")
    broken = _model("llama")
    broken.forward = lambda **_: 1 / 0
    refused(broken, "could not be probed: .*division by zero")
