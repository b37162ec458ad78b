"""Hooks of the site: pages that are not in docs/, and links that lead out of it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ("pst_ds", "pst_ds.hf")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the top README and the API reference."""
    from mkdocs.structure.files import File

    for name, text in {"overview.md": overview(), "api.md": api_reference()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead ../README.md to its page here; of other places outside docs/ keep the name."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown.replace("](../README.md)", "](overview.md)"))


def overview() -> str:
    """Return the top README with its links made for this folder; of places outside docs/ keep the name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?://)([^)]*)\)", _link_from_docs, text)


def _link_from_docs(link: re.Match[str]) -> str:
    name, target = link.groups()
    in_docs = target.startswith("docs/") and target.partition("#")[0].endswith(".md")
    return f"[{name}]({target.removeprefix('docs/')})" if in_docs else name


def api_reference() -> str:
    """Return a page with every public name under the module that exports it."""
    lines = ["# API", "", "What a script of your own imports; [in-your-script.md](in-your-script.md) shows how.", ""]
    for package in PUBLIC:
        module = importlib.import_module(package)
        lines += [f"## {package}", ""]
        for name in sorted(set(module.__all__) - {"__version__"}):
            home = getattr(module, name).__module__
            lines += [f"::: {home}.{name}", "    options:", f'      heading: "{package}.{name}"',
                      f'      toc_label: "{name}"', "      heading_level: 3", ""]  # fmt: skip
    return "\n".join(lines)
