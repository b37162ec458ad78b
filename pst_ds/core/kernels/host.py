"""Facts about the host's processor."""

import platform
from pathlib import Path


def cpu_facts() -> dict[str, str]:
    """Return /proc/cpuinfo of the first processor, such as "model name" and "flags"; empty if the file is missing."""
    facts: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def cpu_name() -> str:
    """Return the name of the processor, or its architecture if the name is unknown."""
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def multiplies_bf16() -> bool:
    """Return whether the processor has bf16 product instructions; without them bf16 is several times slower than fp32.

    True if the system does not say.
    """
    facts = cpu_facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return not flags or any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16", "svebf16"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
