"""``python -m tools.gpu``: measure one GPU, and write runs/gpu.json and a table with the plan's predictions.

Takes at most ten minutes: sections that would start after eight are skipped, which the table says. ``--device cpu``
runs every section at tiny sizes, to test the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pst_ds.atomic_files import write_text_atomic
from pst_ds.planning.machines import MACHINES
from tools.gpu.sections import SECTIONS, TINY, Bench, Sizes, machine_of_card

LAST_START = 480.0
"""Seconds after which no section starts."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            f"tools.gpu: torch {torch.__version__} finds no GPU on this machine; run this on one, or with --device cpu "
            "for a dry run at tiny sizes\n"
        )
        return 2
    found = measured(args.device, args.sections)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(args.out, json.dumps(found, indent=1) + "\n")
    text = table(found)
    write_text_atomic(args.out.with_suffix(".md"), text)
    print(text + f"{args.out} written")
    return int(any(row.get("rc") or row["measured"] is False for rows in found["sections"].values() for row in rows))


def measured(device: str, names: list[str]) -> dict[str, Any]:
    """Return the results of the sections ``names``, with their conditions."""
    is_dry = device == "cpu"
    card = "none: a dry run on the CPU" if is_dry else torch.cuda.get_device_name()
    machine = MACHINES["cpu"] if is_dry else machine_of_card(card)
    bench = Bench(torch.device(device), TINY if is_dry else Sizes(), machine)
    start, sections = time.monotonic(), {}
    for name in names:
        if time.monotonic() - start > LAST_START:
            sections[name] = [{"what": f"section {name}", "measured": None, "why": "out of time"}]
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        sections[name] = SECTIONS[name](bench)
    return {
        "card": card,
        "torch": torch.__version__,
        "predicted_for": machine.name,
        "seconds": time.monotonic() - start,
        "sections": sections,
    }


def table(found: dict[str, Any]) -> str:
    """Return the rows as Markdown for tools/quality/logs/performance.md."""
    lines = [f"{found['card']}, torch {found['torch']}; predicted for {found['predicted_for']}", ""]
    lines += ["| | measured | predicted |", "|---|---|---|"]
    for rows in found["sections"].values():
        lines += [f"| {row['what']} | {_cell(row)} | {_text(row.get('predicted'))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return _text(row["measured"]) if row["measured"] is not None else f"not measured: {row.get('why', 'no GPU')}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
