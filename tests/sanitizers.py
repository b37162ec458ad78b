"""C++ drivers under the compiler's sanitizers."""

import os
import shutil
import subprocess

import pytest


def run_sanitized(driver, folder, *arguments, sanitizers="address,undefined", flags=()):
    """Compile ``driver`` with sanitizers into ``folder`` and run it; skips where the compiler has none that run."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    used = ["-std=c++17", "-g", "-O1", "-Wno-psabi", f"-fsanitize={sanitizers}"]
    used += ["-fno-sanitize-recover=undefined"] if "undefined" in sanitizers else []
    (folder / "empty.cpp").write_text("int main() {}\n")
    tried = subprocess.run([compiler, *used, folder / "empty.cpp", "-o", folder / "empty"], capture_output=True)
    if tried.returncode or subprocess.run([folder / "empty"]).returncode:
        pytest.skip(f"{compiler} has no {sanitizers} sanitizer that runs here: {tried.stderr[-300:].decode()}")
    subprocess.run([compiler, *used, *flags, driver, "-o", folder / "driver"], check=True)
    # GCC before 14 puts vectors of 64 bytes on a stack that is not aligned for them (GCC bug 110027)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    return subprocess.run([folder / "driver", *arguments], capture_output=True, text=True, env=environment)
