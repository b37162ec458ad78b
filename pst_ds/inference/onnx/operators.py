"""ONNX Runtime: operators that multiply with sparse weights, and sessions with them.

``pst-ds export --format onnx`` writes graphs that use the operators. They need a CPU and ONNX Runtime 1.18 or newer.
Call ``register_operators(options)`` before creating a session.
"""

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.core.kernels import NativeSource, library_file
from pst_ds.errors import InputError
from pst_ds.runtime.native_loop import as_asked

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

SOURCE = NativeSource(
    "onnx/operators.cpp",
    {"pst_onnx_level": ([], ctypes.c_int), "pst_onnx_exact_inputs": ([ctypes.c_int], None)},
    "operators for ONNX Runtime",
    # -fvisibility=hidden: only what ONNX Runtime looks up is visible to the programs that load the library
    flags=("-std=c++17", "-O3", "-Wno-psabi", "-fno-math-errno", "-fvisibility=hidden"),
    announce=True,
)


def operator_library() -> Path:
    """Return the shared library to register, built if necessary. Raises RuntimeError.

    Any program that runs ONNX Runtime can load it, in any language; it needs neither Python nor this package.
    """
    return library_file(SOURCE)


def register_operators(options: "SessionOptions") -> None:
    """Let sessions with ``options`` run graphs with sparse weights. Raises InputError for unsupported instructions."""
    library = str(operator_library())
    # the environment may ask for instructions that this processor does not have
    as_asked(ctypes.CDLL(library).pst_onnx_level())
    options.register_custom_ops_library(library)


def open_session(file: Path, threads: int = 0, *, exact: bool = False) -> "InferenceSession":
    """Return an ``onnxruntime.InferenceSession`` of ``file`` on the CPU, with our operators. ``threads``: 0 for all.

    ``exact``: use 16-bit activations in sparse products, even if the file does not. Raises InputError.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError("ONNX files need ONNX Runtime: pip install 'pst-ds[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    register_operators(options)
    use_exact_inputs = ctypes.CDLL(str(operator_library())).pst_onnx_exact_inputs
    use_exact_inputs(int(exact))  # read when a session is created, by any in this process
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class per error code and no common base
        raise InputError(f"{file}: ONNX Runtime {onnxruntime.__version__} rejects it: {error}") from None
    finally:
        use_exact_inputs(0)
