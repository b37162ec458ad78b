"""What results say of the machine that they are from."""

from __future__ import annotations

import os

import torch

from pst_ds.core.kernels.host import cpu_facts, cpu_name

_KINDS = ("Intel Xeon", "Intel Core", "AMD EPYC", "AMD Ryzen")
_INSTRUCTIONS = {"amx_tile": "AMX", "avx512_bf16": "AVX-512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Flags of /proc/cpuinfo that decide the speed of kernels, the fastest first."""


def hardware() -> str:
    """Return the processor by its full name, the number of cores, and the GPU if there is one."""
    text = f"{cpu_name()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


def kind_of_processor() -> str:
    """Return a name that machines of equal speed share, such as "Intel Xeon with AMX"."""
    name = cpu_name()
    for kind in _KINDS:
        if all(word in name for word in kind.split()):
            name = kind
            break
    flags = cpu_facts().get("flags", "").split()
    for flag, instructions in _INSTRUCTIONS.items():
        if flag in flags:
            return f"{name} with {instructions}"
    return name
