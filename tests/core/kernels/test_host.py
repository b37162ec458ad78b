"""What the host says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from pst_ds.core.kernels import host

PROC = {
    "/proc/cpuinfo": """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu avx2 amx_tile

processor\t: 1
model name\t: another
"""
}


@pytest.fixture
def of_linux(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, **_: PROC[str(path)])


@pytest.fixture
def of_another_system(monkeypatch):
    def missing(path, **_):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)


def test_facts_are_those_of_the_first_processor(of_linux):
    assert host.cpu_name() == "Intel(R) Xeon(R) Processor"
    assert host.cpu_facts()["flags"].split() == ["fpu", "avx2", "amx_tile"]


@pytest.mark.parametrize(
    ("line", "multiplies"),
    [
        ("flags : fpu avx2 avx512f avx512_vnni", False),
        ("flags : fpu avx2 avx512f avx512_bf16", True),
        ("flags : fpu amx_tile amx_bf16", True),
        ("Features : fp asimd bf16", True),
        ("Features : fp asimd", False),
        ("model name : one that says nothing", True),
    ],
)
def test_products_in_bf16_need_an_instruction(monkeypatch, line, multiplies):
    monkeypatch.setattr(Path, "read_text", lambda path, **_: line)
    assert host.multiplies_bf16() is multiplies


def test_a_system_without_proc_has_a_name_and_no_facts(of_another_system):
    assert host.cpu_facts() == {}
    assert host.cpu_name()
    assert host.multiplies_bf16()
