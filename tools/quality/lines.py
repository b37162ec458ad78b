"""The results of a grid: tools/quality/logs/results/NAME.jsonl, one line of sorted keys for each cell that was run."""

from __future__ import annotations

import json
from pathlib import Path

from pst_ds.atomic_files import write_text_atomic
from pst_ds.errors import InputError
from tools.quality.cells import Line


class LinesError(InputError):
    """A results file that is not as it was written."""


class Lines:
    """The lines of one file, in the order in which the cells first came to an end. One process may write."""

    def __init__(self, path: Path):
        self.path = path
        self.by_id: dict[str, Line] = {}
        if not path.is_file():
            return
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                self.by_id[line["id"]] = line
            except (ValueError, KeyError, TypeError):
                raise LinesError(f"{path}, line {number}, is not a result; take it out: {text[:80]!r}") from None

    def put(self, line: Line) -> None:
        """Add a line, or put it in the place of the one with its id. A crash leaves the old file or the new."""
        self.by_id[line["id"]] = line
        self._write()

    def keep(self, ids: set[str]) -> int:
        """Take out all other lines, such as those of settings that were changed since; how many."""
        others = self.by_id.keys() - ids
        self.by_id = {key: line for key, line in self.by_id.items() if key in ids}
        if others:
            self._write()
        return len(others)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.path, "".join(json.dumps(kept, sort_keys=True) + "\n" for kept in self.by_id.values()))
