"""Where token stores are cached on this host, and copies of stores and token files that lie at an address."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pst_ds.atomic_files import (
    LOCK,
    only_writer,
    partial_name,
    remove_partial,
    require_writable,
    sync,
    write_bytes_atomic,
)
from pst_ds.config.run import ConfigError
from pst_ds.core.kernels.library_cache import cache_folder as private_folder
from pst_ds.data.tokens.store import MANIFEST, manifest_of
from pst_ds.data.tokens.token_files import all_endings
from pst_ds.progress import Progress
from pst_ds.remote_folder import RemoteFolder

CACHE = "PST_DS_CACHE"


def cache_folder(cache: str = "") -> Path:
    """Return the folder of all cached stores.

    This is ``cache``/tokens, $PST_DS_CACHE/tokens, or pst-ds/tokens next to the hub's cache; the first that is set.
    """
    from huggingface_hub.constants import HF_HOME

    try:
        return Path(cache or os.environ.get(CACHE) or Path(HF_HOME) / "pst-ds").expanduser() / "tokens"
    except RuntimeError:  # expanduser finds neither HOME nor a passwd entry, as in some containers
        return private_folder() / "tokens"


@dataclass(frozen=True, slots=True)
class _File:
    """A file to fetch."""

    name: str
    size: int
    sha256: str
    """Empty if the source does not state it."""


@dataclass(frozen=True, slots=True)
class _Content:
    """What lies at an address."""

    files: list[_File]
    version: str
    """Changes with the contents."""
    manifest: bytes = b""
    """The manifest of a store; empty for token files of other programs."""


def _content_of(remote: RemoteFolder, lead: str) -> _Content:
    """Return what to fetch from an address. Raises ConfigError, starting with ``lead``, if it has no tokens."""
    files: list[_File] = []
    if remote.exists(MANIFEST):
        manifest = remote.read(MANIFEST)
        store = manifest_of(manifest, remote.path(MANIFEST))
        for name, (size, sha256) in store.files.items():
            files.append(_File(name, size, sha256))
        return _Content(files, version=store.digest, manifest=manifest)
    versions: list[str] = []
    endings = all_endings()
    for name in remote.names():
        if name.endswith(endings):
            files.append(_File(name, remote.size(name), sha256=""))
            versions.append(remote.version(name))
    if not files:
        raise ConfigError(
            f"{lead} has no {MANIFEST} and no files of tokens. Text at an address would be downloaded at every "
            "start: write a store with pst-ds prepare, and name it"
        )
    return _Content(files, version=" ".join(versions))


def local_copy(address: str, setting: str, cache: str) -> Path:
    """Return a folder of this host with the token store, or the token files, at ``address``, fetched if need be.

    One process per host fetches, file by file, and the others wait; after an interruption the next one continues.
    Raises InputError, starting with ``setting``.
    """
    remote = RemoteFolder(address, setting)
    remote.require_usable(writable=False)
    lead = f"{setting} = {address!r}"
    content = _content_of(remote, lead)
    files = content.files
    about = f"{remote.address} {content.version}"
    folder = cache_folder(cache) / f"copy-{hashlib.sha256(about.encode()).hexdigest()[:32]}"
    # written last, so that a folder with it is whole
    finished = folder.with_name(f"{folder.name}.fetched")
    if finished.exists() and not _missing(folder, files):
        return folder
    require_writable(folder, f"the cache of {address} (data.cache or {CACHE})")
    with only_writer(folder.with_name(f".{folder.name}{LOCK}"), f"fetch {address}"):
        folder.mkdir(parents=True, exist_ok=True)
        # again: another process may have fetched them while this one waited
        _fetch(remote, folder, _missing(folder, files), lead)
        if content.manifest:
            write_bytes_atomic(folder / MANIFEST, content.manifest)
        write_bytes_atomic(finished, address.encode() + b"\n")
    return folder


def _missing(folder: Path, files: list[_File]) -> list[_File]:
    """Return the files that are not in ``folder`` with their size."""
    sizes: dict[str, int] = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_file():
                sizes[path.name] = path.stat().st_size
    return [file for file in files if sizes.get(file.name) != file.size]


def _fetch(remote: RemoteFolder, folder: Path, files: list[_File], lead: str) -> None:
    """Fetch files, each of which gets its name once it is whole. Raises InputError."""
    if not files:
        return
    remove_partial(*(folder / file.name for file in files))
    # before the first byte, since the last file may be hours away
    for file in files:
        try:
            size = remote.size(file.name)
        except FileNotFoundError:
            raise ConfigError(f"{lead}: {file.name} is missing there. Upload the store again") from None
        if size != file.size:
            raise ConfigError(
                f"{lead}: {file.name} has {size} bytes there, but {MANIFEST} says {file.size}. Upload the store again"
            )
    total = sum(file.size for file in files)
    with Progress(f"fetch {remote.address}", total, "bytes") as progress:
        for file in files:
            partial = partial_name(folder / file.name)
            sha256 = remote.get(file.name, partial)
            if file.sha256 and sha256 != file.sha256:
                # the next start would take it for a file that is whole
                partial.unlink()
                raise ConfigError(
                    f"{lead}: {file.name} is damaged there, its SHA-256 is not the one in {MANIFEST}. Upload the "
                    "store again"
                )
            partial.replace(folder / file.name)
            progress.add(file.size, file.name)
    sync(folder)


def cached_file(name: str, what: str, cache: str, build: Callable[[Path], None]) -> Path:
    """Return the path of a cached file; call ``build`` with a partial path if there is none.

    One process per host builds it and the others wait. ``what`` says of what it is, for messages.
    """
    path = cache_folder(cache) / name
    if path.exists():
        return path
    require_writable(path, f"the cache of {what} (data.cache or {CACHE})")
    with only_writer(path.with_name(f".{name}{LOCK}"), f"index {what}"):
        # again: another process may have built it while this one waited
        if not path.exists():
            partial = partial_name(path)
            try:
                build(partial)
                sync(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return path
