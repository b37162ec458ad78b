"""Check the language of pages, docstrings, comments and raised messages: ``python -m tools.lint_prose``."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("[CR]*.md"), *ROOT.glob("docs/*/*.md")} - {ROOT / "docs/reference/run-file.md"})
"""Written pages; the page of settings is made from docstrings."""
PATTERNS = {
    "start with the subject": r"(?m)(?:^|[.;:] )(?:Of|Beside|As many|So far as)\b",
    '"is not a", "has no"': r"(?<![Tt]here )\b(?:is|are) no (?!longer|more|less|\w+er\b)|\b(?:has|have) none\b",
    '"only"': r"\balone[.,;:)]",
    '"start", "initialise"': r"\b(?:begins?|began|begun)\b",
    '"sparsity", "pruned weights"': r"(?:%|half|shares?) (?:of )?(?:the )?zeros\b",
    '"next to", "compared with"': r"(?<!form )(?<!\")\bbeside\b",
    '"continue", "resume"': r"\b(?:go|goes|went|gone) on\b",
    '"separate", "its"': r"\bof (?:its|their|your|our|one's) own\b",
    '"omit", "exclude"': r"\b(?:leaves?|left|leaving) out\b",
    '"regardless of", "every"': r"\b(?:[Ww]hoever|[Ww]hatever|however many)\b",
    '"per"': r"\b(?:bits|bytes|MB|GB|ns|seconds|state) an? (?:rank|weight|row|token|step|second)\b",
    '"unchanged"': r"\bas (?:it is|they are)\b",
    '"int8", "quantised"': r"\bof [48] bits\b|\bon (?:a|the) grid\b",
    '"overfits", "atomically", "bit-identical"': r"\bby heart\b|\bwhole or not at all\b|\bto the bit\b",
}
"""What to write, and the pattern to avoid."""


def page_text(text: str) -> str:
    """Return a page without code and quoted messages."""
    return re.sub(r'(?ms)^```.*?^```$|`[^`\n]+`|\*"[^"]*"\*', "", text)


def code_texts(source: str) -> Iterator[str]:
    """Yield the docstrings, the strings of ``raise`` statements and the comments of a module."""
    for node in ast.walk(ast.parse(source)):
        parts = list(ast.walk(node)) if isinstance(node, ast.Raise) else [getattr(node, "value", None)]
        if isinstance(node, ast.Raise | ast.Expr):
            yield from (c.value for c in parts if isinstance(c, ast.Constant) and isinstance(c.value, str))
    yield from (t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT)


def offences(name: str, text: str) -> Iterator[str]:
    """Yield a line for each pattern that ``text`` has."""
    for better, pattern in PATTERNS.items():
        shown = [text[max(0, m.start() - 30) : m.end() + 30].replace("\n", " ") for m in re.finditer(pattern, text)]
        if shown:
            yield f"{name}: write {better}, not: {' | '.join(shown[:5])}"


if __name__ == "__main__":
    texts = {path: page_text(path.read_text("utf-8")) for path in PAGES}
    for path in sorted(ROOT.glob("pst_ds/**/*.py")):
        texts[path] = "\n".join(code_texts(path.read_text("utf-8")))
    sys.exit(
        "\n".join(line for path, text in texts.items() for line in offences(str(path.relative_to(ROOT)), text)) or 0
    )
