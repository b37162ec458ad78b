"""Rounded weights, coded bases and the figures of layers on the pretended device: those of the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import Grid
from pst_ds.masks.base_zeros import masks_of_zeros
from pst_ds.masks.layer_stats import measure
from pst_ds.masks.scales import update_scales
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers

from .pretended import module_to_device, pretended, to_device, to_host
from .tiny import tiny_llama

pytestmark = [pytest.mark.device]
GRIDS = [Grid(4, 32), Grid(8, 32)]


def _model(**grids):
    """A model whose every factor is non-zero, the same in every call."""
    model = tiny_llama(1)
    inject_pst(model, PSTConfig(modules_to_save=()), **grids)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = torch.randn_like(param) * 0.05
    return model


def _on_both(compute, **grids):
    """What ``compute`` returns for the model on the CPU, and on the device."""
    expected = compute(_model(**grids))
    with pretended():
        return expected, compute(module_to_device(_model(**grids)))


def _logits(model):
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return to_host(model(input_ids=to_device(tokens) if model.device.type == "gpu" else tokens).logits)


def test_figures_of_layers():
    def compute(model):
        update_masks(model, 0.5)
        return measure(model, with_scores=True)

    expected, found = _on_both(compute)
    in_another_order = ("correlation", "weight_norm")  # sums in double precision, which native code adds up on a CPU
    for name in in_another_order:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-13)
    others = {name: getattr(expected, name) for name in in_another_order}
    assert dataclasses.replace(found, **others) == expected


def test_the_host_waits_for_figures_as_often_for_many_layers_as_for_few():
    waits = []
    for num_layers in (1, 3):
        with pretended() as counts:
            model = module_to_device(inject_pst(tiny_llama(num_layers), PSTConfig(modules_to_save=())))
            measure(model, with_scores=True)
            before = counts.num_waits
            measure(model, with_scores=True)
            waits.append(counts.num_waits - before)
    assert waits[0] == waits[1]


def test_masks_of_zeros():
    def compute(model):
        with torch.no_grad():
            for layer in pst_layers(model).values():
                layer.weight.mul_((layer.weight.abs() > 0.01).to(layer.weight.dtype))
        return masks_of_zeros(model)

    expected, found = _on_both(compute)
    assert found == expected
    assert 0.2 < found.sparsity < 0.8


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_and_the_rounded_forward_pass(grid):
    def compute(model):
        update_masks(model, 0.5)
        stats = update_scales(model)
        return dataclasses.astuple(stats), _logits(model)

    (expected, logits), (found, on_device) = _on_both(compute, grid=grid)
    assert found[0] == expected[0]  # errors of the scales that were chosen
    for ours, other in zip(found, expected, strict=True):
        assert ours == pytest.approx(other, rel=1e-12)
    torch.testing.assert_close(on_device, logits)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masks_over_a_base_of_codes(grid):
    def compute(model):
        return update_masks(model, 0.5), _logits(model)

    (expected, logits), (found, on_device) = _on_both(compute, base_grid=grid)
    assert found == expected
    torch.testing.assert_close(on_device, logits)
