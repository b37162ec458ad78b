"""The operators for ONNX Runtime, one at a time, against torch in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pst_ds.core.quantization import Grid
from pst_ds.formats import FORMATS, QuantizedFormat
from pst_ds.runtime.native_loop import LEVELS, best_level
from pst_ds.storage_format import packed_format
from tests.pairs import every_pair

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with onnx")

ACTIVATIONS = {
    0: lambda y: y,
    1: functional.relu,
    2: functional.gelu,
    3: lambda y: functional.gelu(y, approximate="tanh"),
    4: functional.silu,
    5: torch.tanh,
}
FORMS = {
    "fp32": (FORMATS["bitmask"], torch.float32),
    "bf16": (FORMATS["bitmask"], torch.bfloat16),
    "int8": (packed_format("bitmask", Grid(8, None)), torch.float32),
    "int8, groups": (packed_format("bitmask", Grid(8, 32)), torch.float32),
    "int4": (packed_format("bitmask", Grid(4, None)), torch.float32),
    "int4, groups": (packed_format("bitmask", Grid(4, 32)), torch.float32),
}


def in_8_bits(x: torch.Tensor, word: int) -> torch.Tensor:
    """Quantise x to 8 bits, with a scale for every ``word`` columns of a token."""
    words = x.unflatten(1, (-1, word))
    largest = words.abs().amax(2, keepdim=True)
    return ((words * (127 / largest)).round().double() * (largest / 127).double()).flatten(1)


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def sparse(rows, columns, density=0.3, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    weight[torch.rand(rows, columns, generator=draw) > density] = 0.0
    return weight.to(dtype)


def product(run_node, x, form, weight, bias=None, activation=0, threads=1, **attributes):
    """(what the operator gives, the dense weight that the parts stand for)."""
    parts = form.pack(weight)
    constants = {1: as_numpy(parts["bitmask"]), 2: as_numpy(parts[form.values_name].reshape(-1))}
    bits = form.grid.bits if isinstance(form, QuantizedFormat) else 0
    if bits:
        constants[3] = as_numpy(parts["scales"])
    if bias is not None:
        constants[4] = bias.numpy()
    attributes |= {"bits": bits, "columns": weight.shape[1], "activation": activation}
    (y,) = run_node("SparseLinear", {0: x.numpy()}, constants, attributes, threads=threads)
    return torch.from_numpy(y), form.unpack(parts)


@every_pair
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("density", [0.2, 0.6])
@pytest.mark.parametrize("shape", [(1, 32, 1), (7, 64, 5), (24, 96, 48), (70, 128, 100), (33, 1056, 17)])
def test_a_sparse_product_is_that_of_the_dense_weight(run_node, form, density, shape):
    rows, columns, tokens = shape
    packing, dtype = FORMS[form]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    y, dense = product(run_node, x, packing, sparse(rows, columns, density, dtype=dtype))
    wanted = x.double() @ dense.double().t()
    levels = min(32767, (2**31 - 1) // (127 * columns))  # of activations, so that no sum of codes overflows
    rounded = x.abs().amax(1, keepdim=True) / levels / 2 * dense.abs().sum(1) if "int" in form else torch.zeros(1)
    assert bool(((y - wanted).abs() <= rounded + 1e-5 * math.sqrt(columns)).all())


@pytest.mark.parametrize("columns", [2, 63, 384])
def test_pairs_of_codes_sum_exactly_whatever_they_are(run_node, columns):
    """Activations on their own 16-bit grid, the largest codes: no sum overflows, and none is rounded before its end."""
    draw = torch.Generator().manual_seed(columns)
    weight = torch.where(torch.rand(9, columns, generator=draw) < 0.5, 127.0, -127.0)
    largest = min(32767, (2**31 - 1) // (127 * columns))
    x = torch.randint(-largest, largest + 1, (13, columns), generator=draw).float()
    x[:, 0] = largest
    x[0] = weight[0].sign() * largest
    y, dense = product(run_node, x, packed_format("bitmask", Grid(8, None)), weight)
    assert torch.equal(dense, weight)
    wanted = x.double() @ dense.double().t()
    torch.testing.assert_close(y.double(), wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize("columns", [1, 3, 9, 130, 515])
def test_columns_need_not_fill_bytes_or_chunks(run_node, columns):
    x = torch.randn(2, 11, columns, generator=torch.Generator().manual_seed(1))
    y, dense = product(run_node, x, FORMATS["bitmask"], sparse(19, columns, density=0.6))
    assert y.shape == (2, 11, 19)
    torch.testing.assert_close(y, x @ dense.t(), rtol=1e-5, atol=1e-4)


@every_pair
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 300])
def test_dense_codes_get_bias_and_activation(run_node, activation, tokens):
    """On an odd number of rows, of which threads take parts; 300 tokens are more than go at a time."""
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(77, generator=torch.Generator().manual_seed(2))
    weight = sparse(77, 96, density=0.6)
    y, dense = product(run_node, x, packed_format("bitmask", Grid(8, None)), weight, bias, activation, threads=3)
    wanted = ACTIVATIONS[activation](x.double() @ dense.double().t() + bias)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=3e-3)


@every_pair
@pytest.mark.parametrize("grid", [Grid(8, None), Grid(4, None), Grid(8, 32), Grid(4, 64)], ids=str)
@pytest.mark.parametrize("density", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(7, 64, 5), (77, 192, 300)])
def test_inputs_of_8_bits(run_node, grid, density, shape):
    """Each within half a step of a grid for 32 or 64 columns; on a processor that has no such products, as without."""
    rows, columns, tokens = shape
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    x[:, :64] *= 100
    weight = sparse(rows, columns, density=density)
    y, dense = product(run_node, x, packed_format("bitmask", grid), weight, activation_bits=8)
    wanted = x.double() @ dense.double().t()
    step = x.view(tokens, -1, 32).abs().amax(2)
    step = torch.maximum(step[:, ::2], step[:, 1::2]).repeat_interleave(64, 1) / 127  # at most
    assert bool(((y - wanted).abs() <= step / 2 @ dense.abs().t() + 1e-3).all())
    threaded, _ = product(run_node, x, packed_format("bitmask", grid), weight, threads=3, activation_bits=8)
    assert torch.equal(y, threaded)


@pytest.mark.parametrize("grid", [Grid(8, None), Grid(4, None), Grid(8, 32), Grid(4, 64)], ids=str)
def test_inputs_of_8_bits_share_a_scale_per_word(run_node, grid):
    if grid.group and LEVELS[best_level()] not in ("avx512", "amx"):
        pytest.skip("weights with a scale per group have 8-bit inputs only with AVX-512")
    x = torch.randn(30, 192, generator=torch.Generator().manual_seed(1))
    x[:, :64] *= 100
    weight = sparse(40, 192, density=0.5)
    y, dense = product(run_node, x, packed_format("bitmask", grid), weight, activation_bits=8)
    rounded = in_8_bits(x, 32 if grid.group == 32 else 64)
    torch.testing.assert_close(y.double(), rounded @ dense.double().t(), rtol=1e-5, atol=1e-3)
    assert not torch.allclose(y.double(), x.double() @ dense.double().t(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(run_node, activation):
    x = torch.linspace(-30, 30, 400).view(400, 1) * torch.tensor([[1.0, 0.0, 0.1]])
    bias = torch.tensor([0.0, 0.5])
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    y, dense = product(run_node, x, FORMATS["bitmask"], weight, bias, activation)
    wanted = ACTIVATIONS[activation]((x @ dense.t() + bias).double())
    assert bool(((y - wanted).abs() <= 3e-6 + 1e-6 * (x @ dense.t() + bias).abs()).all())


@pytest.mark.parametrize("tokens", [1, 9, 40, 100])
def test_tokens_of_any_size_keep_their_own_scale(run_node, tokens):
    sizes = 10.0 ** torch.linspace(-12, 12, tokens).view(-1, 1)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)) * sizes
    x[tokens // 2] = 0.0
    y, dense = product(run_node, x, packed_format("bitmask", Grid(8, None)), sparse(20, 96, density=0.6))
    wanted = x.double() @ dense.double().t()
    assert not y[tokens // 2].any()
    torch.testing.assert_close(y.double() / sizes, wanted / sizes, rtol=0, atol=2e-3)


@every_pair
@pytest.mark.parametrize("column", [0, 60])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none_and_with_its_token(run_node, column, odd):
    x = torch.randn(9, 61, generator=torch.Generator().manual_seed(1))
    x[4, column] = odd
    y, _ = product(run_node, x, packed_format("bitmask", Grid(8, None)), sparse(20, 61, density=0.8))
    assert not y[4].isfinite().any()
    assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("weight", [torch.zeros(5, 16), torch.ones(5, 16)], ids=["no values", "every value"])
def test_nothing_kept_and_everything_kept(run_node, weight):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    y, dense = product(run_node, x, FORMATS["bitmask"], weight, torch.arange(5.0))
    torch.testing.assert_close(y, x @ dense.t() + torch.arange(5.0))


def test_threads_change_no_bit(run_node):
    weight, x = sparse(200, 300), torch.randn(700, 300, generator=torch.Generator().manual_seed(1))
    one, _ = product(run_node, x, FORMATS["bitmask"], weight)
    two, _ = product(run_node, x, FORMATS["bitmask"], weight, threads=2)
    assert torch.equal(one, two)


def test_a_product_without_tokens_is_empty(run_node):
    y, _ = product(run_node, torch.empty(0, 16), FORMATS["bitmask"], sparse(5, 16))
    assert y.shape == (0, 5)


def spoiled(parts, which, array):
    return {**parts, which: array}


WRONG = {
    "keeps another number of values": (2, lambda a: a[:-1]),
    "ceil(columns / 8)": (1, lambda a: a[:, :-1]),
    "values of SparseLinear are fp32 or bf16": (2, lambda a: a.view(np.int8)),
    "bias of SparseLinear is (rows,)": (4, lambda a: np.zeros(3, np.float32)),
}


@pytest.mark.parametrize("message", WRONG)
def test_parts_that_do_not_fit_are_refused(run_node, message):
    parts = FORMATS["bitmask"].pack(sparse(6, 24))
    constants = {1: parts["bitmask"].numpy(), 2: parts["compressed"].numpy(), 4: np.zeros(6, np.float32)}
    which, spoil = WRONG[message]
    with pytest.raises(Exception, match="SparseLinear") as caught:
        run_node(
            "SparseLinear", {0: np.zeros((2, 24), np.float32)}, spoiled(constants, which, spoil(constants[which])),
            {"columns": 24},
        )  # fmt: skip
    assert message in str(caught.value)


def test_an_input_of_another_width_is_refused(run_node):
    parts = FORMATS["bitmask"].pack(sparse(6, 24))
    constants = {1: parts["bitmask"].numpy(), 2: parts["compressed"].numpy()}
    with pytest.raises(Exception, match=r"x of SparseLinear is \(\.\.\., columns\) fp32"):
        run_node("SparseLinear", {0: np.zeros((2, 23), np.float32)}, constants, {"columns": 24})


ZEROS = np.zeros((2, 3, 16), np.float32)
VALID = {
    "SparseLinear": (
        {0: ZEROS}, {1: np.full((5, 2), 255, np.uint8), 2: np.zeros(80, np.float32)},
        {"bits": 0, "columns": 16, "activation": 0, "activation_bits": 16},
    ),
    "SkipLayerNorm": ({0: ZEROS, 1: None, 2: ZEROS[0, 0]}, {}, {"epsilon": 1e-5}),
    "Attention": (
        dict.fromkeys(range(3), ZEROS), {},
        {
            "heads": 2, "key_value_heads": 2, "head_size": 8, "q_offset": 0, "k_offset": 0, "v_offset": 0, "scale": 1.0,
            "activation_bits": 16,
        },
    ),
    "Embedding": (
        {0: np.zeros(3, np.int64)}, {1: np.zeros((4, 16), np.int8), 2: np.ones((4, 1), ml_dtypes.bfloat16)},
        {"bits": 8, "columns": 16},
    ),
}  # fmt: skip
"""Inputs, constants and attributes of a node of each operator."""


WHOLE = [(name, key) for name, (*_, given) in VALID.items() for key in given if key not in ("epsilon", "scale")]


@every_pair
@pytest.mark.parametrize("value", [-1, 3, 17, 2**31, 2**62, 2**63 - 32, -(2**63)])
@pytest.mark.parametrize(("operator", "attribute"), WHOLE)
def test_a_whole_number_out_of_bounds_is_refused_by_name(run_node, operator, attribute, value):
    inputs, constants, attributes = VALID[operator]
    run_node(operator, inputs, constants, attributes)
    if value == 3 and attribute in ("activation", "head_size", "q_offset", "k_offset", "v_offset"):
        value = 9  # 3 is within bounds
    with pytest.raises(Exception, match=f"\\b{attribute} = {value}\\b"):
        run_node(operator, inputs, constants, attributes | {attribute: value})


@every_pair
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("operator", "attribute"), [("SkipLayerNorm", "epsilon"), ("Attention", "scale")])
def test_what_is_no_finite_number_is_refused_by_name(run_node, operator, attribute, value):
    inputs, constants, attributes = VALID[operator]
    with pytest.raises(Exception, match=f"{operator}: {attribute} = -?(nan|inf) is not a finite number"):
        run_node(operator, inputs, constants, attributes | {attribute: value})


def test_keys_without_tokens_are_refused(run_node):
    inputs = {0: ZEROS, 1: ZEROS[:, :0], 2: ZEROS[:, :0]}
    with pytest.raises(Exception, match="k and v of Attention have no tokens"):
        run_node("Attention", inputs, {}, VALID["Attention"][2])


@every_pair
@pytest.mark.parametrize("width", [1, 7, 8, 30, 384])
@pytest.mark.parametrize("has_skip", [True, False])
def test_layer_norm_of_a_sum(run_node, width, has_skip):
    draw = torch.Generator().manual_seed(width)
    x, skip, gain, shift = (torch.randn(*s, generator=draw) for s in ((2, 5, width), (2, 5, width), (width,), (width,)))
    inputs = {0: x.numpy(), 1: skip.numpy() if has_skip else None, 2: gain.numpy(), 3: shift.numpy()}
    y, total = run_node("SkipLayerNorm", inputs, {}, {"epsilon": 1e-5}, outputs=2)
    summed = x + skip if has_skip else x
    np.testing.assert_array_equal(total, summed.numpy())
    wanted = functional.layer_norm(summed.double(), (width,), gain.double(), shift.double(), 1e-5)
    torch.testing.assert_close(torch.from_numpy(y).double(), wanted, rtol=1e-5, atol=1e-5)


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2).double()


@every_pair
@pytest.mark.parametrize("size", [1, 5, 8, 32, 80])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (3, 21), (33, 70)])
@pytest.mark.parametrize("mask", [None, (2, 1, 1), (1, 4, -1), (2, 4, -1)])
def test_attention(run_node, size, queries, keys, mask):
    draw = torch.Generator().manual_seed(size * 100 + keys)
    q, k, v = (torch.randn(2, n, h * size, generator=draw) for n, h in ((queries, 4), (keys, 2), (keys, 2)))
    bias = None
    if mask is not None:
        bias = torch.randn(*mask[:2], queries if mask[2] == -1 else 1, keys, generator=draw)
        bias[..., 1:] = torch.where(torch.rand(bias[..., 1:].shape, generator=draw) < 0.3, -3.4e38, bias[..., 1:])
    inputs = {0: q.numpy(), 1: k.numpy(), 2: v.numpy(), 3: None if bias is None else bias.numpy()}
    attributes = {"heads": 4, "key_value_heads": 2, "head_size": size, "scale": 0.3}
    (y,) = run_node("Attention", inputs, {}, attributes)
    wanted = functional.scaled_dot_product_attention(
        heads(q, 4), heads(k, 2), heads(v, 2), attn_mask=None if bias is None else bias.double(), scale=0.3,
        enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(y).double(), wanted.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


@every_pair
@pytest.mark.parametrize("size", [8, 16, 32, 48])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (3, 21), (33, 70), (128, 128)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_attention_with_8_bit_activations_may_round_to_bf16(run_node, size, queries, keys, has_mask):
    draw = torch.Generator().manual_seed(size * 100 + keys)
    q, k, v = (torch.randn(2, n, h * size, generator=draw) for n, h in ((queries, 4), (keys, 2), (keys, 2)))
    bias = None
    if has_mask:
        bias = torch.zeros(2, 1, queries, keys)
        bias[1, :, :, keys // 2 + 1 :] = -3.4e38
    inputs = {0: q.numpy(), 1: k.numpy(), 2: v.numpy(), 3: None if bias is None else bias.numpy()}
    attributes = {"heads": 4, "key_value_heads": 2, "head_size": size, "scale": size**-0.5, "activation_bits": 8}
    (y,) = run_node("Attention", inputs, {}, attributes)
    wanted = functional.scaled_dot_product_attention(
        heads(q, 4), heads(k, 2), heads(v, 2), attn_mask=None if bias is None else bias.double(), scale=size**-0.5,
        enable_gqa=True,
    )  # fmt: skip
    wanted = wanted.transpose(1, 2).flatten(2)
    found = torch.from_numpy(y).double()
    # a number in bf16 is at most 1/256 off; scores move by a few hundredths, and so do the shares of values
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)
    assert (found - wanted).square().mean().sqrt() < 0.004
    (threaded,) = run_node("Attention", inputs, {}, attributes, threads=2)
    np.testing.assert_array_equal(y, threaded)


def test_attention_takes_heads_from_offsets_of_one_tensor(run_node):
    joined = torch.randn(2, 9, 3 * 16, generator=torch.Generator().manual_seed(3))
    q, k, v = joined.split(16, -1)
    attributes = {"heads": 2, "key_value_heads": 2, "head_size": 8, "scale": 1.0}
    (apart,) = run_node("Attention", {0: q.numpy(), 1: k.numpy(), 2: v.numpy()}, {}, attributes)
    offsets = {"q_offset": 0, "k_offset": 16, "v_offset": 32}
    inputs = {index: joined.numpy() for index in range(3)}
    (together,) = run_node("Attention", inputs, {}, attributes | offsets)
    np.testing.assert_array_equal(apart, together)


def test_attention_refuses_a_mask_of_another_shape(run_node):
    x = np.zeros((1, 4, 8), np.float32)
    attributes = {"heads": 1, "key_value_heads": 1, "head_size": 8}
    with pytest.raises(Exception, match="the mask of Attention"):
        run_node("Attention", {0: x, 1: x, 2: x, 3: np.zeros((1, 1, 4, 5), np.float32)}, {}, attributes)


@pytest.mark.parametrize("grid", [Grid(8, None), Grid(4, None), Grid(4, 32)])
def test_embeddings_of_codes(run_node, grid):
    form = packed_format("dense", grid)
    parts = form.pack(torch.randn(50, 64, generator=torch.Generator().manual_seed(4)))
    ids = np.array([[0, 49, 7], [-1, 3, 3]])
    constants = {1: parts["codes"].numpy(), 2: as_numpy(parts["scales"])}
    (y,) = run_node("Embedding", {0: ids}, constants, {"bits": grid.bits, "columns": 64})
    np.testing.assert_array_equal(y, form.unpack(parts).numpy()[ids])


def test_embeddings_in_bf16(run_node):
    table = torch.randn(20, 6, generator=torch.Generator().manual_seed(4)).bfloat16()
    ids = np.array([19, 0])
    (y,) = run_node("Embedding", {0: ids}, {1: as_numpy(table)}, {"bits": 16, "columns": 6})
    np.testing.assert_array_equal(y, table.float().numpy()[ids])


@pytest.mark.parametrize("token", [20, -21])
def test_a_token_outside_the_table_is_refused(run_node, token):
    table = torch.zeros(20, 6).bfloat16()
    with pytest.raises(Exception, match="outside its table"):
        run_node("Embedding", {0: np.array([token])}, {1: as_numpy(table)}, {"bits": 16, "columns": 6})
