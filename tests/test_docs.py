"""What the documents say is so: commands parse, files exist, the settings page is the code's."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pst_ds.cli.main import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def test_the_readme_has_commands():
    assert len(_commands()) >= 6


@pytest.mark.parametrize("command", _commands())
def test_every_readme_command_parses(command):
    words = shlex.split(command)
    if words[0] == "deepspeed":
        assert words[words.index("--module") + 1] == "pst_ds"
        words = ["pst-ds", *words[words.index("--module") + 2 :]]
    if words[0] == "make":
        known = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, check=False)
        assert known.returncode == 0, known.stderr
    elif words[0] == "pst-ds":
        verb = next(word for word in words[1:] if not word.startswith("-"))
        build_parser(verb).parse_args(words[1:])
    elif words[0].endswith(".sh") or words[0] == "sbatch":
        script, *arguments = words[1:] if words[0] == "sbatch" else words
        assert (ROOT / script).is_file()
        option = {"launch/local.sh": "--ranks", "launch/multinode.sh": "--hostfile"}.get(script)
        first = {"launch/slurm_array.sbatch": 1}.get(script, 2 if option else 0)
        assert option in (None, arguments[0])
        build_parser("train").parse_args(["train", *arguments[first:]])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("pip", "git", "cd"), command


def test_every_local_link_of_the_readme_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_tree_in_the_readme_names_what_is_there():
    tree = re.search(r"```text\n(.*?)```", README, flags=re.S)
    assert tree is not None
    for line in tree[1].splitlines():
        path = line.split()[0] if line.split() else ""
        if path:
            assert (ROOT / path).exists(), path


def _tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_is_the_codes():
    written = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    assert written == _tool("make_run_file_docs").page() + "\n", "run tools/make_run_file_docs.py"


def test_the_tables_of_the_scaling_page_are_the_formulas():
    written, tool = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), _tool("make_scaling_docs")
    assert written == tool.page(written), "run tools/make_scaling_docs.py"
    for name, table in tool.TABLES.items():
        assert f"<!-- table: {name} -->\n\n{table()}\n" in written


def test_launch_scripts_are_short_and_pass_bash():
    for script in (ROOT / "launch").glob("*.sh"):
        assert len(script.read_text().splitlines()) <= 40, script
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_tracked_files_hold_no_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".sh", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"(^|[^A-Za-z0-9_.])/(home|root)/[a-z]", text), name
