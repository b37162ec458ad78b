"""What ``pst-ds doctor`` looks at in its own process: versions, accelerator, disk, shared memory, threads."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal

DISTRIBUTION = "pst-ds"
_FREE_GB, _MB_PER_SECOND, _SHM_GB = 10.0, 50.0, 1.0
"""Less is a warning."""
_WRITTEN_MB, _WRITING_SECONDS = 256, 10.0
"""Most that is written to measure a disk, and for how long."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""
    """What to do; empty where nothing is to be done."""


def versions() -> Iterator[Finding]:
    """Python and every requirement of the installed package; those of its extras where they are installed."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata(DISTRIBUTION)
    except PackageNotFoundError:
        yield Finding(DISTRIBUTION, "fail", "it is not installed, so what it requires is not known", "pip install .")
        return
    wanted, found = SpecifierSet(about["Requires-Python"]), platform.python_version()
    fits = wanted.contains(found)
    fix = "" if fits else f"make a virtual environment with Python {wanted}"
    yield Finding("python", "ok" if fits else "fail", f"{found} ({wanted})", fix)
    for text in about.get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        is_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if requirement.name != DISTRIBUTION:
            yield from _requirement(requirement.name, requirement.specifier, is_extra=is_extra)


def _requirement(name: str, wanted: object, *, is_extra: bool) -> Iterator[Finding]:
    fix = f"pip install '{name}{wanted}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        if not is_extra:
            yield Finding(name, "fail", f"not installed ({wanted or 'any version'})", fix)
        return
    if wanted.contains(found, prereleases=True):  # type: ignore[attr-defined]
        if not is_extra:
            yield Finding(name, "ok", f"{found} ({wanted or 'any version'})")
    else:
        yield Finding(name, "warn" if is_extra else "fail", f"{found} is not {wanted}", fix)


def accelerator() -> Iterator[Finding]:
    """What models would train on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("accelerator", "fail", f"torch cannot be imported: {error}", "install torch anew")
        return
    if not torch.accelerator.is_available():
        capability = torch.backends.cpu.get_cpu_capability()
        yield Finding("accelerator", "ok", f"none: runs train on the CPU ({_cores()} cores, {capability})")
        return
    device, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    text = f"{count} x {device.type if device else 'unknown'}"
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        text = f"{count} x {torch.cuda.get_device_name(0)}, {total / 2**30:.0f} GiB each"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("accelerator", "warn", f"{text}, without bf16", 'set train.precision = "fp32"')
            return
    yield Finding("accelerator", "ok", text)


def folder(path: Path) -> Iterator[Finding]:
    """Free space and speed of the disk of ``path``, or of the nearest folder above it; what is written is removed."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    try:
        rate = _write_speed(place)
    except OSError as error:
        yield Finding("disk", "fail", f"{place} cannot be written: {error}", "name another --folder, or free space")
        return
    free = shutil.disk_usage(place).free / 1e9
    text = f"{place}: {free:.1f} GB free, writes {rate:.0f} MB/s"
    if free < _FREE_GB:
        yield Finding("disk", "warn", text, f"free {_FREE_GB:.0f} GB, or set output_dir to another disk")
    elif rate < _MB_PER_SECOND:
        yield Finding(
            "disk", "warn", text, "checkpoints will take long: use a local disk, or a larger checkpoint.interval"
        )
    else:
        yield Finding("disk", "ok", text)


def _write_speed(place: Path) -> float:
    """MB/s, to the disk and not to its cache. Raises OSError."""
    block, start, written = os.urandom(4 << 20), time.monotonic(), 0
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        while written < _WRITTEN_MB << 20 and time.monotonic() - start < _WRITING_SECONDS:
            written += file.write(block)
            os.fsync(file.fileno())
    return written / 1e6 / (time.monotonic() - start)


def shared_memory() -> Iterator[Finding]:
    """Room in /dev/shm, where NCCL and the readers of data sets exchange what they have."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    free = shutil.disk_usage(place).free / 1e9
    if free < _SHM_GB:
        fix = (
            "start the container with --shm-size=8g" if Path("/.dockerenv").exists() else "free it, or mount it larger"
        )
        yield Finding("/dev/shm", "warn", f"{free:.2f} GB free", fix)
    else:
        yield Finding("/dev/shm", "ok", f"{free:.1f} GB free")


def threads() -> Iterator[Finding]:
    """OMP_NUM_THREADS against the cores."""
    name, cores = "OMP_NUM_THREADS", _cores()
    value = os.environ.get(name)
    if value is None:
        yield Finding(
            name, "ok", f"not set: a process takes all {cores} cores; the scripts in launch/ set it for ranks"
        )
    elif not value.isdigit() or not int(value):
        yield Finding(name, "warn", f"{value!r} is not a number of threads", f"export {name}=1")
    elif int(value) > cores:
        yield Finding(name, "warn", f"{value} threads on {cores} cores wait for each other", f"export {name}={cores}")
    else:
        yield Finding(name, "ok", f"{value} of {cores} cores")


def _cores() -> int:
    """That this process may use, of a container or a job often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
