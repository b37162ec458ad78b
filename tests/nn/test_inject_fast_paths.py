"""Encoders of torch compute with their masks in evaluation too, and are as they were when merged."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.merge import merge_and_unload
from tests.pairs import every_pair

EXCLUDED = ("self_attn", "self_attn.out_proj")


def _encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


def _pruned():
    model = inject_pst(_encoder(), PSTConfig(exclude_modules=EXCLUDED))
    update_masks(model, 0.8)
    return model


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_pair
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy, _pickled])
def test_evaluation_computes_with_the_masks(context, padded, again):
    model, x = again(_pruned()), torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * (5 - i) + [True] * i for i in range(3)]) if padded else None
    trained = model.train()(x, src_key_padding_mask=padding)
    with context():
        found = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found.detach().clone(), trained.detach())
    assert len(pst_layers(model)) == 4


def test_a_merged_encoder_has_its_switches_back_and_computes_the_same():
    model, x = _pruned().eval(), torch.randn(3, 5, 16)
    with torch.no_grad():
        masked = model(x)
        torch.testing.assert_close(merge_and_unload(model)(x), masked)
    ours, plain = ({k: v for k, v in vars(m).items() if not k.startswith("_")} for m in (model, _encoder()))
    assert ours.keys() == plain.keys()
    assert (ours["use_nested_tensor"], model.layers[0].activation_relu_or_gelu) == (True, 1)


def test_encoders_that_are_not_pruned_stay_fast():
    model = nn.ModuleDict({"encoder": _encoder(), "blocks": nn.ModuleList([nn.Linear(4, 4)])})
    inject_pst(model, PSTConfig(target_modules=("blocks.0",)))
    assert model["encoder"].use_nested_tensor
    assert model["encoder"].layers[0].activation_relu_or_gelu == 1
