"""A folder of per-user states over one sparse base, written atomically.

    index.json               facts that all users share (base, masks, shapes), and the file and SHA-256 of each user
    states/….safetensors     the personal values of one user, by their names in the model

Masks and base weights are not copied: the index names the base. Only the index determines the users, so an interrupted
write leaves the states that it names, and a removed user has neither entry nor file.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from torch import Tensor

from pst_ds import __version__
from pst_ds.atomic_files import (
    LOCK,
    only_writer,
    remove_partial,
    require_writable,
    write_bytes_atomic,
    write_text_atomic,
)
from pst_ds.checkpoint.restore import same_base
from pst_ds.errors import InputError, first_problem, shortened
from pst_ds.formats.safetensors_file import Slot, TensorFile, TensorFileError

INDEX = "index.json"
STATES = "states"
FORMAT = 1
KEPT_IN_MEMORY = 64
"""Most recently used states that a store keeps in memory."""
_MOST_CHARACTERS = 200

Form = Literal["masked", "beside"]
_StateFile = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}-[0-9a-f]{16}\.safetensors$")]
_Size = Annotated[int, Field(gt=0, lt=1 << 31)]
_Count = Annotated[int, Field(ge=0, lt=1 << 48)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_STRICT = ConfigDict(strict=True, extra="forbid")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
State = dict[str, Tensor]
"""Personal values by name, in the store's dtype, on the CPU."""


class UserStoreError(InputError):
    """A store that is missing or damaged, a user that is not in it, or a state that belongs to another model."""


class UserNameError(UserStoreError):
    """The name of a user who is not in the store, or a name that no user can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """Facts that all states of a store share."""

    __pydantic_config__ = _STRICT
    form: Form
    """"masked": U and V of M . (W0 + beta U V), in the layers; "beside": a separate beta U V next to each layer."""
    task: str
    labels: list[str]
    """Names of the classes, in the order of their ids."""
    base_path: str
    base_fingerprint: str
    masks_sha256: dict[str, str]
    """SHA-256 of each mask, by layer."""
    shared_sha256: str
    """SHA-256 of the trained values that users share."""
    beta: _Finite
    dtype: Literal["bf16", "fp32"]
    """Dtype of the values in the files."""
    shapes: dict[str, Annotated[list[_Size], Field(min_length=1)]]
    """Shapes of the personal values, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEntry:
    """One user in the index."""

    __pydantic_config__ = _STRICT
    file: _StateFile
    sha256: str
    bytes: _Count
    rows: _Count
    """Rows of text that the state was trained on."""
    steps: _Count
    loss: float
    """Mean loss of the last step."""


class UserStore:
    """The states in ``folder``, of which the ``kept`` most recently used stay in memory. Raises UserStoreError.

    Threads may read at the same time; processes write one after another. ``common``: facts that the states share.
    """

    def __init__(self, folder: Path, kept: int = KEPT_IN_MEMORY):
        self.folder = folder
        self._stamp = _stamp(folder / INDEX)  # before reading, so that a concurrent write is noticed
        self.common, self._entries = _read_index(folder)
        # The entry is part of the key, so a state that was replaced is read again.
        self._cached = lru_cache(kept)(lambda name, entry: self._read(name, entry))
        # Without it, two threads that ask for one user at the same time would both read its file.
        self._one_at_a_time = threading.RLock()

    @classmethod
    def create(cls, folder: Path, common: Common) -> "UserStore":
        """Create an empty store, or open the existing one. Raises UserStoreError if that is of another model."""
        if not (folder / INDEX).exists():
            require_writable(folder, f"the store {str(folder)!r}")
            with _writing_alone(folder):
                is_new = not (folder / INDEX).exists()  # another process may have created it meanwhile
                if is_new and any(path.name != LOCK for path in folder.iterdir()):
                    raise UserStoreError(
                        f"{folder} is not a store of users: {INDEX} is missing, and it is not empty. Name a new folder."
                    )
                if is_new:
                    _write_index(folder, common, {})
        store = cls(folder)
        store.require_common(common)
        return store

    def refresh(self) -> None:
        """Read the index again if another process changed it; forget cached states if users were removed. Raises
        UserStoreError if the index is missing, damaged, or of another model."""
        with self._one_at_a_time:
            stamp = _stamp(self.folder / INDEX)
            if stamp == self._stamp and stamp:
                return
            common, entries = _read_index(self.folder)
            self.require_common(common)
            if self._entries.keys() - entries.keys():
                # An lru_cache cannot forget one key, and the values of a removed user must not stay in memory.
                self._cached.cache_clear()
            self._entries = entries
            self._stamp = stamp

    @property
    def names(self) -> list[str]:
        """Names of the users, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> UserEntry:
        """Return the entry of a user. Raises UserNameError if the store does not have it."""
        entry = self._entries.get(name)
        if entry is None:
            require_name(name)
            known = shortened([repr(user) for user in self.names], 6) or "nobody"
            raise UserNameError(f"{self.folder} has no user {name!r}; there is {known}")
        return entry

    def state(self, name: str) -> State:
        """Return the state of a user, which is cached: do not change it. Raises UserNameError for an unknown user, and
        UserStoreError for a file that is missing or damaged."""
        with self._one_at_a_time:
            return self._cached(name, self.entry(name))

    def latest_state(self, name: str) -> State:
        """Refresh the store and return the state of a user, as in :meth:`state`."""
        self.refresh()
        try:
            return self.state(name)
        except UserNameError:
            raise
        except UserStoreError:
            before = self._stamp
            self.refresh()
            if self._stamp == before:
                raise
            return self.state(name)  # its file was replaced between the two readings

    def add(self, name: str, state: Mapping[str, Tensor], *, rows: int = 0, steps: int = 0, loss: float = 0.0) -> None:
        """Write or replace the state of a user. Raises UserStoreError, with the store unchanged, if the state does not
        fit or the disk is full."""
        from safetensors.torch import save

        require_name(name)
        self._require_shapes(state, f"the state of {name!r}")
        data = save({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()})
        digest = hashlib.sha256(data).hexdigest()
        # A digest of the name, because names may have characters that file systems reject or fold. The digest of the
        # content gives a new state a new file: until the index names it, readers find the old one.
        digest_of_name = hashlib.sha256(name.encode()).hexdigest()
        file = f"{digest_of_name[:32]}-{digest[:16]}.safetensors"
        entry = UserEntry(file=file, sha256=digest, bytes=len(data), rows=rows, steps=steps, loss=loss)
        with self._writing() as entries:
            (self.folder / STATES).mkdir(exist_ok=True)
            write_bytes_atomic(self.folder / STATES / file, data)
            entries[name] = entry

    def remove(self, name: str) -> None:
        """Delete the entry and file of a user, and all cached states. Raises UserNameError for an unknown user."""
        self.entry(name)
        with self._writing() as entries:
            entries.pop(name, None)
        self._cached.cache_clear()

    def require_common(self, common: Common) -> None:
        """Raise UserStoreError unless the states belong to a model of ``common``: its base, masks and shapes."""
        own = self.common
        has_other_shapes = own.shapes != common.shapes
        checks = {
            "base model": same_base(own.base_fingerprint, common.base_fingerprint),
            "masks": own.masks_sha256 == common.masks_sha256,
            # Which values are shared depends on which are personal, so their shapes are the problem to report.
            "shared training": has_other_shapes or own.shared_sha256 == common.shared_sha256,
        }
        for what, is_same in checks.items():
            if not is_same:
                raise UserStoreError(
                    f"{self.folder}: its states do not match the {what} of {common.base_path!r}. Use the run "
                    "that they were trained from, or another folder"
                )
        if has_other_shapes:
            raise UserStoreError(
                f"{self.folder} has states of {_difference(own.shapes, common.shapes)}. Use the run and the layers "
                "that they were trained with, or another folder"
            )
        for name in ("form", "task", "labels", "beta", "dtype"):
            own_value = getattr(own, name)
            wanted_value = getattr(common, name)
            if own_value != wanted_value:
                raise UserStoreError(
                    f"{self.folder} has states with {name} = {own_value!r}, but {wanted_value!r} is asked for. Use the "
                    "same, or another folder"
                )

    def _read(self, name: str, entry: UserEntry) -> State:
        path = self.folder / STATES / entry.file
        try:
            data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            if hashlib.sha256(data.numpy().data).hexdigest() != entry.sha256:
                raise UserStoreError(
                    f"{path} of user {name!r} is damaged: its SHA-256 is not the one in {INDEX}. Remove the user, or "
                    "train it again"
                )
            slots = TensorFile(path).slots
        except (OSError, TensorFileError) as error:
            raise UserStoreError(
                f"{path} of user {name!r} cannot be read: {error}. Remove the user, or train it again"
            ) from None
        # views of the file's bytes: allocating hundreds of small tensors would waste a fifth of their size
        state: State = {}
        for key, slot in slots.items():
            state[key] = _viewed(data[slot.offset : slot.offset + slot.nbytes], slot)
        self._require_shapes(state, f"{path} of user {name!r}")
        return state

    def _require_shapes(self, state: Mapping[str, Tensor], what: str) -> None:
        """Raise UserStoreError, about ``what``, unless a state has the names, shapes and dtype of the store."""
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        if shapes != self.common.shapes:
            raise UserStoreError(f"{what} does not fit {self.folder}: it has {_difference(shapes, self.common.shapes)}")
        for name, tensor in state.items():
            if tensor.dtype != _DTYPES[self.common.dtype]:
                raise UserStoreError(
                    f"{what} does not fit {self.folder}: {name} is {tensor.dtype}, not {self.common.dtype}"
                )

    @contextmanager
    def _writing(self) -> Iterator[dict[str, UserEntry]]:
        """Yield the entries under the lock, then write them to the index; delete unnamed files, also after an error."""
        with _writing_alone(self.folder):
            common, entries = _read_index(self.folder)
            self.require_common(common)
            try:
                yield entries
                _write_index(self.folder, self.common, entries)
                self._entries = entries
                self._stamp = _stamp(self.folder / INDEX)
            except BaseException:
                # The caller may have changed the entries: what stays is decided by the index on disk.
                _, entries = _read_index(self.folder)
                raise
            finally:
                named = {entry.file for entry in entries.values()}
                for path in (self.folder / STATES).iterdir():
                    if path.name not in named:
                        path.unlink()


@contextmanager
def _writing_alone(folder: Path) -> Iterator[None]:
    """Hold the lock of the store; turn an OSError, such as for a full disk, into a UserStoreError.

    Indexes that killed processes left unfinished are removed, because they name users who may be removed later.
    """
    try:
        with only_writer(folder / LOCK, f"write {folder}") as doubt:
            if not doubt:
                remove_partial(folder / INDEX)
            yield
    except OSError as error:
        raise UserStoreError(
            f"{folder} cannot be written: {error}. Free some space, or name a folder elsewhere"
        ) from error


def _stamp(path: Path) -> tuple[int, ...]:
    """Return a value that changes with every write of a file; empty for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return ()
    # An atomic write changes the inode; the time alone may be that of a write within the same tick of the clock.
    return status.st_ino, status.st_mtime_ns, status.st_size


def require_name(name: str) -> None:
    """Raise UserNameError for a name that is empty, a path, longer than 200 characters, or not printable."""
    why = ""
    if not name.strip():
        why = "is empty"
    elif "/" in name or "\\" in name or os.sep in name or name in (".", ".."):
        why = "is a path"
    elif len(name) > _MOST_CHARACTERS:
        why = f"has {len(name)} characters, more than {_MOST_CHARACTERS}"
    elif not name.isprintable():
        why = "has characters that cannot be printed"
    if why:
        raise UserNameError(f"the user name {name[:80]!r} {why}; give users plain names, without slashes")


def _write_index(folder: Path, common: Common, entries: dict[str, UserEntry]) -> None:
    users = {name: asdict(entries[name]) for name in sorted(entries)}
    table = {"format": FORMAT, "pst_ds_version": __version__, "common": asdict(common), "users": users}
    write_text_atomic(folder / INDEX, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True, slots=True)
class _Index:
    __pydantic_config__ = ConfigDict(strict=True)
    common: Common
    users: dict[str, UserEntry]


def _read_index(folder: Path) -> tuple[Common, dict[str, UserEntry]]:
    path = folder / INDEX
    try:
        data = path.read_bytes()
        table = json.loads(data)
        format_number = table.get("format")
        if format_number != FORMAT:
            raise UserStoreError(f"{path} has format {format_number!r}; this version reads {FORMAT}")
        index = TypeAdapter(_Index).validate_json(data)
        for name in index.users:
            require_name(name)
    except FileNotFoundError:
        raise UserStoreError(
            f"{path.absolute()} does not exist. Name a store that pst-ds users train has written"
        ) from None
    except (OSError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if type(error) is UserStoreError:  # but not UserNameError, of a name in the index
            raise
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise UserStoreError(f"{path} is damaged: {problem}. Use a copy, or train the users again") from None
    return index.common, index.users


def _viewed(data: Tensor, slot: Slot) -> Tensor:
    """Return the tensor in the bytes ``data`` of a file, without a copy if they are aligned, as we write them."""
    aligned = data if data.storage_offset() % slot.dtype.itemsize == 0 else data.clone()
    return aligned.view(slot.dtype).view(slot.shape)


def _difference(shapes: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> str:
    """Describe the first name, in alphabetical order, whose shape differs."""
    name = next(name for name in sorted({*shapes, *wanted}) if shapes.get(name) != wanted.get(name))
    return f"{name} of shape {shapes.get(name)}, and {wanted.get(name)} is wanted (None: it is missing)"
