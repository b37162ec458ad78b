"""What the sections of ``make gpu`` share: the device, sizes, predicted machine, clocks and models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst
from pst_ds.planning.machines import MACHINES, Machine
from tools.bench.timing import medians
from tools.gpu.cards import machine_of_card

Row = dict[str, Any]
"""``what`` and ``measured`` (False: a failed check); ``predicted``, and ``why`` or how to fix it, where known."""
FLUSHED_BYTES = 512 << 20
"""Bytes that replace the L2 cache, of up to 126 MB, and keep the device busy while the host launches."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 2
    heads: int = 32
    vocabulary: int = 32000
    tokens: int = 4096
    updates: tuple[int, ...] = (1024, 4096, 8192)
    """Sides of the matrices whose masks are updated; those of the first are also compared with the CPU's."""
    matrix: tuple[int, int] = (11008, 4096)
    """Shape of the matrix whose kernels and products are timed."""
    repeats: int = 20
    launches: int = 500
    patterns: tuple[str, ...] = ("matrix", "stack", "global", "row", "2:4", "16x1")
    """Patterns whose masks are compared with the CPU's."""


TINY = Sizes(64, 96, 1, 4, 50, 16, (32, 48, 64), (96, 64), 2, 2, ("matrix",))


@dataclass(frozen=True)
class Bench:
    """Device and sizes of a section."""

    device: torch.device
    sizes: Sizes

    @cached_property
    def machine(self) -> Machine | None:
        """Rates that the plan assumes of this device; None if it has none for the card."""
        on_cuda = self.device.type == "cuda"
        return machine_of_card(torch.cuda.get_device_name()) if on_cuda else MACHINES["cpu"]

    def predicted(self, of: Callable[[Machine], float]) -> float | None:
        return None if self.machine is None else of(self.machine)

    @cached_property
    def flushed(self) -> Tensor:
        return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the median seconds of ``run`` by the device's clock, with a cold L2 cache, after two warm-up runs."""
        if self.device.type != "cuda":
            return medians({"run": run}, self.sizes.repeats, warmup=2)["run"]
        found = []
        for _ in range(2 + self.sizes.repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(found[2:])

    def host_seconds(self, run: Callable[[], object]) -> float:
        """Return the host's seconds per call of ``run``, which launches work that is shorter than its launch."""
        run()
        self.wait()
        start = time.perf_counter()
        for _ in range(self.sizes.launches):
            run()
        return (time.perf_counter() - start) / self.sizes.launches

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def pruned_layers(side: int, pattern: str = "matrix", num_shards: int | None = None) -> nn.Module:
    """Return three bf16 layers of (side, side) on the CPU with nonzero factors, the same in every call."""
    torch.manual_seed(3)
    model = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(3)]).bfloat16()
    config = PSTConfig(pattern=pattern, modules_to_save=(), target_modules=("0", "1", "2"))
    inject_pst(model, config, num_shards=num_shards)
    for param in model.parameters():
        if param.requires_grad:
            param.data = (torch.randn(param.shape) * 0.2).to(param.dtype)
    return model
