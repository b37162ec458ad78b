"""Products of 8-bit activations return the same bits with every set of instructions."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pst_ds.core.quantization import Grid
from pst_ds.runtime.native_loop import LEVELS
from pst_ds.storage_format import packed_format
from tests.inference.onnx.conftest import node_runner
from tests.inference.onnx.test_operators import product, sparse
from tests.runtime.test_native_loop import supported_levels

PRODUCTS = [
    (rows, columns, tokens, bits, density)
    for rows, columns, tokens in [(7, 64, 5), (40, 130, 33), (70, 384, 50), (33, 61, 7), (17, 4200, 20)]
    for bits in (8, 4)
    for density in (0.2, 0.5, 1.0)
]


def results(run_node) -> list[np.ndarray]:
    """Return the results of :data:`PRODUCTS`."""
    found = []
    for rows, columns, tokens, bits, density in PRODUCTS:
        draw = torch.Generator().manual_seed(rows)
        x = torch.randn(tokens, columns, generator=draw)
        x[:, : columns // 2] *= 30
        x[tokens // 2] = 0.0
        bias = torch.randn(rows, generator=draw)
        form = packed_format("bitmask", Grid(bits, None))
        y, _ = product(run_node, x, form, sparse(rows, columns, density), bias, activation_bits=8)
        found.append(y.numpy())
    return found


@pytest.mark.parametrize("level", supported_levels())
def test_every_level_returns_the_bits_of_the_best(run_node, tmp_path, level):
    out = tmp_path / "results.npz"
    # a process of its own, because the level is fixed at first use
    command = [sys.executable, "-m", "tests.inference.onnx.test_operators_levels", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PST_DS_INSTRUCTIONS": LEVELS[level]})
    with np.load(out) as found:
        for index, expected in enumerate(results(run_node)):
            np.testing.assert_array_equal(found[f"arr_{index}"], expected, err_msg=str(PRODUCTS[index]))


if __name__ == "__main__":
    np.savez(sys.argv[1], *results(node_runner()))
