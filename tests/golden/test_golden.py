"""Three tiny runs, step by step, against the figures recorded beside them.

A change that moves a figure must mean to, and say why in its commit message. Record the new figures with
``python tests/golden/test_golden.py``. Sparsities are exact. Losses may differ in their last digits, which depend on
the processor, and masks are held to the bit as long as the losses are: after that a near-tie may fall the other way.
(With AVX-512, AVX2, SSE4.1 and MKL's compatible mode losses differed by at most 5e-7, and no mask did.)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
RUNS = ("encoder", "causal", "two_of_four")
LOSS_TOLERANCE = 1e-4


def figures_of(run: str, folder: Path) -> list[dict[str, Any]]:
    """Train ``run`` in this process; its lines of metrics.jsonl that hold a loss or a mask checksum."""
    from pst_ds.cli.main import main

    arguments = ["train", str(FOLDER / f"{run}.toml"), "--quiet", "--set", f"output_dir={folder}"]
    assert main(arguments) == 0
    keep = ("step", "event", "loss", "sparsity/actual", "mask_checksum")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {name: line[name] for name in keep if name in line}
        for line in lines
        if line["event"] in ("step", "mask_update")
    ]


def recorded(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{run}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_masks_are_those_recorded(run, tmp_path):
    same_bits = True
    for expected, found in zip(recorded(run), figures_of(run, tmp_path), strict=True):
        loss, expected_loss = found.pop("loss", None), expected.pop("loss", None)
        same_bits = same_bits and loss == expected_loss
        if expected_loss is not None:
            assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
        if not same_bits:
            for line in (found, expected):
                line.pop("mask_checksum", None)
        assert found == expected


@pytest.mark.parametrize("run", RUNS)
def test_the_records_are_worth_comparing(run):
    """Each has several different masks, and ends at the sparsity that it was asked for."""
    checksums = [line["mask_checksum"] for line in recorded(run) if "mask_checksum" in line]
    assert len(set(checksums)) == len(checksums) >= 5
    assert recorded(run)[-1]["sparsity/actual"] >= 0.5


if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        with tempfile.TemporaryDirectory() as scratch:
            lines = [json.dumps(line) + "\n" for line in figures_of(name, Path(scratch))]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
