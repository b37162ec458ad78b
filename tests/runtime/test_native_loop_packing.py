"""Weights are packed to the bytes that each layout's definition gives, for all instruction sets and threads."""

from pathlib import Path

import pytest

from tests.sanitizers import run_sanitized

DRIVER = Path(__file__).with_name("packing_driver.cpp")


@pytest.mark.parametrize("flags", [[], ["-DPST_PLAIN_PACKING=1"]], ids=["best", "plain"])
def test_layouts_are_as_defined(tmp_path, flags):
    done = run_sanitized(DRIVER, tmp_path, "60", "1", sanitizers="address,undefined", flags=["-pthread", *flags])
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")


@pytest.mark.thorough
def test_threads_do_not_race(tmp_path):
    done = run_sanitized(DRIVER, tmp_path, "20", "2", sanitizers="thread", flags=["-pthread"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
