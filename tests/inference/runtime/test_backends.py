"""Which way a product is computed, and that every way gives the same."""

import pytest
import torch

from pst_ds.inference.runtime import SparseLinear, native, ops
from pst_ds.inference.runtime.ops import backend_for

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("format_name", "dtype", "device", "vectors", "density", "expected"),
    [
        ("bitmask", BF16, "cpu", 1, 0.5, "native"),
        ("bitmask", BF16, "cpu", 1 << 20, 0.5, "native"),
        ("bitmask", BF16, "cpu", 0, 0.0, "native"),
        ("bitmask", FP32, "cpu", 1, 0.1, "native"),
        ("bitmask", FP32, "cpu", ops.NATIVE_UP_TO[FP32], 0.1, "native"),
        ("bitmask", FP32, "cpu", ops.NATIVE_UP_TO[FP32] + 1, 0.1, "expand"),
        ("bitmask", FP16, "cpu", 1, 0.5, "expand"),
        ("bitmask", FP64, "cpu", 1, 0.5, "expand"),
        ("bitmask", BF16, "cuda", 1, 0.5, "expand"),
        ("csr", BF16, "cpu", 1, 0.1, "csr"),
        ("csr", FP16, "cpu", ops.CSR_UP_TO, 0.1, "csr"),
        ("csr", BF16, "cpu", ops.CSR_UP_TO + 1, 0.1, "expand"),
        ("csr", BF16, "cpu", 1, 0.5, "expand"),
        ("csr", FP64, "cpu", 1, 0.1, "expand"),
        ("csr", BF16, "cuda", 1, 0.1, "expand"),
    ],
)
def test_the_way_is_chosen_by_format_dtype_device_and_size(
    format_name, dtype, device, vectors, density, expected, monkeypatch
):
    monkeypatch.setattr(native, "library", lambda: object())
    assert backend_for(format_name, dtype, device, vectors, density) == expected


def test_without_native_code_the_weight_is_expanded(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert backend_for("bitmask", BF16, "cpu", 1, 0.5) == "expand"
    assert backend_for("csr", BF16, "cpu", 1, 0.1) == "csr"


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("n", [1, 4, 40])
def test_every_way_gives_the_same(n, dtype, levels, problem, monkeypatch):
    case = problem(70, 300, n, 0.9, dtype)
    expected = case.sums().to(dtype)
    found = {way: ops.bitmask_linear(case.x, *case.parts, case.bias, backend=way) for way in ("native", "expand", "")}
    dense = SparseLinear.from_dense(case.weight, case.bias, "csr")
    for way in ("csr", "expand"):
        monkeypatch.setattr(ops, "backend_for", lambda *_, chosen=way: chosen)
        found[f"csr by {way}"] = ops.csr_linear(
            case.x, dense.crow_indices, dense.csr_columns, dense.csr_values, case.bias
        )
    found["on a device"] = torch.nn.functional.linear(
        case.x, ops.expand_on_device(case.compressed, case.bitmask, 300), case.bias
    )
    for way, y in found.items():
        assert torch.equal(y, expected), way
