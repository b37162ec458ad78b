"""Folders at an address that fsspec opens, such as s3://bucket/folder: list, read, write and remove their files.

A path without a protocol is a folder of this host. Credentials and endpoints come from the environment, as fsspec and
its packages read them: AWS_ENDPOINT_URL, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS and others.
"""

import hashlib
import os
import posixpath
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pst_ds.errors import InputError, first_line

T = TypeVar("T")
_PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of pst-ds that brings the package for a protocol."""
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci"})
"""Protocols without folders: a file's folder need not be made, and making one could create a bucket."""
_PAUSES_SECONDS = (1.0, 5.0, 25.0)
"""Waits before another attempt. Object stores answer "slow down" for seconds; longer outages are the caller's."""
_CHUNK_BYTES = 1 << 22
_PROBE = ".pst-ds-probe"
_UNFINISHED = ".partial"


class RemoteError(InputError):
    """A remote file that cannot be read or written, after several attempts."""


def is_address(where: str) -> bool:
    """Return whether ``where`` names a protocol, as "s3://bucket/folder" does."""
    return _PROTOCOL.match(where) is not None


class RemoteFolder:
    """A folder at an fsspec address, whose files are named relative to it. Its methods may be called in any thread.

    Raises InputError for an unknown protocol or a missing package, starting with ``setting``. Methods raise
    RemoteError after several attempts, and FileNotFoundError at once.

    Args:
        address: URL, or path of a local folder.
        setting: Name of the setting or option that has the address, for messages.
    """

    def __init__(self, address: str, setting: str):
        import fsspec

        self.address = address.rstrip("/")
        self._lead = f"{setting} = {address!r}"
        match = _PROTOCOL.match(address)
        if match is not None:
            self._protocol = match[1].lower()
        else:
            # Absolute, so that a later change of the working directory does not matter.
            self._protocol = "file"
            address = os.path.abspath(os.path.expanduser(address))
        try:
            self._files, path = fsspec.core.url_to_fs(address)
        except ImportError as error:
            fix = f"{first_line(error)}, or name another address"
            if self._protocol in _EXTRAS:
                fix = f"Run pip install 'pst-ds[{_EXTRAS[self._protocol]}]'"
            raise InputError(f"{self._lead} needs a package that is not installed. {fix}") from None
        except Exception as error:  # fsspec's packages raise errors of any kind for an address or its environment
            raise InputError(
                f"{self._lead} cannot be opened: {first_line(error)}. Name an address such as s3://bucket/folder"
            ) from None
        self._root = path.rstrip("/")

    def path(self, name: str) -> str:
        """Return the address of a file, for messages."""
        return f"{self.address}/{name}"

    def require_usable(self, *, writable: bool) -> None:
        """Read the folder, and with ``writable`` also write and remove a file there. Raises InputError at once."""
        try:
            self._names("")
            if writable:
                self._write(_PROBE, b"")
                self._files.rm_file(self._full(_PROBE))
        except Exception as error:  # each package has other errors for a wrong host, bucket or credential
            right = "read"
            if writable:
                right = "written"
            raise InputError(
                f"{self._lead} cannot be {right}: {first_line(error)}. Correct the address, the credentials or, for "
                "s3://, AWS_ENDPOINT_URL in the environment"
            ) from None

    def names(self, folder: str = "") -> list[str]:
        """Return the names of files and folders right below ``folder``, sorted; none for one that does not exist."""
        return self._patiently(f"list {self.path(folder)}", lambda: self._names(folder))

    def exists(self, name: str) -> bool:
        """Return whether there is a file ``name``."""

        def exists() -> bool:
            # fsspec's own exists() takes any error, such as a refused connection, for a missing file.
            self._files.invalidate_cache()
            try:
                self._files.info(self._full(name))
            except FileNotFoundError:
                return False
            return True

        return self._patiently(f"find {self.path(name)}", exists)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return self._patiently(f"read {self.path(name)}", lambda: self._files.cat_file(self._full(name)))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, which has its name only once it is whole."""

        def write() -> None:
            unfinished = name + _UNFINISHED
            self._write(unfinished, data)
            # An object appears whole, but a file of a disk grows under its name.
            self._files.mv(self._full(unfinished), self._full(name))

        self._patiently(f"write {self.path(name)}", write)

    def put(self, path: Path, name: str) -> None:
        """Copy the local file ``path`` to ``name``, replacing it. An interrupted copy may leave part of the file."""

        def put() -> None:
            self._make_folder_of(name)
            self._files.put_file(str(path), self._full(name))

        self._patiently(f"write {self.path(name)}", put)

    def get(self, name: str, path: Path) -> str:
        """Copy a file to the local ``path``, wait for the disk, and return its SHA-256."""

        def get() -> str:
            digest = hashlib.sha256()
            with self._files.open(self._full(name), "rb") as source, path.open("wb") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())  # the caller may then remove the remote file
            return digest.hexdigest()

        return self._patiently(f"read {self.path(name)}", get)

    def size(self, name: str) -> int:
        """Return the bytes of a file."""

        def size() -> int:
            self._files.invalidate_cache()
            return int(self._files.info(self._full(name))["size"])

        return self._patiently(f"find {self.path(name)}", size)

    def version(self, name: str) -> str:
        """Return a text that changes with a file, made of its size, time or checksum."""
        return self._patiently(f"find {self.path(name)}", lambda: str(self._files.ukey(self._full(name))))

    def remove(self, *names: str) -> None:
        """Remove files, one after another; those that do not exist are skipped."""
        for name in names:

            def remove(name: str = name) -> None:
                with suppress(FileNotFoundError):
                    self._files.rm_file(self._full(name))

            self._patiently(f"remove {self.path(name)}", remove)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder that holds files only, and its files in the order of their names."""
        self.remove(*(f"{folder}/{name}" for name in self.names(folder)))
        if self._protocol not in _OBJECT_STORES:
            self._patiently(f"remove {self.path(folder)}", lambda: self._files.rmdir(self._full(folder)))

    def _full(self, name: str) -> str:
        """Return the path of a file in its file system; ``name`` "" is the folder itself."""
        if not name:
            return self._root
        return posixpath.join(self._root, name)

    def _names(self, folder: str) -> list[str]:
        """Return what :meth:`names` does, in one attempt."""
        # Packages remember listings, and other processes write there.
        self._files.invalidate_cache()
        full = self._full(folder)
        try:
            listed = self._files.ls(full, detail=False)
        except FileNotFoundError:
            return []
        names: set[str] = set()
        for path in listed:
            path = path.rstrip("/")
            if path != full:  # some object stores list the folder itself, as an empty object
                names.add(posixpath.basename(path))
        return sorted(names)

    def _write(self, name: str, data: bytes) -> None:
        """Write a file under its name, in one attempt."""
        self._make_folder_of(name)
        self._files.pipe_file(self._full(name), data)

    def _make_folder_of(self, name: str) -> None:
        """Make the folder of a file, where the file system has folders."""
        if self._protocol not in _OBJECT_STORES:
            self._files.makedirs(posixpath.dirname(self._full(name)), exist_ok=True)

    def _patiently(self, what: str, action: Callable[[], T]) -> T:
        """Return the result of ``action``, which is repeated after an error. Raises RemoteError."""
        for pause in (*_PAUSES_SECONDS, None):
            try:
                return action()
            except FileNotFoundError:  # an answer, which another attempt would repeat
                raise
            except Exception as error:  # each package has other errors for networks and refusals
                if pause is None:
                    raise RemoteError(f"cannot {what}: {first_line(error)}") from error
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")
