"""``make gpu``: a section that fails costs no other one; a dry run on the CPU goes through all of them."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pst_ds.planning.machines import MACHINES
from tests.pairs import every_pair
from tools.gpu import __main__ as gpu
from tools.gpu import bench, cards
from tools.gpu.__main__ import SECTIONS, main, rows_of, table

ROW = "import json; print(json.dumps({'what': 'speed', 'measured': %r}))"
FAILURES = {
    "raises": (f"import sys; {ROW % 3}; sys.exit('out of memory')", "exit code 1: out of memory"),
    "crashes": ("import os; os.abort()", "killed by SIGABRT"),
    "hangs": ("import time; time.sleep(600)", "still running after 0 s"),
    "prints garbage": ("print('Loading'); print('[1]')", "'Loading' instead of a row"),
    "prints nothing": ("", "no rows"),
}


@pytest.fixture
def programs(monkeypatch):
    """Python programs in place of the sections, by name; each prints a row."""
    found = dict.fromkeys(SECTIONS, ROW % 7)
    monkeypatch.setattr(gpu, "command", lambda name, device: [sys.executable, "-S", "-c", found[name]])
    return found


def _measured(out, *only):
    """The rows' values by section after a run, and its exit code."""
    code = main(["--device", "cpu", "--out", str(out), *(("--only", *only) if only else ())])
    sections = json.loads(out.read_text())["sections"]
    return {name: [row["measured"] for row in rows] for name, rows in sections.items()}, code


@every_pair
@pytest.mark.parametrize("failing", [list(SECTIONS)[::2], list(SECTIONS)[1::2]], ids=["even", "odd"])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_section_that_fails_is_one_row_with_the_reason(programs, monkeypatch, tmp_path, kind, failing):
    program, reason = FAILURES[kind]
    for name in failing:
        programs[name] = program
        if kind == "hangs":
            monkeypatch.setitem(SECTIONS, name, replace(SECTIONS[name], limit=0.1))
    measured, code = _measured(tmp_path / "gpu.json")
    before = [3] if kind == "raises" else []
    assert measured == {name: [*before, False] if name in failing else [7] for name in SECTIONS}
    assert code == 1
    text = (tmp_path / "gpu.md").read_text()
    assert text.count(f"| **no**: {reason}") == len(failing)


def test_what_is_known_is_written_before_the_next_section_starts(programs, tmp_path):
    places = str(tmp_path / "gpu.json"), str(tmp_path / "copy.json")
    programs["train"] = f"import shutil; shutil.copy(*{places}); {ROW % 7}"
    _measured(tmp_path / "gpu.json")
    assert list(json.loads((tmp_path / "copy.json").read_text())["sections"]) == ["driver", "smoke", "bits", "merge"]


ORPHAN = """
import fcntl, subprocess, sys
file = open({0!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
later = "import time; time.sleep(10); open({0!r}, 'a').write('alive')"
subprocess.Popen([sys.executable, "-S", "-c", later], pass_fds=[file.fileno()])
"""


def test_what_a_section_started_ends_with_it(programs, tmp_path):
    path = tmp_path / "held"
    programs["tests"] = ORPHAN.format(str(path)) + ROW % 7
    assert rows_of("tests", "cpu", 60.0, tmp_path / "tests.log") == [{"what": "speed", "measured": 7}]
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for its holder's end
        assert file.read() == ""


def test_a_terminated_job_leaves_no_section_behind_and_keeps_its_rows(programs, tmp_path):
    pid = tmp_path / "pid"
    hang = "os.kill(os.getppid(), 15); time.sleep(600)"
    programs["merge"] = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); {hang}"
    with pytest.raises(SystemExit, match="143"):
        _measured(tmp_path / "gpu.json")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert list(json.loads((tmp_path / "gpu.json").read_text())["sections"]) == ["driver", "smoke", "bits"]


def test_one_section_again_keeps_the_others_unless_the_card_is_another(programs, tmp_path):
    out = tmp_path / "gpu.json"
    _measured(out)
    programs.update(dict.fromkeys(SECTIONS, ROW % 8))
    measured, code = _measured(out, "train", "merge")
    assert measured == {name: [8 if name in ("driver", "merge", "train") else 7] for name in SECTIONS}
    assert code == 0
    programs["driver"] = 'print(\'{"what": "card", "measured": "another"}\')'
    before = out.read_text()
    assert _measured(out, "bits")[0] == {"driver": ["another"], "bits": [8]}
    assert (tmp_path / "gpu.json.old").read_text() == before


def test_sections_that_would_start_too_late_are_named(programs, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LAST_START", 0.0)
    measured, code = _measured(tmp_path / "gpu.json")
    assert measured == {name: [7 if name == "driver" else None] for name in SECTIONS}
    assert code == 0
    assert "| section tests | not measured: out of time: make gpu ONLY=tests |" in (tmp_path / "gpu.md").read_text()


def test_a_dry_run_goes_through_every_section(tmp_path, capsys):
    out = tmp_path / "runs" / "gpu.json"
    code = main(["--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    rows = {row["what"]: row for rows in found["sections"].values() for row in rows}
    assert [row for row in rows.values() if row["measured"] is False] == []
    assert code == 0
    assert list(found["sections"]) == list(SECTIONS)
    timed = [row for what, row in rows.items() if what.endswith((" ms", " us"))]
    assert len(timed) == 4 + 3 + 3 + 4
    assert all(row["measured"] > 0 for row in timed)
    assert 8 <= rows["steps until it was stopped"]["measured"] < rows["pst-ds train, ZeRO-3, gloo, steps"]["measured"]
    written = out.with_suffix(".md").read_text()
    assert written == table(found)
    assert written in capsys.readouterr().out
    assert "| 1 x, dense / int4 bitmask at 90% |" in written
    assert "| peak memory, pst, GB | not measured: no GPU |" in written


def test_an_error_of_a_section_is_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")
    (row,) = rows_of("train", "cpu", 120.0, tmp_path / "train.log")
    assert row["why"].startswith("exit code 1: RuntimeError: pst-ds train ended with 2 instead of 0: ")
    assert "DS_ACCELERATOR = 'abacus'" in row["why"]


# before the first kernel


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_without_cuda_it_is_one_message_and_2(capfd, tmp_path):
    assert main(["--out", str(tmp_path / "gpu.json")]) == 2
    start, told = capfd.readouterr().err.splitlines()
    assert start == "driver ..."
    assert "is built without CUDA. Install a build with CUDA. Use --device cpu for a dry run" in told
    assert not (tmp_path / "gpu.json").exists()


def test_a_driver_that_is_too_old_is_said_to_be(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cards, "driver_version", lambda: 12020)
    (row,) = cards.driver(bench.Bench(torch.device("cuda"), bench.TINY))
    assert (row["what"], row["measured"]) == ("driver", False)
    assert "too old: it supports CUDA 12.2" in row["why"]
    assert "is built for 13.0. Update the driver, or install a build of torch for CUDA 12" in row["why"]


def test_a_card_that_works_is_described(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(cards, "driver_version", lambda: 12080)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16e9))
    rows = {row["what"]: row for row in cards.driver(bench.Bench(torch.device("cuda"), bench.TINY))}
    facts = ("driver", "card", "memory, GB", "predictions")
    expected = ["CUDA 12.8, torch's 12.8", "Tesla T4", 16.0, "no prediction for this card"]
    assert [rows[what]["measured"] for what in facts] == expected
    capability = rows["compute capability 7.5"]
    assert (capability["measured"], capability["why"]) == (False, "our kernels need 8.0: runs use torch, more slowly")


@pytest.mark.parametrize(("wheel", "driver"), [("12.8", 12020), ("12.4", 12080), ("12.8", 13000)])
def test_a_driver_serves_its_minor_versions_and_older_ones(wheel, driver):
    assert cards.driver_problem(wheel, driver) == ""


def test_no_compiler_is_found_before_triton_needs_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = {row["what"]: row for row in rows_of("driver", "cpu", 120.0, tmp_path / "driver.log")}
    assert rows["C compiler for Triton"]["measured"] is False
    assert "there is no gcc and no clang. Install gcc" in rows["C compiler for Triton"]["why"]
    monkeypatch.setenv("CC", "icc")
    assert cards.compiler_problem().startswith("CC = 'icc' is not a program")


def test_a_cache_on_a_shared_file_system_is_named(tmp_path):
    mounts = f"overlay / overlay rw 0 0\nhome:/export {tmp_path} nfs4 rw 0 0\ntmpfs {tmp_path}/fast tmpfs rw 0 0\n"
    assert "is on nfs4" in cards.cache_problem(tmp_path / ".triton" / "cache", mounts)
    assert cards.cache_problem(tmp_path / "fast" / "cache", mounts) == ""


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None), ("NVIDIA H200", "h200"), ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None), ("NVIDIA B200", "b200"), ("NVIDIA GB200", None),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("A100-SXM4-80GB", "a100"), ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None), ("NVIDIA L40S", None), ("NVIDIA A10G", None),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)  # fmt: skip
def test_only_the_card_that_a_machine_describes_has_its_rates(name, machine):
    assert cards.machine_of_card(name) is (None if machine is None else MACHINES[machine])


def test_a_card_without_rates_is_measured_without_predictions(monkeypatch):
    monkeypatch.setattr(bench.Bench, "machine", None)
    from tools.gpu import timings

    on_cpu = bench.Bench(torch.device("cpu"), bench.TINY)
    rows = [row for section in (timings.kernels, timings.steps, timings.updates) for row in section(on_cpu)]
    assert len(rows) == 4 + 6 + 3
    assert all(row.get("predicted") is None for row in rows)


def test_the_cache_is_flushed_before_the_clock_starts(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("clock")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, stop):
            return 4.0 if len(done) < 15 else 2.0  # two warm-up runs, with five entries each

    class Buffer:
        def zero_(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(bench.Bench, "flushed", Buffer())
    on_cuda = bench.Bench(torch.device("cuda"), replace(bench.TINY, repeats=3))
    assert on_cuda.seconds(lambda: done.append("run")) == 2e-3
    assert done == ["flush", "clock", "run", "clock", "wait"] * 5
