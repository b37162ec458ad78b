"""What ``pst-ds doctor`` tries in processes of their own, which may crash or hang: native code, two ranks that meet.

``python -m pst_ds.cli.doctor.processes native | gather`` is such a process; its last line is JSON.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any

from pst_ds.cli.doctor.checks import Finding

_LOOK_SECONDS = 0.05
_COMPILER_FIX = "install a C++ compiler (apt install g++), or name one in CXX"
_GATHER_FIX = (
    "see that 127.0.0.1 and the host's own name can be reached (ping $(hostname)); GLOO_SOCKET_IFNAME or "
    "NCCL_SOCKET_IFNAME=lo names the network to use"
)


def native_code(limit_seconds: float) -> Iterator[Finding]:
    """Whether the C++ of mask updates, packing and sparse layers compiles and computes as torch does."""
    (outcome,), seconds = _run(["native"], [{}], limit_seconds)
    found = _last_json(outcome)
    if found is None:
        yield Finding(
            "native code", "fail", f"{_end_of(outcome)} after {seconds:.1f} s", "set PST_DS_NATIVE=0 meanwhile"
        )
    elif found["wrong"]:
        text = f"{', '.join(found['wrong'])} differ from torch"
        yield Finding("native code", "fail", text, "set PST_DS_NATIVE=0, and report the compiler")
    elif found["missing"]:
        text, fix = f"not there for {', '.join(found['missing'])}: {found['said']}", _COMPILER_FIX
        if os.environ.get("PST_DS_NATIVE") == "0":
            text, fix = "switched off by PST_DS_NATIVE=0: torch is several times slower", "unset PST_DS_NATIVE"
        yield Finding("native code", "warn", text, fix)
    else:
        names = ", ".join(found["checked"])
        text = f"{names} compiled and as torch has them, {seconds:.1f} s; kernels for {found['level']}"
        yield Finding("native code", "ok", text)


def two_ranks(limit_seconds: float) -> Iterator[Finding]:
    """A gather of two ranks over gloo on the CPU; over NCCL too where there are two GPUs."""
    import torch

    yield _gather("gloo", {"DS_ACCELERATOR": "cpu"}, limit_seconds)
    if torch.cuda.device_count() > 1:
        yield _gather("nccl", {}, limit_seconds)
    elif torch.cuda.is_available():
        yield Finding("two ranks over nccl", "ok", "not tried: there is one GPU, and NCCL takes one for each rank")


def _gather(backend: str, environ: Mapping[str, str], limit_seconds: float) -> Finding:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    outcomes, seconds = _run(["gather"], ranks, limit_seconds)
    name = f"two ranks over {backend}"
    # the one that failed first, and not the one that waited for it
    for rank, outcome in sorted(enumerate(outcomes), key=lambda item: item[1][0] is None):
        found = _last_json(outcome)
        if found is None:
            return Finding(name, "fail", f"rank {rank} {_end_of(outcome)} after {seconds:.1f} s", _GATHER_FIX)
        if found != {"backend": backend, "numbers": [0, 1], "names": ["rank 0", "rank 1"]}:
            return Finding(name, "fail", f"rank {rank} gathered {found}", _GATHER_FIX)
    return Finding(name, "ok", f"each gathered what both sent, through DeepSpeed, {seconds:.1f} s")


Outcome = tuple[int | None, str]
"""Exit code of a process, None for one that was ended when time was up; and all it wrote."""


def _run(
    arguments: Sequence[str], environs: Sequence[Mapping[str, str]], limit_seconds: float
) -> tuple[list[Outcome], float]:
    """Run this module once for each of ``environs``, all at a time; nothing of them is left afterwards.

    The outcomes, and how long it took. When one fails the others have no one to meet, and are ended.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in environs]
        started: list[subprocess.Popen[bytes]] = []
        try:
            started += (_started(arguments, e, output) for e, output in zip(environs, outputs, strict=True))
            while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
                if time.monotonic() - start > limit_seconds:
                    break
                time.sleep(_LOOK_SECONDS)
            codes = [process.poll() for process in started]
        finally:
            for process in started:
                _end(process)
        for output in outputs:
            output.seek(0)
        texts = [output.read().decode(errors="replace") for output in outputs]
    return list(zip(codes, texts, strict=True)), time.monotonic() - start


def _started(arguments: Sequence[str], environ: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    command, environ = [sys.executable, "-m", __name__, *arguments], {**os.environ, **environ}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Of a process all that it started too, such as a compiler."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_json(outcome: Outcome) -> dict[str, Any] | None:
    code, text = outcome
    if code != 0:
        return None
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def _end_of(outcome: Outcome) -> str:
    code, text = outcome
    if code is None:
        return "did not come to an end"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{how} ({said[-1][:200]})" if said else how


def _native() -> dict[str, Any]:
    """Loads all native code, compiling what is not in the cache, and holds it against torch."""
    import warnings

    import torch

    from pst_ds.core import native as masks
    from pst_ds.core.bits import count_bits
    from pst_ds.core.formats import FORMATS, rows
    from pst_ds.runtime import native as kernels

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        libraries = {"mask updates": masks.library(), "packing": rows.library(), "sparse layers": kernels.library()}
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=draw) * (torch.rand(96, 256, generator=draw) > 0.7)
    x, bits = torch.randn(5, 256, generator=draw), torch.randint(256, (999,), generator=draw, dtype=torch.uint8)
    parts = FORMATS["bitmask"].pack(weight, None, "weight")
    as_torch = {
        "mask updates": count_bits(bits, bits)[1] == sum(int(byte).bit_count() for byte in bits.tolist()),
        "packing": torch.equal(FORMATS["bitmask"].unpack(parts), weight),
        "sparse layers": libraries["sparse layers"] is None or _multiplies(kernels, x, weight, parts),
    }
    return {
        "checked": [name for name, library in libraries.items() if library is not None],
        "missing": [name for name, library in libraries.items() if library is None],
        "wrong": [name for name, holds in as_torch.items() if not holds],
        "level": kernels.LEVELS[kernels.best_level()],
        "said": str(caught[0].message).partition("\n")[0][:200] if caught else "",
    }


def _multiplies(kernels: Any, x: Any, weight: Any, parts: dict[str, Any]) -> bool:
    import torch

    values, bits, offsets = (parts[name] for name in ("compressed", "bitmask", "row_offsets"))
    y = kernels.bitmask_linear(x, values, bits, offsets, None, kernels.best_level())
    return torch.allclose(y, x @ weight.t(), rtol=1e-4, atol=1e-4)


def _gathered() -> dict[str, Any]:
    """Joins the other rank as a training does; what both sent."""
    import torch
    import torch.distributed as dist

    from pst_ds.parallel.launch import device_of, init_distributed, launch_environment
    from pst_ds.parallel.ranks import all_gather_numbers, all_gather_objects

    launch = launch_environment()
    init_distributed(launch)
    own = torch.tensor(launch.rank, device=device_of(launch))
    numbers, names = all_gather_numbers(own).tolist(), all_gather_objects(f"rank {launch.rank}")
    dist.barrier()
    return {"backend": dist.get_backend(), "numbers": numbers, "names": names}


if __name__ == "__main__":
    print(json.dumps({"native": _native, "gather": _gathered}[sys.argv[1]]()), flush=True)
    os._exit(0)  # gloo's threads may abort a process that cleans up
