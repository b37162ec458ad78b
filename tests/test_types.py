"""The types that pst-ds ships, and how often they say nothing; ``make types`` checks what they say to a consumer."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pst_ds

ROOT = Path(__file__).resolve().parents[1]
MOST_ANYS = 110


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
