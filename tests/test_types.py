"""The types that pst-ds ships: what they say to a consumer, and how often they say nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pst_ds

ROOT = Path(__file__).resolve().parents[1]
MOST_ANYS = 440


def test_a_consumer_is_checked_under_strict():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += [f"--cache-dir={ROOT / '.mypy_cache' / 'consumer'}", "tests/types/consumer.py"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_public_name_is_typed():
    tree = ast.parse((ROOT / "pst_ds" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.asname: node.module.removeprefix("pst_ds.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("pst_ds.")
        for alias in node.names
    }
    assert typed == pst_ds._HOMES


def test_any_is_rare():
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "pst_ds").rglob("*.py"))
    lines = (line for text in texts for line in text.splitlines() if "import" not in line)
    assert sum(len(re.findall(r"\bAny\b", line)) for line in lines) <= MOST_ANYS
