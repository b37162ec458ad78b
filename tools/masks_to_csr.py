"""Convert a pruned model to the packed format csr, for job scripts.

    python tools/masks_to_csr.py SRC OUT [OPTION ...]

SRC is a run folder, a run file or a pruned model folder; OUT is written atomically. The same as ``pst-ds export SRC
--format csr --out OUT``, with its options and exit codes: 0 done, 1 failed, 2 wrong input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pst_ds.cli.main import main as pst_ds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", metavar="SRC", help="run folder, run file, or model folder with pruned weights")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    args, options = parser.parse_known_args(argv)
    return pst_ds(["export", args.source, "--out", args.out, "--format", "csr", *options])


if __name__ == "__main__":
    sys.exit(main())
