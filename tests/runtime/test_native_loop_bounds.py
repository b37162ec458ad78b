"""The native loop touches no byte outside its arrays, and no two threads the same at once, at every instruction set.

Tiles of AMX are pretended ones: what the processor's own read and write is not seen by sanitizers.
"""

from pathlib import Path

import pytest

from tests.sanitizers import run_sanitized

DRIVER = Path(__file__).with_name("native_loop_driver.cpp")


@pytest.mark.thorough
@pytest.mark.parametrize(("sanitizers", "cases"), [("address,undefined", "60"), ("thread", "12")])
def test_sanitizers_find_nothing(tmp_path, sanitizers, cases):
    flags = ["-pthread", "-ffp-contract=off", "-DPST_PRETENDED_TILES=1"]
    done = run_sanitized(DRIVER, tmp_path, cases, "1", sanitizers=sanitizers, flags=flags)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
