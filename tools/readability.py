"""Count what makes code dense, per file and room: ``python -m tools.readability [PATH ...]``."""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
HEADER = f"{'code':>6} {'comments':>9} {'assigned':>9} {'if else':>9} {'for in':>9}  per 1,000 lines of code"


@dataclass(frozen=True)
class Counts:
    """Counts of one file, or of several together."""

    code_lines: int = 0
    """Lines with code; a docstring is not code."""
    comment_lines: int = 0
    """Lines with a comment, alone or after code, except directives to tools."""
    unrelated_assignments: int = 0
    """Assignments of a tuple that is written out to several names, such as ``a, b = x, y``."""
    conditional_expressions: int = 0
    comprehensions: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            code_lines=self.code_lines + other.code_lines,
            comment_lines=self.comment_lines + other.comment_lines,
            unrelated_assignments=self.unrelated_assignments + other.unrelated_assignments,
            conditional_expressions=self.conditional_expressions + other.conditional_expressions,
            comprehensions=self.comprehensions + other.comprehensions,
        )

    def row(self, name: str) -> str:
        """Return a line of the table: lines of code, the four counts per 1,000 of them, and a name."""
        counts = (self.comment_lines, self.unrelated_assignments, self.conditional_expressions, self.comprehensions)
        rates = " ".join(f"{1000 * count / max(1, self.code_lines):9.1f}" for count in counts)
        return f"{self.code_lines:6d} {rates}  {name}"


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the lines of docstrings, those of attributes included."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def is_unrelated(node: ast.AST) -> bool:
    """Return whether a statement assigns several values of a written tuple to as many names.

    Unpacking one call or iterable is not counted. Neither is a swap or a step of a recurrence (``a, b = b, a + b``), in
    which a value reads a name that is assigned before it: these cannot be written one after another.
    """
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    if not isinstance(target, ast.Tuple):
        return False
    assigned: set[str] = set()
    for name, value in zip(target.elts, node.value.elts, strict=False):
        read = {ast.unparse(part) for part in ast.walk(value) if isinstance(part, ast.expr)}
        if assigned & read:
            return False
        assigned.add(ast.unparse(name))
    return True


def count(source: str) -> Counts:
    """Return the counts of a module's text.

    Raises:
        SyntaxError: If the text is not Python.
    """
    tree = ast.parse(source)
    code_lines: set[int] = set()
    comment_lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            is_directive = token.string.startswith(("# noqa", "# type:", "# fmt:", "# pragma"))
            if not is_directive:
                comment_lines.add(token.start[0])
        elif token.type not in NO_CODE:
            code_lines.update(range(token.start[0], token.end[0] + 1))
    nodes = list(ast.walk(tree))
    return Counts(
        code_lines=len(code_lines - docstring_lines(tree)),
        comment_lines=len(comment_lines),
        unrelated_assignments=sum(is_unrelated(node) for node in nodes),
        conditional_expressions=sum(isinstance(node, ast.IfExp) for node in nodes),
        comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in nodes),
    )


def table(paths: Iterable[Path]) -> str:
    """Return the counts of the files in ``paths``, the longest first, and their total. Folders are searched."""
    counts: dict[Path, Counts] = {}
    for path in paths:
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            counts[file] = count(file.read_text("utf-8"))
    by_length = sorted(counts, key=lambda file: counts[file].code_lines, reverse=True)
    rows = [counts[file].row(str(file)) for file in by_length]
    total = sum(counts.values(), start=Counts())
    return "\n".join([HEADER, *rows, total.row("total")])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "pst_ds"], help="files and folders")
    print(table(parser.parse_args().paths))
