"""SparseLinear against the dense layer of the same weight."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from pst_ds.formats import FORMATS, FormatError, rows
from pst_ds.runtime import SparseLinear, native, sparse_layers
from tests.pairs import every_pair
from tools.packed_layers import packed_linear

OUT, IN = 37, 64
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20, torch.float64: 2**-45}
"""Of one result, relative to the largest: the sum's own error is below the rounding to 16 bits."""
PARTS = {
    "bitmask": ["compressed", "bitmask", "row_offsets", "shape"],
    "2:4": ["compressed", "bitmask", "shape"],
    "csr": ["crow_indices", "col_indices", "values", "shape"],
}
ALL = [(name, dtype) for name in FORMATS for dtype in FLOATS]


def numbers(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pruned(name="bitmask", dtype=torch.bfloat16, sparsity=0.9):
    """2 of 4 for "2:4"."""
    weight = numbers(OUT, IN, dtype=dtype)
    if name == "2:4":
        return weight * torch.tensor([0, 1, 1, 0]).repeat(IN // 4).to(dtype)
    return torch.where(torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) >= sparsity, weight, 0)


def made(name="bitmask", dtype=torch.bfloat16, bias=True):
    """(layer, dense weight, bias)."""
    weight, values = pruned(name, dtype), numbers(OUT, dtype=dtype, seed=2) if bias else None
    return packed_linear(weight, values, name), weight, values


def near(y, expected):
    """Within one rounding each of the other."""
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    room = 2 * ROUNDING[y.dtype] * max(1.0, expected.double().abs().max().item()) if y.numel() else 0
    assert ((y.double() - expected.double()).abs() <= room).all()


@every_pair
@pytest.mark.parametrize(("name", "dtype"), ALL, ids=str)
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (3, IN), (0, IN), (2, 0, IN), (2, 3, 4, IN), (50, IN), (129, IN)])
def test_it_gives_what_the_dense_layer_gives(shape, name, dtype):
    layer, weight, bias = made(name, dtype)
    x = numbers(*shape, dtype=dtype, seed=3)
    expected = (x.double() @ weight.double().t() + bias.double()).to(dtype)
    near(layer(x), expected)
    assert torch.equal(layer.dense_weight(), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_bias(name):
    layer, weight, _ = made(name, bias=False)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    near(layer(numbers(5, IN)), linear(numbers(5, IN), weight))


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_vectors_that_lie_apart_in_memory(name, backend, monkeypatch):
    if backend == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    layer, weight, bias = made(name)
    wide, columns = numbers(6, 2 * IN), numbers(IN, 6)
    for x in (wide[:, ::2], wide[::2, IN:], columns.t(), wide[:1, :IN].expand(4, IN)):
        near(layer(x), linear(x.contiguous(), weight, bias))


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_without_native_code_it_gives_the_same(name, dtype, monkeypatch):
    layer, _, _ = made(name, dtype)
    x = numbers(7, IN, dtype=dtype, seed=3)
    with_kernels, dense = layer(x), layer.dense_weight()
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(rows, "library", lambda: None)
    near(layer(x), with_kernels)
    assert torch.equal(layer.dense_weight(), dense)


@pytest.mark.parametrize("name", FORMATS)
def test_state_dict_has_the_parts_of_a_file_and_no_more(name):
    layer, weight, _ = made(name)
    model = nn.ModuleDict({"q_proj": layer})
    assert sorted(model.state_dict()) == sorted(f"q_proj.{part}" for part in [*PARTS[name], "bias"])
    packed = FORMATS[name].pack(weight)
    for part in PARTS[name]:
        assert torch.equal(model.state_dict()[f"q_proj.{part}"].view(torch.uint8), packed[part].view(torch.uint8))


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("assign", [True, False])
def test_a_layer_made_without_memory_is_loaded(name, assign):
    layer, weight, bias = made(name)
    state = layer.state_dict()
    count = state[FORMATS[name].values_name].numel()
    with torch.device("meta"):
        empty = SparseLinear(IN, OUT, count, format=name)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(state, assign=assign)
    empty.check("a.q_proj")
    x = numbers(4, IN)
    near(empty(x), linear(x, weight, bias))
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_computed_with_parts_that_were_not_checked(name):
    layer, _, _ = made(name)
    fresh = SparseLinear(IN, OUT, layer.state_dict()[FORMATS[name].values_name].numel(), format=name)
    for act in (lambda: fresh(numbers(1, IN)), fresh.dense_weight):
        with pytest.raises(RuntimeError, match=r"Call check\(name\)"):
            act()
    fresh.load_state_dict(layer.state_dict())
    fresh.check("w")
    assert torch.equal(fresh(numbers(1, IN)), layer(numbers(1, IN)))
    emptied = copy.deepcopy(fresh).to("meta").to_empty(device="cpu")
    nn.ModuleList([fresh]).load_state_dict({f"0.{key}": value for key, value in layer.state_dict().items()})
    for unchecked in (fresh, emptied):
        with pytest.raises(RuntimeError, match=r"Call check\(name\)"):
            unchecked(numbers(1, IN))


@pytest.mark.parametrize(
    ("name", "part", "spoil"),
    [
        ("bitmask", "bitmask", lambda t: t.bitwise_not_()),
        ("bitmask", "row_offsets", lambda t: t.add_(1)),
        ("bitmask", "shape", lambda t: t.fill_(8)),
        ("2:4", "bitmask", lambda t: t.fill_(0)),
        ("csr", "crow_indices", lambda t: t.add_(1)),
        ("csr", "col_indices", lambda t: t.fill_(IN)),
        ("csr", "values", lambda t: t.detach().fill_(-0.0)),
    ],
)
def test_bad_parts_are_refused_by_name(name, part, spoil):
    layer, _, _ = made(name)
    spoil(getattr(layer, part))
    with pytest.raises(FormatError, match=r"^layers\.0\.q_proj: "):
        layer.check("layers.0.q_proj")


@pytest.mark.parametrize(
    "bias", [torch.zeros(OUT), torch.zeros(OUT - 1).bfloat16(), torch.zeros(1).bfloat16().expand(OUT)]
)
def test_a_bias_of_another_kind_is_refused(bias):
    layer, _, _ = made()
    layer.bias = nn.Parameter(bias, requires_grad=False)
    with pytest.raises(FormatError, match=r"^w: bias must be a contiguous"):
        layer.check("w")


@pytest.mark.parametrize("name", FORMATS)
def test_x_of_another_dtype_or_width_is_an_error_that_says_so(name):
    layer, _, _ = made(name)
    with pytest.raises(TypeError, match=r"x is torch.float32, the sparse weight torch.bfloat16"):
        layer(torch.ones(1, IN))
    for width in (IN - 1, IN + 1, 1, 0):
        with pytest.raises(ValueError, match=rf"x is \(2, {width}\), the layer takes 64 features"):
            layer(torch.ones(2, width).bfloat16())


@pytest.mark.parametrize("name", FORMATS)
def test_x_has_the_gradient_of_the_dense_layer_and_the_weight_none(name):
    layer, weight, bias = made(name, torch.float32)
    x, other = (numbers(5, IN, dtype=torch.float32).requires_grad_() for _ in range(2))
    layer(x).square().sum().backward()
    linear(other, weight, bias).square().sum().backward()
    assert torch.allclose(x.grad, other.grad, rtol=1e-5, atol=1e-5)
    assert [param.requires_grad for param in layer.parameters()] == [False, False]
    assert all(param.grad is None for param in layer.parameters())
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        near(layer(numbers(5, IN, dtype=torch.float32)), linear(x, weight, bias))


@pytest.mark.parametrize("name", FORMATS)
def test_autocast_takes_what_the_layers_before_it_give(name):
    layer, weight, bias = made(name)
    x = numbers(5, IN, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), linear(x, weight, bias)
    near(y, expected)
    wide, weight, bias = made(name, torch.float32)
    for vectors in (1, 3, 200):
        x = numbers(vectors, IN)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [wide(x), wide(x.float()), wide(x.float().requires_grad_())]
        for y in found:
            near(y, linear(x.float(), weight, bias))


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same_with_memory_of_its_own(name, way):
    layer, _, _ = made(name)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    else:
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    x = numbers(9, IN)
    assert torch.equal(twin(x), layer(x))
    twin.check("w")
    for part in PARTS[name]:
        assert getattr(twin, part).data_ptr() != getattr(layer, part).data_ptr()


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_cast_is_a_cast_of_the_values_alone(name, dtype, to):
    layer, weight, bias = made(name, dtype)
    integers = {part: getattr(layer, part).clone() for part in PARTS[name] if part != FORMATS[name].values_name}
    assert layer.to(to) is layer
    for part, before in integers.items():
        assert torch.equal(before.view(torch.uint8), getattr(layer, part).view(torch.uint8))
    assert torch.equal(layer.dense_weight(), weight.to(to))
    layer.check("w")
    x = numbers(5, IN, dtype=to)
    near(layer(x), (x.double() @ weight.to(to).double().t() + bias.to(to).double()).to(to))


@pytest.mark.parametrize("name", FORMATS)
def test_a_value_that_a_cast_makes_zero_has_no_sign(name):
    weight = pruned(name, torch.float32)
    weight[0, torch.nonzero(weight[0])[0]] = -1e-30
    layer = packed_linear(weight, None, name).half()
    layer.check("w")
    assert layer.float()(torch.ones(1, IN))[0, 0] == pytest.approx(weight[0].half().sum().item(), rel=1e-3)


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), [(0, 8), (3, 0)])
def test_layers_with_nothing_in_them(name, outputs, inputs):
    bias = numbers(outputs)
    layer = packed_linear(torch.zeros(outputs, inputs).bfloat16(), bias, name)
    assert torch.equal(layer(numbers(2, inputs)), bias.expand(2, outputs))


@pytest.mark.parametrize("name", FORMATS)
def test_more_rows_than_a_panel(name, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr("pst_ds.runtime.ops.PANEL_ROWS", 8)
    layer, weight, bias = made(name, torch.float32)
    x = numbers(2, 3, IN, dtype=torch.float32)
    near(layer(x), linear(x, weight, bias))


def test_sparse_layers_of_a_model_by_name():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(made()[0], made("csr")[0])})
    assert list(sparse_layers(model)) == ["b.0", "b.1"]
    assert sparse_layers(model)["b.1"] is model["b"][1]


def test_it_says_what_it_is():
    assert "64, 37, 2:4, bias=True" in repr(made("2:4")[0])
