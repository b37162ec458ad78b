"""``pst-ds doctor``: check whether this machine can train; every line is ok, a warning or a failure with its fix."""

import argparse
from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from pst_ds.cli.main import above


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pst-ds doctor``."""
    parser.add_argument("--folder", default=".", metavar="DIR", help="folder of future runs (default: here)")
    # generous, because a busy machine compiles and imports torch slowly
    limit = "limit for compiling, and for the ranks to connect (default: 180)"
    parser.add_argument("--time-limit", type=above(0), default=180.0, metavar="SECONDS", help=limit)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Print every finding, and return them with their counts. The exit code is 1 if a check fails."""
    # imported here, because they import torch, and --help must not wait for it
    from pst_ds.cli.doctor import checks, processes

    # quick checks of what the slow ones need come first
    findings_in_turn = chain(
        checks.versions(),
        checks.accelerator(),
        processes.native_code(args.time_limit),
        processes.two_ranks(args.time_limit),
        checks.folder(Path(args.folder)),
        checks.shared_memory(),
        checks.threads(),
    )
    findings = []
    counts = Counter(ok=0, warn=0, fail=0)
    for finding in findings_in_turn:
        findings.append(asdict(finding))
        counts[finding.status] += 1
        # at once, because the next check may take minutes
        print(f"{finding.status:<6}{finding.name}: {finding.text}", flush=True)
        if finding.fix:
            print(f"      fix: {finding.fix}", flush=True)
    print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    return {"findings": findings, **counts, "exit_code": 1 if counts["fail"] else 0}
