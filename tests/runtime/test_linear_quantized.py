"""SparseLinear of int8 and int4 codes against the dense layer of the weight that they stand for."""

import copy
import io

import pytest
import torch
from torch.nn.functional import linear

from pst_ds.core.quantization import Grid
from pst_ds.formats import FormatError
from pst_ds.runtime import SparseLinear, ops
from pst_ds.storage_format import packed_format
from tests.pairs import every_pair
from tools.packed_layers import packed_linear

OUT, IN = 37, 64
GRIDS = [Grid(8), Grid(8, 32), Grid(4), Grid(4, 32)]
FORMS = [packed_format(packing, grid) for packing in ("bitmask", "2:4", "dense") for grid in GRIDS]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(form, dtype=torch.bfloat16):
    """(layer, the weight that it stands for, bias)."""
    weight, bias = numbers(OUT, IN, dtype=dtype), numbers(OUT, dtype=dtype, seed=2)
    if form.packing == "2:4":
        weight = weight * torch.tensor([0, 1, 1, 0]).repeat(IN // 4).to(dtype)
    else:
        weight = torch.where(torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) >= 0.7, weight, 0)
    parts = form.pack(weight)
    return packed_linear(weight, bias, form), form.unpack(parts, dtype), bias


def id_of(form):
    return f"{form.name}-{form.grid.group or 'row'}"


@every_pair
@pytest.mark.parametrize("form", FORMS, ids=id_of)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("panel", [1024, 8])
def test_it_gives_what_the_dense_layer_gives(form, dtype, panel, monkeypatch):
    monkeypatch.setattr(ops, "PANEL_ROWS", panel)
    layer, weight, bias = made(form, dtype)
    assert layer.dtype == dtype
    assert torch.equal(layer.dense_weight(), weight)
    for shape in [(IN,), (3, IN), (2, 0, IN), (2, 3, IN)]:
        x = numbers(*shape, dtype=dtype, seed=3)
        expected = linear(x, weight, bias)
        assert layer(x).dtype == dtype
        torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=2**-7)
    x = numbers(3, IN, dtype=dtype, seed=3).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, IN), rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("form", FORMS, ids=id_of)
def test_codes_expand_by_torch_s_operators_alone(form):
    layer, _, _ = made(form)
    bits = None if form.packing == "dense" else layer.bitmask
    expected = form.unpack_codes(layer.parts())
    assert torch.equal(ops.codes_on_device(form, layer.codes, bits, IN), expected)


@pytest.mark.parametrize("form", FORMS, ids=id_of)
def test_a_cast_changes_the_product_and_no_scale(form):
    layer, weight, _ = made(form, torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cast = copy.deepcopy(layer).to(dtype)
        assert cast.dtype == cast.bias.dtype == dtype
        assert torch.equal(cast.scales, layer.scales)
        assert cast.scales.dtype == torch.bfloat16
        cast.check("layer")
        assert torch.equal(cast.dense_weight(), weight.to(dtype))
        assert cast(numbers(2, IN, dtype=dtype)).dtype == dtype


def test_state_dicts_round_trip_and_are_checked():
    form = packed_format("bitmask", Grid(4, 32))
    layer, weight, _ = made(form)
    assert list(layer.state_dict()) == ["bias", *form.part_names]
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = SparseLinear(IN, OUT, form.stored_of(layer.codes.numel()), format=form)
    with pytest.raises(RuntimeError, match="have not been checked"):
        other(numbers(1, IN, dtype=torch.bfloat16))
    other.load_state_dict(torch.load(stream))
    other.check("other")
    assert torch.equal(other.dense_weight(), weight)
    state = layer.state_dict() | {"scales": layer.scales.clone()}
    state["scales"][0] = 0.0
    other.load_state_dict(state)
    with pytest.raises(FormatError, match=r"^other: scale 0 of row 0 is 0"):
        other.check("other")


@pytest.mark.parametrize("form", [FORMS[0], FORMS[7], FORMS[11]], ids=id_of)
def test_compiled_and_exported(form):
    layer, weight, bias = made(form, torch.float32)
    x = numbers(3, IN)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(exported(x), linear(x, weight, bias))
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), linear(x, weight, bias))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[7], FORMS[11]], ids=id_of)
def test_the_gradient_of_x_is_the_eager_one_when_compiled(form):
    layer, *_ = made(form, torch.float32)
    compiled = torch.compile(layer, backend="aot_eager")
    grads = []
    for forward in (layer, compiled):
        x = numbers(3, layer.in_features).requires_grad_()
        forward(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_what_does_not_fit_is_refused():
    layer, _, _ = made(FORMS[0])
    with pytest.raises(TypeError, match=r"x is torch\.float32, the sparse weight torch\.bfloat16"):
        layer(numbers(1, IN))
    with pytest.raises(ValueError, match="the layer takes 64"):
        layer(numbers(1, 63, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(numbers(1, IN)).dtype == torch.bfloat16
