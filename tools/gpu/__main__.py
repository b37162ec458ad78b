"""``python -m tools.gpu``: check and measure one GPU, and write runs/gpu.json and a table with the plan's predictions.

Every section runs in a process with a time limit, and its rows are written when it ends, however it ends. Takes at most
ten minutes: sections that would start after eight are skipped. ``--only`` runs some and keeps earlier rows of the
others. ``--device cpu`` is a dry run of all sections at tiny sizes, to test the code.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pst_ds.atomic_files import write_text_atomic
from pst_ds.errors import first_line

ROOT = Path(__file__).resolve().parents[2]
LAST_START, END = 480.0, 600.0
"""Seconds after which no section starts, and after which none runs."""


@dataclass(frozen=True)
class Section:
    """A function of this package that yields rows."""

    module: str
    limit: float
    """Seconds after which it is killed."""
    interpreted: bool = False
    """True if Triton's interpreter stands in for the device in a dry run."""


SECTIONS = {
    "driver": Section("cards", 90),
    "smoke": Section("checks", 90, interpreted=True),
    "bits": Section("checks", 120, interpreted=True),
    "merge": Section("checks", 90, interpreted=True),
    "train": Section("checks", 180),
    "kernels": Section("timings", 90),
    "steps": Section("timings", 120),
    "deepspeed": Section("timings", 150),
    "updates": Section("timings", 90),
    "decode": Section("timings", 90),
    "tests": Section("checks", 240),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    only = "sections to run; driver always does"
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS), help=only)
    parser.add_argument("--section", choices=tuple(SECTIONS), help="run a section here, and print a row per line")
    args = parser.parse_args(arguments)
    if args.section:
        return print_rows(args.section, args.device)
    return measure(args.device, args.out, [name for name in SECTIONS if name == "driver" or name in args.only])


def print_rows(name: str, device: str) -> int:
    """Run a section in this process; standard output has rows only, and the last line of an error says what failed."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to it
    if device == "cpu" and SECTIONS[name].interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import torch

        from tools.gpu.bench import TINY, Bench, Sizes

        bench = Bench(torch.device(device), TINY if device == "cpu" else Sizes())
        for row in getattr(import_module(f"tools.gpu.{SECTIONS[name].module}"), name)(bench):
            print(json.dumps(row), file=out, flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)  # CUDA's messages end with advice
        return 1
    return 0


def measure(device: str, out: Path, names: list[str]) -> int:
    """Run sections and write their results to ``out`` and a table next to it. Return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no section outlives its job
    start, failed, found = time.monotonic(), False, dict[str, Any]()
    for name in names:
        seconds = time.monotonic() - start
        if name != "driver" and seconds > LAST_START:
            rows = [{"what": f"section {name}", "measured": None, "why": f"out of time: make gpu ONLY={name}"}]
            found["sections"].setdefault(name, rows)
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            log = out.with_suffix("") / f"{name}.log"
            rows = rows_of(name, device, min(SECTIONS[name].limit, END - seconds), log)
            failed |= any(row["measured"] is False for row in rows)
            if name == "driver":
                if problems := [row["why"] for row in rows if row["what"] == "driver" and row["measured"] is False]:
                    print(f"tools.gpu: {problems[0]}", file=sys.stderr)
                    return 2
                found = _with_earlier(out, rows)
            found["sections"][name] = rows
        _write(out, found)
    print(table(found) + f"{out} written, logs in {out.with_suffix('')}")
    return int(failed)


def rows_of(name: str, device: str, limit: float, log: Path) -> list[dict[str, Any]]:
    """Run a section in a process of at most ``limit`` seconds; return its rows, and one with the reason if it failed.

    ``log``: file for its standard error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", errors="replace") as out, log.open("w") as errors:
        child = subprocess.Popen(command(name, device), stdout=out, stderr=errors, cwd=ROOT, start_new_session=True)
        try:
            reason = _reason(child.wait(limit))
        except subprocess.TimeoutExpired:
            reason = f"still running after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # it and what it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(0)
        rows, garbage = _parsed(out.read())
    reason = reason or garbage or ("" if rows else "no rows")
    if reason:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        rows.append({"what": f"section {name}", "measured": False, "why": ": ".join([reason, *said[-1:]])})
    return rows


def command(name: str, device: str) -> list[str]:
    return [sys.executable, "-m", "tools.gpu", "--section", name, "--device", device]


def _reason(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else ""


def _parsed(text: str) -> tuple[list[dict[str, Any]], str]:
    """Return the rows in ``text``, and what is wrong with the first line that is not a row."""
    rows, garbage = [], ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and {"what", "measured"} <= row.keys():
            rows.append(row)
        else:
            garbage = garbage or f"{line[:80]!r} instead of a row"
    return rows, garbage


def _with_earlier(out: Path, driver: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results in ``out`` if they are of this card and torch; other ones move to a file ending in .old."""
    facts = {row["what"]: row["measured"] for row in driver}
    predictions = facts.get("predictions", "unknown")
    found = {"card": facts.get("card", "unknown"), "torch": version("torch"), "predicted_for": predictions}
    earlier: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        earlier = json.loads(out.read_text(encoding="utf-8"))
    if all(earlier.get(key) == value for key, value in found.items()):
        return earlier
    if out.exists():
        out.replace(f"{out}.old")
    return found | {"sections": {}}


def _write(out: Path, found: dict[str, Any]) -> None:
    found["sections"] = {name: found["sections"][name] for name in SECTIONS if name in found["sections"]}
    write_text_atomic(out, json.dumps(found, indent=1) + "\n")
    write_text_atomic(out.with_suffix(".md"), table(found))


def table(found: dict[str, Any]) -> str:
    """Return the rows as Markdown for tools/quality/logs/performance.md."""
    lines = [f"{found['card']}, torch {found['torch']}; predicted for {found['predicted_for']}", ""]
    lines += ["| | measured | predicted |", "|---|---|---|"]
    for rows in found["sections"].values():
        lines += [f"| {row['what']} | {_cell(row)} | {_text(row.get('predicted'))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    if row["measured"] is None:
        return f"not measured: {row.get('why', 'no GPU')}"
    why = row.get("why") if row["measured"] is False else None
    return _text(row["measured"]) + (f": {why.replace('|', '/')}" if why else "")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
