"""The test runner: every test is in one stage, a failing stage stops no other, and Ctrl-C stops all."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from tools import run_tests
from tools.run_tests import STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "test_good.py": "import pytest\n\n@pytest.mark.thorough\ndef test_slow(): pass\n\ndef test_fast(): pass\n",
    "test_bad.py": "def test_wrong(): assert False\n",
    "test_broken.py": "import no_such_module\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with tests that pass, fail, and cannot be collected, and none that are slow in one stage."""
    for name, text in CASES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = thorough\n")
    (tmp_path / "conftest.py").write_text(
        "import hypothesis\n"
        "for name in ('quick', 'thorough'): hypothesis.settings.register_profile(name)\n"
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    stages = [
        Stage("bad", "not thorough", paths=("test_bad.py", "test_broken.py"), workers=None),
        Stage("none", "thorough", paths=("test_bad.py",), workers=None),
        Stage("good", "not nothing", paths=("test_good.py",), workers=None),
    ]
    monkeypatch.setattr(run_tests, "STAGES", stages)
    return tmp_path


@pytest.mark.parametrize("stage", ["device-ranks", "device"])
def test_the_files_of_the_emulated_device_are_collected_for_their_stages(stage):
    (chosen,) = [one for one in STAGES if one.name == stage]
    command = run_tests.pytest_command(replace(chosen, workers=None), "quick", {})
    done = subprocess.run([*command, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("extra", ["", "thorough", "gpu", "few"])
def test_each_test_is_in_exactly_one_stage(extra):
    """Of the marks that choose a stage, "device" and "interpreted" exclude "launcher" and "cluster"."""
    on_hosts = [set(marks) for n in range(4) for marks in itertools.combinations(("zero3", "launcher", "cluster"), n)]
    others = [{"device"}, {"device", "zero3"}, {"interpreted"}]
    for marks in [*on_hosts, *others]:
        has = {*marks, extra}.__contains__
        stages = [stage.name for stage in STAGES if Expression.compile(stage.marks).evaluate(has)]
        assert len(stages) == 1, (marks, stages)


def test_a_stage_with_one_of_several_marks_collects_only_the_files_that_name_one(project):
    (project / "test_launcher.py").write_text("import pytest\n\npytestmark = pytest.mark.launcher\n")
    stage = Stage("some", "launcher or thorough", paths=(".",), one_of=("launcher", "thorough"))
    assert run_tests.collected(stage) == ["test_good.py", "test_launcher.py"]
    assert run_tests.collected(replace(stage, one_of=())) == ["."]


@pytest.mark.parametrize("name", ["ranks", "launchers"])
def test_marks_that_choose_files_exclude_no_test_of_their_stage(name):
    (stage,) = [one for one in STAGES if one.name == name]
    others = {"zero3", "launcher", "cluster", "device", "interpreted", "thorough"} - set(stage.one_of)
    subsets = [set(marks) for n in range(len(others) + 1) for marks in itertools.combinations(others, n)]
    assert not any(Expression.compile(stage.marks).evaluate(marks.__contains__) for marks in subsets)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.one_of], ids=lambda stage: stage.name)
def test_a_stage_that_names_its_files_imports_no_emulated_device(stage, monkeypatch):
    """pytest would import it, and a backward pass would then end all forks of ranks."""
    monkeypatch.chdir(ROOT)
    files = run_tests.collected(stage)
    assert len(files) > 5
    assert not [path for path in files if "\nfrom tests.device" in Path(path).read_text(encoding="utf-8")]


def test_a_stage_that_fails_stops_no_other(project, capfd):
    assert run_tests.main([]) == 1
    printed = capfd.readouterr().out
    summary = printed[printed.index("== summary ==") :]
    assert [line.split()[:2] for line in summary.splitlines()[1:4]] == [
        ["bad", "failed"],
        ["none", "no"],
        ["good", "passed"],
    ]
    assert "FAILED test_broken.py" in summary
    assert summary.endswith('2 of 3 stages failed. Run them again: make test ONLY="bad none"\n')
    assert "1 passed, 1 deselected" in printed
    assert run_tests.main(["--only", "good", "--scope", "all"]) == 0
    assert "2 passed" in capfd.readouterr().out


def test_a_test_that_fails_is_named_until_it_passes(project, capfd):
    (project / "test_broken.py").unlink()
    assert run_tests.main(["--only", "good"]) == 0
    (project / "test_broken.py").write_text("def test_mended(): pass\n")
    assert run_tests.main(["--only", "bad"]) == 1
    assert "FAILED test_bad.py::test_wrong\n" in capfd.readouterr().out
    (project / "test_bad.py").write_text("def test_wrong(): pass\n")
    assert run_tests.main(["--only", "bad"]) == 0
    assert "FAILED" not in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_a_stop_ends_the_running_stage_and_starts_no_other(project, number):
    """A terminal sends Ctrl-C to the whole group, and ``kill`` SIGTERM to one process."""
    os.mkfifo("started")
    waits = "def test_waits():\n    with open('started', 'w'): pass\n    signal.pause()\n"
    (project / "test_bad.py").write_text("import signal\n\n" + waits)
    (project / "test_broken.py").write_text("")
    program = (
        "import sys; from tools import run_tests; from tools.run_tests import Stage\n"
        "run_tests.STAGES = [Stage(name, 'not nothing', paths=(f'test_{name}.py',), workers=None)"
        " for name in ('bad', 'good')]\n"
        "sys.exit(run_tests.main([]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    with open("started"):  # opens when the test has started
        pass
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    printed, _ = process.communicate()
    assert process.returncode == run_tests.INTERRUPTED
    assert printed.endswith("stopped in stage bad\n")
    assert "== good" not in printed
