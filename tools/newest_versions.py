"""Test the newest versions that pyproject.toml allows, and name those that differ from the installed set.

    make test-newest

Installs what differs into .venv-newest, on top of .venv, and runs the tests that depend most on other packages: Triton
kernels in its interpreter, data, run files, recorded results and ONNX graphs. Exits with 1 if a test fails. Where the
registry cannot be reached, it warns and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.run_tests import (
    FAILED_BEFORE,
    INTERRUPTED,
    PYTEST_NO_TESTS,
    STAGES,
    failed_tests,
    pytest_command,
    run_until_end,
)

FOLDER = Path(".venv-newest")
SENSITIVE = {
    "kernels": ("tests/kernels",),
    "units": ("tests/data", "tests/config", "tests/golden", "tests/inference/onnx"),
}
"""Folders of each stage of tools/run_tests.py whose tests run."""
CUDA_LIBRARIES = ("nvidia-", "cuda-")
RESOLVE_SECONDS = 300
"""Longest wait for pip's answer about the newest versions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, test and warn. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    try:
        newest = differing(newest_versions())
        if not newest:
            print("the newest versions are the installed ones: nothing to test")
            return 0
        python = make_environment(newest)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        warn("the newest versions are not tested: pip could not find or install them. Its message is above.")
        return 0
    words = ", ".join(f"{name} {new} instead of {installed(name) or 'none'}" for name, new in newest.items())
    print(f"testing {words}", flush=True)

    FAILED_BEFORE.unlink(missing_ok=True)
    codes = []
    for stage in STAGES:
        if stage.name in SENSITIVE:
            chosen = replace(stage, paths=SENSITIVE[stage.name])
            command = pytest_command(chosen, "quick", {"unit": 2, "rank": 2}, python=str(python))
            codes.append(run_until_end(command, chosen.environment))
    if not set(codes) - {0, PYTEST_NO_TESTS}:
        print(f"passed with {words}")
        return 0
    warn("\n".join([f"tests fail with {words}:", *failed_tests()]))
    return 1


def newest_versions() -> dict[str, str]:
    """Return the newest version of every package that the extra ``dev`` needs, as pip resolves it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
        subprocess.run(
            [*pip(sys.executable), *command, "--retries", "1", "--editable", ".[dev]"],
            check=True,
            timeout=RESOLVE_SECONDS,
        )
        packages = json.loads(report.read_text(encoding="utf-8"))["install"]
    metadata = [package["metadata"] for package in packages]
    return {canonicalize_name(one["name"]): one["version"] for one in metadata if one["name"] != "pst-ds"}


def differing(newest: dict[str, str]) -> dict[str, str]:
    """Return those of ``newest`` whose version is not the installed one; 2.13.0+cpu is 2.13.0.

    Libraries of torch's CUDA builds count only if torch changes: an environment with its CPU build lacks them.
    """
    changed = {
        name: new for name, new in newest.items() if Version(new).public != Version(installed(name) or "0").public
    }
    if "torch" in changed:
        return changed
    return {name: new for name, new in changed.items() if not name.startswith(CUDA_LIBRARIES)}


def installed(name: str) -> str | None:
    """Return the version of a package in this environment."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def make_environment(packages: dict[str, str]) -> Path:
    """Write .venv-newest: ``packages``, and all else from this environment. Return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(FOLDER)], check=True)
    python = FOLDER / "bin" / "python"
    below = sysconfig.get_path("purelib")
    site_packages = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # addsitedir, unlike a plain path, reads the .pth file of the editable installation
    line = f"import site; site.addsitedir({below!r})\n"
    (Path(site_packages) / "tested_set.pth").write_text(line, encoding="utf-8")
    pins = [f"{name}=={new}" for name, new in packages.items()]
    subprocess.run([*pip(str(python)), "install", "--quiet", "--no-deps", *pins], check=True)
    return python


def pip(python: str) -> list[str]:
    """Return the command of this environment's pip, which installs for ``python``."""
    return [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]


def warn(text: str) -> None:
    """Print a warning, on GitHub one that its pages show."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print("::warning::" + text.replace("\n", "%0A"), flush=True)
    print(f"warning: {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
