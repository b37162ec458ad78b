"""Every wrong input ends with exit code 2 and one message that names the place, the value and the fix, and changes
nothing on disk: in one process, on two ranks of which the first alone speaks, and under the real launcher."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from pst_ds.cli.main import main
from tools.cluster.processes import environment, free_ports

from .workshop import Workshop, Wrong
from .wrong_data import DATA
from .wrong_deepspeed import DEEPSPEED
from .wrong_folders import EXPORTS, RUNS
from .wrong_grids import GRIDS
from .wrong_models import MODELS
from .wrong_settings import COMMAND_LINES, SETTINGS
from .wrong_tokens import TOKENS
from .wrong_verbs import VERBS

CASES: dict[str, Wrong] = SETTINGS | COMMAND_LINES | DATA | TOKENS | MODELS | DEEPSPEED | RUNS | EXPORTS | VERBS | GRIDS
OF_RANKS = {
    name: wrong for name, wrong in (SETTINGS | DATA | MODELS | DEEPSPEED | RUNS).items() if not wrong.environment
}
"""What every rank of a launcher can be given."""
ON_RANKS = "ds_configs/zero3_cpu.json"
END = "-- end\n"
WALK = f"""
import json, sys
from pst_ds.cli.main import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 2
    sys.stderr.write({END!r})
    sys.stderr.flush()
"""
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")


def contents(*folders: Path) -> dict[str, str]:
    """What every file and link below some folders holds, and which folders there are."""
    found = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def said_by(arguments: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a verb in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as ended:  # of argparse
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


def all_said_by(arguments: dict[str, list[str]]) -> dict[str, tuple[int, str, str]]:
    """:func:`said_by` of several, on a rank."""
    gc.collect()
    gc.freeze()
    said = {}
    for name, words in arguments.items():
        said[name] = said_by(words)
        gc.collect()  # transformers goes on with zero.Init while the DeepSpeed config of a failed run is alive
    return said


def workshops(cases: Iterable[str], tmp_path: Path, made: Path, deepspeed_config: str = "") -> dict[str, Workshop]:
    """A workshop for each case, in folders of their own."""
    shops = {name: Workshop(tmp_path / str(i), made, deepspeed_config) for i, name in enumerate(cases)}
    for shop in shops.values():
        shop.tmp.mkdir()
    return shops


def with_deepspeed(arguments: list[str]) -> list[str]:
    """The same for ranks: a run that was made in one process has no DeepSpeed config."""
    has_one = any(word.startswith("deepspeed_config=") for word in arguments)
    return arguments if has_one else [*arguments, "--set", f"deepspeed_config={ON_RANKS}"]


def require_one_message(wrong: Wrong, shop: Workshop, code: int, err: str) -> None:
    assert "Traceback" not in err, err
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("pst-ds")
    for part in (wrong.place, wrong.value, wrong.fix):
        assert shop.filled(part) in err


def skip_on_gpu(wrong: Wrong) -> None:
    import torch

    if wrong.without_gpu and torch.accelerator.is_available():
        pytest.skip("is right where there is a GPU")


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_2_and_one_message_and_nothing_is_written(name, made, tmp_path, monkeypatch):
    wrong, shop = CASES[name], Workshop(tmp_path, made)
    skip_on_gpu(wrong)
    for key in LAUNCHER:
        monkeypatch.delenv(key, raising=False)
    for key, value in wrong.environment.items():
        monkeypatch.setenv(key, value)
    arguments = wrong.arguments(shop)
    before = contents(tmp_path, made)
    code, out, err = said_by(arguments)
    require_one_message(wrong, shop, code, err)
    assert not out
    assert contents(tmp_path, made) == before


@pytest.mark.thorough
def test_libraries_add_nothing_to_it(made, tmp_path):
    """In a process of its own, where they are imported as a verb imports them."""
    cases = {name: wrong for name, wrong in (DATA | MODELS).items() if not wrong.environment}
    shops = workshops(cases, tmp_path, made)
    arguments = [wrong.arguments(shops[name]) for name, wrong in cases.items()]
    done = subprocess.run(
        [sys.executable, "-c", WALK, json.dumps(arguments)],
        env=environment(), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout == ""
    for (name, wrong), err in zip(cases.items(), done.stderr.split(END)[:-1], strict=True):
        require_one_message(wrong, shops[name], 2, err)


@pytest.mark.zero3
def test_on_two_ranks_all_end_with_2_and_the_first_alone_speaks(made, tmp_path, run_ranks):
    shops = workshops(OF_RANKS, tmp_path, made, ON_RANKS)
    arguments = {name: with_deepspeed(wrong.arguments(shops[name])) for name, wrong in OF_RANKS.items()}
    before = contents(tmp_path, made)
    first, second = run_ranks(all_said_by, 2, arguments)
    for name, wrong in OF_RANKS.items():
        code, _, err = first[name]
        require_one_message(wrong, shops[name], code, err)
        assert second[name] == (2, "", ""), name
    ranks = next(tmp_path.glob("ranks-*"))  # where the two met
    assert {path: held for path, held in contents(tmp_path, made).items() if not path.startswith(str(ranks))} == before


@pytest.mark.launcher
@pytest.mark.parametrize("name", ["an unknown option", "a head of another size"])
@pytest.mark.few(1)
def test_under_the_launcher_there_is_one_message_and_exit_code_2(name, made, tmp_path):
    wrong, shop = CASES[name], Workshop(tmp_path, made, ON_RANKS)
    arguments = wrong.arguments(shop)
    if arguments[0] == "train":
        arguments = with_deepspeed(arguments)
    before = contents(tmp_path, made)
    port = str(free_ports(1)[0])
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", port, "--module", "pst_ds", *arguments]
    env = environment(MASTER_PORT=port)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    ours = [line for line in done.stderr.splitlines() if line.startswith("pst-ds")]
    assert "Traceback" not in done.stderr, done.stderr
    require_one_message(wrong, shop, done.returncode, "\n".join(ours))
    assert contents(tmp_path, made) == before
