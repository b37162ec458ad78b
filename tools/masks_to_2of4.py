"""Turn the zeros of a pruned model into the packed format 2:4, for job scripts.

    python tools/masks_to_2of4.py SRC OUT [--processes 4] [--json]

SRC is a run folder, a run file or a model folder with zeros in it; OUT is written whole or not at all. It is
``pst-ds export SRC --format 2:4 --out OUT``, with its exit codes: 0 done, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

FORMAT = "2:4"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", metavar="SRC", help="run folder, run file, or model folder with zeros in it")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--processes", default="1", metavar="N", help="processes to write with (default: 1)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line of stdout")
    args = parser.parse_args(argv)
    from pst_ds.cli.main import main as pst_ds

    options = ["--format", FORMAT, "--out", args.out, "--processes", args.processes]
    return pst_ds(["export", args.source, *options, *(["--json"] if args.json else [])])


if __name__ == "__main__":
    sys.exit(main())
