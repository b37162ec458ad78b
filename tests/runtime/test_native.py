"""The CPU kernels at every level: exact where sums are exact, else within a bound that is derived here."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pst_ds.formats import FORMATS
from pst_ds.runtime import native
from tests.pairs import every_pair

DTYPES = [torch.bfloat16, torch.float32]
VECTORS = [1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64, 127, 128, 129, 200, 512, 513, 1025]
WORK = 20_000_000  # multiplications in an example

FP32_ROUNDING = 2.0**-24
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
MORE_ROUNDINGS = 16
"""Tolerance of a sum of k kept terms: each passes through at most k additions and one rounding of its product, those
with pruned zeros being exact, then a few that join the partial sums, and the bias. So it is off by at most
(k + 16) 2^-24 (sum of |w x| + |bias|), in any order of summation. One rounding to the dtype follows: 2^-8 of a bf16."""


def tolerance(problem):
    magnitude = problem.x.double().abs() @ problem.weight.double().abs().t()
    if problem.bias is not None:
        magnitude = magnitude + problem.bias.double().abs()
    kept = (problem.weight != 0).sum(dim=1).double()
    off = (kept + MORE_ROUNDINGS) * FP32_ROUNDING * magnitude
    return off + ROUNDING[problem.x.dtype] * (problem.sums().abs() + off)


def same_bits(left, right):
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@st.composite
def sizes(draw, work=WORK):
    """(rows, cols, n): fewer rows where cols and n are large."""
    n = draw(st.sampled_from(VECTORS))
    near = st.sampled_from([8, 32, 64, 128, 256, 4096, 8192]).flatmap(lambda c: st.integers(max(1, c - 9), c + 9))
    cols = draw(st.one_of(st.integers(1, 300), near, st.integers(1, 9000)))
    return draw(st.integers(1, min(600, max(1, work // (cols * n))))), cols, n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_whole_numbers_are_exact_at_every_level_with_any_number_of_threads(dtype, levels, problem):
    @given(sizes(), st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9, 0.99, 1.0]), st.booleans(), st.integers(0, 1 << 20))
    @example((600, 257, 129), 0.5, True, 0)  # pieces of 256 rows and 256 columns, and what is left of both
    @example((523, 8195, 1), 0.5, True, 1)
    @example((70, 8999, 33), 0.7, False, 2)  # whole rows in more than one piece
    @example((40, 64, 1025), 0.3, True, 3)
    @example((1, 9, 5), 1.0, False, 4)  # nothing kept
    def holds(size, sparsity, bias, seed):
        case = problem(*size, sparsity, dtype, bias, seed)
        expected = case.sums().to(dtype)
        for level in levels:
            for threads in (1, 2):
                assert torch.equal(case.product(level, threads), expected), (native.LEVELS[level], threads)

    holds()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_as_near_to_float64_as_fp32_allows_and_the_same_again(dtype, levels, problem):
    @given(sizes(WORK // 4), st.floats(0, 1), st.booleans(), st.integers(0, 1 << 20))
    def holds(size, sparsity, bias, seed):
        case = problem(*size, sparsity, dtype, bias, seed, normal=True)
        exact, near = case.sums(), tolerance(case)
        found = [case.product(level) for level in levels]
        for level, y in zip(levels, found, strict=True):
            assert ((y.double() - exact).abs() <= near).all(), native.LEVELS[level]
            assert same_bits(case.product(level), y), native.LEVELS[level]
            assert same_bits(case.product(level, threads=2), y), native.LEVELS[level]
            assert ((y.double() - found[0].double()).abs() <= 2 * near).all(), native.LEVELS[level]

    holds()


@pytest.mark.parametrize("n", [1, 4, 40, 130])
def test_a_vector_that_was_multiplied_before_leaves_nothing_behind(n, levels, problem):
    """Scratch memory is kept from call to call: a smaller product after a larger one, of infinities."""
    large, small = problem(300, 700, 150), problem(37, 45, n, seed=1)
    large.x.fill_(float("inf"))
    large.compressed.fill_(float("inf"))
    for level in levels:
        large.product(level)
        assert torch.equal(small.product(level), small.sums().bfloat16())


@every_pair
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 9, 33, 130])
def test_no_vectors_have_no_products_and_a_weight_of_no_rows_none_either(n, dtype, levels, problem):
    for level in levels:
        none = problem(5, 40, 0, dtype=dtype)
        assert none.product(level).shape == (0, 5)
        assert native.bitmask_linear(
            none.x.new_ones(n, 40), none.compressed[:0], none.bitmask[:0], none.row_offsets[:0], None, level
        ).shape == (n, 0)


def kinds(y):
    """Which numbers are NaN, +inf, -inf."""
    return torch.stack([y.isnan(), y == float("inf"), y == -float("inf")])


@every_pair
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 8, 32, 33, 130])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_do_what_they_do_in_a_dense_product(special, n, dtype, levels, problem):
    """In x they meet pruned weights as zeros: 0 times infinity is NaN, as in the dense layer."""
    cases = [problem(70, 333, n, 0.5, dtype, seed=seed) for seed in range(3)]
    cases[0].x[n - 1, 7] = special
    cases[1].x[0, 332] = special
    at = cases[2].compressed.numel() // 2
    cases[2].compressed[at] = special
    row = int(torch.searchsorted(cases[2].row_offsets, at, right=True)) - 1
    bits = np.unpackbits(cases[2].bitmask[row].numpy(), count=333, bitorder="little")
    cases[2].weight[row, np.nonzero(bits)[0][at - int(cases[2].row_offsets[row])]] = special
    for number, case in enumerate(cases):
        expected = case.sums()  # torch's bf16 product may spread a NaN to its neighbours
        assert not expected.isfinite().all()
        for level in levels:
            assert torch.equal(kinds(case.product(level)), kinds(expected)), (number, native.LEVELS[level])


@pytest.mark.parametrize("n", [1, 3, 33])
def test_a_sum_beyond_bf16_is_infinite(n, levels, problem):
    case = problem(20, 64, n, 0.0)
    case.compressed.fill_(1e30)
    case.x.fill_(1e30)
    for level in levels:
        y = case.product(level)
        assert (y[:, 0] == float("inf")).all()
        assert torch.equal(y[:, 1], case.bias[1].expand(n))  # an all-zero row


@pytest.mark.parametrize("n", [1, 2, 8, 33])
def test_denormal_bf16_numbers_may_count_as_zero(n, levels, problem):
    """The dot instructions of AVX-512 and AMX take them as zeros; all else multiplies them in fp32."""
    case = problem(20, 64, n, 0.0, bias=False)
    smallest = torch.tensor([1], dtype=torch.int16).view(torch.bfloat16)  # 2^-133
    case.compressed.fill_(smallest.item())
    case.x.fill_(2.0**100)
    kept = torch.where(torch.arange(20) % 5 == 1, 0.0, 64.0)
    for level in levels:
        y, exact = case.product(level), (kept * 2.0**-33).bfloat16().expand(n, 20)
        has_dots = native.LEVELS[level] not in ("portable", "avx2")
        assert torch.equal(y, exact) or (has_dots and not y.any()), native.LEVELS[level]


def test_arguments_that_no_tensor_has_are_refused(levels, problem):
    case, library = problem(4, 8, 1), native.library()

    def code(rows=4, cols=8, count=0, n=0, size=2, threads=1, level=0):
        pointers = [part.data_ptr() for part in case.parts]
        return library.pst_bitmask_linear(*pointers, rows, cols, count, 0, 0, 0, n, size, threads, level)

    assert code() == 0
    wrong = [{"rows": -1}, {"cols": 0}, {"count": -1}, {"n": -1}, {"size": 8}, {"threads": 0}, {"level": -1}]
    assert [code(**bad) for bad in [*wrong, {"level": native.best_level() + 1}]] == [2] * 8


@pytest.mark.parametrize("wrong", ["features", "rows", "dtype"])
def test_parts_that_do_not_belong_together_are_refused(wrong):
    weight = torch.ones(6, 24)
    parts = FORMATS["bitmask"].pack(weight)
    x = torch.ones(2, 33 if wrong == "features" else 24, dtype=torch.bfloat16 if wrong == "dtype" else torch.float32)
    offsets = parts["row_offsets"][: 5 if wrong == "rows" else 6]
    with pytest.raises(ValueError, match="float32 values, a bitmask"):
        native.bitmask_linear(x, parts["compressed"], parts["bitmask"], offsets, None, 0)
