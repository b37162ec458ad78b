"""``pst-ds report RUN ...``: one HTML page about runs, with curves and tables; needs no network."""

import argparse
import sys
from pathlib import Path

from pst_ds.atomic_files import require_writable, write_bytes_atomic
from pst_ds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder; several are shown side by side")
    add("--out", metavar="FILE", help="HTML file to write (default: report.html in the first run)")
    add("--export", nargs="+", default=[], metavar="DIR", help="exports outside the run folders")


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.report.exports import find_exports
    from pst_ds.report.page import page
    from pst_ds.report.run_data import read_runs

    runs = read_runs([Path(name) for name in args.runs])
    exports, notes = find_exports(runs, [Path(name) for name in args.export])
    for note in notes:
        print(f"pst-ds report: {note}", file=sys.stderr)
    data = page(runs, exports, notes).encode(errors="replace")  # folder names may contain any bytes
    names, out = [run.name for run in runs], Path(args.out) if args.out else Path(args.runs[0]) / "report.html"
    require_writable(out, f"--out {str(out)!r}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(out, data)
    except BrokenPipeError:  # --out /dev/stdout without a reader
        raise
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written: {error}. Name an HTML file") from None
    print(f"wrote {out}: {', '.join(names)}; {len(data):,} bytes")
    return {"out": str(out), "bytes": len(data), "runs": names, "exports": list(exports)}
