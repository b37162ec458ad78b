"""The operators touch no byte outside their arrays, whatever instructions they use and a file says."""

import os
from pathlib import Path

from tests.sanitizers import run_sanitized

DRIVER = Path(__file__).with_name("sanitizer_driver.cpp")
MUTATED = 1000 * int(os.environ.get("PST_DS_FUZZ_TIMES", "1"))
"""Attributes that are mutated, over all operators."""


def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    """Products of codes with the best instructions, then with AMX (pretended) if these have all else of it."""
    for level, mutated in (("", MUTATED), ("amx", 0)):
        environment, flags = {"PST_DS_INSTRUCTIONS": level}, ["-DPST_PRETENDED_TILES=1"]
        done = run_sanitized(DRIVER, tmp_path, "100", "1", str(mutated), flags=flags, environment=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
