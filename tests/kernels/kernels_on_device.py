"""Kernels serve the pretended device, on which a launch is one launch, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pst_ds.core.kernels.triton import bit_sums, scan, table
from pst_ds.masks import layer_scores, update
from tests.device.pretended import DEVICE, PretendedTensor, counts, to_host

LAUNCHED: list[str] = []
"""Names of the kernels that were launched."""


def serve_the_device(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Launch kernels for the pretended device from now on; ``replace``: as ``monkeypatch.setattr``."""
    real = scan.launch

    def launch(kernel, grid, *args, **constants):
        if 0 not in grid:
            counts.launches += 1
            LAUNCHED.append(kernel.fn.__name__)
        assert all(isinstance(arg, PretendedTensor) for arg in args if isinstance(arg, torch.Tensor)), kernel
        real(kernel, grid, *(to_host(arg) if isinstance(arg, torch.Tensor) else arg for arg in args), **constants)

    LAUNCHED.clear()
    for module in (scan, bit_sums, table):
        replace(module, "launch", launch)
    for module in (layer_scores, bit_sums, update):
        replace(module, "serves", lambda device: device == DEVICE)
