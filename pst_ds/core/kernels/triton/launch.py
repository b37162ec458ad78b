"""Where Triton kernels run, and the only function that launches them."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pst_ds.core.kernels.triton.compilation import compile_first

Grid = tuple[int, ...]
LEAST_CAPABILITY = (8, 0)
"""Required compute capability of an NVIDIA GPU: bf16 arithmetic, and the target that the tests compile for."""


def is_interpreted() -> bool:
    """Return whether Triton runs kernels in Python on the CPU: ``TRITON_INTERPRET=1``."""
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


def launch(kernel: Any, grid: Grid, *args: object, num_warps: int = 4, fuse: bool = False, **constants: object) -> None:
    """Run ``kernel`` on ``grid`` on the device of its first argument, a tensor. Do nothing for an empty grid.

    Unless ``fuse``, products and sums are rounded separately, as in the C++ loops.
    """
    if 0 in grid:
        return
    assert isinstance(args[0], Tensor)
    device = args[0].device
    # Triton launches on the current device, which need not be that of the tensors
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        options = {"num_warps": num_warps, "enable_fp_fusion": fuse, **constants}
        if not is_interpreted():
            compile_first(kernel, args, options)
        kernel[grid](*args, **options)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy numbers from the host to ``device`` without waiting for it."""
    if device.type == "cuda":
        values = values.pin_memory()  # a copy from pageable memory would wait
    return values.to(device, non_blocking=True)


def programs_of(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how one launch serves many things in turn, the i-th by ``counts[i]`` programs.

    Returns the first program of each, (n + 1,) int64, and whom every program serves, (sum of counts,) int32.
    """
    starts = upload(torch.tensor([0, *accumulate(counts)]), device)
    # the search runs on the device: a list from the host would have as many entries as there are programs
    programs = torch.arange(sum(counts), device=device)
    return starts, torch.searchsorted(starts[1:], programs, right=True, out_int32=True)


def blocks(count: int, size: int) -> int:
    """Return how many blocks of ``size`` contain ``count``."""
    return -(-count // size)
