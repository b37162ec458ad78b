"""Bytes of a model in memory, as ``pst-ds bench`` shows them."""

import torch
from torch import nn

from pst_ds.inference.bench import resident_bytes
from tools.packed_layers import packed_linear


def test_resident_bytes_count_shared_storage_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert resident_bytes(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    model.register_buffer("window", model[0].weight.detach()[2:4])
    assert resident_bytes(model) == 8 * 8 * 4
    layer = packed_linear(torch.eye(16))
    assert resident_bytes(layer) == 16 * 4 + 16 * 2 + 16 * 8 + 2 * 8
