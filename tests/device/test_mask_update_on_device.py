"""A mask update on the pretended device: the bits of the CPU, wherever weights and factors are."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from tests.pairs import every_pair

from .pretended import PretendedTensor, WrongDeviceError, module_to_device, pretended, to_device, to_host

pytestmark = [pytest.mark.device]
PATTERNS = ["matrix", "stack", "global", "row", "2:4", "4x4"]


def _mid_ramp(pattern, dtype=torch.float32, magnitude="weight", num_layers=2):
    """A model whose every factor is non-zero, with ties among the weights, the same in every call."""
    torch.manual_seed(3)
    model = BertModel(
        BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=16,
        )
    ).to(dtype)  # fmt: skip
    for param in model.parameters():
        param.data = (param.data * 200).round() / 200
    inject_pst(model, PSTConfig(pattern=pattern, magnitude=magnitude, modules_to_save=()))
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        if magnitude == "activation":
            layer.input_norms = torch.linspace(0.5, 2.0, layer.layout.in_features)
        for _, param in layer.factor_parameters():
            param.data = (torch.randn(param.shape, generator=generator) * 0.3).to(param.dtype)
    return model


@every_pair
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_masks_are_those_of_the_cpu(pattern, dtype):
    expected = update_masks(_mid_ramp(pattern, dtype), 0.5)
    with pretended() as counts:
        model = module_to_device(_mid_ramp(pattern, dtype))
        found = update_masks(model, 0.5)
        assert all(isinstance(layer.pst_mask, PretendedTensor) for layer in pst_layers(model).values())
        assert counts.launches > 0
    assert found == expected


@pytest.mark.few(2)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_host_waits_as_often_for_many_layers_as_for_few(pattern):
    waits = []
    for num_layers in (1, 3):
        model = _mid_ramp(pattern, num_layers=num_layers)
        with pretended() as counts:
            module_to_device(model)
            moved = counts.num_waits
            update_masks(model, 0.5)
            waits.append(counts.num_waits - moved)
            assert not counts.host_indices
    assert waits[0] == waits[1] <= 8


@every_pair
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("magnitude", ["weight", "activation"])
def test_weights_on_the_host_are_scored_there(pattern, magnitude):
    """As with a weight that ZeRO-3 offloads: its optimizer's masters are on the device."""
    expected = update_masks(_mid_ramp(pattern, magnitude=magnitude), 0.5)
    with pretended() as counts:
        model = _mid_ramp(pattern, magnitude=magnitude)
        num_factors = 0
        for layer in pst_layers(model).values():
            for name, param in layer.factor_parameters():
                setattr(layer, f"pst_{name}", torch.nn.Parameter(to_device(param)))
                num_factors += 1
            if layer.input_norms is not None:
                layer.input_norms = to_device(layer.input_norms)
                num_factors += 1
        found = update_masks(model, 0.5)
        assert counts.num_waits <= num_factors  # each factor comes to the host, and nothing else waits
    assert found == expected


def test_a_tensor_of_the_host_beside_one_of_the_device_is_refused():
    with pretended() as counts:
        device_side, host_side = to_device(torch.ones(3)), torch.ones(3)
        with pytest.raises(WrongDeviceError, match="gpu:0, cpu"):
            device_side + host_side
        assert to_host(device_side + 1).tolist() == [2.0, 2.0, 2.0]
        assert (counts.launches, counts.bytes_moved, counts.num_waits) == (1, 24, 0)
        assert float(device_side.sum()) == 3.0
        assert counts.num_waits == 1
        before = counts.live_bytes
        held = [torch.zeros(1000, device=device_side.device) for _ in range(3)]
        assert counts.peak_bytes == counts.live_bytes == before + 12_000
        del held
        assert (counts.live_bytes, counts.peak_bytes) == (before, before + 12_000)
