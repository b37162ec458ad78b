"""``make gpu``: a dry run on the CPU goes through every section; without a card it says so and ends with 2."""

from __future__ import annotations

import json

import pytest
import torch

from pst_ds.planning.machines import MACHINES
from tools.gpu.__main__ import main, table
from tools.gpu.sections import SECTIONS, machine_of_card


def test_a_dry_run_goes_through_every_section(tmp_path, capsys):
    out = tmp_path / "runs" / "gpu.json"
    assert main(["--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found["sections"]) == list(SECTIONS)
    rows = {row["what"]: row for rows in found["sections"].values() for row in rows}
    assert all(rows[what]["measured"] is True for what in rows if what.startswith("masks of"))
    timed = [row for what, row in rows.items() if what.endswith((" ms", " us"))]
    assert len(timed) == 3 + 3 + 2
    assert all(row["measured"] > 0 for row in timed)
    assert all(row["predicted"] > 0 for row in timed if "lora" not in row["what"])
    written = out.with_suffix(".md").read_text()
    assert written == table(found)
    assert written in capsys.readouterr().out
    assert "| 1 x, dense / int4 bitmask at 90% |" in written
    assert "| peak memory, pst, GB | not measured: no GPU |" in written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_card_it_is_one_message_and_2(capsys, tmp_path):
    assert main(["--out", str(tmp_path / "gpu.json")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "finds no GPU" in told
    assert not (tmp_path / "gpu.json").exists()


def test_a_card_has_its_own_rates():
    assert machine_of_card("NVIDIA H200") is MACHINES["h200"]
    assert machine_of_card("NVIDIA A100-SXM4-80GB") is MACHINES["a100"]
    assert machine_of_card("NVIDIA L40S") is MACHINES["h100"]
