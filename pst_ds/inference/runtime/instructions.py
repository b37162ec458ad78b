"""Which instructions multiply weights of codes: in the native loop, and in graphs for ONNX Runtime."""

from __future__ import annotations

import os

from pst_ds.errors import InputError

LEVELS = ("portable", "avx2", "avx_vnni", "avx512", "amx")
"""Plain C++; AVX2 with FMA; AVX-VNNI beside them; AVX-512 with VBMI2 and VNNI; AMX with int8 beside it."""
VARIABLE = "PST_DS_INSTRUCTIONS"
"""Names one of :data:`LEVELS` in the environment; libraries read it once, when they are first asked."""


def as_asked(level: int) -> int:
    """Return ``level``, which a library has chosen.

    Raises InputError where the environment asks for another one, which that library therefore cannot have.
    """
    asked = os.environ.get(VARIABLE)
    if asked and asked != LEVELS[level]:
        raise InputError(
            f"the environment sets {VARIABLE} = {asked!r}, which this processor, its system or the compiler of our "
            f"native code does not have; unset it for {LEVELS[level]!r}, or set one of {', '.join(LEVELS[: level + 1])}"
        )
    return level
