"""Check a file that a verb writes at its end, before the work starts."""

from pathlib import Path

from pst_ds.atomic_files import require_writable
from pst_ds.errors import InputError


def require_file_place(path: Path, option: str) -> None:
    """Raise InputError unless ``path`` can become a file: its folder exists, and both may be written.

    ``option``: the option that named it, such as "--out".
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder. Name a file to write")
    # not created: a folder that does not exist is more often misspelt than new
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist. Create it, or name another file")
    require_writable(path, f"{option} {path}")
