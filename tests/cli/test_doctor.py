"""``pst-ds doctor``: what it finds on a machine that is well, and on ones that are not; nothing is left running."""

from __future__ import annotations

import email.message
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import psutil
import pytest
import torch

from pst_ds.cli.doctor import checks as doctor_checks
from pst_ds.cli.doctor import processes as doctor_processes
from pst_ds.cli.doctor.checks import Finding
from pst_ds.cli.main import main

LIMIT = 900
"""Seconds; a machine that is busy with other things takes long to import torch."""


@pytest.fixture
def packages(monkeypatch):
    """``packages(requires, installed)``: makes these the package's requirements and the versions that are there."""

    def set_up(requires, installed):
        about = email.message.Message()
        about["Requires-Python"] = ">=3.11"
        for line in requires:
            about["Requires-Dist"] = line

        def version(name):
            if name not in installed:
                raise PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(doctor_checks, "metadata", lambda name: about)
        monkeypatch.setattr(doctor_checks, "version", version)
        return {finding.name: finding for finding in doctor_checks.versions()}

    return set_up


def test_versions_are_held_against_the_packages_requirements(packages):
    requires = ["deepspeed<0.20,>=0.19.8", "transformers>=5", "jinja2", "gone>=2", 'peft>=0.17; extra == "bench"',
                'sacrebleu>=2.4; extra == "nlg"', 'pst-ds[bench]; extra == "test"']  # fmt: skip
    found = packages(requires, {"deepspeed": "0.19.7", "transformers": "5.1.0rc1", "jinja2": "1", "peft": "0.16"})
    assert {name: finding.status for name, finding in found.items()} == {
        "python": "ok", "deepspeed": "fail", "transformers": "ok", "jinja2": "ok", "gone": "fail", "peft": "warn"
    }  # fmt: skip
    assert found["deepspeed"].text == "0.19.7 is not <0.20,>=0.19.8"
    assert found["deepspeed"].fix == "pip install 'deepspeed<0.20,>=0.19.8'"
    assert found["gone"].fix == "pip install 'gone>=2'"
    assert not found["transformers"].fix


def test_an_old_python_and_a_package_that_is_not_installed_fail(packages, monkeypatch):
    monkeypatch.setattr(doctor_checks.platform, "python_version", lambda: "3.9.2")
    assert packages([], {})["python"].status == "fail"

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor_checks, "metadata", missing)
    (finding,) = doctor_checks.versions()
    assert (finding.status, finding.fix) == ("fail", "pip install .")


def test_here_all_requirements_are_met():
    found = list(doctor_checks.versions())
    assert {"python", "torch", "deepspeed", "transformers"} <= {finding.name for finding in found}
    assert [finding for finding in found if finding.status == "fail"] == []


def test_a_disk_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    for free, status, words in ((0.0, "ok", "GB free"), (1e9, "warn", "output_dir")):
        monkeypatch.setattr(doctor_checks, "_FREE_GB", free)
        (finding,) = doctor_checks.folder(tmp_path / "not" / "yet")
        assert finding.status == status
        assert words in finding.text + finding.fix
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_fails(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor_checks.os, "fsync", full)
    (finding,) = doctor_checks.folder(tmp_path)
    assert finding.status == "fail"
    assert "No space left on device" in finding.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_inside_one_that_may_not_be_entered_is_judged_by_the_outer_one(tmp_path, monkeypatch):
    stat = os.stat

    def refused(path, **options):
        if str(path).startswith(f"{tmp_path}{os.sep}closed{os.sep}"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "stat", refused)
    (finding,) = doctor_checks.folder(tmp_path / "closed" / "runs" / "mine")
    assert finding.text.startswith(f"{tmp_path / 'closed'}: ")


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [(None, "ok", "not set"), ("1", "ok", "1 of"), ("4096", "warn", "compete for"), ("many", "warn", "export")],
)
def test_threads(monkeypatch, value, status, words):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    (finding,) = doctor_checks.threads()
    assert finding.status == status
    assert words in finding.text + finding.fix


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that pins processes to cores")
def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        (of_threads,), (of_accelerator,) = doctor_checks.threads(), doctor_checks.accelerator()
    finally:
        os.sched_setaffinity(0, allowed)
    assert (of_threads.status, of_threads.text) == ("warn", "2 threads compete for 1 cores")
    assert "(1 cores, " in of_accelerator.text


def test_a_torch_that_cannot_be_imported_is_one_failure_and_no_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = doctor_checks.accelerator()
    assert finding.status == "fail"
    assert finding.text.startswith("torch cannot be imported: ")
    assert list(doctor_processes.native_code(LIMIT)) == []
    assert list(doctor_processes.two_ranks(LIMIT)) == []


@pytest.mark.parametrize(("multiplies", "status"), [(True, "ok"), (False, "warn")])
def test_a_processor_without_bf16_is_a_warning(monkeypatch, multiplies, status):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(doctor_checks, "multiplies_bf16", lambda: multiplies)
    (finding,) = doctor_checks.accelerator()
    assert finding.status == status
    assert (finding.fix == 'set train.precision = "fp32"') is not multiplies


def test_little_shared_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor_checks, "_SHM_GB", 1e9)
    assert [finding.status for finding in doctor_checks.shared_memory()] in ([], ["warn"])


def _mine():
    """Processes that this one started; other tests may have left some, such as multiprocessing's resource tracker."""
    return set(psutil.Process().children(recursive=True))


def test_native_code_is_compiled_and_right():
    (finding,) = doctor_processes.native_code(LIMIT)
    assert finding.status == "ok", finding
    assert "mask updates" in finding.text


@pytest.mark.thorough
def test_a_compiler_that_fails_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (finding,) = doctor_processes.native_code(LIMIT)
    assert finding.status == "warn"
    assert "missing for mask updates" in finding.text  # where the package was installed, packing is compiled already
    assert "g++" in finding.fix


@pytest.mark.thorough
def test_native_code_that_is_switched_off_is_a_warning(monkeypatch):
    monkeypatch.setenv("PST_DS_NATIVE", "0")
    (finding,) = doctor_processes.native_code(LIMIT)
    assert (finding.status, finding.fix) == ("warn", "unset PST_DS_NATIVE")


def test_what_does_not_come_to_an_end_is_ended():
    before = _mine()
    (native,), ranks = doctor_processes.native_code(0.1), list(doctor_processes.two_ranks(0.1))
    assert [native.status, ranks[0].status] == ["fail", "fail"]
    assert "did not finish" in native.text
    assert "did not finish" in ranks[0].text
    assert _mine() <= before


@pytest.mark.thorough
def test_the_rank_that_failed_is_reported_and_not_the_one_that_waited_for_it(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, torch.distributed as dist\n"
        "def barrier():\n"
        "    if os.environ.get('RANK') == '1':\n"
        "        raise OSError('no network')\n"
        "    import time; time.sleep(900)\n"
        "dist.barrier = barrier\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (finding, *_) = doctor_processes.two_ranks(LIMIT)
    assert finding.status == "fail"
    assert "failed with exit code 1 (OSError: no network)" in finding.text


def test_a_process_that_crashes_is_a_failure(monkeypatch):
    crash = [sys.executable, "-u", "-c", "import os, signal; print('compiling'); os.kill(os.getpid(), signal.SIGILL)"]
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: popen([*crash[:1], "-u", *crash[1:]], **options)
    )
    (finding,) = doctor_processes.native_code(LIMIT)
    assert finding.status == "fail"
    assert finding.text.startswith("was killed by SIGILL (compiling) after ")


def test_code_that_computes_something_else_is_a_failure(monkeypatch):
    report = json.dumps({"checked": [], "missing": [], "wrong": ["packing"], "level": "avx2", "warning": ""})
    monkeypatch.setattr(doctor_processes, "_run", lambda *arguments: doctor_processes._Outcome(report, "", "0.1 s"))
    (finding,) = doctor_processes.native_code(10)
    assert (finding.status, finding.text) == ("fail", "packing differ from torch")


@pytest.mark.launcher
@pytest.mark.thorough
def test_a_machine_that_is_well(capsys, tmp_path):
    before = _mine()
    assert main(["doctor", "--folder", str(tmp_path), "--time-limit", str(LIMIT), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    names = [finding["name"] for finding in found["findings"]]
    assert {"python", "torch", "accelerator", "native code", "two ranks over gloo", "disk"} <= set(names)
    assert found["fail"] == 0
    assert found["ok"] + found["warn"] == len(names)
    assert len([line for line in lines if line.startswith(("ok ", "warn "))]) == len(names)
    assert _mine() <= before


def test_a_failure_is_exit_code_1_and_still_ends_with_json(capsys, monkeypatch):
    bad = Finding("disk", "fail", "it is full", "free space")
    for name in ("versions", "accelerator", "shared_memory", "threads"):
        monkeypatch.setattr(doctor_checks, name, lambda: iter(()))
    monkeypatch.setattr(doctor_checks, "folder", lambda path: iter([bad]))
    for name in ("native_code", "two_ranks"):
        monkeypatch.setattr(doctor_processes, name, lambda limit: iter(()))
    assert main(["doctor", "--json"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["fail  disk: it is full", "      fix: free space", "0 ok, 0 warnings, 1 failures"]
    assert json.loads(last)["exit_code"] == 1
