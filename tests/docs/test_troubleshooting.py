"""Messages that the troubleshooting page quotes are messages of the code."""

from __future__ import annotations

import ast
import re

import pytest

from .pages import PAGES, ROOT

QUOTED = re.findall(r'\*"(.+?)"\*', PAGES["docs/reference/troubleshooting.md"])
SHORTEST = 10
"""Letters that a quotation needs besides its gaps to say anything."""


def _text(node: ast.JoinedStr | ast.Constant) -> str:
    """A string of the code, with a gap for each value."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)


@pytest.fixture(scope="module")
def messages():
    """Every string of the package, and the launch scripts."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "pst_ds").rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    texts = {
        _text(node) for node in nodes if isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", 0), str)
    }
    return "\n".join(sorted(texts) + [path.read_text() for path in sorted((ROOT / "launch").glob("*.s*"))])


def test_there_are_messages():
    assert len(QUOTED) > 50


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_one_that_is_printed(quoted, messages):
    assert len(quoted.replace("…", "").strip()) >= SHORTEST
    assert re.search(".*".join(map(re.escape, quoted.split("…"))), messages)


def test_a_message_that_is_not_printed_is_found(messages):
    with pytest.raises(AssertionError):
        test_a_quoted_message_is_one_that_is_printed("… has checkpoints down to …", messages)
