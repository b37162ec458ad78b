"""What a plan takes kernels to move and launch, against what the pretended accelerator is asked for with them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.kernels.triton import merge
from pst_ds.nn.inject import inject_pst
from pst_ds.planning.time import COUNTS
from tests.device.pretended import DEVICE, counts, module_to_device, pretended, to_device, to_host

pytestmark = pytest.mark.interpreted
OUT, IN, TOKENS = 256, 512, 8
PLANNED = COUNTS["triton"]


@pytest.fixture
def kernels_on_device(monkeypatch):
    """Kernels serve the pretended device: a launch is one, and moves every tensor that it is given once."""
    real = merge.launch

    def launch(kernel, grid, *args, **constants):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        counts.launches += 1
        launched.append(kernel)
        counts.bytes_moved += sum(t.numel() * t.element_size() for t in tensors)
        real(kernel, grid, *(to_host(arg) if isinstance(arg, torch.Tensor) else arg for arg in args), **constants)

    launched = []
    monkeypatch.setattr(merge, "launch", launch)
    monkeypatch.setattr(merge, "serves", lambda device: device == DEVICE)
    return launched


def passes(outputs):
    """(launches, bytes beside products) of a layer's forward and backward pass."""
    with pretended():
        model = nn.Sequential(nn.Linear(IN, outputs, bias=False)).bfloat16()
        inject_pst(model, PSTConfig(score_rank=8, update_rank=8, modules_to_save=(), target_modules=("0",)))
        (layer,) = module_to_device(model)
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


def test_a_layer_moves_and_launches_what_is_planned(kernels_on_device):
    small, large = passes(OUT), passes(2 * OUT)
    assert [launches for launches, _ in small] == [launches for launches, _ in large]
    backward = PLANNED.layer_launches + PLANNED.band_launches
    assert (small[0][0], small[1][0]) == (PLANNED.forward_launches.total, backward.total)
    assert len(kernels_on_device) == 2 * (PLANNED.forward_launches + backward).triton
    for one, two, planned in zip(small, large, (PLANNED.merge_bytes, PLANNED.backward_bytes), strict=True):
        sums = (2 * OUT + IN) / (OUT + IN)  # what factors take grows with outputs + inputs
        assert (two[1] - sums * one[1]) / ((2 - sums) * OUT * IN) == pytest.approx(planned, rel=0.01)
