"""The gates and the release agree: CI runs `make check`, pins lie in their ranges, one version stands everywhere."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pst_ds import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(*extras: str) -> list[Requirement]:
    """Requirements of the package and of ``extras``, those of extras named in extras included."""
    found = [Requirement(text) for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    inner = [r for own in found if own.name == "pst-ds" for r in requirements(*own.extras)]
    return [Requirement(text) for text in PROJECT["dependencies"]] + [r for r in found if r.name != "pst-ds"] + inner


def pins() -> dict[str, Version]:
    lines = [line for line in read(".ci/constraints.txt").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_every_requirement_of_a_check_is_pinned_within_its_range():
    pinned = pins()
    for requirement in requirements("dev"):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_pins_can_be_installed_anywhere():
    assert [name for name, version in pins().items() if version.local] == []


def test_every_requirement_has_a_floor():
    """The lowest versions are installed and tested as such; without a floor that would be the oldest release."""
    for requirement in requirements(*PROJECT["optional-dependencies"]):
        assert any(clause.operator == ">=" for clause in requirement.specifier), requirement


def test_garbage_collections_skip_what_collecting_the_tests_made():
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_ci_runs_the_checks_in_their_order():
    checks = re.search(r"^check: (.*)$", read("Makefile"), flags=re.M)
    made = re.findall(r"^make (.*)$", read(".ci/run"), flags=re.M)
    assert checks is not None
    assert " ".join(made) == checks[1]


def test_the_newest_versions_warn_and_do_not_decide():
    assert re.search(r"^timeout .*\d+ make test-newest \|\|$", read(".ci/run"), flags=re.M)
    jobs = yaml.safe_load(read(".github/workflows/checks.yml"))["jobs"].values()
    steps = [step for job in jobs for step in job["steps"] if "make test-newest" in step.get("run", "")]
    assert [step["continue-on-error"] for step in steps] == [True]


def test_make_installs_the_tested_set_again_when_it_changes(tmp_path):
    """``make --question`` exits with 0 if nothing is left to do."""
    constraints, stamp = tmp_path / ".ci/constraints.txt", tmp_path / ".venv/.installed"
    for path in (constraints, stamp):
        path.parent.mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    constraints.touch()

    def is_installed(*settings: str) -> bool:
        environment = {name: value for name, value in os.environ.items() if name not in ("CONSTRAINTS", "MAKEFLAGS")}
        command = ["make", "--question", "venv", *settings]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == 0

    assert not is_installed()
    stamp.write_text(".ci/constraints.txt\n")
    assert is_installed()
    assert not is_installed("CONSTRAINTS=")
    os.utime(constraints, (0, 2**31))
    assert not is_installed()
    stamp.write_text("\n")
    assert is_installed("CONSTRAINTS=")
    assert not is_installed()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_makes_what_there_is(workflow):
    targets = {name for line in re.findall(r"\bmake ([a-z- ]+)", read(str(workflow))) for name in line.split()}
    known = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.M))
    assert targets or workflow.name == "wheels.yml"
    assert targets <= known


def unpinned(workflow: str) -> list[str]:
    """Return the actions of a workflow without a commit, and what pip installs without a version."""
    uses = re.findall(r"\buses: *(\S+.*)", workflow)
    installs = re.findall(r"^\s*(?:run: )?(?:python -m )?pip install (.*)", workflow, flags=re.M)
    words = [word for line in installs for word in line.split() if not word.startswith("-")]
    return [
        *(action for action in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)),
        *(word for word in words if not re.fullmatch(r"[\w-]+==[\w.]+", word)),
    ]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_fetches_is_pinned(workflow):
    assert unpinned(read(str(workflow))) == []


def test_what_is_not_pinned_is_found():
    steps = (
        "- uses: a/b@v4\n- uses: a/b@{0}\n- uses: a/b@{0} # v4.0.1\n  run: pip install uv\n  pip install -q c==1.2\n"
    )
    assert unpinned(steps.format("0f" * 20)) == ["a/b@v4", f"a/b@{'0f' * 20}", "uv"]


def test_the_newest_release_is_this_version():
    headings = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"), flags=re.M)
    assert headings[0] == ("Unreleased", "")
    assert all(date for _, date in headings[1:])
    citation = read("CITATION.cff")
    number, date = headings[1]
    assert number == __version__
    assert f"\nversion: {number}\n" in citation
    assert f"\ndate-released: {date}\n" in citation
