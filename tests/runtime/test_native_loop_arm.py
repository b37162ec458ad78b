"""NEON's products, attention, updates and norms against the portable ones, bit by bit, on emulated arm64 processors."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pst_ds.runtime.native_loop import LEVELS, SOURCE, VARIABLE

DRIVER = Path(__file__).with_name("native_loop_arm_driver.cpp")
COMPILER, EMULATOR = (shutil.which(name) or "" for name in ("aarch64-linux-gnu-g++", "qemu-aarch64"))
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not COMPILER or not EMULATOR, reason="needs g++-aarch64-linux-gnu and qemu-user"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    program = tmp_path_factory.mktemp("arm") / "driver"
    flags = [flag.replace("-O3", "-O2") for flag in SOURCE.flags]
    subprocess.run([COMPILER, *flags, "-static", "-pthread", DRIVER, "-o", program], check=True)
    return program


def compared(driver, processor, cases, asked=""):
    """(the instruction sets that the processor has, the one that is used, the number of results that differ)."""
    environment = {**os.environ, VARIABLE: asked}
    command = [EMULATOR, "-cpu", processor, driver, str(cases), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *sets, summary = done.stdout.splitlines()
    ((best, wrong),) = re.findall(r"^(\w+) is the best, (\d+) wrong$", summary)
    return [line.split()[0] for line in sets], best, int(wrong)


def test_every_result_has_the_bits_of_the_portable_kernels(driver):
    assert compared(driver, "max", 100) == (["neon_dotprod", "neon_i8mm"], "neon_i8mm", 0)


@pytest.mark.parametrize(
    ("processor", "sets", "best"), [("neoverse-n1", ["neon_dotprod"], "neon_dotprod"), ("cortex-a53", [], "portable")]
)
def test_only_instructions_of_the_processor_are_used(driver, processor, sets, best):
    assert compared(driver, processor, 5) == (sets, best, 0)


@pytest.mark.parametrize("asked", ["portable", "neon_dotprod", "neon_i8mm"])
def test_the_environment_chooses(driver, asked):
    assert asked in LEVELS
    assert compared(driver, "max", 0, asked)[1] == asked
