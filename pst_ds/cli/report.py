"""``pst-ds report RUN ...``: one HTML page about runs, with curves, heat maps and tables; needs no network."""

import argparse
import sys
from pathlib import Path

from pst_ds.atomic_files import require_writable, write_bytes_atomic
from pst_ds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are shown side by side")
    parser.add_argument("--out", metavar="FILE", help="HTML file to write (default: report.html in the first run)")
    parser.add_argument("--export", nargs="+", default=[], metavar="DIR", help="exports that are in none of the runs")
    parser.add_argument("--bench", nargs="+", default=[], metavar="FILE", help="what pst-ds bench --json printed")
    parser.add_argument("--verified", nargs="+", default=[], metavar="FILE", help="what pst-ds verify --json printed")


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.report.outcomes import bench_tables, export_table, find_exports, verification_table
    from pst_ds.report.page import page
    from pst_ds.report.run_data import read_runs
    from pst_ds.report.tables import checkpoint_table, straggler_table
    from pst_ds.report.tuning import tuning_tables

    runs = read_runs([Path(name) for name in args.runs])
    exports, notes = find_exports(runs, [Path(name) for name in args.export])
    for note in notes:
        print(f"pst-ds report: {note}", file=sys.stderr)
    verified = verification_table([Path(name) for name in args.verified])
    saved = [table for table in (checkpoint_table(runs), export_table(exports, notes), verified) if table]
    speed = list(bench_tables([Path(name) for name in args.bench]))
    slow = [table for table in (straggler_table(runs),) if table]
    outcomes = [("Tuning", list(tuning_tables(runs))), ("Checkpoints and exports", saved), ("Speed", speed)]
    outcomes.insert(0, ("Stragglers", slow))
    data = page(runs, exports, outcomes).encode(errors="replace")  # names of folders may be of any bytes
    out = Path(args.out) if args.out else Path(args.runs[0]) / "report.html"
    require_writable(out, f"--out {str(out)!r}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(out, data)
    except BrokenPipeError:  # --out /dev/stdout, whose reader has gone
        raise
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written: {error}; name an HTML file to write") from None
    print(f"wrote {out}: {', '.join(run.name for run in runs)}; {len(data):,} bytes")
    names = {"runs": [run.name for run in runs], "exports": [export.name for export in exports]}
    return {"out": str(out), "bytes": len(data), **names}
