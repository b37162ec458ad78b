"""Which files a checkpoint has beside its manifest, and which shards lie in each: one, or those of a host's ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_TENSOR_FILE = re.compile(r"(shard|host)-(\d{5,})-of-(\d{5,})\.safetensors")


def shard_name(file: int, num_shards: int) -> str:
    return f"shard-{file + 1:05d}-of-{num_shards:05d}.safetensors"


def host_name(file: int, num_hosts: int) -> str:
    return f"host-{file + 1:05d}-of-{num_hosts:05d}.safetensors"


def is_tensor_file(name: str) -> bool:
    return _TENSOR_FILE.fullmatch(name) is not None


def shared_key(key: str, shard: int) -> str:
    """Return the name of the tensor ``key`` of a shard in a file that has several."""
    return f"{key}/{shard}"


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """The files of ``num_shards`` shards: one of each, or, with ``hosts``, those shards together that each entry lists.

    Raises ValueError unless every shard is in one file.
    """

    num_shards: int
    hosts: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        listed = sorted(shard for of_host in self.hosts or () for shard in of_host)
        if self.hosts is not None and (listed != list(range(len(listed))) or len(listed) != self.num_shards):
            raise ValueError(f"hosts do not have each of {self.num_shards} shards once")

    @property
    def count(self) -> int:
        return self.num_shards if self.hosts is None else len(self.hosts)

    def name(self, file: int) -> str:
        return shard_name(file, self.num_shards) if self.hosts is None else host_name(file, len(self.hosts))

    def shards(self, file: int) -> Sequence[int]:
        """Return the shards that lie in a file."""
        return [file] if self.hosts is None else self.hosts[file]

    def file_of(self, shard: int) -> int:
        """Return the file that a shard lies in."""
        if self.hosts is None:
            return shard
        return next(file for file, shards in enumerate(self.hosts) if shard in shards)

    def key(self, key: str, shard: int) -> str:
        """Return the name of a shard's tensor in its file."""
        return key if self.hosts is None else shared_key(key, shard)
