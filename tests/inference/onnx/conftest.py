"""Graphs of one node, run by ONNX Runtime with our operators."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Array = np.ndarray
ABSENT = None


@pytest.fixture(scope="session")
def _compiler() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("the operators are compiled, and there is no C++ compiler")


@pytest.fixture(scope="session")
def run_node(_compiler: None) -> Callable[..., list[Array]]:
    return node_runner()


def node_runner() -> Callable[..., list[Array]]:
    """Return ``run(name, inputs, constants, attributes)``: arrays (or None) by position; it returns the outputs."""
    import ml_dtypes
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    from pst_ds.inference.onnx.operators import register_operators

    kinds = {
        np.dtype(np.float32): TensorProto.FLOAT,
        np.dtype(np.uint8): TensorProto.UINT8,
        np.dtype(np.int8): TensorProto.INT8,
        np.dtype(np.int64): TensorProto.INT64,
        np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    }

    def run(
        name: str, inputs: dict[int, Array | None], constants: dict[int, Array | None], attributes: dict[str, Any],
        outputs: int = 1, threads: int = 1,
    ) -> list[Array]:  # fmt: skip
        given = {**inputs, **constants}
        names = [f"i{i}" if given.get(i) is not None else "" for i in range(max(given) + 1)]
        node = helper.make_node(name, names, [f"y{i}" for i in range(outputs)], domain="pst_ds", **attributes)
        made = [
            helper.make_tensor(f"i{i}", kinds[a.dtype], a.shape, a.tobytes(), raw=True)
            for i, a in constants.items()
            if a is not None
        ]
        takes = [
            helper.make_tensor_value_info(f"i{i}", kinds[a.dtype], [None] * a.ndim)
            for i, a in inputs.items()
            if a is not None
        ]
        gives = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("pst_ds", 1)]
        graph = helper.make_graph([node], "one", takes, gives, made)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        register_operators(options)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, {f"i{i}": a for i, a in inputs.items() if a is not None}))

    assert onnx
    return run
