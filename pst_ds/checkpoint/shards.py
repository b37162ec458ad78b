"""Where a checkpoint's values lie: the names of its files, and which chunks of which tensors each file holds."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pst_ds.core.bits import part_range, shard_numel

Chunk = tuple[int, int, int]
"""(index of the tensor, first value, last value + 1): values of a tensor that lie together in one file."""
TENSOR_FILE = re.compile(r"shard-(\d{5,})-of-(\d{5,})\.safetensors")
"""Names of the files with tensors."""


def shard_name(shard: int, num_shards: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{shard + 1:05d}-of-{num_shards:05d}.safetensors"


def files_of(size: int, num_files: int, parts: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (file, first, last + 1) for values [start, stop) of a tensor divided by
    :func:`pst_ds.core.bits.part_range`, in their order."""
    part_size = size // parts
    per_file = shard_numel(part_size, num_files // parts)
    while start < stop:
        part, inside = divmod(start, part_size)
        index = inside // per_file  # of the file among those of this part
        end_of_file = part * part_size + min(part_size, (index + 1) * per_file)
        last = min(stop, end_of_file)
        yield index * parts + part, start, last  # neighbouring files hold different parts
        start = last


@dataclass(frozen=True, slots=True)
class Fragment:
    """Values [start, stop) of a tensor, stored from index ``offset`` of a file's flat values."""

    file: int
    start: int
    stop: int
    offset: int


class ChunkedTensors:
    """Tensors of ``sizes`` values each, divided over ``num_files`` files.

    A file stores its chunks one after another: ``chunks[i]`` lists the chunks of file i. Without them every tensor is
    divided evenly, as by ZeRO-3: file i has values [i * p, (i + 1) * p) with p = ceil(size / num_files), in the order
    of the tensors; a tensor of several ``parts`` as by :func:`pst_ds.core.bits.part_range`. Raises ValueError unless
    the chunks hold every value exactly once.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        num_files: int,
        chunks: Sequence[Sequence[Chunk]] | None = None,
        parts: Mapping[str, int] | None = None,
    ):
        self.sizes = dict(sizes)
        self.num_files = num_files
        self._chunks = chunks
        self._names = list(sizes)
        self._parts = parts or {}
        # How many tensors have a size and a number of parts: layers of a model repeat a few shapes, so the length of a
        # file is a sum over these.
        self._counts = Counter((size, self._parts.get(name, 1)) for name, size in sizes.items())
        # Made on request: a reader needs the tables of the files that overlap with its own shard only.
        self._tables: dict[int, dict[str, list[Fragment]]] = {}
        self._files_of: dict[str, dict[int, None]] = {}  # the inner dict is a set in the order of the files
        if chunks is not None:
            self._check(chunks)

    def length(self, file: int) -> int:
        """Return the number of values in a file."""
        if self._chunks is not None:
            return sum(stop - start for _, start, stop in self._chunks[file])
        length = 0
        for (size, parts), number in self._counts.items():
            start, stop = part_range(size, self.num_files, file, parts)
            length += number * (stop - start)
        return length

    def fragments(self, name: str, start: int, stop: int) -> list[Fragment]:
        """Return the fragments that make up values [start, stop) of a tensor, in order."""
        fragments: list[Fragment] = []
        for file in self._files(name, start, stop):
            for fragment in self._table(file).get(name, ()):
                first = max(start, fragment.start)
                last = min(stop, fragment.stop)
                if first < last:
                    offset = fragment.offset + first - fragment.start
                    fragments.append(Fragment(file=file, start=first, stop=last, offset=offset))
        return sorted(fragments, key=lambda fragment: fragment.start)

    def _files(self, name: str, start: int, stop: int) -> Sequence[int]:
        """Return the files that may hold some of the values [start, stop) of a tensor."""
        if self._chunks is not None:
            return list(self._files_of.get(name, ()))
        num_parts = self._parts.get(name, 1)
        files: list[int] = []
        for file, *_ in files_of(self.sizes[name], self.num_files, num_parts, start, stop):
            files.append(file)
        return files

    def _table(self, file: int) -> dict[str, list[Fragment]]:
        if file not in self._tables:
            table: dict[str, list[Fragment]] = {}
            offset = 0
            for name, start, stop in self._ranges(file):
                fragment = Fragment(file=file, start=start, stop=stop, offset=offset)
                table.setdefault(name, []).append(fragment)
                offset += stop - start
            self._tables[file] = table
        return self._tables[file]

    def _ranges(self, file: int) -> Iterator[tuple[str, int, int]]:
        """Yield (tensor, first value, last value + 1) of a file, in the order of its values."""
        if self._chunks is not None:
            for i, start, stop in self._chunks[file]:
                yield self._names[i], start, stop
        else:
            for name, size in self.sizes.items():
                yield name, *part_range(size, self.num_files, file, self._parts.get(name, 1))

    def _check(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        """Raise ValueError unless the ``chunks`` hold every value once; note the files of each tensor."""
        if len(chunks) != self.num_files:
            raise ValueError(f"chunks of {len(chunks)} files, not of {self.num_files}")
        ranges: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(self._names))}
        for file, of_file in enumerate(chunks):
            for i, start, stop in of_file:
                if i not in ranges or not 0 <= start <= stop:
                    raise ValueError(f"file {file} has a chunk {i, start, stop} of no tensor")
                ranges[i].append((start, stop))
                self._files_of.setdefault(self._names[i], {})[file] = None
        for i, (name, size) in enumerate(self.sizes.items()):
            # Sorted by their first value, each chunk must start where the one before it ends.
            end = 0
            for start, stop in sorted(ranges[i]):
                if start != end:
                    raise ValueError(f"the chunks of {name} leave or repeat values from {min(start, end)} on")
                end = stop
            if end != size:
                raise ValueError(f"the chunks of {name} end at {end} of {size}")
