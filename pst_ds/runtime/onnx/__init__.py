"""Operators for ONNX Runtime that multiply with sparse weights: ``register_operators(options)`` before a session.

Graphs that use them are written by ``pst-ds export --format onnx``. They need a CPU and ONNX Runtime 1.18 or newer.
"""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pst_ds.core.native import BF16_HEADER, NativeSource, library_file
from pst_ds.runtime.instructions import as_asked

_FOLDER = Path(__file__).parent
SOURCE = NativeSource(
    _FOLDER / "operators.cpp",
    {"pst_onnx_level": ([], ctypes.c_int), "pst_onnx_exact_inputs": ([ctypes.c_int], None)},
    "operators for ONNX Runtime",
    flags=("-std=c++17", "-O3", "-Wno-psabi", "-fno-math-errno", "-fvisibility=hidden"),
    headers=(
        *sorted(_FOLDER.glob("*.hpp")),
        *sorted((_FOLDER.parent / "decoder").glob("*.hpp")),
        *sorted((_FOLDER.parent / "lanes").glob("*.hpp")),
        *(_FOLDER.parent / "kernels" / name for name in ("common.hpp", "tile_config.hpp")),
        BF16_HEADER,
    ),
    prebuilt=_FOLDER.parent / f"_onnx_operators{sysconfig.get_config_var('EXT_SUFFIX')}",
    announce=True,
)


def operator_library() -> Path:
    """Return the shared library to register, built now if no installation made it. Raises RuntimeError if it cannot be.

    Any program that runs ONNX Runtime loads it, in any language; it needs neither Python nor this package.
    """
    return library_file(SOURCE)


def register_operators(options: Any) -> None:
    """Let sessions made with ``options``, an ``onnxruntime.SessionOptions``, run graphs with sparse weights.

    Raises InputError where the environment asks for instructions that are not supported.
    """
    library = str(operator_library())
    as_asked(ctypes.CDLL(library).pst_onnx_level())
    options.register_custom_ops_library(library)


@contextmanager
def exact_inputs() -> Iterator[None]:
    """Let sessions that are opened inside take inputs of 16 bits where their graph allows 8, in all of the process."""
    library = ctypes.CDLL(str(operator_library()))
    library.pst_onnx_exact_inputs(1)
    try:
        yield
    finally:
        library.pst_onnx_exact_inputs(0)
