"""Tables as lines of text: the first column aligned left, the others right."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row; all have the same number of cells, and two spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())  # a last cell may be empty
    return lines


def bytes_text(count: float) -> str:
    """Format a size as "1.25 GB", "76.30 MB" or "812 bytes"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    # sizes that were computed from rates are floats
    return f"{count:,.0f} bytes"
