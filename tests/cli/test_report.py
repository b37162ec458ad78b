"""``pst-ds report`` on a run that was really trained and exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pst_ds.cli.main import main
from pst_ds.text_table import bytes_text

ROOT = Path(__file__).resolve().parents[2]


def test_a_trained_run_has_its_curves_layers_and_exports(folders, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    exports = [str(folders / name) for name in ("dense", "bitmask")]
    arguments = ["report", str(folders / "run"), "--out", str(out), "--json"]
    capsys.readouterr()
    assert main([*arguments, "--export", *exports]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"out": str(out), "bytes": out.stat().st_size, "runs": ["run"], "exports": exports}
    text = out.read_text(encoding="utf-8")
    for title in ("Loss", "Sparsity", "Flip rate", "Correlation of S with |W|", "Learning rates", "Evaluation: loss"):
        assert f"<figcaption>{title}</figcaption>" in text
    layers = json.loads((folders / "run" / "layers.jsonl").read_text().partition("\n")[0])["layers"]
    assert all(f"<th>{name}</th>" in text for name in layers)
    assert bytes_text((folders / "bitmask" / "pst_bitmask.safetensors").stat().st_size) in text


def test_half_an_export_in_the_run_is_said_and_left_out(copied, tmp_path, capsys):
    run = copied("run")
    (run / "half").mkdir()
    (run / "half" / "pst_manifest.json").write_text('{"kind": "den')
    capsys.readouterr()
    assert main(["report", str(run), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["exports"] == []
    (line,) = said.err.splitlines()
    assert line.startswith("pst-ds report: run/half is omitted: ")


def test_the_page_goes_into_the_first_run_unless_it_is_told_where(copied, folders):
    run = copied("run")
    assert main(["report", str(run), str(folders / "run")]) == 0
    assert "2 runs" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["no/such"], ["'no/such' is not a run folder: run.toml is missing", "looked in", "output_dir"]),
        (["{run}", "--export", "{run}"], ["is not an export: pst_manifest.json is missing"]),
        (["{run}", "--out", "{run}"], ["--out", "cannot be written", "Name an HTML file"]),
    ],
)
def test_what_cannot_be_reported_is_one_message_and_2(folders, capsys, arguments, parts):
    capsys.readouterr()
    assert main(["report", *(word.format(run=folders / "run") for word in arguments)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("pst-ds report: InputError: ")
    assert all(part in line for part in parts)
    assert said.out == ""


def test_it_needs_no_torch(folders, tmp_path):
    script = f"""
import sys
from pst_ds.cli.main import main
from pst_ds.text_table import bytes_text
assert main(["report", {str(folders / "run")!r}, "--out", {str(tmp_path / "page.html")!r}]) == 0
print(sorted({{"torch", "transformers", "deepspeed", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout.endswith("[]\n")
