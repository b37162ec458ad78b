"""A multiplicative update: SPP's formula, also in layers that fuse several matrices, as GPT-2's c_attn does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.merge import merge_and_unload

GROUPS = 5
SPP = {"multiplicative_update": True, "score_rank": 0, "structured_scores": False, "update_rank": GROUPS, "beta": 2.0}


def _gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=1, n_head=2, n_positions=48, initializer_range=0.2)
    model = inject_pst(AutoModelForCausalLM.from_config(config), PSTConfig(modules_to_save=(), **SPP)).eval()
    update_masks(model, 0.5)
    for layer in pst_layers(model).values():
        layer.pst_U.data.normal_()
        layer.pst_V.data.normal_()
    return model


def _spp(x, kept, U, V, parts):
    """y of SPP (arXiv 2405.16057): group g of n is the outputs floor(g O / n) up to floor((g + 1) O / n), whose inputs
    its row of V scales; U then scales every output. ``kept`` is M . W0, (outputs, inputs)."""
    updates = []
    for part_kept, part_rows in zip(kept.chunk(parts), V.chunk(parts), strict=True):
        borders = [g * len(part_kept) // len(part_rows) for g in range(len(part_rows) + 1)]
        for row, first, end in zip(part_rows, borders[:-1], borders[1:], strict=True):
            updates.append((x * row) @ part_kept[first:end].t())
    return x @ kept.t() + SPP["beta"] * U * torch.cat(updates, dim=1)


@pytest.mark.parametrize(("name", "parts"), [("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 1)])
def test_weight_and_gradients_are_those_of_the_formula(name, parts):
    layer = pst_layers(_gpt2())[f"transformer.h.0.{name}"]
    assert layer.layout.num_matrices == parts
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, layer.layout.in_features, generator=generator)
    grad_y = torch.randn(5, layer.layout.out_features, generator=generator)
    y = layer(x)
    y.backward(grad_y)
    U, V = (p.detach().double().requires_grad_() for p in (layer.pst_U, layer.pst_V))
    kept = ((layer.masked_weight() != 0) * layer.weight).detach().double().t()  # GPT-2 stores (inputs, outputs)
    assert len(kept) % GROUPS != 0
    expected = _spp(x.double(), kept, U, V, parts)
    assert (y - expected).abs().max() < 1e-6 * expected.abs().max()
    identity = torch.eye(kept.shape[1], dtype=torch.float64)
    assert torch.allclose(layer.masked_weight().double(), _spp(identity, kept, U, V, parts), atol=1e-6)
    expected.backward(grad_y.double())
    for ours, theirs in ((layer.pst_U.grad, U.grad), (layer.pst_V.grad, V.grad)):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    assert (layer.pst_V.grad != 0).any(1).all()  # every factor has a part in it


def test_a_merged_model_has_its_logits():
    model = _gpt2()
    ids = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(2))
    logits = model(input_ids=ids).logits
    masked = {name: layer.masked_weight() for name, layer in pst_layers(model).items()}
    merge_and_unload(model)
    assert torch.equal(model(input_ids=ids).logits, logits)
    for name, weight in masked.items():
        assert torch.equal(model.get_submodule(name).weight.data, weight)
