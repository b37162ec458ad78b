"""Loader of all compiled C++ code for CPUs. Every caller has a torch version for machines without it.

A wheel has the sources of inference, which choose their instructions at run time. Any other source is compiled once per
machine and version with ``$CXX`` or the system's C++ compiler, and cached in
``$XDG_CACHE_HOME/pst_ds`` (``~/.cache/pst_ds``, see library_cache). Without a compiler, or with ``PST_DS_NATIVE=0`` in
the environment, the torch versions run: same results, several times slower. Triton kernels are in ``triton/``.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.core.kernels.host import cpu_facts
from pst_ds.core.kernels.library_cache import cache_folder, find_libraries, store_library

if TYPE_CHECKING:  # the loader works without torch
    from torch import Tensor

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno")
"""Flags of sources that choose their instructions when they are compiled, which wheels lack: training and torch's
decoding. Products and sums are rounded separately, as in torch, or masks would differ between processors."""
INT = ctypes.c_int64
POINTER = ctypes.c_void_p


class TENSOR:
    """Pointer for which callers pass a tensor, which lives until the call has returned, an address, or None."""

    @staticmethod
    def from_param(argument: "Tensor | int | None") -> ctypes.c_void_p:
        if argument is None or isinstance(argument, int):
            return ctypes.c_void_p(argument)
        return ctypes.c_void_p(argument.data_ptr())


_FOLDER = Path(__file__).resolve().parent
_PACKAGE = _FOLDER.parents[1]
Signature = tuple[list[type], type | None]
"""ctypes of the arguments and of the result."""


@dataclass(frozen=True, eq=False)
class NativeSource:
    """A C++ file in ``cpp/``, its functions, and what is slow without it. Changing a header recompiles it."""

    name: str
    """Path below ``cpp/``."""
    functions: dict[str, Signature]
    purpose: str
    flags: tuple[str, ...] = FLAGS
    may_flags: tuple[str, ...] = ()
    """Flags that are omitted if the compiler rejects them."""
    announce: bool = False
    """True to announce the compilation on stderr, because it takes longer than a moment."""

    @property
    def path(self) -> Path:
        return _FOLDER / "cpp" / self.name

    @property
    def prebuilt(self) -> Path:
        """Library built at installation. A checkout uses it unless a source is newer."""
        return _FOLDER / f"_{self.path.stem}.so"

    @property
    def sources(self) -> list[Path]:
        return [self.path, *sorted((_FOLDER / "cpp").rglob("*.hpp"))]


_MASKS = NativeSource(
    "masks.cpp",
    {
        "pst_score_keys": ([TENSOR, *([INT] * 4), *([TENSOR, TENSOR, INT, TENSOR] * 2), *([TENSOR] * 6)], None),
        "pst_classify": ([TENSOR, INT, ctypes.c_int32, ctypes.c_int32, INT, TENSOR, TENSOR, TENSOR, INT, TENSOR], INT),
        "pst_histogram": ([TENSOR, INT, INT, INT, INT, TENSOR], None),
        "pst_select": ([TENSOR, INT, INT, TENSOR], INT),
        "pst_keep_n_of_m": ([TENSOR, INT, INT, INT, INT, TENSOR], None),
        "pst_keep_in_rows": ([TENSOR, INT, INT, INT, TENSOR], None),
        "pst_set_bits": ([TENSOR, TENSOR, INT], None),
        "pst_count_bits": ([TENSOR, TENSOR, INT, TENSOR], None),
        "pst_checksum": ([TENSOR, INT, INT, INT], ctypes.c_uint64),
    },
    "mask updates",
)
_MERGES = NativeSource(
    "apply.cpp",
    {
        "pst_apply_bits": ([TENSOR, INT, TENSOR, INT], None),
        "pst_merge": (
            [*([TENSOR, INT] * 2), INT, INT, *([TENSOR] * 4), INT, ctypes.c_float, TENSOR, INT, ctypes.c_int],
            None,
        ),
    },
    "masks and updates on weights",
    may_flags=("-fopenmp",),
)


def load(source: NativeSource) -> ctypes.CDLL | None:
    """Return the compiled functions of ``source``, or None with a warning. The caller keeps the result."""
    if os.environ.get("PST_DS_NATIVE") == "0":
        return None
    try:
        return _library(source)
    except RuntimeError as error:
        warnings.warn(f"{error}: {source.purpose} run in torch, several times slower", stacklevel=2)
        return None


library = cache(partial(load, _MASKS))
"""Functions of mask updates, or None if they are not available; a failed compilation warns once."""
merges = cache(partial(load, _MERGES))
"""Functions that apply masks and updates to weights, or None."""


def library_file(source: NativeSource) -> Path:
    """Return the compiled library of ``source`` for another program to load. Raises RuntimeError."""
    try:
        return Path(_library(source)._name)
    except RuntimeError as error:
        raise RuntimeError(f"{source.purpose} cannot be built: {error}") from None


def _library(source: NativeSource) -> ctypes.CDLL:
    """Return the prebuilt or cached library, or compile it. Raises RuntimeError."""
    if _is_current(source.prebuilt, source.sources):
        with suppress(OSError, AttributeError):  # built for another machine, or from other sources
            return _declared(source.prebuilt, source.functions)
    try:
        compiler = _compiler()
        folder = cache_folder()
        name = f"{source.path.stem}-{_key(source, compiler)}"
        for path in find_libraries(folder, name):
            with suppress(OSError, AttributeError):  # a damaged file is compiled again
                return _declared(path, source.functions)
        return _declared(store_library(folder, name, _compiled(source, compiler)), source.functions)
    except (OSError, ValueError, AttributeError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise RuntimeError(f"native code cannot be built: {said}") from None


def _compiler() -> tuple[str, ...]:
    """Return the command that starts the C++ compiler. Raises FileNotFoundError."""
    words = shlex.split(os.environ.get("CXX", ""))
    if words:
        return tuple(words)
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return (path,)
    raise FileNotFoundError("no C++ compiler found. Install one, or set CXX")


def _is_current(built: Path, sources: list[Path]) -> bool:
    """Return whether ``built`` is newer than its sources, which it always is in an installation."""
    if not built.is_file():
        return False
    is_installed = any(_PACKAGE.parent.glob("pst_ds-*.dist-info"))
    return is_installed or built.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def _declared(path: Path, functions: dict[str, Signature]) -> ctypes.CDLL:
    """Load a library and declare the types of its functions."""
    loaded = ctypes.CDLL(str(path))
    for name, (arguments, result) in functions.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = result
    return loaded


def _key(source: NativeSource, compiler: tuple[str, ...]) -> str:
    """Return a hash of the source, compiler, flags, C library and processor, which determine the library."""
    texts = [path.read_text(encoding="utf-8") for path in source.sources]
    facts = cpu_facts()
    features = facts.get("flags") or facts.get("Features", "")  # on x86, and on arm; -march=native depends on them
    host = (_version(compiler), *platform.libc_ver(), features)
    parts = [*texts, *compiler, *source.flags, *source.may_flags, *host]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@cache
def _version(compiler: tuple[str, ...]) -> str:
    said = subprocess.run([*compiler, "--version"], check=False, capture_output=True, text=True).stdout
    return said.partition("\n")[0]


def _compiled(source: NativeSource, compiler: tuple[str, ...]) -> bytes:
    """Compile ``source`` and return the library. Raises OSError, CalledProcessError."""
    if source.announce:
        words = shlex.join(compiler)
        print(f"pst-ds: compiling {source.purpose} with {words}, once for this machine", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="pst_ds-") as scratch:
        output = Path(scratch) / "library.so"
        command = [*compiler, *source.flags, "-shared", "-fPIC", str(source.path), "-o", str(output)]
        try:
            subprocess.run([*command, *source.may_flags], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError:
            if not source.may_flags:
                raise
            subprocess.run(command, check=True, capture_output=True, text=True)
        return output.read_bytes()
