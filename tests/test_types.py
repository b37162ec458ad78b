"""The types that pst-ds ships; ``make types`` checks what they say to a consumer."""

from __future__ import annotations

import ast
from pathlib import Path

import pst_ds

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_typed():
    tree = ast.parse((ROOT / "pst_ds" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.asname: node.module.removeprefix("pst_ds.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("pst_ds.")
        for alias in node.names
    }
    assert typed == pst_ds._HOMES
