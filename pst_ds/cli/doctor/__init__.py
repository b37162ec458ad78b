"""``pst-ds doctor``: check whether this machine can train; every line is ok, a warning or a failure with its fix."""

import argparse
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from pst_ds.cli.main import above


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default=".", metavar="DIR", help="folder of future runs (default: here)")
    limit = "limit for compiling, and for the ranks to connect (default: 180)"
    parser.add_argument("--time-limit", type=above(0), default=180.0, metavar="SECONDS", help=limit)


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.cli.doctor import checks, processes

    findings = []
    for finding in chain(
        checks.versions(),
        checks.accelerator(),
        processes.native_code(args.time_limit),
        processes.two_ranks(args.time_limit),
        checks.folder(Path(args.folder)),
        checks.shared_memory(),
        checks.threads(),
    ):
        findings.append(finding)
        print(f"{finding.status:<6}{finding.name}: {finding.text}", flush=True)
        if finding.fix:
            print(f"      fix: {finding.fix}", flush=True)
    counts = {status: sum(f.status == status for f in findings) for status in ("ok", "warn", "fail")}
    print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    return {"findings": [asdict(f) for f in findings], **counts, "exit_code": 1 if counts["fail"] else 0}
