"""``make test`` runs tests of every guarantee in docs/reference/guarantees.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reference/guarantees.md").read_text(encoding="utf-8")
NEED_A_CLUSTER = "tests/cluster"
"""Left to ``make test-all``; tests/train/run/test_faults.py, which its row names too, is not."""


def _runs_in_make_test(file: Path) -> bool:
    """Return whether some test of ``file`` is not marked ``thorough``."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return any("mark.thorough" not in "".join(map(ast.unparse, test.decorator_list)) for test in tests)


def test_every_guarantee_has_tests_in_make_test():
    named = {*re.findall(r"`(tests/[\w/]+(?:\.py)?)`", PAGE)} - {NEED_A_CLUSTER}
    assert len(named) > 50
    for path in sorted(named):
        files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).rglob("test_*.py"))
        assert any(map(_runs_in_make_test, files)), path
