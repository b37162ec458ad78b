"""Products of the native loop with codes, against exact sums: layouts, instruction sets, shapes, splits of threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.runtime.native_loop import LEVELS, Matrix, best_level, require_library
from tests.pairs import every_pair

BITS_AND_GROUPS = [(8, 0), (8, 128), (4, 32), (4, 64), (4, 0)]


def supported_levels():
    """Indices of the instruction sets that this processor, its system and the compiler have."""
    return [level for level in range(len(LEVELS)) if require_library().pst_decoder_supports(level)]


AVAILABLE = supported_levels()


def _codes(rows, columns, bits, group, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    largest = 127 if bits == 8 else 7
    codes = torch.randint(1, largest + 1, (rows, columns), generator=generator, dtype=torch.int8)
    codes *= torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.int8) * 2 - 1
    codes[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    groups = -(-columns // group) if group else 1
    return codes, (torch.rand(rows, groups, generator=generator) * 0.01 + 0.001).bfloat16()


def _rounded(x, columns_of_a_chunk, largest):
    """The activations as the layout rounds them: integers of as many levels as a chunk's sum in 32 bits allows."""
    whole = []
    for part in x.split(columns_of_a_chunk, 1):
        levels = min(32767, (2**31 - 1) // (largest * min(columns_of_a_chunk, x.shape[1])))
        most = part.abs().amax(1, keepdim=True)
        whole.append((part * (torch.tensor(float(levels)) / most)).round().double() * (most / levels).double())
    return torch.cat(whole, 1)


@every_pair
@pytest.mark.parametrize("level", AVAILABLE, ids=lambda level: LEVELS[level])
@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUPS)
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (13, 100), (24, 576), (9, 4500)])
def test_a_product_is_that_of_the_rounded_activations(level, bits, group, sparsity, shape):
    rows, columns = shape
    codes, scales = _codes(rows, columns, bits, group, sparsity)
    matrix = Matrix.of_codes(codes, scales, bits, group, level)
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(1))
    largest = 127 if bits == 8 else 7
    weight = codes.double() * scales.double().repeat_interleave(group or columns, 1)[:, :columns]
    expected = _rounded(x, group or 2048, largest) @ weight.T
    torch.testing.assert_close(matrix.multiply(x).double(), expected, rtol=1e-5, atol=1e-6)


@every_pair
@pytest.mark.parametrize("level", AVAILABLE, ids=lambda level: LEVELS[level])
@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUPS)
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_threads_and_the_number_of_vectors_change_no_bit(level, bits, group, sparsity):
    codes, scales = _codes(200, 320, bits, group, sparsity)
    matrix = Matrix.of_codes(codes, scales, bits, group, level)
    x = torch.randn(40, 320, generator=torch.Generator().manual_seed(2))
    together = matrix.multiply(x)
    assert torch.equal(together, torch.cat([matrix.multiply(row[None]) for row in x]))
    for count in (*range(2, 10), 17, 25):
        assert torch.equal(together[:count], matrix.multiply(x[:count])), count
    assert torch.equal(together, matrix.multiply(x, threads=3))


@every_pair
@pytest.mark.skipif(best_level() == 0, reason="this processor has plain C++ alone")
@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUPS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_every_instruction_set_gives_the_same_bits(bits, group, sparsity):
    codes, scales = _codes(40, 2500, bits, group, sparsity)
    x = torch.randn(9, 2500, generator=torch.Generator().manual_seed(3))
    first, *others = [Matrix.of_codes(codes, scales, bits, group, level).multiply(x) for level in AVAILABLE]
    for other in others:
        assert torch.equal(first, other)


@every_pair
@pytest.mark.parametrize(("bits", "group"), BITS_AND_GROUPS)
@pytest.mark.parametrize("kept", [2, 4, 8])
@pytest.mark.parametrize("shape", [(13, 100), (24, 576), (9, 4500)])
def test_patterns_of_16_columns(bits, group, kept, shape):
    """At most `kept` weights of every 16 columns of a row: the product, with the same bits for all instructions."""
    rows, columns = shape
    codes, scales = _codes(rows, columns, bits, group, 0.02)
    of_16 = torch.rand(rows, -(-columns // 16), 16, generator=torch.Generator().manual_seed(4))
    ranks = of_16.argsort(-1).argsort(-1).view(rows, -1)[:, :columns]
    codes[ranks >= kept] = 0
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(5))
    weight = codes.double() * scales.double().repeat_interleave(group or columns, 1)[:, :columns]
    expected = _rounded(x, group or 2048, 127 if bits == 8 else 7) @ weight.T
    matrices = [Matrix.of_codes(codes, scales, bits, group, level) for level in AVAILABLE]
    first = matrices[0].multiply(x)
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-6)
    for matrix in matrices:
        assert torch.equal(first, matrix.multiply(x))
        for count in (1, 2, 3):
            assert torch.equal(first[:count], matrix.multiply(x[:count])), count


@given(st.integers(1, 40), st.integers(1, 400), st.floats(0, 1), st.integers(0, 1000))
def test_any_pattern_of_zeros(rows, columns, sparsity, seed):
    codes, scales = _codes(rows, columns, 8, 0, sparsity, seed)
    codes[:, torch.rand(columns, generator=torch.Generator().manual_seed(seed)) < sparsity / 2] = 0  # whole columns too
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    expected = _rounded(x, 2048, 127) @ (codes.double() * scales.double()).T
    for level in AVAILABLE:
        got = Matrix.of_codes(codes, scales, 8, 0, level).multiply(x)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("code", "bits"), [(127, 8), (-127, 8), (7, 4), (-8, 4)])
@pytest.mark.parametrize("group", [0, 32, 256, 288, 4096])
@pytest.mark.parametrize("step", [1, 2])
def test_the_largest_sums_are_exact(code, bits, group, step):
    """Codes at their limit, all kept or half of them, and the largest activation: sums come to the end of 32 bits.

    With all codes equal, what unsigned codes add to a sum is as large as it can be.
    """
    for columns in (516, 2048, 5000):
        codes = torch.zeros(8, columns, dtype=torch.int8)
        codes[:, ::step] = code
        scales = torch.ones(8, -(-columns // group) if group else 1).bfloat16()
        expected = torch.full((1, 8), 3.0 * code * len(range(0, columns, step)))
        for level in AVAILABLE:
            matrix = Matrix.of_codes(codes, scales, bits, group, level)
            for sign in (1, -1):
                for vectors in (1, 30):
                    got = matrix.multiply(torch.full((vectors, columns), 3.0 * sign))
                    torch.testing.assert_close(got, (expected * sign).expand(vectors, 8), rtol=1e-6, atol=0)


@every_pair
@pytest.mark.parametrize("level", AVAILABLE, ids=lambda level: LEVELS[level])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(level, value):
    codes, scales = _codes(8, 100, 8, 0, 0.5)
    x = torch.randn(2, 100)
    x[1, 50] = value
    y = Matrix.of_codes(codes, scales, 8, 0, level).multiply(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_vectors_of_zeros_and_of_the_smallest_numbers():
    codes, scales = _codes(8, 64, 8, 0, 0.0)
    matrix = Matrix.of_codes(codes, scales, 8, 0)
    assert torch.equal(matrix.multiply(torch.zeros(1, 64)), torch.zeros(1, 8))
    assert matrix.multiply(torch.full((1, 64), 1e-42)).abs().max() < 1e-30


needs_bytes = pytest.mark.skipif(
    LEVELS[best_level()] not in ("avx512", "amx"),
    reason="vectors of 8 bits are multiplied by AVX-512 with VBMI2 and VNNI, and by AMX, alone",
)


@every_pair
@needs_bytes
@pytest.mark.parametrize(("bits", "group"), [*BITS_AND_GROUPS, (8, 96)])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (13, 100), (56, 576), (41, 2530)])
def test_vectors_of_8_bits(bits, group, sparsity, shape):
    """Rounded word by word of columns; splits over threads and vectors change no bit."""
    rows, columns = shape
    codes, scales = _codes(rows, columns, bits, group, sparsity)
    matrix = Matrix.of_codes(codes, scales, bits, group)
    x = torch.randn(15, columns, generator=torch.Generator().manual_seed(1))
    x[3, : columns // 2] = 0
    whole = []
    for part in x.split(32 if group % 64 and group < columns else 64, 1):
        most = part.abs().amax(1, keepdim=True)
        whole.append((part * torch.where(most > 0, 127 / most, 0)).round().double() * (most / 127).double())
    weight = codes.double() * scales.double().repeat_interleave(group or columns, 1)[:, :columns]
    got = matrix.multiply(x, in_bytes=True)
    torch.testing.assert_close(got.double(), torch.cat(whole, 1) @ weight.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, matrix.multiply(x, threads=3, in_bytes=True))
    assert torch.equal(got[5:6], matrix.multiply(x[5:6], in_bytes=True))


@needs_bytes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none_in_8_bits(value):
    x = torch.randn(2, 100)
    x[1, 50] = value
    y = Matrix.of_codes(*_codes(8, 100, 8, 0, 0.5), 8, 0).multiply(x, in_bytes=True)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_other_instructions_refuse_vectors_of_8_bits():
    with pytest.raises(ValueError, match="not supported with portable"):
        Matrix.of_codes(*_codes(8, 64, 8, 0, 0.5), 8, 0, 0).multiply(torch.ones(1, 64), in_bytes=True)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", AVAILABLE, ids=lambda level: LEVELS[level])
def test_floats(level, dtype):
    weight, x = torch.randn(21, 83).to(dtype), torch.randn(6, 83)
    matrix = Matrix.of_floats(weight, level)
    torch.testing.assert_close(matrix.multiply(x), x @ weight.float().T, rtol=1e-5, atol=1e-5)
    assert torch.equal(matrix.multiply(x), matrix.multiply(x, threads=2))


def test_zeros_make_a_matrix_smaller():
    sizes = [Matrix.of_codes(*_codes(512, 576, 8, 0, s), 8, 0).nbytes * 8 / (512 * 576) for s in (0.0, 0.5, 0.8, 0.9)]
    assert sizes[0] < 8.2
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 4.2


@pytest.mark.parametrize(("bits", "kept", "most"), [(8, 8, 6.1), (8, 4, 3.1), (4, 4, 2.1)])
def test_patterns_of_16_columns_make_a_matrix_smaller(bits, kept, most):
    codes, scales = _codes(64, 2048, bits, 0, 0.0)
    codes.view(64, -1, 16)[:, :, kept:] = 0
    assert Matrix.of_codes(codes, scales, bits, 0, 0).nbytes * 8 / codes.numel() < most


@pytest.mark.parametrize(
    ("codes", "scales", "group", "said"),
    [
        (torch.ones(8, 64), torch.ones(8, 1).bfloat16(), 0, "int8 codes take bf16 scales"),
        (torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1), 0, "int8 codes take bf16 scales"),
        (torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1).bfloat16(), 32, r"\(8, 2\)"),
        (torch.ones(8, 60, dtype=torch.int8), torch.ones(8, 3).bfloat16(), 20, "multiple of 32"),
    ],
)
def test_other_parts_are_refused(codes, scales, group, said):
    with pytest.raises(ValueError, match=said):
        Matrix.of_codes(codes, scales, 8, group)
