"""One file of a checkpoint that the ranks of a host write together, each its own part, in place.

It is a safetensors file with the tensors of every rank, named "master/3" for rank 3's: those of a kind lie together,
fp32 before bytes, so that each begins where its type may. Where everything lies follows from the sizes alone, which do
not change, so no rank waits for another before it writes. Ranks of a host share its page cache; no file system is asked
to let several hosts write into one file.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pst_ds.atomic_files import file_sha256
from pst_ds.checkpoint.file_names import host_name, shared_key
from pst_ds.formats.safetensors_file import Slot, header_and_slots, tensor_bytes, write_at
from pst_ds.parallel.ranks import all_gather_objects, rank

Lengths = Mapping[str, tuple[torch.dtype, int]]
"""The type and the number of values of each tensor of a rank, by the names of a shard's file."""


@dataclass(frozen=True, slots=True)
class HostFile:
    """The file of this rank's host."""

    name: str
    hosts: list[list[int]]
    """The ranks of every host; in the order of their lowest."""
    is_first: bool
    """True for the one rank of the host that writes the header, and reads the whole file in the end."""
    header: bytes
    slots: Mapping[str, Slot]
    """Where each tensor of this rank lies in the file."""
    size: int

    def write_part(self, folder: Path, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Write this rank's tensors, each as pieces that follow each other, into the file, wait for the disk, and read
        them back from there.

        Raises OSError when the disk is full, or gives back other bytes than it was given.
        """
        path = folder / self.name
        parts = self._parts(tensors)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if self.is_first:
                os.ftruncate(handle, self.size)  # what is there of a save that was killed is written over
            for place, data in parts.items():
                write_at(handle, data, place)
            os.fsync(handle)
            for place, data in parts.items():
                if hasattr(os, "posix_fadvise"):  # or the page cache would answer for the disk
                    os.posix_fadvise(handle, place, len(data), os.POSIX_FADV_DONTNEED)
                if not _reads_back(handle, data, place):
                    raise OSError(f"{path} was read back with other bytes than were written; the disk is failing")
        finally:
            os.close(handle)

    def _parts(self, tensors: Mapping[str, Sequence[Tensor]]) -> dict[int, memoryview]:
        """Return what this rank writes, by where it begins."""
        parts = {0: memoryview(self.header)} if self.is_first else {}
        for key, slot in self.slots.items():
            place = slot.offset
            for piece in filter(Tensor.numel, tensors[key]):
                parts[place] = tensor_bytes(piece.to("cpu", slot.dtype))
                place += len(parts[place])
        return parts

    def digest(self, folder: Path) -> str:
        """Return the SHA-256 of the whole file, once every rank of the host has written its part. Raises OSError."""
        path = folder / self.name
        if path.stat().st_size != self.size:
            raise OSError(f"{path} has {path.stat().st_size} bytes, and its header says {self.size}")
        return file_sha256(path)


def plan_host_file(lengths: Lengths) -> HostFile:
    """Return the file of this rank's host, given what this rank has to write. Collective."""
    of_ranks = all_gather_objects((socket.gethostname(), dict(lengths)))
    by_host: dict[str, list[int]] = {}
    for other, (host, _) in enumerate(of_ranks):
        by_host.setdefault(host, []).append(other)
    own, hosts = rank(), list(by_host.values())
    (file,) = [i for i, ranks in enumerate(hosts) if own in ranks]
    kinds = {
        shared_key(key, other): (dtype, (count,))
        for other in hosts[file]
        for key, (dtype, count) in of_ranks[other][1].items()
    }
    header, slots, size = header_and_slots(kinds)
    name = host_name(file, len(hosts))
    return HostFile(
        name,
        hosts,
        own == hosts[file][0],
        header,
        {key: slots[shared_key(key, own)] for key in lengths},
        size,
    )


def _reads_back(handle: int, data: memoryview, place: int) -> bool:
    """Return whether the file has ``data`` at ``place``."""
    step = 1 << 24
    return all(
        os.pread(handle, step, place + i)[: len(data) - i] == data[i : i + step] for i in range(0, len(data), step)
    )
