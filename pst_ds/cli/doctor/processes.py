"""Checks of ``pst-ds doctor`` that may crash or hang, and therefore run in separate processes.

``python -m pst_ds.cli.doctor.processes native | gather BACKEND`` is such a process; its last line is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pst_ds.cli.doctor.checks import Finding, torch_problem

if TYPE_CHECKING:
    # functions import it, so that doctor can report a torch that cannot be imported
    import torch
    from torch import Tensor

_GATHER_FIX = (
    "check that 127.0.0.1 and the host's name can be reached (ping $(hostname)); GLOO_SOCKET_IFNAME or "
    "NCCL_SOCKET_IFNAME=lo names the network to use"
)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a process ended."""

    last_line: str
    """Last line that it printed; "" if it printed nothing."""
    problem: str
    """Why it failed, with its time; "" if it did not."""
    seconds: str
    """Its time, such as "4.2 s"."""


def native_code(limit_seconds: float) -> Iterator[Finding]:
    """Check that the C++ code of mask updates, packing, layers and decoding compiles and agrees with torch.

    Yields nothing if torch cannot be imported.
    """
    if torch_problem():
        # a failure of the accelerator's check, which has the right advice
        return
    outcome = _run(["native"], {}, limit_seconds)
    if outcome.problem:
        yield Finding("native code", "fail", outcome.problem, "set PST_DS_NATIVE=0 until it is fixed")
        return
    report = json.loads(outcome.last_line)
    if report["wrong"]:
        text = f"{', '.join(report['wrong'])} differ from torch"
        yield Finding("native code", "fail", text, "set PST_DS_NATIVE=0, and report this compiler")
    elif report["missing"] and os.environ.get("PST_DS_NATIVE") == "0":
        text = "switched off by PST_DS_NATIVE=0: torch is several times slower"
        yield Finding("native code", "warn", text, "unset PST_DS_NATIVE")
    elif report["missing"]:
        text = f"missing for {', '.join(report['missing'])}: {report['warning']}"
        yield Finding("native code", "warn", text, "install a C++ compiler (apt install g++), or name one in CXX")
    else:
        text = f"compiled and equal to torch, {outcome.seconds}; kernels for {report['level']}"
        yield Finding("native code", "ok", f"{', '.join(report['checked'])} {text}")


def two_ranks(limit_seconds: float) -> Iterator[Finding]:
    """Check an all-gather of two ranks over gloo on the CPU, and over NCCL if there are two GPUs.

    Yields nothing if torch cannot be imported.
    """
    if torch_problem():
        return
    import torch

    # DeepSpeed would choose a GPU, which gloo does not use
    yield _gather("gloo", {"DS_ACCELERATOR": "cpu"}, limit_seconds)
    if torch.cuda.device_count() > 1:
        yield _gather("nccl", {}, limit_seconds)
    elif torch.cuda.is_available():
        yield Finding("two ranks over nccl", "ok", "skipped: NCCL needs one GPU per rank, and there is only one")


def _gather(backend: str, environ: Mapping[str, str], limit_seconds: float) -> Finding:
    """Check an all-gather of two ranks over ``backend``, with ``environ`` added to the environment."""
    name = f"two ranks over {backend}"
    outcome = _run(["gather", backend], environ, limit_seconds)
    if outcome.problem:
        return Finding(name, "fail", outcome.problem, _GATHER_FIX)
    return Finding(name, "ok", f"each received what both sent, through DeepSpeed, {outcome.seconds}")


def _run(arguments: list[str], environ: Mapping[str, str], limit_seconds: float) -> _Outcome:
    """Run this module in a process, for at most ``limit_seconds``. No child survives."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdin=subprocess.DEVNULL,
            # a file, because a full pipe would stop the process, and a child could keep it open after its end
            stdout=output,
            stderr=output,
            env={**os.environ, **environ},
            # so that its children, such as the ranks and the compiler, can be killed with it
            start_new_session=True,
        )
        ending = "did not finish"
        try:
            ending = _ending(process.wait(limit_seconds))
        except subprocess.TimeoutExpired:
            is_finished = False
        else:
            is_finished = True
        finally:
            # also after Ctrl-C, which a process in another session does not get
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        last_line = _last_line(output.read())
    seconds = f"{time.monotonic() - start:.1f} s"
    if process.returncode == 0:
        return _Outcome(last_line, problem="", seconds=seconds)
    shown = ""
    if is_finished and last_line:
        # the error; the last line of a process that was killed here says nothing about it
        shown = f" ({last_line[:200]})"
    return _Outcome(last_line, problem=f"{ending}{shown} after {seconds}", seconds=seconds)


def _ending(exit_code: int) -> str:
    """Describe the exit code of a process, which is negative for one that a signal has killed."""
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"failed with exit code {exit_code}"


def _last_line(output: bytes) -> str:
    """Return the last line that is not empty; "" if there is none."""
    for line in reversed(output.decode(errors="replace").splitlines()):
        if line.strip():
            return line.strip()
    return ""


def _native() -> dict[str, object]:
    """Load all native code, compiling it if it is not in the cache, and compare it with torch."""
    import torch

    from pst_ds.core import kernels as masks
    from pst_ds.formats import rows
    from pst_ds.runtime import native as kernels
    from pst_ds.runtime import native_loop as decoder

    with warnings.catch_warnings(record=True) as caught:
        # a library that cannot be compiled warns why, which the parent reports
        warnings.simplefilter("always")
        libraries = {
            "mask updates": masks.library(),
            "packing": rows.library(),
            "sparse layers": kernels.library(),
            "decoding": decoder.library(),
        }
    is_right = {"mask updates": _counts_bits, "packing": _packs, "sparse layers": _multiplies, "decoding": _decodes}
    checked: list[str] = []
    missing: list[str] = []
    wrong: list[str] = []
    for name, library in libraries.items():
        if library is None:
            missing.append(name)
            continue
        checked.append(name)
        if not is_right[name](torch.Generator().manual_seed(0)):
            wrong.append(name)
    warning = ""
    if caught:
        # the rest is what the compiler said, which would fill a screen
        warning = str(caught[0].message).partition("\n")[0][:200]
    return {
        "checked": checked,
        "missing": missing,
        "wrong": wrong,
        "level": kernels.LEVELS[kernels.best_level()],
        "warning": warning,
    }


def _counts_bits(draw: torch.Generator) -> bool:
    """Return whether the library of mask updates counts bits as Python does."""
    import torch

    from pst_ds.core.bits import count_bits

    # odd, so that the loop over words has a remainder
    packed = torch.randint(256, (999,), generator=draw, dtype=torch.uint8)
    _, kept = count_bits(packed, packed)
    return int(kept) == sum(byte.bit_count() for byte in packed.tolist())


def _packs(draw: torch.Generator) -> bool:
    """Return whether a packed weight is unpacked unchanged."""
    import torch

    from pst_ds.formats import BitmaskFormat

    weight = _sparse_weight(draw)
    layout = BitmaskFormat()
    return torch.equal(layout.unpack(layout.pack(weight, None, "weight")), weight)


def _multiplies(draw: torch.Generator) -> bool:
    """Return whether the product with a packed weight is that with the dense one."""
    import torch

    from pst_ds.formats import BitmaskFormat
    from pst_ds.runtime import native as kernels

    weight = _sparse_weight(draw)
    x = torch.randn(5, weight.shape[1], generator=draw)
    parts = BitmaskFormat().pack(weight, None, "weight")
    y = kernels.bitmask_linear(
        x,
        values=parts["compressed"],
        bitmask=parts["bitmask"],
        row_offsets=parts["row_offsets"],
        bias=None,
        level=kernels.best_level(),
    )
    # the sums are in another order, and 256 products of fp32 differ by less than this
    return torch.allclose(y, x @ weight.t(), rtol=1e-4, atol=1e-4)


def _decodes(draw: torch.Generator) -> bool:
    """Return whether the decoder's product with int8 values is that with the same values as floats."""
    import torch

    from pst_ds.runtime import native_loop as decoder

    weight = _sparse_weight(draw)
    x = torch.randn(5, weight.shape[1], generator=draw)
    codes = weight.sign().to(torch.int8)
    scales = torch.ones(codes.shape[0], 1, dtype=torch.bfloat16)
    matrix = decoder.Matrix.of_codes(codes, scales, bits=8, group=0)
    # more than for fp32, because the decoder quantises inputs to 13 to 16 bits
    return torch.allclose(matrix.multiply(x), x @ codes.t().float(), rtol=1e-3, atol=1e-2)


def _sparse_weight(draw: torch.Generator) -> Tensor:
    """Draw a weight (96, 256) of 70 % sparsity."""
    import torch

    weight = torch.randn(96, 256, generator=draw)
    return weight * (torch.rand(96, 256, generator=draw) > 0.7)


def _two_ranks(backend: str) -> None:
    """Start two ranks that exchange values; raise the error of the first that failed."""
    import torch.multiprocessing

    with socket.socket() as probe:
        # port 0 is any free one; another program could take it before the ranks do, which is unlikely
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.multiprocessing.spawn(_rank, (backend,), nprocs=2)


def _rank(rank: int, backend: str) -> None:
    """Join the other rank as training does, and check the values received. Collective."""
    import torch
    import torch.distributed as dist

    from pst_ds.parallel.launch import device_of, init_distributed, launch_environment
    from pst_ds.parallel.ranks import all_gather_numbers, all_gather_objects

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    launch = launch_environment()
    init_distributed(launch)
    # one gather of a tensor on the device, and one of objects, which training uses, too
    ranks = all_gather_numbers(torch.tensor(rank, device=device_of(launch))).tolist()
    names = all_gather_objects(f"rank {rank}")
    gathered = (ranks, names, dist.get_backend())
    if gathered != ([0, 1], ["rank 0", "rank 1"], backend):
        raise RuntimeError(f"rank {rank} gathered {gathered}")
    # a rank that ends early would break the connections that the other still uses
    dist.barrier()
    # gloo's threads may abort a process that cleans up
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "native":
        print(json.dumps(_native()), flush=True)
    else:
        _two_ranks(sys.argv[2])
