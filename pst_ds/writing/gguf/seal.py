"""The SHA-256 of a GGUF file, inside the file: written by an export, and compared by ``pst-ds verify``."""

import hashlib
import os
from pathlib import Path

from pst_ds.core.packings import GGUF
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import Facts, require_plain

SEAL_KEY = "pst_ds.sha256"
UNSEALED = "0" * 64
"""Value of the key while the SHA-256 is computed."""
_MAGIC = b"GGUF"
_STRING_TYPE = 8
"""GGUF's number for a string."""
_HEAD_BYTES = 4096
"""Bytes at the start of a file in which the key is: it is the first one after the architecture."""
_CHUNK_BYTES = 1 << 24


def seal(path: Path) -> None:
    """Write the SHA-256 of a file, computed with :data:`UNSEALED` in its place, into its value :data:`SEAL_KEY`."""
    with path.open("r+b") as file:
        offset = _offset_of_value(file.read(_HEAD_BYTES))
        assert offset is not None, "the writer has added the key"
        os.pwrite(file.fileno(), _sha256_without_seal(path, offset).encode(), offset)


def check_gguf(path: Path) -> Facts:
    """Compare a file with the SHA-256 in it; return its size. Raises ExportError if it differs or is missing."""
    require_plain(path, f"{path} does not exist")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.startswith(_MAGIC):
        raise ExportError(f"{path} is not a GGUF file. Name an export of pst-ds")
    offset = _offset_of_value(head)
    if offset is None:
        raise ExportError(
            f"{path} has no {SEAL_KEY}, so its content cannot be verified: it was damaged, or written by an older "
            "version or another program. Export the model again"
        )
    if head[offset : offset + len(UNSEALED)] != _sha256_without_seal(path, offset).encode():
        raise ExportError(f"{path} is not what was exported: its SHA-256 differs. Export the model again")
    return {"kind": GGUF, "file_bytes": path.stat().st_size}


def _offset_of_value(head: bytes) -> int | None:
    """Return where the value of :data:`SEAL_KEY` is in the first bytes of a file; None without exactly one."""
    key = SEAL_KEY.encode()
    # as GGUF writes a string: length and bytes of the key, the type, the length of the value
    entry = len(key).to_bytes(8, "little") + key + _STRING_TYPE.to_bytes(4, "little")
    entry += len(UNSEALED).to_bytes(8, "little")
    place = head.find(entry)
    # a second entry could hide a change of the first, since only one of them is compared
    if place < 0 or head.count(entry) != 1:
        return None
    start = place + len(entry)
    if start + len(UNSEALED) > len(head):
        return None
    return start


def _sha256_without_seal(path: Path, offset: int) -> str:
    """Return the SHA-256 of a file with :data:`UNSEALED` in place of the value at ``offset``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        # in pieces, because a file may be larger than memory
        digest.update(file.read(offset))
        digest.update(UNSEALED.encode())
        file.seek(offset + len(UNSEALED))
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
