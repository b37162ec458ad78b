"""Hooks of the site: its front page is the README, and the API page ends with the docstrings of every public name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ("pst_ds", "pst_ds.hf")
API_PAGE = "reference/api.md"


def on_files(files: Any, *, config: Any) -> Any:
    """Add the front page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=front_page()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Resolve links that leave docs/, and append the docstrings to the API page."""
    uri = page.file.src_uri
    depth = uri.count("/") + 1
    markdown = markdown.replace(f"]({'../' * depth}README.md)", f"]({'../' * (depth - 1)}index.md)")
    markdown = re.sub(rf"\[([^\]]+)\]\((?:\.\./){{{depth}}}[^)]*\)", r"\1", markdown)
    return markdown + api_reference() if uri == API_PAGE else markdown


def front_page() -> str:
    """Return the README with links relative to docs/. Links to other folders become plain words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://)([^)]*)\)", _link_from_docs, text)


def _link_from_docs(link: re.Match[str]) -> str:
    mark, name, target = link.groups()
    return f"{mark}[{name}]({target.removeprefix('docs/')})" if target.startswith("docs/") else name


def api_reference() -> str:
    """Return every public name with its docstring, under the module that exports it."""
    lines = [""]
    for package in PUBLIC:
        module = importlib.import_module(package)
        lines += [f"## Docstrings: {package}", ""]
        for name in sorted(set(module.__all__) - {"__version__"}):
            home = getattr(module, name).__module__
            lines += [f"::: {home}.{name}", "    options:", f'      heading: "{package}.{name}"',
                      f'      toc_label: "{name}"', "      heading_level: 3", ""]  # fmt: skip
    return "\n".join(lines)
