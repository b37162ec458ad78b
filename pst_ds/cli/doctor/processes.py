"""Checks of ``pst-ds doctor`` that may crash or hang, and therefore run in separate processes.

``python -m pst_ds.cli.doctor.processes native | gather BACKEND`` is such a process; its last line is JSON.
"""

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

from pst_ds.cli.doctor.checks import Finding

_GATHER_FIX = (
    "check that 127.0.0.1 and the host's name can be reached (ping $(hostname)); GLOO_SOCKET_IFNAME or "
    "NCCL_SOCKET_IFNAME=lo names the network to use"
)


def native_code(limit_seconds: float) -> Iterator[Finding]:
    """Check that the C++ code of mask updates, packing, layers and decoding compiles and agrees with torch."""
    last_line, problem, seconds = _run(["native"], {}, limit_seconds)
    if problem:
        yield Finding("native code", "fail", problem, "set PST_DS_NATIVE=0 until it is fixed")
        return
    report = json.loads(last_line)
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
        text = f"compiled and equal to torch, {seconds}; kernels for {report['level']}"
        yield Finding("native code", "ok", f"{', '.join(report['checked'])} {text}")


def two_ranks(limit_seconds: float) -> Iterator[Finding]:
    """Check an all-gather of two ranks over gloo on the CPU, and over NCCL if there are two GPUs."""
    import torch

    yield _gather("gloo", {"DS_ACCELERATOR": "cpu"}, limit_seconds)
    if torch.cuda.device_count() > 1:
        yield _gather("nccl", {}, limit_seconds)
    elif torch.cuda.is_available():
        yield Finding("two ranks over nccl", "ok", "skipped: NCCL needs one GPU per rank, and there is only one")


def _gather(backend: str, environ: Mapping[str, str], limit_seconds: float) -> Finding:
    _, problem, seconds = _run(["gather", backend], environ, limit_seconds)
    if problem:
        return Finding(f"two ranks over {backend}", "fail", problem, _GATHER_FIX)
    text = f"each received what both sent, through DeepSpeed, {seconds}"
    return Finding(f"two ranks over {backend}", "ok", text)


def _run(arguments: list[str], environ: Mapping[str, str], limit_seconds: float) -> tuple[str, str, str]:
    """Run this module in a process; return its last line, its problem or "", and its time. No child survives."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environ},
            start_new_session=True,
        )
        how = "did not finish"
        try:
            code = process.wait(limit_seconds)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after Ctrl-C, which a process in another session does not get
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    last_line, seconds = lines[-1] if lines else "", f"{time.monotonic() - start:.1f} s"
    if process.returncode == 0:
        return last_line, "", seconds
    shown = f" ({last_line[:200]})" if lines and how != "did not finish" else ""
    return last_line, f"{how}{shown} after {seconds}", seconds


def _native() -> dict[str, object]:
    """Load all native code, compiling it if it is not in the cache, and compare it with torch."""
    import torch

    from pst_ds.core import kernels as masks
    from pst_ds.core.bits import count_bits
    from pst_ds.formats import BitmaskFormat, rows
    from pst_ds.runtime import native as kernels
    from pst_ds.runtime import native_loop as decoder

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        libraries = {
            "mask updates": masks.library(),
            "packing": rows.library(),
            "sparse layers": kernels.library(),
            "decoding": decoder.library(),
        }
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=draw) * (torch.rand(96, 256, generator=draw) > 0.7)
    x, bits = torch.randn(5, 256, generator=draw), torch.randint(256, (999,), generator=draw, dtype=torch.uint8)
    layout = BitmaskFormat()
    parts = layout.pack(weight, None, "weight")
    y = x @ weight.t()
    if libraries["sparse layers"] is not None:
        values, mask, offsets = (parts[name] for name in ("compressed", "bitmask", "row_offsets"))
        y = kernels.bitmask_linear(x, values, mask, offsets, None, kernels.best_level())
    codes = weight.sign().to(torch.int8)
    decoded = x @ codes.t().float()
    if libraries["decoding"] is not None:
        matrix = decoder.Matrix.of_codes(codes, torch.ones(96, 1, dtype=torch.bfloat16), bits=8, group=0)
        decoded = matrix.multiply(x)
    as_torch = {
        "mask updates": int(count_bits(bits, bits)[1]) == sum(int(byte).bit_count() for byte in bits.tolist()),
        "packing": torch.equal(layout.unpack(parts), weight),
        "sparse layers": torch.allclose(y, x @ weight.t(), rtol=1e-4, atol=1e-4),
        "decoding": torch.allclose(decoded, x @ codes.t().float(), rtol=1e-3, atol=1e-2),
    }
    return {
        "checked": [name for name, library in libraries.items() if library is not None],
        "missing": [name for name, library in libraries.items() if library is None],
        "wrong": [name for name, holds in as_torch.items() if not holds],
        "level": kernels.LEVELS[kernels.best_level()],
        "warning": str(caught[0].message).partition("\n")[0][:200] if caught else "",
    }


def _two_ranks(backend: str) -> None:
    """Start two ranks that exchange values; raise the error of the first that failed."""
    import torch.multiprocessing

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    torch.multiprocessing.spawn(_rank, (backend,), nprocs=2)


def _rank(rank: int, backend: str) -> None:
    """Join the other rank as training does, and check the values received."""
    import torch
    import torch.distributed as dist

    from pst_ds.parallel.launch import device_of, init_distributed, launch_environment
    from pst_ds.parallel.ranks import all_gather_numbers, all_gather_objects

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    launch = launch_environment()
    init_distributed(launch)
    own = torch.tensor(rank, device=device_of(launch))
    gathered = all_gather_numbers(own).tolist(), all_gather_objects(f"rank {rank}"), dist.get_backend()
    if gathered != ([0, 1], ["rank 0", "rank 1"], backend):
        raise RuntimeError(f"rank {rank} gathered {gathered}")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that cleans up


if __name__ == "__main__":
    if sys.argv[1] == "native":
        print(json.dumps(_native()), flush=True)
    else:
        _two_ranks(sys.argv[2])
