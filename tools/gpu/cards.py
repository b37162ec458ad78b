"""Names of graphics cards, and whether driver, compiler and Triton's cache fit: the first section of ``make gpu``."""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pst_ds.core.kernels.triton.launch import LEAST_CAPABILITY
from pst_ds.errors import first_line
from pst_ds.planning.machines import MACHINES, Machine

if TYPE_CHECKING:
    from tools.gpu.bench import Bench, Row

CARDS = {
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "B200": "b200",
    "A100-SXM4-80GB": "a100",
    "AMD Instinct MI300X": "mi300x",
}
"""Machines by the driver's exact name of the card, without "NVIDIA": PCIe, NVL and GH200 cards have other rates."""
DRY_RUN = "Use --device cpu for a dry run at tiny sizes"
_REMOTE = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "9p", "afs", "wekafs", "fuse.")
"""First letters of the types of file systems that hosts share."""


def machine_of_card(name: str) -> Machine | None:
    """Return the rates that the plan assumes of a card, by its name; None if it has none."""
    return MACHINES.get(CARDS.get(name.removeprefix("NVIDIA "), ""))


def driver(bench: Bench) -> Iterator[Row]:
    """Check what a card needs before the first kernel. A row ``driver`` that is False ends everything."""
    if bench.device.type == "cuda":
        problem = driver_problem(torch.version.cuda, driver_version()) if torch.version.hip is None else ""
        try:
            if not problem:
                torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            problem = f"torch cannot use the GPU: {first_line(error)}. See nvidia-smi and CUDA_VISIBLE_DEVICES"
        if problem:
            yield {"what": "driver", "measured": False, "why": f"{problem}. {DRY_RUN}"}
            return
        versions = f"CUDA {_text(driver_version() or 0)}, torch's {torch.version.cuda}"
        yield {"what": "driver", "measured": f"ROCm {torch.version.hip}" if torch.version.hip else versions}
        capability, least = torch.cuda.get_device_capability(), LEAST_CAPABILITY
        yield {"what": "card", "measured": torch.cuda.get_device_name()}
        yield {"what": "memory, GB", "measured": torch.cuda.get_device_properties(0).total_memory / 1e9}
        problem = f"our kernels need {least[0]}.{least[1]}: runs use torch, more slowly" if capability < least else ""
        yield checked(f"compute capability {capability[0]}.{capability[1]}", problem)
    else:
        yield {"what": "card", "measured": "none: a dry run on the CPU"}
    yield {"what": "predictions", "measured": bench.machine.name if bench.machine else "no prediction for this card"}
    yield checked("C compiler for Triton", compiler_problem())
    home = Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
    mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or home)
    yield checked("Triton's cache on a local disk", cache_problem(cache, mounts))


def checked(what: str, problem: str) -> Row:
    """Return the row of a check that found ``problem``, or "" if it passed."""
    return {"what": what, "measured": not problem} | ({"why": problem} if problem else {})


def driver_version() -> int | None:
    """Return the newest CUDA version that the driver supports, such as 12020 for 12.2; None without a driver."""
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    return None if library.cuDriverGetVersion(ctypes.byref(version)) else version.value


def driver_problem(wheel: str | None, supported: int | None) -> str:
    """Return why torch cannot use the driver, with the fix; "" if it can. ``wheel``: CUDA version torch is built for.

    A driver serves every minor version of its CUDA version and all older ones.
    """
    if wheel is None:
        return f"torch {torch.__version__} is built without CUDA. Install a build with CUDA"
    if supported is None:
        return (
            "there is no NVIDIA driver (libcuda.so.1). Run this on a machine with a GPU, in a container with --gpus all"
        )
    needed, newest = int(wheel.split(".")[0]), supported // 1000
    if newest < needed:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_text(supported)}, and torch {torch.__version__} is "
            f"built for {wheel}. Update the driver, or install a build of torch for CUDA {newest}"
        )
    return ""


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def compiler_problem() -> str:
    """Return why Triton cannot compile the code that launches its kernels, with the fix; "" if it can."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        lead = f"CC = {compiler!r} is not a program" if compiler else "there is no gcc and no clang"
        return f"{lead}. Install gcc, or name a C compiler in CC; PST_DS_TRITON=0 trains without kernels, more slowly"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.exists() else f"{header} is missing. Install the headers of Python, such as python3-dev"


def cache_problem(folder: Path, mounts: str) -> str:
    """Return why ranks on several hosts should not compile into ``folder``, with the fix; "" if they may.

    ``mounts``: text of /proc/mounts.
    """
    types = {fields[1]: fields[2] for line in mounts.splitlines() if len(fields := line.split()) > 2}
    place = folder.absolute()
    kind = next((types[str(path)] for path in (place, *place.parents) if str(path) in types), "")
    fix = "Set TRITON_CACHE_DIR to a folder on a local disk of every host"
    return f"{folder} is on {kind}, and every rank compiles into it. {fix}" if kind.startswith(_REMOTE) else ""
