"""Exports in a report."""

from __future__ import annotations

import json

import pytest

from pst_ds.errors import InputError
from pst_ds.report.exports import find_exports, read_export
from pst_ds.report.run_data import read_runs


@pytest.fixture
def export():
    """Writes the manifest of an export whose file has 40 bytes."""

    def write(folder, **more):
        folder.mkdir()
        about = {"kind": "dense", "step": 9, "sparsity_requested": 0.75, "sparsity_measured": 0.74, "file_bytes": 40}
        (folder / "pst_manifest.json").write_text(json.dumps({**about, "dense_bf16_bytes": 40, **more}))
        return folder

    return write


def test_exports_in_the_run_and_elsewhere_have_their_sizes(write_run, export, tmp_path):
    run = write_run()
    inside = export(run / "export")
    quantised = {"kind": "bitmask", "values": "int4", "embeddings": "int8", "largest_rounding_error": 0.0912}
    outside = export(tmp_path / "other", **quantised)
    found, notes = find_exports(read_runs([run]), [outside, inside])
    assert notes == []
    assert list(found) == ["mine/export", str(outside)]
    assert found["mine/export"] == {
        "format": "dense",
        "step": 9,
        "sparsity requested": 0.75,
        "measured": 0.74,
        "weight files": "40 bytes",
        "of dense bf16": "1.000",
        "bits per weight": "16.00",
        "largest quantisation error": None,
    }
    assert found[str(outside)]["format"] == "bitmask int4 int8"
    assert found[str(outside)]["largest quantisation error"] == "9.12%"


@pytest.mark.parametrize("content", ['{"kind": "dense", "tens', "", "[]", "\\u00ff"])
def test_what_is_no_whole_export_in_a_run_is_left_out_with_a_note(write_run, export, content):
    run = write_run()
    for name in ("export", "export.partial", "half"):
        export(run / name)
    (run / "half" / "pst_manifest.json").write_text(content)
    found, (note,) = find_exports(read_runs([run]), [])
    assert list(found) == ["mine/export"]
    assert str(run / "half" / "pst_manifest.json") in note
    assert note.startswith("mine/half is omitted: ")
    with pytest.raises(InputError, match=r"pst_manifest\.json is damaged"):
        find_exports(read_runs([run]), [run / "half"])


@pytest.mark.parametrize(
    "content", ["{}", '{"kind"', '{"file_bytes": "many", "dense_bf16_bytes": 3}', '{"tensors": 3}']
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    with pytest.raises(InputError, match=r"is not an export: pst_manifest\.json is missing"):
        read_export(tmp_path)
    (tmp_path / "pst_manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"pst_manifest\.json is damaged: .*\. Run pst-ds verify for details"):
        read_export(tmp_path)
