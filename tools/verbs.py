"""Run pst-ds verbs in this process, where torch is imported once."""

from __future__ import annotations

import importlib
from typing import Any

from pst_ds.cli.main import build_parser, quiet_libraries


def verb(name: str, *arguments: str) -> dict[str, Any]:
    """Run ``pst-ds NAME ARGUMENTS`` and return its result."""
    quiet_libraries()
    return importlib.import_module(f"pst_ds.cli.{name}").run(build_parser(name).parse_args([name, *arguments]))
