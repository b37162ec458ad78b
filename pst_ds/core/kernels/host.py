"""Facts about the host: its processor and its available memory."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_facts() -> dict[str, str]:
    """/proc/cpuinfo of the first processor, such as "model name" and "flags"; empty where the file is missing."""
    facts: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def cpu_name() -> str:
    """The processor's name as it gives it, or else its architecture."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def multiplies_bf16() -> bool:
    """Return whether the processor has instructions for products in bf16, without which they are several times slower
    than in fp32; also True where the system does not say."""
    facts = cpu_facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return not flags or any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16", "svebf16"))


def available_bytes() -> int | None:
    """Return the bytes that can be allocated without swapping; None where the system does not say."""
    found = (line.split() for line in _lines("/proc/meminfo") if line.startswith("MemAvailable"))
    return next((int(words[1]) << 10 for words in found), None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
