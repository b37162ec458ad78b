"""Counts and patterns of packed tensors are those of their values, not of the mask they were pruned with."""

import pytest
import torch

from pst_ds.formats import row_bits
from pst_ds.formats.safetensors_file import header_and_slots
from pst_ds.writing.plan import PlannedFile, TensorJob, TensorSpec, TensorValues
from pst_ds.writing.write import write_tensors


class _Source:
    """One tensor, pruned with ``keep``."""

    def __init__(self, weight, keep):
        self._values = TensorValues(weight, keep, (weight.numel() // 2,))

    def make(self, job):
        yield self._values


@pytest.mark.parametrize("packing", ["bitmask", "2:4"])
def test_a_kept_weight_of_value_zero_is_no_kept_weight_of_the_pattern(tmp_path, packing):
    keep = torch.zeros(4, 16, dtype=torch.bool)
    keep[:, 0::4] = keep[:, 1::4] = True  # blocks, 2:4 and equal rows
    weight = torch.where(keep, torch.randn(4, 16), 0.0).bfloat16()
    weight[0, 0:2] = weight[1, 4] = weight[2, 9] = weight[3, 12] = 0.0  # kept by the mask
    nonzero = int((weight != 0).sum())
    spec = TensorSpec("layer.weight", (4, 16), torch.bfloat16, "pruned", is_linear=True)
    bits = row_bits(keep.float())
    packed = spec.packed(packing, None, bits)
    assert packed.form is not None
    file = PlannedFile("model.safetensors", *header_and_slots(packed.part_sizes()))
    (tensor,) = write_tensors(tmp_path, [file], [TensorJob((packed,), None)], _Source(weight, bits))
    assert tensor.nonzero == nonzero
    assert tensor.pattern == "7:16"  # of the mask it would be "1x2"
