"""``pst-ds doctor``: whether this machine can train, and what to fix; every line is ok, a warning or a failure."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=".", metavar="DIR", help="where runs will be written (default: here)")
    parser.add_argument(
        "--time-limit", type=_seconds, default=180.0, metavar="SECONDS",
        help="for compiling, and for the ranks to meet (default: 180)",
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pst_ds.cli.doctor import checks as doctor_checks
    from pst_ds.cli.doctor import processes as doctor_processes

    checks = (
        doctor_checks.versions,
        doctor_checks.accelerator,
        lambda: doctor_processes.native_code(args.time_limit),
        lambda: doctor_processes.two_ranks(args.time_limit),
        lambda: doctor_checks.folder(Path(args.folder)),
        doctor_checks.shared_memory,
        doctor_checks.threads,
    )
    findings = []
    for check in checks:
        for finding in check():
            findings.append(finding)
            print(f"{finding.status:<6}{finding.name}: {finding.text}", flush=True)
            if finding.fix:
                print(f"      fix: {finding.fix}", flush=True)
    counts = {status: sum(f.status == status for f in findings) for status in ("ok", "warn", "fail")}
    print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    return {"findings": [asdict(f) for f in findings], **counts, "exit_code": 1 if counts["fail"] else 0}
