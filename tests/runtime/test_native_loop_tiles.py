"""Products with Intel AMX, on processors without it: its tile registers are arrays, all else is what AMX would run."""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pst_ds.core import kernels
from pst_ds.errors import InputError
from pst_ds.inference.onnx import operators as onnx
from pst_ds.runtime import native_loop as decoder
from pst_ds.runtime.native_loop import LEVELS, VARIABLE, Matrix
from tests.guard_pages import Region, in_child
from tests.pairs import every_pair
from tests.runtime.test_native_loop import _codes, supported_levels

AVX512, AMX = LEVELS.index("avx512"), LEVELS.index("amx")
TOKENS = [8, 15, 16, 17, 32, 33, 50]
SHAPES = [(1, 1), (13, 100), (56, 576), (41, 2530), (33, 4200), (135, 200)]


@pytest.fixture(scope="module")
def pretended():
    """The native loop with pretended tiles; skips where AVX-512, which expands the codes, is missing."""
    if AVX512 not in supported_levels():
        pytest.skip("no AVX-512 with VBMI2 and VNNI, beside which AMX multiplies")
    flags = (*decoder.SOURCE.flags, "-DPST_PRETENDED_TILES=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_is_current", lambda *_: False)  # the prebuilt library has other flags
        return kernels.load(replace(decoder.SOURCE, flags=flags, announce=False))


@pytest.fixture
def with_tiles(pretended, monkeypatch):
    monkeypatch.setattr(decoder, "library", lambda: pretended)
    assert AMX in supported_levels()


@every_pair
@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 96), (8, 128), (4, 0), (4, 32), (4, 64)])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_give_the_bits_of_avx512(bits, group, shape, in_bytes):
    rows, columns = shape
    for sparsity in (0.0, 0.4, 0.95):
        codes, scales = _codes(rows, columns, bits, group, sparsity)
        slow, quick = (Matrix.of_codes(codes, scales, bits, group, level) for level in (AVX512, AMX))
        x = torch.randn(TOKENS[-1], columns, generator=torch.Generator().manual_seed(1))
        x[3, : columns // 2] = 0
        expected = slow.multiply(x, in_bytes=in_bytes)
        for tokens in TOKENS:
            assert torch.equal(quick.multiply(x[:tokens], in_bytes=in_bytes), expected[:tokens]), (sparsity, tokens)
        assert torch.equal(quick.multiply(x, 3, in_bytes=in_bytes), expected)


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_tiles_are_exact(sign):
    """Every code 127 and every activation the largest: the sum of a chunk comes to the end of 32 bits."""
    codes, scales = torch.full((8, 5000), 127 * sign, dtype=torch.int8), torch.ones(8, 1).bfloat16()
    got = Matrix.of_codes(codes, scales, 8, 0, AMX).multiply(torch.full((20, 5000), 3.0))
    torch.testing.assert_close(got, torch.full((20, 8), 3.0 * 127 * 5000 * sign), rtol=1e-6, atol=0)


@every_pair
@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_in_tiles(value, in_bytes):
    x = torch.randn(20, 100)
    x[17, 50] = value
    y = Matrix.of_codes(*_codes(8, 100, 8, 0, 0.5), 8, 0, AMX).multiply(x, in_bytes=in_bytes)
    assert y[17].isnan().all()
    assert y[torch.arange(20) != 17].isfinite().all()


def between_guards(library):
    regions = Region(1 << 20), Region(1 << 20)
    for rows, columns, tokens in [(1, 1, 9), (13, 65, 17), (40, 300, 33), (37, 130, 32)]:
        matrix = Matrix.of_codes(*_codes(rows, columns, 8, 0, 0.5), 8, 0, AMX)
        x, y = torch.randn(tokens, columns), torch.empty(tokens, rows)
        for in_bytes in (False, True):
            for at_end in (False, True):
                read, written = regions[0].place(x, at_end), regions[1].place(y, at_end)
                assert library.pst_matrix_multiply(matrix.handle, read, tokens, written, 1, AMX, in_bytes) == 0
                ctypes.memmove(y.data_ptr(), written, y.nbytes)
                assert torch.equal(y, matrix.multiply(x, in_bytes=in_bytes))


@pytest.mark.usefixtures("with_tiles")
def test_tiles_touch_no_byte_outside_the_arrays(pretended):
    assert in_child(lambda: between_guards(pretended)) == 0


def chosen(library, asked):
    """The level that a process takes whose environment asks for ``asked``."""
    ask = f"import ctypes; print(ctypes.CDLL({library._name!r}).pst_decoder_level())"
    environment = {**os.environ, VARIABLE: asked}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    return LEVELS[int(done.stdout)]


def test_tiles_are_used_where_there_are_any(pretended):
    assert chosen(pretended, "") == "amx"
    assert chosen(pretended, "avx512") == "avx512"
    assert chosen(pretended, "avx2") == "avx2"


def test_instructions_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "avx1024")
    with pytest.raises(InputError, match=r"PST_DS_INSTRUCTIONS = 'avx1024', which this processor"):
        decoder.best_level.__wrapped__()
    with pytest.raises(InputError, match=r"Unset it for '\w+'"):
        onnx.register_operators(None)


@pytest.mark.parametrize("library", [lambda: decoder.library()._name, onnx.operator_library])
def test_the_libraries_hold_products_of_tiles(library):
    """Those with unsigned inputs, of planes, and with signed ones, of bytes."""
    disassembler, compiler = (
        shutil.which("objdump"),
        os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++"),
    )
    if disassembler is None or compiler is None:
        pytest.skip("no objdump, or no compiler to ask whether it knows AMX")
    macros = subprocess.run([compiler, "-dM", "-E", "-x", "c++", "-"], input="", capture_output=True, text=True).stdout
    if not all(f"#define {name}" in macros for name in ("__x86_64__ 1", "__linux__ 1")) or "__clang__" in macros:
        pytest.skip(f"{compiler} makes no code for AMX")
    known = subprocess.run([compiler, "-mamx-int8", "-E", "-x", "c++", "-"], input="", capture_output=True)
    if known.returncode:
        pytest.skip(f"{compiler} does not know AMX")
    code = subprocess.run([disassembler, "-d", str(library())], capture_output=True, text=True, check=True).stdout
    assert {name for name in ("tdpbusd", "tdpbssd", "ldtilecfg", "tilerelease") if name in code} == {
        "tdpbusd", "tdpbssd", "ldtilecfg", "tilerelease",
    }  # fmt: skip
