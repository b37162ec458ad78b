"""Checks of ``pst-ds doctor`` in its process: versions, accelerator, disk, shared memory, threads."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal

from pst_ds.core.kernels.host import multiplies_bf16

DISTRIBUTION = "pst-ds"
_FREE_GB, _SHM_GB = 10.0, 1.0
"""Less is a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the output."""

    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""
    """The remedy; empty if none is needed."""


def versions() -> Iterator[Finding]:
    """Check Python and the requirements of the installed package, and of its installed extras."""
    from packaging.requirements import Requirement

    try:
        about = metadata(DISTRIBUTION)
    except PackageNotFoundError:
        yield Finding(DISTRIBUTION, "fail", "not installed, so its requirements are unknown", "pip install .")
        return
    for text in (f"python{about['Requires-Python']}", *(about.get_all("Requires-Dist") or ())):
        requirement = Requirement(text)
        name, wanted = requirement.name, requirement.specifier
        is_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        is_python = name == "python"
        fix = f"make a virtual environment with Python {wanted}" if is_python else f"pip install '{name}{wanted}'"
        try:
            installed = platform.python_version() if is_python else version(name)
        except PackageNotFoundError:
            if not is_extra:
                yield Finding(name, "fail", f"not installed ({wanted or 'any version'})", fix)
            continue
        if not wanted.contains(installed, prereleases=True):
            yield Finding(name, "warn" if is_extra else "fail", f"{installed} is not {wanted}", fix)
        elif not is_extra:
            yield Finding(name, "ok", f"{installed} ({wanted or 'any version'})")


def accelerator() -> Iterator[Finding]:
    """Describe the device on which models would train."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("accelerator", "fail", f"torch cannot be imported: {error}", "reinstall torch")
        return
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        cores = len(os.sched_getaffinity(0))
        text = f"none: runs train on the CPU ({cores} cores, {torch.backends.cpu.get_cpu_capability()})"
        has_bf16 = multiplies_bf16()
    elif torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        text = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {total / 2**30:.0f} GiB each"
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        text, has_bf16 = f"{torch.accelerator.device_count()} x {device.type}", True
    if has_bf16:
        yield Finding("accelerator", "ok", text)
    else:
        yield Finding("accelerator", "warn", f"{text}, without bf16", 'set train.precision = "fp32"')


def folder(path: Path) -> Iterator[Finding]:
    """Check that ``path``, or the nearest folder above it, can be written and has free space."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{place} cannot be written: {error}"
        yield Finding("disk", "fail", text, "name another --folder, or free some space")
        return
    yield _enough("disk", place, _FREE_GB, f"free {_FREE_GB:.0f} GB, or set output_dir to another disk")


def shared_memory() -> Iterator[Finding]:
    """Check the free space in /dev/shm, which NCCL and data loaders use."""
    if Path("/dev/shm").is_dir():
        in_docker = Path("/.dockerenv").exists()
        fix = "start the container with --shm-size=8g" if in_docker else "free it, or mount it larger"
        yield _enough("/dev/shm", Path("/dev/shm"), _SHM_GB, fix)


def _enough(name: str, place: Path, least_gb: float, fix: str) -> Finding:
    free = shutil.disk_usage(place).free / 1e9
    text = f"{place}: {free:.2f} GB free"
    return Finding(name, "warn", text, fix) if free < least_gb else Finding(name, "ok", text)


def threads() -> Iterator[Finding]:
    """Compare OMP_NUM_THREADS with the number of cores that containers and jobs leave to this process."""
    name, cores = "OMP_NUM_THREADS", len(os.sched_getaffinity(0))
    value = os.environ.get(name)
    if value is None:
        text = f"not set: a process uses all {cores} cores; the scripts in launch/ set it for ranks"
        yield Finding(name, "ok", text)
    elif not value.isdigit() or not int(value):
        yield Finding(name, "warn", f"{value!r} is not a number of threads", f"export {name}=1")
    elif int(value) > cores:
        yield Finding(name, "warn", f"{value} threads compete for {cores} cores", f"export {name}={cores}")
    else:
        yield Finding(name, "ok", f"{value} of {cores} cores")
