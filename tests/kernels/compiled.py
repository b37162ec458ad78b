"""Kernels compiled ahead of time for a GPU that need not be there, and what their machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_PADDING = ("NOP", "BRA")
"""Behind the last instruction of a kernel."""


@dataclass(frozen=True)
class Machine:
    """What the machine code of a kernel needs."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: Counter[str]

    @property
    def num_instructions(self) -> int:
        """Of the code, each once."""
        return self.instructions.total()

    def count(self, *names: str) -> int:
        """How many instructions begin with one of ``names``, a whole word or more of them."""
        return sum(n for name, n in self.instructions.items() if any(f"{name}.".startswith(f"{x}.") for x in names))

    @property
    def num_fused(self) -> int:
        """Products that are not rounded before they are added."""
        return self.count("FFMA", "FFMA2")

    @property
    def num_flushing(self) -> int:
        """Instructions that take denormal numbers for zeros, but for those of divisions of integers."""
        found = ((name.split("."), n) for name, n in self.instructions.items())
        return sum(n for parts, n in found if "FTZ" in parts and parts[0] != "F2I")


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, *, loose: tuple[str, ...] = (),
    num_warps: int = 4, fuse: bool = False,
) -> Machine:  # fmt: skip
    """Compile ``kernel`` as :func:`assembly` does, and read its machine code."""
    made = assembly(kernel, types, constants, capability, loose=loose, num_warps=num_warps, fuse=fuse)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        resources = _RESOURCES.search(_dumped("--dump-resource-usage", file.name))
        code = _dumped("-sass", file.name)
    assert resources is not None
    registers, stack, _, local = map(int, resources.groups())
    found = Counter(name for name in _INSTRUCTION.findall(code) if name.split(".")[0] not in _PADDING)
    return Machine(registers, stack + local, made.metadata.shared, found)


def assembly(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, *, loose: tuple[str, ...] = (),
    num_warps: int = 4, fuse: bool = False,
) -> Any:  # fmt: skip
    """Compile ``kernel`` as a launch would, for pointers and integers divisible by 16 but for those of ``loose``.

    ``types``: Triton's of each argument, such as "*bf16"; all others are ``constants``.
    """
    names = kernel.arg_names
    missing = [name for name in names if name not in types and name not in constants]
    assert not missing, missing
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [name for name, kind in types.items() if kind != "fp32" and name not in loose]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": num_warps, "enable_fp_fusion": fuse}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _dumped(option: str, path: str) -> str:
    command = [str(_TOOLS / "cuobjdump"), option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
