"""How flat values of many tensors are cut over the files of a checkpoint, and which file holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pst_ds.core.bits import shard_numel

Cut = tuple[int, int, int]
"""(index of the tensor, first value, value after the last): one run of a tensor in one file."""


@dataclass(frozen=True, slots=True)
class Run:
    """Values [start, stop) of a tensor, from index ``offset`` of a file's flat values on."""

    file: int
    start: int
    stop: int
    offset: int


class ChunkedTensors:
    """Tensors of ``sizes`` values each, cut over ``num_files`` files.

    A file holds its runs one after another, in the order of the tensors. Without ``cuts`` every tensor is cut evenly as
    ZeRO-3 does: file i has values [i * p, (i + 1) * p) with p = ceil(size / num_files). With them, ``cuts[i]`` lists
    the runs of file i. Raises ValueError for cuts that do not hold every value exactly once.
    """

    def __init__(self, sizes: Mapping[str, int], num_files: int, cuts: Sequence[Sequence[Cut]] | None = None):
        self.sizes, self.num_files, self._cuts = dict(sizes), num_files, cuts
        self._names = list(sizes)
        self._tables: dict[int, dict[str, list[Run]]] = {}
        self._places: dict[str, dict[int, None]] = {}
        if cuts is not None:
            self._check(cuts)

    def length(self, file: int) -> int:
        """Values in a file."""
        return sum(run.stop - run.start for runs in self._table(file).values() for run in runs)

    def runs(self, name: str, start: int, stop: int) -> list[Run]:
        """The runs that make up values [start, stop) of a tensor, in order."""
        found = []
        for file in self._files(name, start, stop):
            for run in self._table(file).get(name, ()):
                first, last = max(start, run.start), min(stop, run.stop)
                if first < last:
                    found.append(Run(file, first, last, run.offset + first - run.start))
        return sorted(found, key=lambda run: run.start)

    def _files(self, name: str, start: int, stop: int) -> Sequence[int]:
        if self._cuts is not None:
            return list(self._places.get(name, ()))
        if start >= stop:
            return ()
        per_file = shard_numel(self.sizes[name], self.num_files)
        return range(start // per_file, (stop - 1) // per_file + 1)

    def _table(self, file: int) -> dict[str, list[Run]]:
        if file not in self._tables:
            table: dict[str, list[Run]] = {}
            offset = 0
            for name, start, stop in self._ranges(file):
                table.setdefault(name, []).append(Run(file, start, stop, offset))
                offset += stop - start
            self._tables[file] = table
        return self._tables[file]

    def _ranges(self, file: int):
        if self._cuts is not None:
            yield from ((self._names[i], start, stop) for i, start, stop in self._cuts[file])
            return
        for name, size in self.sizes.items():
            per_file = shard_numel(size, self.num_files)
            start = min(file * per_file, size)
            yield name, start, min(start + per_file, size)

    def _check(self, cuts: Sequence[Sequence[Cut]]) -> None:
        if len(cuts) != self.num_files:
            raise ValueError(f"cuts of {len(cuts)} files, not of {self.num_files}")
        runs: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(self._names))}
        for file, of_file in enumerate(cuts):
            for i, start, stop in of_file:
                if i not in runs or not 0 <= start <= stop:
                    raise ValueError(f"file {file} has a cut {i, start, stop} of no tensor")
                runs[i].append((start, stop))
                self._places.setdefault(self._names[i], {})[file] = None
        for i, found in runs.items():
            end = 0
            for start, stop in sorted(found):
                if start != end:
                    raise ValueError(f"the cuts of {self._names[i]} leave or repeat values from {min(start, end)} on")
                end = stop
            if end != self.sizes[self._names[i]]:
                raise ValueError(f"the cuts of {self._names[i]} end at {end} of {self.sizes[self._names[i]]}")
