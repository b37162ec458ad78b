"""C++ drivers under the compiler's sanitizers."""

import os
import shutil
import subprocess

import pytest


def run_sanitized(driver, folder, *arguments, sanitizers="address,undefined", flags=(), environment=None):
    """Compile ``driver`` with sanitizers into ``folder``, if it is not there, and run it.

    Not optimised, which takes a third of the time: few cases need no quick program. Skips where the compiler has no
    sanitizers that run. ``environment``: variables beside those of this process.
    """
    program = folder / "driver"
    if not program.exists():
        _compile(driver, program, f"-fsanitize={sanitizers}", flags)
    # GCC before 14 puts vectors of 64 bytes on a stack that is not aligned for them (GCC bug 110027)
    variables = {**os.environ, **(environment or {}), "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=variables)


def _compile(driver, program, sanitizers, flags):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    used = ["-std=c++17", "-g1", "-O0", "-Wno-psabi", sanitizers]
    used += ["-fno-sanitize-recover=undefined"] if "undefined" in sanitizers else []
    empty = program.with_name("empty")
    empty.with_suffix(".cpp").write_text("int main() {}\n")
    tried = subprocess.run([compiler, *used, empty.with_suffix(".cpp"), "-o", empty], capture_output=True)
    if tried.returncode or subprocess.run([empty]).returncode:
        pytest.skip(f"{compiler} has no {sanitizers} that runs here: {tried.stderr[-300:].decode()}")
    subprocess.run([compiler, *used, *flags, driver, "-o", program], check=True)
