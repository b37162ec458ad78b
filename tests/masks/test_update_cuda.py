"""CUDA against the CPU, which is the reference: the same masks to the bit, gradients within rounding."""

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from tests.pairs import every_pair

pytestmark = pytest.mark.gpu
PATTERNS = ["matrix", "global", "row", "2:4", "16x1"]


def _model(dtype, pattern):
    torch.manual_seed(3)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(256, 512) for _ in range(3)).to(dtype)
    inject_pst(model, PSTConfig(modules_to_save=(), pattern=pattern))
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = (torch.randn(param.shape, generator=generator) * 0.2).to(dtype)
    return model


@every_pair
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_the_bits_of_the_cpu(dtype, pattern):
    on_cpu, on_cuda = _model(dtype, pattern), _model(dtype, pattern).cuda()
    for sparsity in (0.25, 0.5):
        progress = sparsity / 0.5
        assert update_masks(on_cuda, sparsity, progress=progress) == update_masks(on_cpu, sparsity, progress=progress)
    for ours, reference in zip(pst_layers(on_cuda).values(), pst_layers(on_cpu).values(), strict=True):
        assert torch.equal(ours.pst_mask.cpu(), reference.pst_mask)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_gradients_are_those_of_the_cpu(dtype, bound):
    on_cpu, on_cuda = _model(dtype, "matrix"), _model(dtype, "matrix").cuda()
    for model in (on_cpu, on_cuda):
        update_masks(model, 0.5)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(7)).to(dtype)
    for model, device in ((on_cpu, "cpu"), (on_cuda, "cuda")):
        for layer in pst_layers(model).values():
            layer(x.to(device)).float().square().mean().backward()
    for (name, ours), reference in zip(on_cuda.named_parameters(), on_cpu.parameters(), strict=True):
        if ours.requires_grad:
            off = (ours.grad.cpu().double() - reference.grad.double()).norm() / reference.grad.double().norm()
            assert off <= bound, name
