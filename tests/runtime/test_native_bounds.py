"""No kernel touches a byte outside its arrays.

Each array lies between pages that may be neither read nor written: this sees masked loads and stores, which
AddressSanitizer does not. The sanitizers look at the same loops on the heap, unoptimised enough that a load which the
compiler would join with a masked instruction, and so make harmless, is still a load; and at two threads.
"""

import ctypes
import faulthandler
import mmap
import random
import signal
from pathlib import Path

import pytest
import torch

from pst_ds.runtime import native
from tests.guard_pages import Region, in_child
from tests.sanitizers import run_sanitized

COLUMNS = [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257, 300, 4097, 4160]
ROWS = [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 64, 65, 257, 300]
VECTORS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 129, 513]
DENSITIES = [0.0, 0.02, 0.1, 0.5, 0.9, 1.0]
CASES, WORK, ROOM = 1500, 4_000_000, 20 << 20
DRIVER = Path(__file__).with_name("asan_driver.cpp")


def multiply_between_guards(regions, case, level, at_end):
    y = torch.empty(case.x.shape[0], case.weight.shape[0], dtype=case.x.dtype)
    arrays = [*case.parts, case.x, y]
    values, bits, offsets, x, out = (r.place(a, at_end) for r, a in zip(regions, arrays, strict=False))
    bias = 0 if case.bias is None else regions[5].place(case.bias, at_end)
    code = native.library().pst_bitmask_linear(
        values, bits, offsets, *case.weight.shape, case.compressed.numel(), x, bias, out, case.x.shape[0],
        case.x.element_size(), 1, level,
    )  # fmt: skip
    assert code == 0
    ctypes.memmove(y.data_ptr(), out, y.nbytes)
    return y


def sizes(rng):
    """(rows, cols, n): often more than 256 rows with more than 128 vectors, where AMX has pieces of another shape."""
    cols, n, rows = rng.choice([rng.choice(COLUMNS), rng.randint(1, 400)]), rng.choice(VECTORS), rng.choice(ROWS)
    if rng.random() < 0.1:
        return rng.choice([257, 300]), rng.choice([129, 257, 300]), rng.choice([129, 140])
    return min(rows, max(1, WORK // (cols * n))), cols, n


def many_cases(dtype, problem):
    rng = random.Random(0)
    regions = [Region(ROOM) for _ in range(6)]
    for seed in range(CASES):
        shape, density = sizes(rng), rng.choice(DENSITIES)
        case = problem(*shape, 1 - density, dtype, rng.random() < 0.5, seed)
        expected = case.sums().to(dtype)
        for level in range(native.best_level() + 1):
            y = multiply_between_guards(regions, case, level, rng.random() < 0.7)
            assert torch.equal(y, expected), (native.LEVELS[level], shape, density)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_byte_outside_the_arrays_is_touched(dtype, levels, problem):
    assert in_child(lambda: many_cases(dtype, problem)) == 0


@pytest.mark.parametrize("offset", [-1, mmap.PAGESIZE])
def test_a_guard_page_is_a_fault(offset):
    region = Region(1)

    def touch():
        faulthandler.disable()
        ctypes.string_at(region.start + offset, 1)

    assert in_child(touch) == -signal.SIGSEGV


@pytest.mark.thorough
def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    done = run_sanitized(DRIVER, tmp_path, "200", "1", flags=["-O1", "-march=native", "-fopenmp"])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:] + done.stderr[-5000:]
    assert done.stdout.endswith(" 0 wrong\n")
    assert done.stdout.startswith("200 cases, ")
