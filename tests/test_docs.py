"""Generated pages match the code; launch scripts and tracked paths follow the rules.

Commands, code and links of the documents: tests/docs.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from pst_ds.cli.main import main
from pst_ds.config.targets import TARGETS
from tools.docs import run_file, scaling

ROOT = Path(__file__).resolve().parent.parent


def test_the_settings_page_is_the_codes():
    schema = run_file.schema()
    for path, code in ((run_file.PAGE, run_file.page(schema)), (run_file.SCHEMA, json.dumps(schema, indent=1) + "\n")):
        assert path.read_text(encoding="utf-8") == code, "run python -m tools.docs.run_file"


def test_the_page_on_smaller_models_has_every_target():
    page = (ROOT / "docs/how-to/shapes.md").read_text(encoding="utf-8")
    table = page.partition("| your target |")[2].partition("\n\n")[0]
    targets = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    named = {name for cell in targets for name in re.findall(r"`(.+?)`", cell)}
    assert named == {*TARGETS}


@pytest.mark.thorough
def test_the_tables_of_large_models_are_what_is_planned():
    written = scaling.PAGE.read_text(encoding="utf-8")
    assert {*re.findall(r"<!-- table: (\w+) -->\n\n\|", written)} == {*scaling.TABLES}
    assert written == scaling.page(written), "run python -m tools.docs.scaling"


@pytest.mark.few(1)
@pytest.mark.parametrize(("model", "gpus"), [("7B", 8), ("70B", 512)])
def test_a_row_of_large_models_is_what_the_command_says(capsys, tmp_path, model, gpus):
    run = scaling.write_run(tmp_path, model, gpus)
    arguments = ["plan", str(run), "--json", "--no-data", "--ranks", str(gpus), "--machine", "h100"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    memory, time = plan["memory_bytes_per_rank"], plan["time"]
    page = scaling.PAGE.read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {model} \| {gpus} \| (.*) \|$", page, flags=re.M)
    cells = [float(cell) for cell in row.split("|")]
    finer = [memory[part] / 1e9 for part in ("weights", "copies", "gathers", "activations", "peak")]
    finer += [time["step"], time["step_host"], time["over_full"]]
    rough = [time["step_received"] / 1e9, time["step_between_nodes"] / 1e9, time["update"] * 1e3]  # one decimal
    assert [*cells[:5], *cells[7:9], cells[10]] == pytest.approx(finer, rel=0.01, abs=0.005)
    assert [*cells[5:7], cells[9]] == pytest.approx(rough, rel=0.01, abs=0.051)


@pytest.mark.thorough
def test_with_kernels_a_step_and_an_update_are_predicted_to_take_little_more_than_full_fine_tuning():
    times = scaling.times_of_machines()
    assert all(times[name].over_full <= 1.05 for name in ("h100", "h200", "b200", "a100"))
    assert times["mi300x"].over_full > 1.1  # no kernels there


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
