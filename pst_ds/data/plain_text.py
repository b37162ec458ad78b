"""Detect whether the lines, paragraphs or all of a plain text file form a document."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import quantiles

DOCUMENT_BYTES = 1 << 24
"""Maximum bytes of a file that is one document: tokenising a text needs about 100 times its size in memory."""
_WINDOWS = 4
_WINDOW_BYTES = 1 << 16
_FEWEST_LINES = 8
"""Minimum lines with text for a decision."""
_WIDTHS = range(30, 141)
"""Characters of the longest lines of wrapped text, or text with short lines."""
# Minimum fraction of empty lines, and minimum mean lines between them, of text in groups of lines.
_EMPTY_LINES = 0.1
_LINES_OF_GROUP = 1.5
# Minimum fractions of wrapped lines that are nearly as long as the longest, and that end within a sentence.
_FULL_LINES = 0.5
_RUN_ON_LINES = 0.3
_SENTENCE_ENDS = tuple(".!?:;…。！？\"'”’»)*_")


def proposed_sample_by(path: Path) -> str:
    """Return the ``data.sample_by`` for a .txt file, by a sample of its lines."""
    if not is_wrapped(path):
        return "line"
    if path.stat().st_size <= DOCUMENT_BYTES:
        return "document"
    return "paragraph"


def is_wrapped(path: Path) -> bool:
    """Return whether the lines of a file are parts of a longer text, by a sample of them."""
    return lines_belong_together(sampled_lines(path))


def lines_belong_together(lines: Sequence[str]) -> bool:
    """Return whether lines are parts of a longer text, not separate documents: wrapped prose, or verse, dialogue and
    code with groups of short lines between empty lines."""
    filled = [line.strip() for line in lines if line.strip()]
    if len(filled) < _FEWEST_LINES:
        return False
    # the ninth decile: a few long lines, such as addresses, do not count as the width
    width = quantiles(map(len, filled), n=10)[-1]
    if not _WIDTHS.start <= width < _WIDTHS.stop:
        return False
    num_empty = len(lines) - len(filled)
    has_groups = len(filled) >= _LINES_OF_GROUP * _num_groups(lines)
    if num_empty >= _EMPTY_LINES * len(lines) and has_groups:
        return True
    # without empty lines, only wrapped prose can be told from separate documents
    num_full = sum(len(line) >= 0.8 * width for line in filled)
    return num_full >= _FULL_LINES * len(filled) and _num_run_on(filled) >= _RUN_ON_LINES * len(filled)


def _num_groups(lines: Sequence[str]) -> int:
    """Return the number of groups of lines with text, between empty lines."""
    num_groups = 0
    # the first line starts a group as if an empty one were before it
    for before, line in pairwise(["", *lines]):
        if line.strip() and not before.strip():
            num_groups += 1
    return num_groups


def _num_run_on(filled: Sequence[str]) -> int:
    """Return the number of lines whose sentence continues in the next one: ``filled`` lines, which have text."""
    num_run_on = 0
    for line, after in pairwise(filled):
        if not line.endswith(_SENTENCE_ENDS) and not after[0].isupper():
            num_run_on += 1
    return num_run_on


def sampled_lines(path: Path) -> list[str]:
    """Return the lines of a file, or the whole lines in four windows of a large file."""
    size = path.stat().st_size
    lines: list[str] = []
    with path.open("rb") as file:
        if size <= _WINDOWS * _WINDOW_BYTES:
            return _lines_of(file.read())
        for window in range(_WINDOWS):
            # at even distances, the last one at the end of the file: the start of a book is often a table of contents
            file.seek((size - _WINDOW_BYTES) * window // (_WINDOWS - 1))
            # a window cuts its first and last line
            lines += _lines_of(file.read(_WINDOW_BYTES))[1:-1]
    return lines


def _lines_of(data: bytes) -> list[str]:
    """Return the lines of the bytes of a window, without their breaks."""
    # A window may start inside a character, and a file may have another encoding: lengths of lines are enough here.
    text = data.decode(errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
