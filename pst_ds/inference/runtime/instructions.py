"""Instruction sets for products with quantised weights, in the native loop and in graphs for ONNX Runtime."""

from __future__ import annotations

import os

from pst_ds.errors import InputError

LEVELS = ("portable", "avx2", "avx_vnni", "avx512", "amx")
"""Plain C++; AVX2 with FMA; the same with AVX-VNNI; AVX-512 with VBMI2 and VNNI; the same with int8 AMX."""
VARIABLE = "PST_DS_INSTRUCTIONS"
"""Environment variable with one of :data:`LEVELS`. Libraries read it once, on first use."""


def as_asked(level: int) -> int:
    """Return ``level``, which a library has chosen.

    Raises InputError if the environment asks for another one, which the library therefore does not support.
    """
    asked = os.environ.get(VARIABLE)
    if asked and asked != LEVELS[level]:
        raise InputError(
            f"the environment sets {VARIABLE} = {asked!r}, which this processor, its system or the compiler of our "
            f"native code does not have. Unset it for {LEVELS[level]!r}, or set one of {', '.join(LEVELS[: level + 1])}"
        )
    return level
