"""inject_pst with a base in few bits: what becomes of the weights, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pst_ds import PSTConfig, inject_pst, load_pretrained, merge_and_unload, print_trainable_parameters, save_pretrained
from pst_ds.checkpoint.adapter import PretrainedError
from pst_ds.core.bits import unpack_range
from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.masks.base_zeros import masks_of_zeros
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.inject import bypassed, pst_layers
from pst_ds.nn.targets import InjectionError

GRID = Grid(4, 32)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 96), Conv1D(32, 96)

    def forward(self, x):
        return x + self.narrow(torch.relu(self.wide(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.classifier = nn.ModuleList([Block(), Block()]), nn.Linear(32, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


def base(rounded=None):
    torch.manual_seed(5)
    model = Model()
    for block in model.blocks if rounded else ():
        block.wide.weight.data.copy_(round_to_grid(block.wide.weight.data, None, rounded))
        block.narrow.weight.data.copy_(round_to_grid(block.narrow.weight.data.t(), None, rounded).t())
    return model


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4), Grid(8), Grid(8, 32)], ids=str)
def test_codes_train_as_the_weights_that_they_are_would(grid, capsys):
    """Scales of |W|, outputs, gradients, masks and what is merged, bit for bit."""
    coded, plain = inject_pst(base(), PSTConfig(), base_grid=grid), inject_pst(base(grid), PSTConfig())
    x, found = torch.randn(4, 32), []
    for model in (coded, plain):
        model(x).square().sum().backward()
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param -= 0.1 * param.grad
        stats, after = update_masks(model, 0.6), model(x)
        with bypassed(model):
            dense = model(x)
        print_trainable_parameters(model)
        grads = [param.grad for param in model.parameters() if param.requires_grad]
        scales = [layer.magnitude_scales for layer in pst_layers(model).values()]
        merged = merge_and_unload(model)
        found.append((stats, scales, [after, dense, *grads, *merged.state_dict().values()], capsys.readouterr().out))
    (stats, scales, tensors, said), (same_stats, same_scales, same_tensors, same_said) = found
    assert (stats, scales, said) == (same_stats, same_scales, same_said)
    assert all(torch.equal(one, other) for one, other in zip(tensors, same_tensors, strict=True))


def test_a_layer_has_bytes_for_its_weight_and_casts_leave_them():
    model = inject_pst(base(), PSTConfig(), base_grid=GRID)
    layer = pst_layers(model)["blocks.0.wide"]
    assert layer.weight is None
    assert layer.pst_base_codes.numel() == 32 * 96 // 2
    assert layer.pst_base_scales.numel() == 32 * 96 // 32 * 2
    codes = layer.pst_base_codes.clone()
    model.bfloat16()
    assert layer.dtype == torch.bfloat16
    assert torch.equal(layer.pst_base_codes, codes)
    assert model(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(model)(torch.randn(2, 32).bfloat16()).isfinite().all()


def test_the_zeros_of_a_pruned_base_are_its_mask_and_small_weights_that_round_to_zero_are_kept():
    model = base()
    for block in model.blocks:
        for weight in (block.wide.weight.data, block.narrow.weight.data):
            weight.normal_()[weight.abs() < 0.01] = 0.0
    pruned = {n: m.weight.detach().clone() for n, m in model.named_modules() if n.endswith(("wide", "narrow"))}
    inject_pst(model, PSTConfig(initial_mask="zeros"), base_grid=GRID)
    assert masks_of_zeros(model) == mask_stats(model)
    for name, layer in pst_layers(model).items():
        mask = unpack_range(layer.pst_mask, layer.layout.numel, layer.num_shards, 0, layer.layout.numel)
        mask = mask.view(layer.layout.shape)
        assert torch.equal(mask.bool(), pruned[name] != 0), name
        assert (layer.base_weight().dense()[mask.bool()] == 0).any(), "the test is to have such weights"


def test_an_adapter_state_goes_onto_a_base_in_the_same_bits(tmp_path):
    model = inject_pst(base(), PSTConfig(), base_grid=GRID)
    model(torch.randn(2, 32)).sum().backward()
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.normal_(std=0.1)
    update_masks(model, 0.5)
    save_pretrained(model, tmp_path)
    x = torch.randn(3, 32)
    for loaded in (base(), inject_pst(base(), PSTConfig(), base_grid=GRID)):
        assert torch.equal(load_pretrained(loaded, tmp_path)(x), model(x))
    with pytest.raises(PretrainedError, match="base_grid = int4, a scale for 32 inputs, and the model was injected"):
        load_pretrained(inject_pst(base(), PSTConfig()), tmp_path)


@pytest.mark.parametrize(
    ("config", "grid", "said"),
    [
        (PSTConfig(), Grid(4, 64), "blocks.0.wide: the base: groups of 64 do not divide 32 inputs; take 32 or row"),
        (PSTConfig(train_weights=True, score_rank=0, structured_scores=False, update_rank=0), GRID, "train_weights"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(config, grid, said):
    model = base()
    with pytest.raises(InjectionError, match=said):
        inject_pst(model, config, base_grid=grid)
    assert not pst_layers(model)


def test_a_damaged_base_is_refused_by_name():
    model = base()
    model.blocks[1].narrow.weight.data[3, 3] = float("nan")
    with pytest.raises(InjectionError, match=r"blocks\.1\.narrow\.weight has NaN"):
        inject_pst(model, PSTConfig(), base_grid=GRID)


def test_shapes_on_the_meta_device_are_those_of_values():
    with torch.device("meta"):
        shapes = inject_pst(Model(), PSTConfig(relative_magnitude=False), num_shards=3, base_grid=GRID)
    values = inject_pst(base(), PSTConfig(relative_magnitude=False), num_shards=3, base_grid=GRID)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in values.named_parameters()}
