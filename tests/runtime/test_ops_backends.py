"""Which way a product is computed, and that every way gives the same."""

import pytest
import torch

from pst_ds.runtime import native, ops
from pst_ds.runtime.ops import backend_for
from tests.pairs import every_pair

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "device", "vectors", "expected"),
    [
        (BF16, "cpu", 1, "native"),
        (BF16, "cpu", 1 << 20, "native"),
        (BF16, "cpu", 0, "native"),
        (FP32, "cpu", 1, "native"),
        (FP32, "cpu", ops.NATIVE_UP_TO[FP32], "native"),
        (FP32, "cpu", ops.NATIVE_UP_TO[FP32] + 1, "expand"),
        (FP16, "cpu", 1, "expand"),
        (FP64, "cpu", 1, "expand"),
        (BF16, "cuda", 1, "expand"),
    ],
)
def test_the_way_is_chosen_by_dtype_device_and_size(dtype, device, vectors, expected, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: object())
    assert backend_for(dtype, device, vectors) == expected


def test_without_native_code_the_weight_is_expanded(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert backend_for(BF16, "cpu", 1) == "expand"


@every_pair
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("n", [1, 4, 40])
def test_every_way_gives_the_same(n, dtype, levels, problem):
    case = problem(70, 300, n, 0.9, dtype)
    expected = case.sums().to(dtype)
    found = {way: ops.bitmask_linear(case.x, *case.parts, case.bias, backend=way) for way in ("native", "expand", "")}
    found["on a device"] = torch.nn.functional.linear(
        case.x, ops.expand_on_device(case.compressed, case.bitmask, 300), case.bias
    )
    for way, y in found.items():
        assert torch.equal(y, expected), way
