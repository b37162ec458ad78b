"""C++ loops for CPU tensors, compiled at first use; everything that calls them has a torch twin for where they are not.

A source is compiled once for each machine and version with the system's C++ compiler and kept in
``$XDG_CACHE_HOME/pst_ds`` (``~/.cache/pst_ds``). Without a compiler, or with ``PST_DS_NATIVE=0`` in the environment,
the torch twins run: the same results, several times slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pst_ds.core.host import cpu_facts

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno")
INT, POINTER = ctypes.c_int64, ctypes.c_void_p
_PACKAGE = Path(__file__).resolve().parents[1]
BF16_HEADER = Path(__file__).with_name("bf16.hpp")
"""Included by sources of core and of runtime."""
Signature = tuple[list[type], type | None]
"""ctypes of the arguments, and of the result."""


@dataclass(frozen=True, eq=False)
class NativeSource:
    """One C++ file, its functions, and what is slow without it."""

    path: Path
    functions: dict[str, Signature]
    purpose: str
    flags: tuple[str, ...] = FLAGS
    may_flags: tuple[str, ...] = ()
    """Left out where the compiler refuses them."""
    headers: tuple[Path, ...] = ()
    prebuilt: Path | None = None
    """A library that an installation may have made; a checkout uses it unless a source is newer."""
    announce: bool = False
    """Say on stderr that it is being compiled: it takes more than a moment."""


_MASKS = NativeSource(
    Path(__file__).with_name("native.cpp"),
    {
        "pst_score_keys": (
            [POINTER, INT, INT, INT, INT, *([POINTER, POINTER, INT, POINTER] * 2), *([POINTER] * 6)],
            None,
        ),
        "pst_classify": (
            [POINTER, INT, ctypes.c_int32, ctypes.c_int32, INT, POINTER, POINTER, POINTER, INT, POINTER],
            INT,
        ),
        "pst_histogram": ([POINTER, INT, INT, INT, INT, POINTER], None),
        "pst_select": ([POINTER, INT, INT, POINTER], INT),
        "pst_keep_n_of_m": ([POINTER, INT, INT, INT, INT, POINTER], None),
        "pst_keep_in_rows": ([POINTER, INT, INT, INT, POINTER], None),
        "pst_set_bits": ([POINTER, POINTER, INT], None),
        "pst_count_bits": ([POINTER, POINTER, INT, POINTER], None),
        "pst_checksum": ([POINTER, INT, INT, INT], ctypes.c_uint64),
    },
    "mask updates",
    headers=(BF16_HEADER,),
)


_MERGES = NativeSource(
    Path(__file__).with_name("apply.cpp"),
    {
        "pst_apply_bits": ([POINTER, INT, POINTER, INT], None),
        "pst_merge": (
            [*([POINTER, INT] * 2), INT, INT, *([POINTER] * 4), INT, ctypes.c_float, POINTER, INT, ctypes.c_int],
            None,
        ),
    },
    "masks and updates on weights",
    may_flags=("-fopenmp",),
)


@cache
def library() -> ctypes.CDLL | None:
    """The functions of a mask update, or None where they cannot be had; a failed compilation warns once."""
    return load(_MASKS)


@cache
def merges() -> ctypes.CDLL | None:
    """Return what puts masks and updates on weights, as :func:`library` returns the functions of a mask update."""
    return load(_MERGES)


def load(source: NativeSource) -> ctypes.CDLL | None:
    """The compiled functions of ``source``, or None where they cannot be had, with a warning. Keep what it returns."""
    if os.environ.get("PST_DS_NATIVE") == "0":
        return None
    if source.prebuilt is not None and _is_current(source.prebuilt, (source.path, *source.headers)):
        try:
            return _declared(source.prebuilt, source.functions)
        except (OSError, AttributeError):  # made for another machine, or for other sources: compile here
            pass
    slow = f"{source.purpose} run in torch, several times slower"
    compiler = _compiler()
    if compiler is None:
        warnings.warn(f"no C++ compiler found: {slow}", stacklevel=2)
        return None
    try:
        return _declared(compiled(source, compiler), source.functions)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"native code cannot be built, {slow}: {said}", stacklevel=2)
        return None


def library_file(source: NativeSource) -> Path:
    """Return the shared library of ``source``, which somebody else loads; compiled if need be. Raises RuntimeError."""
    if source.prebuilt is not None and _is_current(source.prebuilt, (source.path, *source.headers)):
        return source.prebuilt
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError(f"{source.purpose} are compiled at first use, and there is no C++ compiler: install one")
    try:
        return compiled(source, compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise RuntimeError(f"{source.purpose} cannot be built: {said}") from None


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _is_current(built: Path, sources: tuple[Path, ...]) -> bool:
    """Return whether ``built`` was made from these sources. In an installation it was, whatever dates pip gave them."""
    if not built.is_file():
        return False
    is_installed = any(_PACKAGE.parent.glob("pst_ds-*.dist-info"))
    return is_installed or built.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def _declared(path: Path, functions: dict[str, Signature]) -> ctypes.CDLL:
    """The library with its functions given their types."""
    loaded = ctypes.CDLL(str(path))
    for name, (arguments, result) in functions.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


def compiled(source: NativeSource, compiler: str) -> Path:
    """The library for this source, compiler and processor; compiled now if it is not in the cache."""
    flags = (*source.flags, "-shared", "-fPIC")
    texts = [path.read_text(encoding="utf-8") for path in (source.path, *source.headers)]
    parts = [*texts, compiler, *flags, *source.may_flags, _instructions()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pst_ds"
    target = folder / f"{source.path.stem}-{key}.so"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write to
        folder = Path(tempfile.mkdtemp(prefix="pst_ds-"))
        target = folder / target.name
    if source.announce:
        print(f"pst-ds: compiling {source.purpose} with {compiler}, once for this machine", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several ranks may compile at once; the last rename stays
        made = Path(scratch) / target.name
        command = [compiler, *flags, str(source.path), "-o", str(made)]
        try:
            subprocess.run([*command, *source.may_flags], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError:
            if not source.may_flags:
                raise
            subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(target)
    return target


def _instructions() -> str:
    """Return the processor features that -march=native depends on."""
    facts = cpu_facts()
    return facts.get("flags") or facts.get("Features", "")
