"""The native loop touches no byte outside its arrays, in every instruction set that this machine has."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("sanitizer_driver.cpp")


def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    flags = ["-std=c++17", "-g", "-O1", "-Wno-psabi", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    tried = subprocess.run([compiler, *flags, tmp_path / "empty.cpp", "-o", tmp_path / "empty"], capture_output=True)
    if tried.returncode:
        pytest.skip(f"{compiler} has no sanitizers: {tried.stderr[-300:].decode()}")
    subprocess.run([compiler, *flags, DRIVER, "-o", tmp_path / "driver"], check=True)
    done = subprocess.run([tmp_path / "driver", "60", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")
