"""Products of packed layers with the kernels for GPUs, in Triton's interpreter, against those of CPUs."""

from __future__ import annotations

import pytest
import torch

from tests.pairs import every_pair

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.core.experts.routing import Routing
from pst_ds.core.quantization import Grid
from pst_ds.runtime import gpu
from pst_ds.storage_format import packed_format
from tools.packed_layers import packed_experts, packed_linear

pytestmark = pytest.mark.interpreted


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    names, real = [], gpu.launch

    def launch(kernel, *args, **constants):
        names.append(kernel.fn.__name__)
        real(kernel, *args, **constants)

    monkeypatch.setattr(gpu, "launch", launch)
    return names


def weight_of(rows, columns, kept, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight = (weight * (torch.rand(weight.shape, generator=generator) < kept)).to(dtype)
    return weight, torch.randn(rows, generator=generator).to(dtype) if rows % 2 else None


def inputs(vectors, columns, dtype=torch.float32):
    return torch.randn(1, vectors, columns, generator=torch.Generator().manual_seed(vectors)).to(dtype)


def require_dense(layer, bias, x, found):
    """The product of the weight that the layer's parts stand for on a CPU."""
    weight = layer.format.unpack(layer.parts(), torch.float64)
    expected = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[x.dtype]  # the interpreter cuts bf16
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@every_pair
@pytest.mark.parametrize(
    ("rows", "columns", "kept", "dtype"),
    [
        (3, 32, 0.5, torch.bfloat16), (1, 1056, 0.2, torch.float32), (2, 64, 0.0, torch.float32),
        (2, 96, 1.0, torch.bfloat16), (5, 37, 0.4, torch.float32),
    ],
)  # fmt: skip
@pytest.mark.parametrize("vectors", [1, gpu.MOST_WALKED])
def test_products_of_kept_values(rows, columns, kept, dtype, vectors, launched):
    weight, bias = weight_of(rows, columns, kept, dtype)
    layer, x = packed_linear(weight, bias), inputs(vectors, columns, dtype)
    require_dense(layer, bias, x, layer(x))
    assert launched == ["packed_vector"]


@every_pair
@pytest.mark.parametrize(
    ("packing", "bits", "group", "columns"),
    [
        ("bitmask", 8, 32, 96), ("bitmask", 4, 32, 96), ("bitmask", 8, 128, 256), ("bitmask", 4, 64, 1088),
        ("bitmask", 8, None, 44), ("bitmask", 4, None, 37), ("2:4", 8, 64, 64), ("2:4", 4, None, 44),
        ("dense", 8, None, 37), ("dense", 4, 32, 64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("vectors", [1, gpu.MOST_WALKED])
def test_products_of_codes(packing, bits, group, columns, vectors, launched):
    weight, bias = weight_of(3, columns, 0.6)
    if packing == "2:4":
        weight *= torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(columns // 4)
    layer = packed_linear(weight, bias, packed_format(packing, Grid(bits, group)))
    x = inputs(vectors, columns)
    require_dense(layer, bias, x, layer(x))
    assert launched == ["packed_vector"]


@every_pair
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "vectors", "dtype"), [(2, 3, torch.bfloat16), (2, 2, torch.float16)])
def test_products_of_codes_in_16_bits(bits, rows, vectors, dtype, launched):
    weight, _ = weight_of(rows, 64, 0.5)
    layer = packed_linear(weight, None, packed_format("bitmask", Grid(bits, 32))).to(dtype)
    x = inputs(vectors, 64, dtype)
    require_dense(layer, None, x, layer(x))
    assert len(launched) == 1


@every_pair
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kept", [0.03, 1.0])
def test_rows_of_any_number_of_codes(bits, kept, launched):
    """Rows begin at every byte of a word, and some are empty."""
    weight, _ = weight_of(12, 32, kept)
    weight[::3] = 0.0
    layer, x = packed_linear(weight, None, packed_format("bitmask", Grid(bits, None))), inputs(1, 32)
    require_dense(layer, None, x, layer(x))
    assert launched == ["packed_vector"]


def require_experts(experts, counts, launches, launched, *, by_token=False, dtype=torch.float32):
    """Products of a stack with so many vectors for each expert, against dense ones, in these launches."""
    launched.clear()
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).view(-1, 1)
    if by_token:  # in another order than the experts', and two experts a token
        index = torch.cat([index.flip(0), (index.flip(0) + 1) % len(counts)], 1)
    routing = Routing.of(index, torch.ones(index.shape), len(counts))
    x = inputs(len(index), experts.in_features, dtype)[0]
    rows = x[routing.tokens] if by_token else x
    found = experts(x, routing, by_token=by_token)
    weight = experts.format.unpack(experts.parts(), torch.float64).view(len(counts), -1, experts.in_features)
    expected = torch.einsum("pi,poi->po", rows.double(), weight[routing.experts].double())
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert launched == launches


def stack_of(experts, rows, columns):
    return torch.stack([weight_of(rows, columns + i, 0.4)[0][:, :columns] for i in range(experts)])


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_begin_with_any_byte_and_share_a_launch(bits, launched):
    experts = packed_experts(stack_of(4, 3, 64), packed_format("bitmask", Grid(bits, 32)))
    require_experts(experts, [1, 1, 1, 1], ["packed_vector"], launched)
    require_experts(experts, [2, 0, 3, 0], ["packed_vector"], launched, by_token=True)
    require_experts(experts, [1, 0, 9, 1], ["packed_vector"], launched)  # 11: fewer than 8 for each of 3 experts
    require_experts(experts, [9, 0, 17, 1], ["packed_vector"], launched)  # the last; the others are expanded


@pytest.mark.parametrize(("packing", "bits"), [("bitmask", 0), ("2:4", 0), ("dense", 8), ("2:4", 4)])
def test_experts_of_every_format(packing, bits, launched):
    stack = stack_of(3, 2, 64).bfloat16()
    if packing == "2:4":
        stack *= torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(16)
    form = packed_format(packing, Grid(bits, 32)) if bits else packing
    experts = packed_experts(stack, form)
    require_experts(experts, [2, 0, 1], ["packed_vector"], launched, dtype=torch.bfloat16)
    require_experts(experts, [13, 0, 12], [], launched, dtype=torch.bfloat16)


def test_experts_whose_inputs_have_a_gradient_are_multiplied_as_dense_ones(launched):
    experts = packed_experts(stack_of(2, 3, 32))
    x = inputs(2, 32)[0].requires_grad_()
    routing = Routing.of(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    experts(x, routing, by_token=True).sum().backward()
    torch.testing.assert_close(x.grad, experts.dense_weight().view(2, 3, 32).sum(1))
    assert launched == []


def test_what_is_pruned_meets_no_infinity_of_few_vectors():
    weight = torch.tensor([[1.0, 0.0] * 16])
    x = torch.tensor([[1.0, torch.inf] * 16])
    assert packed_linear(weight)(x).tolist() == [[16.0]]


def test_more_vectors_and_other_dtypes_are_left_to_other_ways():
    values = torch.ones(4)
    assert not gpu.takes(torch.ones(gpu.MOST_WALKED + 1, 32), values)
    assert not gpu.takes(torch.ones(1, 32), values.double())
    assert not gpu.takes(torch.ones(1, 32).double(), values.char())
    assert not gpu.takes(torch.ones(0, 32), values)
    assert gpu.takes(torch.ones(gpu.MOST_WALKED, 40), values)
    assert gpu.takes(torch.ones(1, 32), values.char())
