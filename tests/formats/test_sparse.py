"""Packed formats: layouts against numpy, scipy and loops written out; round trips to the bit, native and not."""

import ctypes
import math
import mmap
import os
import traceback
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.bits import INT_OF_SIZE, pack_mask
from pst_ds.core.factors import Constants, Factors
from pst_ds.core.kernels import load
from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import pack_nibbles
from pst_ds.core.scores import masked_weight, merged_weight
from pst_ds.formats import FORMATS, FormatError, mask_row_bits, row_bits, rows
from tests.pairs import every_pair

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BACKENDS = ["native", "portable", "numpy"]


def nbytes(form, shape, count, dtype=torch.bfloat16):
    """Bytes of all parts of a matrix."""
    return sum(math.prod(dims) * part.itemsize for part, dims in form.parts(shape, count, dtype).values())


@cache
def portable_library():
    """The loops for processors without AVX-512."""
    return load(replace(rows.SOURCE, flags=(*rows.SOURCE.flags, "-DPST_PLAIN=1")))


def use(monkeypatch, backend):
    found = {"native": rows.library, "portable": portable_library, "numpy": lambda: None}[backend]
    if backend != "numpy" and found() is None:
        pytest.skip("no C++ compiler, or PST_DS_NATIVE=0")
    monkeypatch.setattr(rows, "library", found)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    use(monkeypatch, request.param)
    return request.param


@st.composite
def matrices(draw, groups_of=1):
    """(weight, kept positions as bool numpy): some values are NaN with a payload, infinite, 0.0 or -0.0."""
    height = draw(st.integers(1, 5))
    width = draw(st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 130, 256])))
    width = -(-width // groups_of) * groups_of
    dtype = draw(st.sampled_from(DTYPES))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    size = dtype.itemsize
    ints = generator.integers(-(1 << (8 * size - 1)), (1 << (8 * size - 1)) - 1, (height, width), dtype=f"i{size}")
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0], dtype=dtype).view(int_of(dtype))
    where = generator.random((height, width)) < 0.2
    ints[where] = generator.choice(special.numpy(), where.sum())
    return torch.from_numpy(ints).view(dtype), generator.random((height, width)) < density


def int_of(dtype):
    return INT_OF_SIZE[dtype.itemsize]


def as_ints(tensor):
    return tensor.view(int_of(tensor.dtype)).numpy()


def as_bits(keep):
    return torch.from_numpy(np.packbits(keep, axis=1, bitorder="little"))


def stored(weight, keep):
    """What must come back: bits as integers, zeros where nothing is kept, -0.0 made +0.0."""
    ints = np.where(keep, as_ints(weight), 0)
    return np.where(ints == np.iinfo(ints.dtype).min, 0, ints)


def same_parts(left, right):
    assert left.keys() == right.keys()
    for part in left:
        assert (left[part].dtype, left[part].shape) == (right[part].dtype, right[part].shape), part
        assert left[part].view(torch.uint8).numpy().tobytes() == right[part].view(torch.uint8).numpy().tobytes(), part


def at_most_two(keep):
    """``keep`` without the third and fourth position of a group."""
    return keep & (np.cumsum(keep.reshape(len(keep), -1, 4), axis=2) <= 2).reshape(keep.shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitmask_is_the_values_the_bits_and_where_rows_begin(backend):
    @given(matrices())
    def holds(case):
        weight, keep = case
        parts = FORMATS["bitmask"].pack(weight, as_bits(keep))
        values, offsets = [], []
        for row, ints in enumerate(stored(weight, keep)):
            offsets.append(len(values))
            values += [int(ints[column]) for column in range(len(ints)) if keep[row, column]]
        assert as_ints(parts["compressed"]).tolist() == values
        assert parts["compressed"].dtype == weight.dtype
        assert parts["row_offsets"].tolist() == offsets
        assert np.array_equal(parts["bitmask"].numpy(), np.packbits(keep, axis=1, bitorder="little"))
        assert parts["shape"].tolist() == list(weight.shape)

    with pytest.MonkeyPatch.context() as patched:
        use(patched, backend)
        holds()


@pytest.mark.parametrize("backend", BACKENDS)
def test_csr_is_what_scipy_makes(backend):
    @given(matrices())
    def holds(case):
        weight, keep = case
        parts = FORMATS["csr"].pack(weight, as_bits(keep))
        expected = scipy.sparse.csr_matrix(keep)
        assert parts["crow_indices"].tolist() == expected.indptr.tolist()
        assert parts["col_indices"].tolist() == expected.indices.tolist()
        assert (parts["crow_indices"].dtype, parts["col_indices"].dtype) == (torch.int32, torch.uint16)
        assert np.array_equal(as_ints(parts["values"]), stored(weight, keep)[keep])

    with pytest.MonkeyPatch.context() as patched:
        use(patched, backend)
        holds()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_four_fills_groups_up_with_zeros_at_the_lowest_positions(backend):
    @given(matrices(groups_of=4))
    def holds(case):
        weight, keep = case[0], at_most_two(case[1])
        parts = FORMATS["2:4"].pack(weight, as_bits(keep))
        values, filled = [], keep.copy()
        for row, ints in enumerate(stored(weight, keep)):
            for first in range(0, len(ints), 4):
                taken = [column for column in range(first, first + 4) if keep[row, column]]
                free = [column for column in range(first, first + 4) if not keep[row, column]]
                taken = sorted(taken + free[: 2 - len(taken)])
                filled[row, taken] = True
                values += [int(ints[column]) for column in taken]
        assert as_ints(parts["compressed"]).flatten().tolist() == values
        assert tuple(parts["compressed"].shape) == (weight.shape[0], weight.shape[1] // 2)
        assert np.array_equal(parts["bitmask"].numpy(), np.packbits(filled, axis=1, bitorder="little"))
        assert parts["shape"].tolist() == [[n] for n in weight.shape]

    with pytest.MonkeyPatch.context() as patched:
        use(patched, backend)
        holds()


@every_pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMATS)
def test_round_trips_are_exact_and_pass_the_check(name, backend):
    form = FORMATS[name]

    @given(matrices(groups_of=4 if name == "2:4" else 1), st.booleans())
    def holds(case, give_keep):
        weight, keep = case
        keep = at_most_two(keep) if name == "2:4" else keep
        if not give_keep:
            weight = torch.from_numpy(np.where(keep, as_ints(weight), 0)).view(weight.dtype)
        parts = form.pack(weight, as_bits(keep) if give_keep else None)
        assert form.check("w", parts, tuple(weight.shape)) == tuple(weight.shape)
        assert np.array_equal(as_ints(form.unpack(parts)), stored(weight, keep))
        sizes = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
        count = parts[form.values_name].numel()
        assert form.parts(tuple(weight.shape), count, weight.dtype) == sizes

    with pytest.MonkeyPatch.context() as patched:
        use(patched, backend)
        holds()


@every_pair
@pytest.mark.parametrize("other", ["native", "portable"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loops_and_twins_give_the_same_bits(name, dtype, other, monkeypatch):
    generator = np.random.default_rng(0)
    shape = (37, 612)  # whole registers, whole bytes and half a byte
    weight = torch.from_numpy(generator.integers(0, 255, (37, 612 * dtype.itemsize), dtype=np.uint8)).view(dtype)
    keep = at_most_two(generator.random(shape) < 0.5)
    made = {}
    for backend in (other, "numpy"):
        use(monkeypatch, backend)
        parts = FORMATS[name].pack(weight, as_bits(keep))
        made[backend] = {**parts, "dense": FORMATS[name].unpack(parts), "bits": row_bits(weight)}
        monkeypatch.undo()
    same_parts(made[other], made["numpy"])


@every_pair
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_matrices_with_nothing_in_them(name, shape, backend):
    weight = torch.empty(shape, dtype=torch.bfloat16)
    parts = FORMATS[name].pack(weight)
    assert FORMATS[name].check("w", parts) == shape
    assert FORMATS[name].unpack(parts).shape == shape


def test_row_bits_are_those_of_what_is_not_zero(backend):
    weight = torch.tensor([[1.0, -0.0, 0.0, float("nan"), -2.0, 0.0, 0.0, 0.0, 1e-45], [0.0] * 8 + [-1e-45]])
    assert row_bits(weight).tolist() == [[0b11001, 1], [0, 1]]


def test_wide_csr_takes_int32_columns(backend):
    for width, dtype in ((1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)):
        weight = torch.zeros(2, width)
        weight[0, -1], weight[1, 5], weight[1, -2] = 1.0, 2.0, 3.0
        parts = FORMATS["csr"].pack(weight)
        assert parts["col_indices"].dtype == dtype
        assert parts["col_indices"].tolist() == [width - 1, 5, width - 2]
        FORMATS["csr"].check("w", parts)
        assert torch.equal(FORMATS["csr"].unpack(parts), weight)


def test_columns_beyond_two_bytes_are_counted_right(backend):
    weight = torch.ones(1, 70001)
    assert FORMATS["csr"].pack(weight)["col_indices"].tolist() == list(range(70001))


def test_two_to_the_31_values_need_wide_offsets():
    shape = (1 << 16, 1 << 16)
    assert FORMATS["csr"].parts(shape, (1 << 31) - 1, torch.bfloat16)["crow_indices"][0] == torch.int32
    assert FORMATS["csr"].parts(shape, 1 << 31, torch.bfloat16)["crow_indices"][0] == torch.int64


@pytest.mark.parametrize(
    ("name", "sparsity", "share"),
    [("bitmask", 0.5, 0.564), ("bitmask", 0.8, 0.264), ("bitmask", 0.9, 0.164), ("2:4", 0.5, 0.5625),
     ("csr", 0.5, 1.0), ("csr", 0.8, 0.40), ("csr", 0.9, 0.20)],
)  # fmt: skip
def test_shares_of_dense_bf16(name, sparsity, share):
    shape = (4096, 4096)
    numel = shape[0] * shape[1]
    packed = nbytes(FORMATS[name], shape, round(numel * (1 - sparsity)))
    assert packed / (2 * numel) == pytest.approx(share, rel=0.01)


def test_parts_share_no_memory_with_what_was_packed():
    weight, keep = torch.ones(2, 8), torch.full((2, 1), 255, dtype=torch.uint8)
    parts = FORMATS["bitmask"].pack(weight, keep)
    weight.zero_(), keep.zero_()
    assert parts["bitmask"].tolist() == [[255], [255]]
    assert parts["compressed"].tolist() == [1.0] * 16


def test_a_transposed_parameter_is_packed_as_it_reads():
    weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    parts = FORMATS["bitmask"].pack(weight.t())
    assert parts["compressed"].tolist() == [4.0, 8.0, 1.0, 5.0, 9.0, 2.0, 6.0, 10.0, 3.0, 7.0, 11.0]
    assert torch.equal(FORMATS["bitmask"].unpack(parts), weight.detach().t())


@pytest.mark.parametrize(
    ("name", "weight", "keep", "said"),
    [
        ("csr", torch.ones(2, 7), torch.tensor([[127], [128]], dtype=torch.uint8), "beyond the 7 inputs of row 1"),
        ("2:4", torch.ones(2, 6), None, "divisible by 4, got 6"),
        ("2:4", torch.ones(2, 8), torch.tensor([[0x33], [0x73]], dtype=torch.uint8), "row 1 keeps 3 .* 4 to 7"),
        ("2:4", torch.ones(2, 8), torch.tensor([[0x3F], [0x33]], dtype=torch.uint8), "row 0 keeps 4 .* 0 to 3"),
    ],
)
def test_what_cannot_be_packed_is_named(name, weight, keep, said):
    with pytest.raises(FormatError, match=f"^a.q_proj: .*{said}"):
        FORMATS[name].pack(weight, keep, "a.q_proj")


@given(matrices(groups_of=4))
def test_two_four_accepts_what_it_can_pack(case):
    weight, keep = case
    if FORMATS["2:4"].accepts(as_bits(keep), tuple(weight.shape)):
        FORMATS["2:4"].pack(weight, as_bits(keep))
    else:
        assert (keep.reshape(-1, 4).sum(axis=1) > 2).any()


def test_accepts_looks_at_the_shape():
    bits = torch.zeros(2, 1, dtype=torch.uint8)
    assert not FORMATS["2:4"].accepts(bits, (2, 6))
    assert FORMATS["bitmask"].accepts(bits, (2, 6))
    assert not FORMATS["bitmask"].accepts(bits, (2, 9))


@every_pair
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(3, 16), (5, 12), (8, 3)])
def test_masks_become_row_bits(outputs, inputs, transposed):
    layout = WeightLayout(outputs, inputs, transposed=transposed)
    keep = torch.rand(layout.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    found = mask_row_bits(pack_mask(keep), layout)
    by_output = keep.t() if transposed else keep
    assert np.array_equal(found.numpy(), np.packbits(by_output.numpy(), axis=1, bitorder="little"))


@every_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "layout", [WeightLayout(12, 40), WeightLayout(12, 20, num_matrices=3), WeightLayout(12, 20, True, 3)]
)
def test_what_is_packed_unmasked_is_what_the_masked_model_multiplies_with(layout, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layout.shape, generator=generator).to(dtype)
    factors = Factors(
        U=torch.randn(layout.out_features, 4, generator=generator).to(dtype),
        V=torch.randn(layout.num_matrices * 4, layout.in_features, generator=generator).to(dtype),
    )
    mask = pack_mask(torch.rand(layout.shape, generator=generator) > 0.5)
    merged = merged_weight(weight, layout, factors, Constants())
    masked = masked_weight(weight, mask, 1, layout, factors, Constants())
    merged, masked = (merged.t(), masked.t()) if layout.transposed else (merged, masked)
    assert not torch.equal(merged, masked)
    form = FORMATS["bitmask"]
    assert torch.equal(form.unpack(form.pack(merged, mask_row_bits(mask, layout))), masked)


class Guarded:
    """A copy of ``array`` whose last byte lies before a page that may be neither read nor written."""

    def __init__(self, array):
        size = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, size + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        self.address, self._like = start + size - array.nbytes, array
        ctypes.memmove(self.address, array.ctypes.data, array.nbytes)

    def array(self):
        return np.frombuffer(ctypes.string_at(self.address, self._like.nbytes), self._like.dtype)


def move_between_guards(native, size, height, width, density):
    """Every function of the library once, with no byte to spare behind any of its arrays."""
    generator = np.random.default_rng(width)
    weight = generator.integers(1, 100, (height, width)).astype(f"i{size}")
    keep = generator.random((height, width)) < density
    count = int(keep.sum())
    bits, full = Guarded(np.packbits(keep, axis=1, bitorder="little")), Guarded(weight)
    values, indices = Guarded(np.zeros(count, weight.dtype)), Guarded(np.zeros(count, np.uint16))
    native.pst_gather(full.address, bits.address, size, height, width, values.address, count)
    assert np.array_equal(values.array(), weight[keep])
    native.pst_columns(bits.address, height, width, 2, indices.address, count)
    assert np.array_equal(indices.array(), np.nonzero(keep)[1])
    dense = Guarded(np.full_like(weight, -1))
    native.pst_scatter(values.address, bits.address, size, height, width, dense.address, count)
    assert np.array_equal(dense.array(), np.where(keep, weight, 0).flatten())
    codes = np.where(keep, generator.integers(-7, 8, (height, width)), 0).astype(np.int8)
    for kept in (keep, np.ones_like(keep)):
        packed = [
            pack_nibbles(torch.from_numpy(row[kept_of_row])) for row, kept_of_row in zip(codes, kept, strict=True)
        ]
        halves = Guarded(torch.cat(packed).numpy())
        row_codes, out = Guarded(np.zeros(width + 1, np.int8)), Guarded(np.full_like(codes, 1))
        pointer = bits.address if kept is keep else 0
        native.pst_scatter_nibbles(halves.address, pointer, height, width, row_codes.address, out.address)
        assert np.array_equal(out.array(), codes.flatten())
    found = Guarded(np.zeros_like(np.packbits(keep, axis=1)))
    native.pst_row_bits(dense.address, size, height, width, found.address)
    assert np.array_equal(found.array(), bits.array())
    counts = Guarded(np.zeros(height, np.int64))
    native.pst_row_counts(bits.address, height, -(-width // 8), counts.address)
    assert np.array_equal(counts.array(), keep.sum(axis=1))


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_no_byte_beyond_an_array_is_touched(backend, monkeypatch):
    use(monkeypatch, backend)
    child = os.fork()  # a fault ends the process
    if child == 0:
        try:
            for size in (2, 4, 8):
                for width in (1, 7, 8, 31, 32, 33, 63, 64, 65, 100, 256):
                    for density in (0.0, 0.1, 0.5, 1.0):
                        move_between_guards(rows.library(), size, 3, width, density)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
