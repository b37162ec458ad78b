"""The documents, and the blocks of code in them."""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from dataclasses import dataclass
from pathlib import Path

from pst_ds.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
_FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in _FILES}
NAVIGATION = (ROOT / "tools/docs/mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
PLANNED = ["docs/" + page for page in re.findall(r": (\S+/\S+\.md)$", NAVIGATION, flags=re.M)]
"""Pages of the site's navigation, in its order."""


@dataclass(frozen=True, slots=True)
class Block:
    """What stands between two fences."""

    page: str
    line: int
    language: str
    text: str
    not_run: str = ""
    """Why no test runs it: the page says so in a comment above it, ``<!-- not run: needs a GPU -->``."""
    is_encoder: bool = False
    """Whether it is about an encoder although its page is about a decoder: ``<!-- encoder -->`` above it."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Those of a page, in its order."""
    text = PAGES[page]
    comment = r"(?:^<!-- (?:not run: (?P<why>[^\n]*)|(?P<encoder>encoder)) -->\n+)?"
    found = re.finditer(comment + r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", text, flags=re.M | re.S)
    return [
        Block(
            page,
            text[: m.start("language")].count("\n") + 1,
            m["language"],
            m["text"],
            m["why"] or "",
            bool(m["encoder"]),
        )
        for m in found
    ]


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block: without comments, assignments before it, and where output goes."""
    split = (shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines())
    return [_bare(words) for words in split if words]


def _bare(words: list[str]) -> list[str]:
    inner = re.fullmatch(r"\$\((.*)\)", words[-1])
    if words[0] == "eval" and inner:
        return shlex.split(inner[1])
    words = words[: words.index(">")] if ">" in words else words
    while words[0] == "time" or re.match(r"\w+=", words[0]):
        words = words[1:]
    return words


def settings() -> set[str]:
    """Every key of a run file, such as "train.num_steps"."""
    sections = typing.get_type_hints(RunConfig)
    inner = {f"{name}.{f.name}" for name, t in sections.items() if dataclasses.is_dataclass(t)
             for f in dataclasses.fields(t)}  # fmt: skip
    return set(sections) | inner | {"pst.preset", "data.preset"}
