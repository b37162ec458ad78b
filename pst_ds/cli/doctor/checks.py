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

from packaging.requirements import Requirement

from pst_ds.core.kernels.host import multiplies_bf16

DISTRIBUTION = "pst-ds"
_FREE_GB = 10.0
"""Free gigabytes on the disk of future runs; less is a warning."""
_SHM_GB = 1.0
"""Free gigabytes in shared memory; less is a warning. Docker gives a container 0.06 by default."""


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
    try:
        about = metadata(DISTRIBUTION)
    except PackageNotFoundError:
        yield Finding(DISTRIBUTION, "fail", "not installed, so its requirements are unknown", "pip install .")
        return
    requirements = [f"python{about['Requires-Python']}"]
    requirements += about.get_all("Requires-Dist") or []
    for text in requirements:
        yield from _version(Requirement(text))


def _version(requirement: Requirement) -> Iterator[Finding]:
    """Compare a requirement with what is installed. Yield nothing for an extra that is not, or that meets it."""
    name = requirement.name
    wanted = requirement.specifier
    # with an empty extra, markers such as extra == "test" are false; markers of the platform keep their value
    is_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
    is_python = name == "python"
    fix = f"pip install '{name}{wanted}'"
    if is_python:
        fix = f"make a virtual environment with Python {wanted}"
    try:
        installed = platform.python_version() if is_python else version(name)
    except PackageNotFoundError:
        if not is_extra:
            yield Finding(name, "fail", f"not installed ({wanted or 'any version'})", fix)
        return
    # a release candidate was installed on purpose
    if not wanted.contains(installed, prereleases=True):
        yield Finding(name, "warn" if is_extra else "fail", f"{installed} is not {wanted}", fix)
    elif not is_extra:
        yield Finding(name, "ok", f"{installed} ({wanted or 'any version'})")


def torch_problem() -> str:
    """Return why torch cannot be imported; "" if it can."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        # OSError is how a missing CUDA library is reported
        return str(error)
    return ""


def accelerator() -> Iterator[Finding]:
    """Describe the device on which models would train."""
    problem = torch_problem()
    if problem:
        yield Finding("accelerator", "fail", f"torch cannot be imported: {problem}", "reinstall torch")
        return
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        cores = _cores()
        text = f"none: runs train on the CPU ({cores} cores, {torch.backends.cpu.get_cpu_capability()})"
        has_bf16 = multiplies_bf16()
    elif torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        text = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {total / 2**30:.0f} GiB each"
        # emulated bf16 is slower than fp32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # torch has no test of bf16 for other accelerators
        text = f"{torch.accelerator.device_count()} x {device.type}"
        has_bf16 = True
    if has_bf16:
        yield Finding("accelerator", "ok", text)
    else:
        yield Finding("accelerator", "warn", f"{text}, without bf16", 'set train.precision = "fp32"')


def folder(path: Path) -> Iterator[Finding]:
    """Check that ``path``, or the nearest folder above it, can be written and has free space."""
    place = _nearest_existing(path)
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            # a full disk may fail only when data reach it: with a quota, or over a network
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{place} cannot be written: {error}"
        yield Finding("disk", "fail", text, "name another --folder, or free some space")
        return
    fix = f"free {_FREE_GB:.0f} GB, or set output_dir to another disk"
    yield _enough("disk", place, least_gb=_FREE_GB, fix=fix)


def _nearest_existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    place = path.absolute()
    # os.path, because Path.exists raises PermissionError for what is inside a folder that may not be entered
    while not os.path.exists(place):
        place = place.parent
    return place


def shared_memory() -> Iterator[Finding]:
    """Check the free space in /dev/shm, which NCCL and data loaders use."""
    place = Path("/dev/shm")
    if not place.is_dir():
        # this system shares memory in another way
        return
    fix = "free it, or mount it larger"
    if Path("/.dockerenv").exists():
        # it cannot be mounted anew from inside a container
        fix = "start the container with --shm-size=8g"
    yield _enough("/dev/shm", place, least_gb=_SHM_GB, fix=fix)


def _enough(name: str, place: Path, least_gb: float, fix: str) -> Finding:
    """Compare the free space at ``place`` with ``least_gb`` gigabytes."""
    free = shutil.disk_usage(place).free / 1e9
    text = f"{place}: {free:.2f} GB free"
    if free < least_gb:
        return Finding(name, "warn", text, fix)
    return Finding(name, "ok", text)


def threads() -> Iterator[Finding]:
    """Compare OMP_NUM_THREADS with the number of cores that containers and jobs leave to this process."""
    name = "OMP_NUM_THREADS"
    cores = _cores()
    value = os.environ.get(name)
    if value is None:
        text = f"not set: a process uses all {cores} cores; the scripts in launch/ set it for ranks"
        yield Finding(name, "ok", text)
    elif not value.isdigit() or not int(value):
        # libraries would ignore it, and use all cores
        yield Finding(name, "warn", f"{value!r} is not a number of threads", f"export {name}=1")
    elif int(value) > cores:
        yield Finding(name, "warn", f"{value} threads compete for {cores} cores", f"export {name}={cores}")
    else:
        yield Finding(name, "ok", f"{value} of {cores} cores")


def _cores() -> int:
    """Return the cores that this process may use; os.cpu_count() has all of the machine."""
    return len(os.sched_getaffinity(0))
