"""What a plan takes a layer and a mask update to move and launch in torch, against what the device is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.head_loss import head_loss
from pst_ds.core.masked_linear import factors_with_ones
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst
from pst_ds.nn.language_head import language_head
from pst_ds.planning.activations import layers_save_their_input, trace_micro_batch
from pst_ds.planning.time import COUNTS

from .pretended import module_to_device, pretended, to_device
from .tiny import tiny_llama

pytestmark = [pytest.mark.device]
OUT, IN, TOKENS = 1024, 2048, 8
PLANNED = COUNTS["torch"]


def layers(number, outputs=OUT):
    """So many pruned layers of (outputs, IN) with factors that are not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(IN, outputs, bias=False) for _ in range(number)]).bfloat16()
    names = tuple(map(str, range(number)))
    inject_pst(model, PSTConfig(score_rank=8, update_rank=8, modules_to_save=(), target_modules=names))
    for param in model.parameters():
        if param.requires_grad:
            param.data = torch.randn_like(param) * 0.1
    return module_to_device(model)


def passes(outputs):
    """(launches, bytes beside products) of a layer's forward and backward pass."""
    with pretended() as counts:
        (layer,) = layers(1, outputs)
        x = to_device(torch.randn(TOKENS, IN).bfloat16()).requires_grad_()
        grad_y = to_device(torch.randn(TOKENS, outputs).bfloat16())
        at = [(counts.launches, counts.bytes_moved)]
        y = layer(x)
        at.append((counts.launches, counts.bytes_moved))
        y.backward(grad_y)
        at.append((counts.launches, counts.bytes_moved))
    product = 2 * (outputs * IN + TOKENS * (outputs + IN))
    return [
        (after[0] - before[0], after[1] - before[1] - products * product)
        for before, after, products in zip(at, at[1:], (1, 2), strict=False)
    ]


def test_a_layer_moves_and_launches_what_is_planned():
    small, large = passes(OUT), passes(2 * OUT)
    assert [launches for launches, _ in small] == [launches for launches, _ in large]
    assert small[0][0] == PLANNED.forward_launches.total
    assert small[1][0] == (PLANNED.layer_launches + PLANNED.band_launches).total
    for one, two, planned in zip(small, large, (PLANNED.merge_bytes, PLANNED.backward_bytes), strict=True):
        sums = (2 * OUT + IN) / (OUT + IN)  # what factors take grows with outputs + inputs
        assert (two[1] - sums * one[1]) / ((2 - sums) * OUT * IN) == pytest.approx(planned, rel=0.01)


def test_a_mask_update_moves_and_launches_what_is_planned():
    found = []
    for number in (2, 4):
        with pretended() as counts:
            model = layers(number)
            update_masks(model, 0.3)
            before = counts.launches, counts.bytes_moved, counts.num_waits
            update_masks(model, 0.5)
            launches, waits = counts.launches - before[0], counts.num_waits - before[2]
            found.append((launches + waits, (counts.bytes_moved - before[1]) / (number * OUT * IN)))
    each = (found[1][0] - found[0][0]) / 2
    assert each == PLANNED.update_launches.total
    assert found[0][0] - 2 * each == PLANNED.shared_launches.total
    assert each <= 120
    assert [nbytes for _, nbytes in found] == pytest.approx([PLANNED.update_bytes] * 2, rel=0.05)


def test_the_operators_of_a_traced_model_are_those_that_run():
    config, shape = PSTConfig(modules_to_save=()), {"batch": 2, "sequence": 12, "checkpointing": False}
    traced = trace_micro_batch(inject_pst(tiny_llama(2), config), device="cuda", **shape)
    with pretended() as counts:
        model = module_to_device(inject_pst(tiny_llama(2), config))
        head, tokens = language_head(model), to_device(torch.arange(24).view(2, 12))
        places = to_device(torch.arange(24))
        with layers_save_their_input(model):
            before = counts.launches, counts.bytes_moved
            with head.reading(
                lambda hidden: head_loss(hidden.flatten(0, 1), head.readout, tokens.flatten(), places)
            ) as losses:
                model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            losses[0].backward()
        found = counts.launches - before[0], counts.bytes_moved - before[1]
    assert traced.launches == pytest.approx(found[0] - 2 * 6, rel=0.02)  # silu's gradient, in parts there
    assert 0.75 * found[1] < traced.moved < found[1]  # which has the bytes of products too, in a model so small


def test_products_with_factors_have_rows_of_whole_16_bytes():
    with pretended():
        (layer,) = layers(1)
        factors = factors_with_ones(layer.state())
    assert factors.A.shape == (OUT, 16)  # rank 8, the ones and zeros
    assert factors.B.shape == (16, IN)
