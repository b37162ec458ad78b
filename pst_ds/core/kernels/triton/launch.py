"""Where Triton kernels run, and the one place that launches them."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

Grid = tuple[int, ...]
LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU: bf16 arithmetic, and what the kernels are compiled for in the tests."""


def is_interpreted() -> bool:
    """Return whether Triton was told to run kernels in Python, on the CPU: ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(device: torch.device) -> bool:
    """Return whether kernels run on tensors of ``device``; never with ``PST_DS_TRITON=0`` in the environment."""
    if os.environ.get("PST_DS_TRITON") == "0" or not _has_triton():
        return False
    if device.type == "cpu":
        return is_interpreted()
    return device.type == "cuda" and torch.version.hip is None and _is_capable(device)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _is_capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def launch(kernel: Any, grid: Grid, *args: Any, num_warps: int = 4, fuse: bool = False, **constants: Any) -> None:
    """Run ``kernel`` on ``grid`` where its first argument, a tensor, is; on an empty grid do nothing.

    Unless ``fuse``, products and sums are rounded apart, as in the loops for CPUs.
    """
    if 0 in grid:
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=fuse, **constants)


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` hold ``count``."""
    return -(-count // size)
