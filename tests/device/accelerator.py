"""The pretended device as DeepSpeed's accelerator: streams that run at once, gloo, and the CPU's operators.

Every rank has one device, which it calls "gpu:0", as on hosts with one card each. DeepSpeed is told that the device is
not synchronized with the host, so it takes the paths that it takes on a card: streams, events, ``record_stream``.
Collectives need nothing: those of torch are operators, which the pretended device computes on the tensors of the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from .pretended import DEVICE, NAME, PretendedTensor, counts, pretended, streams


class _Stream:
    """Work given to any stream is done at once, see :class:`tests.device.pretended.Streams`."""

    def wait_stream(self, other: _Stream) -> None:
        streams.wait(other)

    def wait_event(self, event: _Event) -> None: ...

    def synchronize(self) -> None:
        streams.wait(self)


class _Event:
    def __init__(self, **_: Any): ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class PretendedAccelerator(CPU_Accelerator):  # type: ignore[misc]
    """What differs from a CPU."""

    Stream, Event = _Stream, _Event

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = NAME, "gloo"
        self._stream = streams.current = _Stream()

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def device_name(self, device_index: int | str | None = None) -> str:
        return NAME if device_index is None else str(DEVICE)

    def device(self, device_index: int | None = None) -> torch.device:
        return DEVICE

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return str(DEVICE)

    def device_count(self) -> int:
        return 1

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, streams.current = streams.current, stream
        yield
        streams.current = before

    def current_stream(self, device_index: int | None = None) -> Any:
        return streams.current

    def default_stream(self, device_index: int | None = None) -> _Stream:
        return self._stream

    def synchronize(self, device_index: int | None = None) -> None:
        streams.wait(streams.current)

    def memory_allocated(self, device_index: int | None = None) -> int:
        return counts.live_bytes

    memory_cached = memory_reserved = memory_allocated

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return counts.peak_bytes

    max_memory_cached = max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        counts.peak_bytes = counts.live_bytes

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
        return {"allocated_bytes.all.current": counts.live_bytes, "allocated_bytes.all.peak": counts.peak_bytes}

    def create_op_builder(self, op_name: str) -> None:
        """There is none: the CPU's collectives in shared memory would be compiled at the first call, for minutes, in
        which the other ranks wait at a lock file."""

    def on_accelerator(self, tensor: Tensor) -> bool:
        return isinstance(tensor, PretendedTensor)

    FloatTensor = property(lambda self: _maker(torch.float32))
    ByteTensor = property(lambda self: _maker(torch.uint8))


def _maker(dtype: torch.dtype) -> Callable[[list[Any]], Tensor]:
    return lambda values: torch.tensor(values, dtype=dtype).to(DEVICE)


def with_device(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as a rank whose DeepSpeed computes on the pretended device. The process is to end afterwards."""
    os.environ["LOCAL_RANK"] = "0"
    os.environ.pop("DS_ACCELERATOR", None)
    set_accelerator(PretendedAccelerator())
    with pretended():
        return function(*args)
