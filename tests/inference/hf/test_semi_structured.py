"""Which layers become semi-structured, and why the others do not. The product itself needs CUDA."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from pst_ds.errors import InputError
from pst_ds.inference.hf import semi_structured
from pst_ds.inference.hf.semi_structured import is_two_four, to_semi_structured
from pst_ds.inference.runtime import SparseLinear


def two_four(rows, columns, dtype=torch.bfloat16, kept=2):
    """(rows, columns) with ``kept`` non-zeros in every group of four."""
    torch.manual_seed(rows + columns)
    order = torch.rand(rows, columns // 4, 4).argsort(-1)
    return ((order < kept).reshape(rows, columns) * (1 + torch.rand(rows, columns))).to(dtype)


def linear(weight, bias=True):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data = weight
    return layer


def conv1d(weight):
    layer = Conv1D(weight.shape[0], weight.shape[1]).to(weight.dtype)
    layer.weight.data = weight.t().contiguous()
    return layer


def model_with_all():
    """Layers that qualify, and one of each that does not."""
    model = nn.Sequential()
    model.embed = nn.Embedding(64, 64, dtype=torch.bfloat16)
    model.head = linear(two_four(64, 64))
    model.head.weight = model.embed.weight
    model.plain = linear(two_four(64, 128))
    model.no_bias = linear(two_four(64, 64, kept=1), bias=False)
    model.empty = linear(torch.zeros(64, 64, dtype=torch.bfloat16))
    model.conv = conv1d(two_four(128, 64))
    model.packed = SparseLinear.from_dense(two_four(64, 64), torch.ones(64, dtype=torch.bfloat16), "2:4")
    model.packed_bits = SparseLinear.from_dense(two_four(64, 64), None, "bitmask")
    model.dense = linear(torch.ones(64, 64, dtype=torch.bfloat16))
    model.three = linear(two_four(64, 64, kept=3))
    model.single = linear(two_four(64, 64, torch.float32))
    model.odd = linear(two_four(60, 64))
    return model


QUALIFY = ["plain", "no_bias", "empty", "conv", "packed", "packed_bits"]


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Everything but the GPU: the device counts as one, and the converted weight is the dense one."""
    monkeypatch.setattr(semi_structured, "_reason_against_device", lambda device: None)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda weight: weight.clone())


def test_every_layer_that_qualifies_is_chosen(pretend_cuda):
    assert to_semi_structured(model_with_all()) == QUALIFY


def test_outputs_are_those_of_the_layers_before(pretend_cuda):
    model = model_with_all()
    x = {name: torch.randn(3, 128 if name == "plain" else 64, dtype=torch.bfloat16) for name in QUALIFY}
    wanted = {name: model.get_submodule(name)(x[name]) for name in QUALIFY}
    for name in to_semi_structured(model, reversed(QUALIFY)):
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert not layer.weight.requires_grad
        torch.testing.assert_close(layer(x[name]), wanted[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head", "head: its weight is tied to another layer"),
        ("dense", "dense: not 2:4: output 0 has more than two weights in inputs 0 to 3"),
        ("three", "three: not 2:4: output 0"),
        ("single", "single: its weight is torch.float32, and bf16 or fp16 is needed"),
        ("odd", "odd: its shape (outputs, inputs) is (60, 64), and multiples of"),
        ("embed", "embed is not a linear layer of this model. Its layers: head, plain"),
        ("nothing", "nothing is not a linear layer of this model"),
    ],
)
def test_a_named_layer_that_does_not_qualify_leaves_the_model_alone(pretend_cuda, name, message):
    model = model_with_all()
    before = list(model.modules())
    with pytest.raises(InputError) as caught:
        to_semi_structured(model, ["conv", name])
    assert message in str(caught.value)
    assert list(model.modules()) == before


def test_the_bad_group_is_named(pretend_cuda):
    weight = two_four(64, 64)
    weight[17, 40:44] = 1.0
    with pytest.raises(InputError, match=r"^0: not 2:4: output 17 .* inputs 40 to 43"):
        to_semi_structured(nn.Sequential(linear(weight)), ["0"])


def test_off_cuda():
    model = nn.Sequential(linear(two_four(64, 64)), SparseLinear.from_dense(two_four(64, 64), format="2:4"))
    for name in ("0", "1"):
        with pytest.raises(InputError, match=rf"^{name}: it is on cpu, and .* need CUDA. Move the model"):
            to_semi_structured(model, [name])
    with pytest.raises(InputError, match="none of 2 linear layers qualifies; 0: it is on cpu"):
        to_semi_structured(model)


def test_none_qualifies(pretend_cuda):
    with pytest.raises(InputError, match="the model has no linear layer"):
        to_semi_structured(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match=r"1: its weight is torch\.float32"):
        to_semi_structured(nn.Sequential(linear(two_four(60, 64)), linear(two_four(64, 64, torch.float32))))


@given(
    st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.5, float("nan")]), min_size=8, max_size=8), min_size=1, max_size=3)
)
def test_two_four_is_what_counting_says(rows):
    expected = all(sum(x != 0 for x in row[i : i + 4]) <= 2 for row in rows for i in (0, 4))
    assert is_two_four(torch.tensor(rows)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_on_cuda(dtype):
    for kept in (2, 1):
        layer = linear(two_four(256, 512, dtype, kept)).cuda()
        x = torch.randn(64, 512, dtype=dtype, device="cuda")
        wanted = layer(x).float()
        assert to_semi_structured(nn.Sequential(layer)) == ["0"]
        assert isinstance(layer.weight.data, torch.sparse.SparseSemiStructuredTensor)
        torch.testing.assert_close(layer(x).float(), wanted, rtol=2e-2, atol=2e-1)


@pytest.mark.gpu
def test_packed_two_four_on_cuda():
    model = nn.Sequential(SparseLinear.from_dense(two_four(128, 128), torch.ones(128).bfloat16(), "2:4")).cuda()
    x = torch.randn(32, 128, dtype=torch.bfloat16, device="cuda")
    wanted = model(x).float()
    assert to_semi_structured(model) == ["0"]
    torch.testing.assert_close(model(x).float(), wanted, rtol=2e-2, atol=2e-1)
