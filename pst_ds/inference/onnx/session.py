"""ONNX Runtime sessions of exported graphs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pst_ds.errors import InputError
from pst_ds.inference.onnx.operators import exact_inputs, register_operators


def open_session(file: Path, threads: int = 0, *, exact: bool = False) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of ``file`` on the CPU, with our operators. ``threads``: 0 for all.

    ``exact``: use 16-bit activations in sparse products, whatever the file says. Raises InputError without ONNX
    Runtime, and if it rejects the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError("ONNX files are run by ONNX Runtime: pip install 'pst-ds[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    register_operators(options)
    try:
        with exact_inputs() if exact else nullcontext():
            return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class per error code and no common base
        raise InputError(f"{file}: ONNX Runtime {onnxruntime.__version__} refuses it: {error}") from None
