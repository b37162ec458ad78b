"""C++ loops for CPU tensors, compiled at first use; everything that calls them has a torch twin for where they are not.

``native.cpp`` is compiled once for each machine and version with the system's C++ compiler and kept in
``$XDG_CACHE_HOME/pst_ds`` (``~/.cache/pst_ds``). Without a compiler, or with ``PST_DS_NATIVE=0`` in the environment,
the torch twins run: the same results, several times slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "pst_score_keys": (
        [_POINTER, _INT, _INT, _INT, _INT, *([_POINTER, _POINTER, _INT, _POINTER] * 2), *([_POINTER] * 4)],
        None,
    ),
    "pst_classify": (
        [_POINTER, _INT, ctypes.c_int32, ctypes.c_int32, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER],
        _INT,
    ),
    "pst_histogram": ([_POINTER, _INT, _INT, _INT, _INT, _POINTER], None),
    "pst_keep_n_of_m": ([_POINTER, _INT, _INT, _INT, _INT, _POINTER], None),
    "pst_keep_in_rows": ([_POINTER, _INT, _INT, _INT, _POINTER], None),
    "pst_set_bits": ([_POINTER, _POINTER, _INT], None),
    "pst_count_bits": ([_POINTER, _POINTER, _INT, _POINTER], None),
    "pst_checksum": ([_POINTER, _INT, _INT, _INT], ctypes.c_uint64),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had; a failed compilation warns once."""
    if os.environ.get("PST_DS_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        warnings.warn("no C++ compiler found: mask updates run in torch, several times slower", stacklevel=2)
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"native code cannot be built, mask updates run in torch, several times slower: {said}", stacklevel=2
        )
        return None
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


def _compiled(compiler: str) -> Path:
    """The library for this source, compiler and processor; compiled now if it is not in the cache."""
    key = hashlib.sha256("\n".join([_SOURCE.read_text(), compiler, *_FLAGS, _processor()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pst_ds"
    target = folder / f"native-{key}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write to
        folder = Path(tempfile.mkdtemp(prefix="pst_ds-"))
        target = folder / target.name
    with tempfile.TemporaryDirectory(dir=folder) as beside:  # ranks may compile at the same time; the last rename stays
        made = Path(beside) / target.name
        subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
        made.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
