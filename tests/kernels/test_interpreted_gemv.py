"""Products of packed layers with the kernel for GPUs, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.runtime import gemv
from pst_ds.runtime.linear import SparseLinear

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(("rows", "columns", "kept"), [(3, 32, 0.5), (4, 1120, 0.2), (2, 64, 0.0), (2, 96, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_is_that_of_the_dense_weight(rows, columns, kept, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    weight = (weight * (torch.rand(weight.shape, generator=generator) < kept)).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if rows > 2 else None
    layer = SparseLinear.from_dense(weight, bias)
    x = torch.randn(1, 2, columns, generator=generator).to(dtype)
    launched = []
    real = gemv.launch
    monkeypatch.setattr(gemv, "launch", lambda *args, **constants: (launched.append(1), real(*args, **constants)))
    found = layer(x)
    assert launched == [1]
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # the interpreter cuts what a GPU rounds to bf16
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_is_pruned_meets_no_infinity():
    weight = torch.tensor([[1.0, 0.0] * 16])
    x = torch.tensor([[1.0, torch.inf] * 16])
    assert SparseLinear.from_dense(weight)(x).tolist() == [[16.0]]


def test_many_vectors_and_odd_rows_are_left_to_other_ways():
    values = torch.ones(4)
    assert not gemv.takes(torch.ones(9, 32), values)
    assert not gemv.takes(torch.ones(1, 40), values)
    assert not gemv.takes(torch.ones(1, 32), values.double())
    assert gemv.takes(torch.ones(8, 32), values)
